"""Anderson acceleration on an orthonormal basis, with restarts where its model has failed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fixpoint.solvers.base import Solver, gram_dtype, require_count
from fixpoint.solvers.history import History, recording, require_history_dtype
from fixpoint.solvers.small import NumPyArithmetic, Small, arithmetic

# A change of the residual is independent of the basis when at least this share of its length lies outside. Of less,
# much would be rounding, or tell that f is not linear here.
_NEW_SHARE = 0.01
# A row's model has failed when the residual is so many times the predicted one, beyond what a plain step does to it.
_SURPRISE = 10.0
# When the residual has fallen to this share, earlier failures are forgotten.
_RECOVERY = 0.1
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
    """The residual ``g`` and its last change ``dg``, each split into a part in the basis and one outside."""

    along: Small  # (rows, slots): coordinates of g in the basis
    shared: Small  # (rows, slots): coordinates of dg
    outside: Small  # (rows,): squared length of g outside
    fresh: Small  # (rows,): squared length of dg outside
    cross: Small  # (rows,): product of the two parts outside
    independent: Small  # (rows,): whether enough of dg is outside; where not, the basis is left out of all the others

    @classmethod
    def of(cls, xp: NumPyArithmetic, along: Small, before: Small, square: Small, product: Small, size: Small) -> _Split:
        """From coordinates of g and of the residual before, and from ``|g|^2``, ``g . dg`` and ``|dg|^2``."""
        shared = along - before
        inside = xp.products(along, shared)
        outside = square - xp.detach(inside[:, 0, 0])
        fresh, cross = size - inside[:, 1, 1], product - inside[:, 0, 1]
        independent = fresh > _NEW_SHARE**2 * size
        if not xp.holds(independent):
            column = independent[:, None]
            along, shared = xp.where(column, along, 0), xp.where(column, shared, 0)
            outside, fresh = xp.where(independent, outside, square), xp.where(independent, fresh, size)
            cross = xp.where(independent, cross, product)
        return cls(along, shared, outside, fresh, cross, independent)


class AndersonState(NamedTuple):
    """What a step remembers.

    Attributes:
        basis: Changes of the residual, made orthogonal and of length 1. There is room for one more than ``memory``:
            a step writes where its state does not read, so a state can be stepped from again.
        images: The changes of f that belong to them.
        residuals: The last residual, at ``newest``, and room for the next.
        use: One where a slot counts for a row, else zero ``(rows, slots)``.
        before: Coordinates of the last residual in the basis ``(rows, slots)``.
        slot: The slot that is free.
        fz: The last image; None before the first step.
        first: ``|g|^2`` of the first residual ``(rows,)``, until there is a guard.
        guard: Whether the model of a row is trusted; None before the second step.
    """

    basis: History
    images: History
    residuals: History
    use: Small
    before: Small
    slot: int = 0
    newest: int = 0
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

    memory: int = 5
    damping: float = 1.0
    ridge: float = 0.0
    history_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        require_count("memory", self.memory)
        if not 0 < self.damping <= 1:
            raise ValueError(f"damping must lie in (0, 1], found {self.damping}")
        if not self.ridge >= 0:
            raise ValueError(f"ridge must be at least 0, found {self.ridge}")
        require_history_dtype(self.history_dtype)

    def init(self, z: Tensor) -> AndersonState:
        wide, kept = gram_dtype(z), self.history_dtype or z.dtype
        basis, images = (History.empty(self.memory + 1, z, kept) for _ in range(2))
        use = arithmetic(z).take(torch.zeros(len(z), self.memory + 1, dtype=wide, device=z.device))
        return AndersonState(basis, images, History.empty(2, z, wide), use, use)

    def step(self, z: Tensor, fz: Tensor, state: AndersonState) -> tuple[Tensor, AndersonState]:
        dtype, wide = fz.dtype, gram_dtype(fz)
        if dtype != wide:
            z, fz = z.to(wide), fz.to(wide)
        now, slot = 1 - state.newest, state.slot
        residuals = state.residuals.put(now, torch.sub, fz, z)
        g = residuals.lines[now]
        if state.fz is None:
            xp = arithmetic(g, kept=state.use)
            first = xp.detach(xp.take(residuals.product(now, g))[:, 0, 0])
            z_next = z + self.damping * residuals.slots[now]
            return z_next.to(dtype), state._replace(residuals=residuals, newest=now, fz=fz, first=first)

        # The change of g is worked on where the new image will stand: nothing reads that slot before.
        work, at = (state.images, slot) if state.images.states.dtype == wide else (History.empty(1, z, wide), 0)
        work = work.put(at, torch.sub, residuals.slots[now], residuals.slots[state.newest])
        change = work.lines[at]
        coordinates = state.basis.dots(g)
        xp = arithmetic(coordinates, change, state.images.states, kept=state.use)
        square = xp.detach(xp.take(residuals.product(now, g))[:, 0, 0])
        product, size = xp.take(work.product(at, g))[:, 0, 0], xp.take(work.product(at, change))[:, 0, 0]
        use = xp.own(state.use)
        with xp.quiet():
            along = xp.take(coordinates)[:, 0] * use
            split = _Split.of(xp, along, xp.own(state.before), square, product, size)
            # A power would make 0 times infinity of a gradient.
            scale = 1 / xp.sqrt(split.fresh + torch.finfo(wide).tiny)
            along, newest = split.along, split.cross * scale  # coordinates of g, the last one along the new vector
            guard = state.guard or _Guard.start(xp, xp.own(state.first), square)
            trusted, guard = guard.judge(xp, square, split.outside - xp.detach(newest * newest))
            if not (xp.holds(split.independent) and xp.holds(trusted)):
                kept = (split.independent & trusted)[:, None]
                newest, along, use = xp.where(trusted, newest, 0), xp.where(kept, along, 0), use * kept
        step, basis, images = self._extrapolate(xp, state, g, fz, change, split.shared, scale, along, newest)
        # The exact step s solves (I - J) s = g, so s . g = s . (I - J) s is positive wherever f does not expand. Where
        # it is not, the model aims at a point that f repels from: the row follows f instead, and forgets.
        ahead = xp.detach(xp.take(residuals.product(now, step))[:, 0, 0]) > 0
        step = step[:, 0]
        z_next = step + z if recording(step, z) else step.add_(z)
        if not xp.holds(ahead):
            z_next = torch.where(xp.tensor(ahead)[:, None], z_next, fz)
            guard = guard._replace(bound=xp.where(ahead, guard.bound, float("inf")))
            use, along, newest = use * ahead[:, None], xp.where(ahead[:, None], along, 0), xp.where(ahead, newest, 0)
            trusted = trusted & ahead
        use, along, free = xp.copy(use), xp.writable(along), (slot + 1) % (self.memory + 1)
        use[:, slot], along[:, slot] = trusted, newest
        use[:, free], along[:, free] = 0, 0
        state = AndersonState(basis, images, residuals, use, along, free, now, fz, None, guard)
        return z_next.to(dtype), state

    def _extrapolate(
        self,
        xp: NumPyArithmetic,
        state: AndersonState,
        g: Tensor,
        fz: Tensor,
        change: Tensor,
        shared: Small,
        scale: Small,
        along: Small,
        newest: Small,
    ) -> tuple[Tensor, History, History]:
        """The step from z ``(rows, 1, dim)``, and the basis and the images with one vector more.

        ``change`` ``(rows, 1, dim)``, the change of ``g``, is used up. ``shared`` are its coordinates in the basis, and
        ``scale`` is one over the length of the rest; ``along`` and ``newest`` are the coordinates of ``g``.
        """
        assert state.fz is not None
        if self.ridge > 0:
            along, newest = along / (1 + self.ridge), newest / (1 + self.ridge)
        weights, weight = xp.tensor(along[:, None]), xp.tensor((newest * scale)[:, None, None])
        shared, scale = xp.tensor(shared[:, None]), xp.tensor(scale[:, None])
        change = state.basis.subtract(change, shared, in_place=True)
        remainder = None
        if self.damping < 1:
            remainder = torch.addcmul(state.basis.subtract(g, weights), change, weight, value=-1)
        basis = state.basis.put(state.slot, torch.mul, change[:, 0], scale)
        image = state.images.subtract((fz - state.fz)[:, None], shared, in_place=True)
        images = state.images.put(state.slot, torch.mul, image[:, 0], scale)
        recorded = recording(g, image, weight)
        step = torch.addcmul(g, image, weight, value=-1, out=None if recorded else image)
        step = state.images.subtract(step, weights, in_place=True)
        if remainder is not None:
            step = step - (1 - self.damping) * remainder
        return step, basis, images

    def forget(self, state: AndersonState, rows: Tensor) -> AndersonState:
        xp = arithmetic(kept=state.use)
        forgotten = xp.take(rows)
        guard = state.guard
        if guard is not None:  # two plain steps, for the next one finds a difference of two maps
            infinite = float("inf")
            guard = guard._replace(
                bound=xp.where(forgotten, infinite, guard.bound),
                level=xp.where(forgotten, infinite, guard.level),
                left=xp.where(forgotten, 2.0, guard.left),
            )
        use, before = (xp.where(forgotten[:, None], 0, x) for x in (state.use, state.before))
        return state._replace(use=use, before=before, guard=guard)
