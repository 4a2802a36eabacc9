"""Anderson acceleration on an orthonormal basis, with restarts where its model has failed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fixpoint.solvers.base import Solver, gram_dtype, require_count
from fixpoint.solvers.history import PairHistory, recording, require_history_dtype
from fixpoint.solvers.small import NumPyArithmetic, Small, arithmetic

# A change of the residual is independent of the basis when at least this share of its length lies outside. Of less,
# much would be rounding, or tell that f is not linear here.
_NEW_SHARE = 0.01
# A row's model has failed when the residual is so many times the predicted one, beyond what a plain step does to it.
_SURPRISE = 10.0
# When the residual has fallen to this share, earlier failures are forgotten.
_RECOVERY = 0.1
# Without a memory given, a row's histories may take twice so many bytes, between so few and so many changes.
_BYTES, _LEAST, _MOST = 160 * 1024, 5, 20
# This share of the present |g|^2 is added to the predicted one, which rounding may bring to zero.
_NEGLIGIBLE = 1e-3


class _Guard(NamedTuple):
    """What decides whether a row's model is trusted, all ``(rows,)``.

    A model that fails costs the row plain steps: one at the first failure, twice as many at each further one.
    """

    bound: Small  # the last prediction of |g|^2, infinity after a plain step: the model must be able to repeat it
    growth: Small  # how many times the bound |g|^2 may be
    level: Small  # once |g|^2 is well below this, failures are forgotten
    penalty: Small  # number of plain steps that the next failure costs
    left: Small  # number of plain steps still to take

    @classmethod
    def start(cls, xp: NumPyArithmetic, first: Small, square: Small) -> _Guard:
        """From ``|g|^2`` at the start and after one plain step: that shows how much f may stretch a residual."""
        zero = xp.zeros_like(square)
        growth = _SURPRISE**2 * xp.maximum(square / first, zero + 1)
        return cls(zero + float("inf"), growth, xp.minimum(first, square), zero + 1, zero)

    def judge(self, xp: NumPyArithmetic, square: Small, predicted: Small) -> tuple[Small, _Guard]:
        """Which rows may trust their model, given ``|g|^2`` and the smallest ``|g|^2`` that the model promises.

        Two tests. The promise must not be larger than the last one, since the same differences are still there; it is
        larger if the one dropped in between was needed. And the residual must not be far larger than promised; it is
        if f bends. A row that fails a test takes plain steps. NaN fails.
        """
        trusted = xp.maximum(predicted, square / self.growth) <= self.bound
        recovery = _RECOVERY**2 * self.level
        if xp.holds(trusted & (square >= recovery) & (self.left == 0)):
            # Nearly every step is one of these.
            return trusted, _Guard(predicted + _NEGLIGIBLE * square, *self[1:])
        recovered = square < recovery
        penalty = xp.where(recovered, 1.0, self.penalty)
        due = ~trusted * penalty
        left = xp.maximum(self.left - 1, due)
        plain = left > 0
        bound = xp.where(plain, float("inf"), predicted + _NEGLIGIBLE * square)
        level = xp.where(recovered, square, self.level)
        return ~plain, _Guard(bound, self.growth, level, penalty + due, left)


class _Split(NamedTuple):
    """The residual ``g`` and its last change ``dg``, each split into a part along what is held and a part outside.

    Attributes:
        along, shared: Coefficients of g, and of dg, in the changes held ``(rows, count)``.
        held: Squared length of dg along each of them.
        inverse: That of the state, without the change that dg replaces.
        square, outside: Squared length of g ``(rows,)``, and of its part outside.
        fresh, cross: Squared length of the part of dg outside, and its product with that of g.
    """

    along: Small
    shared: Small
    held: Small
    inverse: Small
    square: Small
    outside: Small
    fresh: Small
    cross: Small

    @classmethod
    def of(cls, xp: NumPyArithmetic, coordinates: Small, squares: Small, inverse: Small) -> _Split:
        """From products of g and dg with the changes held ``(rows, 2, count)`` and with each other ``(rows, 2, 2)``.

        Where dg has too little outside, the change that it repeats most is no longer held.
        """
        along, rest = _projected(coordinates, squares, inverse)
        independent = rest[:, 1, 1] >= _NEW_SHARE**2 * squares[:, 1, 1]
        if not xp.holds(independent):
            held = along[:, 1] * coordinates[:, 1]
            repeated = held == xp.amax(held, 1)[:, None]
            inverse = xp.where(repeated & ~independent[:, None], 0, inverse)
            along, rest = _projected(coordinates, squares, inverse)
        held = along[:, 1] * coordinates[:, 1]
        return cls(
            along[:, 0], along[:, 1], held, inverse, squares[:, 0, 0], rest[:, 0, 0], rest[:, 1, 1], rest[:, 0, 1]
        )


def _projected(coordinates: Small, squares: Small, inverse: Small) -> tuple[Small, Small]:
    along = coordinates * inverse[:, None]
    return along, squares - along @ coordinates.swapaxes(1, 2)


def _products(x: Tensor) -> Tensor:
    """All products of the states ``x`` ``(rows, k, dim)`` of a row: ``(rows, k, k)``."""
    return torch.bmm(x, x.transpose(1, 2))


def _changes(z: Tensor, fz: Tensor, state: AndersonState) -> Tensor:
    """The residual, its change and the change of f since the last step ``(rows, 3, dim)``."""
    assert state.g is not None
    assert state.fz is not None
    if recording(z, fz, state.g, state.fz):
        g = fz - z
        return torch.stack((g, g - state.g, fz - state.fz), dim=1)
    work = fz.new_empty(len(fz), 3, fz.shape[1])
    g, change, image = work.unbind(1)
    torch.sub(fz, z, out=g)
    torch.sub(g, state.g, out=change)
    torch.sub(fz, state.fz, out=image)
    return work


class AndersonState(NamedTuple):
    """What a step remembers.

    Attributes:
        history: Changes of the residual, made orthogonal, and of f. There is room for one pair more than ``memory``: a
            step writes where its state does not read, so a state can be stepped from again.
        inverse: One over the squared length of each change of the residual; zero where none is held ``(rows, count)``.
        free: Where in the history each row has a free place: ``row * count + place`` ``(rows,)``.
        newest: Where the newest change is.
        g: The last residual.
        fz: The last image; None before the first step.
        first: ``|g|^2`` of the first residual ``(rows,)``, until there is a guard.
        guard: Whether the model of a row is trusted; None before the second step.
    """

    history: PairHistory
    inverse: Small
    free: Small
    newest: Small
    g: Tensor | None = None
    fz: Tensor | None = None
    first: Small = None
    guard: _Guard | None = None


@dataclass(frozen=True, kw_only=True)
class Anderson(Solver):
    """Anderson acceleration (type II), with restarts of single rows where it fails.

    ``g = f(z) - z`` is the residual. The last changes of ``g`` and of ``f`` are the columns of ``dG`` and ``dF``. They
    are a linear model of f, and a step goes where the model's residual is least: ``gamma = argmin |g - dG gamma|``,
    ``z_next = f(z) - dF gamma - (1 - damping) (g - dG gamma)``.

    Each new change is made orthogonal to the ``memory`` before it. So there is no system to solve and nothing to
    regularise, the scale of a problem plays no part, and on a linear symmetric map a short memory does what an
    unlimited one would.

    A model fails when the change that was dropped last was still needed, or when the residual is far from the predicted
    one. Its row then forgets it and takes a plain step, ``z_next = f(z)``; two at the next failure, then four, until
    the residual has fallen to a tenth. A row also takes a plain step where its own would go backwards,
    ``(z_next - z) . g <= 0``: it was drawn to a point that f repels from, such as a saddle of the likelihood in
    expectation-maximisation.

    Args:
        memory: Number of changes kept. Two states per row are held for each, and five more. 5 is enough for symmetric
            and for strongly contracting maps; 20 or 40 save evaluations on non-symmetric, slowly converging ones.
        damping: Mixing in (0, 1]; 1 trusts the accelerated step wholly.
        ridge: Tikhonov weight on the coefficients of the orthonormal basis: each is divided by ``1 + ridge``.
        history_dtype: Precision of the histories, such as ``torch.bfloat16`` to halve their memory; None takes the
            state's own.

    Raises:
        TypeError, ValueError: If an option is out of range.

    Source: D. G. Anderson, J. ACM 12 (1965); truncated Gram-Schmidt as in Tang et al., arXiv:2403.14961. The tests of
    the model and of the step, and the plain steps after a failure, are this project's own.

    Example:
        >>> import torch, fixpoint
        >>> sol = fixpoint.solve(torch.cos, torch.tensor(1.0), solver=fixpoint.Anderson(memory=3), rtol=1e-6)
        >>> bool(sol.converged), sol.nfev < 10
        (True, True)
    """

    memory: int | None = None
    damping: float = 1.0
    ridge: float = 0.0
    history_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        if self.memory is not None:
            require_count("memory", self.memory)
        if not 0 < self.damping <= 1:
            raise ValueError(f"damping must lie in (0, 1], found {self.damping}")
        if not self.ridge >= 0:
            raise ValueError(f"ridge must be at least 0, found {self.ridge}")
        require_history_dtype(self.history_dtype)

    def init(self, z: Tensor) -> AndersonState:
        rows, dim = z.shape
        kept = self.history_dtype or z.dtype
        allowed = _BYTES // max(dim * kept.itemsize, 1)
        count = 1 + (self.memory or min(max(allowed, _LEAST), _MOST))
        inverse = torch.zeros(rows, count, dtype=gram_dtype(z), device=z.device)
        lines = torch.arange(0, rows * count, count, device=z.device)
        xp = arithmetic(inverse)
        return AndersonState(PairHistory.empty(count, z, kept), xp.take(inverse), xp.take(lines), xp.take(lines))

    def step(self, z: Tensor, fz: Tensor, state: AndersonState) -> tuple[Tensor, AndersonState]:
        dtype, wide = fz.dtype, gram_dtype(fz)
        if dtype != wide:
            z, fz = z.to(wide), fz.to(wide)
        if state.fz is None:
            g = fz - z
            xp = arithmetic(g, kept=state.inverse)
            first = xp.detach(xp.take(_products(g[:, None])))[:, 0, 0]
            z_next = fz if self.damping == 1 else z + self.damping * g
            return z_next.to(dtype), state._replace(g=g, fz=fz, first=first)

        work = _changes(z, fz, state)
        g, both, change = work[:, :1], work[:, :2], work[:, 1:]
        coordinates, squares = state.history.dots(both), _products(both)
        xp = arithmetic(coordinates, squares, kept=state.inverse)
        inverse, lines, tiny = xp.own(state.inverse), xp.own(state.free), torch.finfo(wide).tiny
        with xp.quiet():
            split = _Split.of(xp, xp.take(coordinates), xp.take(squares), inverse)
            newest = split.cross / (split.fresh + tiny)
            square = xp.detach(split.square)
            guard = state.guard or _Guard.start(xp, xp.own(state.first), square)
            good, guard = guard.judge(xp, square, xp.detach(split.outside - newest * split.cross))
            weights = xp.put(split.along, lines, newest)
            if not xp.holds(good):
                weights = xp.where(good[:, None], weights, 0)
            if self.ridge > 0:
                weights = weights / (1 + self.ridge)
        by = xp.tensor(weights)
        history = state.history.put(xp.tensor(lines), state.history.subtract(change, xp.tensor(split.shared)))
        step = history.less_images(g, by)
        # The exact step s solves (I - J) s = g, so s . g = s . (I - J) s is positive wherever f does not expand. Where
        # it is not, the model aims at a point that f repels from: the row follows f instead, and forgets.
        ahead = xp.detach(xp.take(torch.bmm(step, g.transpose(1, 2))))[:, 0, 0] >= 0
        if self.damping < 1:
            step = step - (1 - self.damping) * history.less_changes(g, by)
        step = step[:, 0]
        z_next = step + z if recording(step, z) else step.add_(z)
        good = good & ahead
        with xp.quiet():
            inverse = xp.put(split.inverse, lines, 1 / (split.fresh + tiny))
            if not xp.holds(good):
                z_next = torch.where(xp.tensor(good)[:, None], z_next, fz)
                inverse = xp.where(good[:, None], inverse, 0)
                guard = guard._replace(bound=xp.where(good, guard.bound, float("inf")))
            # What the newest change had least of is the least needed, but for the two newest: its place is free now.
            needed = xp.put(xp.put(split.held, lines, float("inf")), xp.own(state.newest), float("inf"))
            free = xp.take(history.starts) + xp.argmin(needed)
            inverse = xp.put(inverse, free, 0)
        g = g[:, 0] if recording(g) else g[:, 0].clone()
        return z_next.to(dtype), AndersonState(history, inverse, free, lines, g, fz, None, guard)

    def forget(self, state: AndersonState, rows: Tensor) -> AndersonState:
        xp = arithmetic(kept=state.inverse)
        forgotten = xp.take(rows)
        guard = state.guard
        if guard is not None:  # two plain steps, for the next one finds a difference of two maps
            infinite = float("inf")
            guard = guard._replace(
                bound=xp.where(forgotten, infinite, guard.bound),
                level=xp.where(forgotten, infinite, guard.level),
                left=xp.where(forgotten, 2.0, guard.left),
            )
        return state._replace(inverse=xp.where(forgotten[:, None], 0, state.inverse), guard=guard)
