"""Anderson acceleration on an orthonormal basis, with restarts where its model has failed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fixpoint.solvers.base import Solver, gram_dtype, require_count, require_history_dtype
from fixpoint.solvers.small import NumPyArithmetic, Small, arithmetic
from fixpoint.solvers.states import State, states_for

# A change of the residual is independent of the basis when at least this share of its length lies outside. Of less,
# much would be rounding, or tell that f is not linear here.
_NEW_SHARE = 0.01
# A row's model has failed when the residual is so many times the predicted one, beyond what a plain step does to it.
_SURPRISE = 10.0
# Where no memory is given, the changes of f may take so many bytes a row, and those of the residual as many, but there
# is room for so many changes at least and at most.
_ROW_BYTES, _LEAST, _MOST = 80 * 1024, 5, 20
# The squared length at a place that holds no change: nothing lies along it.
_NONE = float("inf")
# This share of the present |g|^2 is added to the predicted one, which rounding may bring to zero.
_NEGLIGIBLE = 1e-3


class _Guard(NamedTuple):
    """What decides whether a row's model is trusted, all ``(rows,)``. A model that fails costs the row a plain step."""

    bound: Small  # the last prediction of |g|^2, infinity after a plain step: the model must be able to repeat it
    growth: Small  # how many times the bound |g|^2 may be

    @classmethod
    def start(cls, xp: NumPyArithmetic, first: Small, square: Small) -> _Guard:
        """From ``|g|^2`` at the start and after one plain step: that shows how much f may stretch a residual."""
        zero = xp.zeros_like(square)
        growth = _SURPRISE**2 * xp.maximum(square / (first + (first == 0)), zero + 1)
        return cls(zero + float("inf"), growth)

    def judge(self, xp: NumPyArithmetic, square: Small, predicted: Small) -> tuple[Small, _Guard]:
        """Which rows may trust their model, given ``|g|^2`` and the smallest ``|g|^2`` that the model promises.

        Two tests. The promise must not be larger than the last one, since the same differences are still there; it is
        larger if the one dropped in between was needed. And the residual must not be far larger than promised; it is
        if f bends. NaN fails.
        """
        trusted = xp.maximum(predicted, square / self.growth) <= self.bound
        return trusted, _Guard(xp.plus(predicted, square, _NEGLIGIBLE), self.growth)

    def where(self, good: Small) -> _Guard:
        """The same where a model is good; elsewhere what it said is forgotten."""
        # Over false: infinity, or NaN for a row at rest, which costs it one plain step more. A device needs one launch.
        return _Guard(self.bound / good, self.growth)


class _Split(NamedTuple):
    """The residual g and its last change dg, each split into a part along the changes held and a part outside."""

    along: Small  # coefficients of g and of dg in the changes held (rows, 2, count)
    outside: Small  # squared length of g outside (rows,)
    cross: Small  # product of the two parts outside (rows,)
    fresh: Small  # squared length of dg outside (rows,)
    lengths: Small  # squared length of each change that is still held, else infinity (rows, count)
    needed: Small  # how much of |dg|^2 lies along each change held; zero where it is not needed (rows, count)

    @classmethod
    def of(cls, xp: NumPyArithmetic, coordinates: Small, squares: Small, lengths: Small, *, sparing: bool) -> _Split:
        """From what is held and what was measured. If too little of dg is outside, the change it repeats most goes.

        Args:
            sparing: Whether a change counts as needed only if dg has more than next to nothing of it.
            coordinates: Products of g and of dg with the changes held ``(rows, 2, count)``.
            squares: Products of g and dg with each other ``(rows, 2, 2)``.
            lengths: Squared length of each change held; infinity where none is.
        """
        nothing = _NEW_SHARE**2 * squares[:, 1, 1]
        along = coordinates / lengths[:, None]  # the derivative of a reciprocal would leave the range of small states
        rest = xp.less(squares, along, coordinates)
        shares = along[:, 1] * coordinates[:, 1]
        dependent = rest[:, 1, 1] < nothing
        if not xp.absent(dependent):
            lost = dependent[:, None] & (shares >= xp.amax(shares, 1)[:, None])
            lengths, shares = xp.put_where(lost, _NONE, lengths), xp.put_where(lost, 0.0, shares)
            along = xp.put_where(lost[:, None], 0.0, along)
            rest = xp.less(squares, along, coordinates)
        needed = shares * (shares > nothing[:, None]) if sparing else shares
        return cls(along, rest[:, 0, 0], rest[:, 0, 1], rest[:, 1, 1], lengths, needed)


class AndersonState(NamedTuple):
    """What a step remembers.

    Attributes:
        changes: Changes of the residual, made orthogonal ``(rows, count, dim)``. There is room for one more than
            ``memory``, at a place that each row has free: a step writes where its state does not read, so a state can
            be stepped from again.
        images: The changes of f that belong to them ``(rows, count, dim)``.
        lengths: Squared length of each change of the residual; infinity where none is held ``(rows, count)``.
        rows: Numbers of the rows.
        free: The place of each row that is free ``(rows,)``.
        newest: The place of its newest change ``(rows,)``.
        z: The last state, in at least float32; of that precision the loop holds it as well.
        fz: Its image; None before the first step.
        first: ``|g|^2`` of the first residual ``(rows,)``, until there is a guard.
        guard: Whether the model of a row is trusted; None before the second step.
    """

    changes: State
    images: State
    lengths: Small
    rows: Small
    free: Small
    newest: Small
    z: State = None
    fz: State = None
    first: Small = None
    guard: _Guard | None = None


@dataclass(frozen=True, kw_only=True)
class Anderson(Solver):
    """Anderson acceleration (type II), with restarts of single rows where it fails.

    ``g = f(z) - z`` is the residual. The last changes of ``g`` and of ``f`` are the columns of ``dG`` and ``dF``. They
    are a linear model of f, and a step goes where the model's residual is least: ``gamma = argmin |g - dG gamma|``,
    ``z_next = f(z) - dF gamma - (1 - damping) (g - dG gamma)``.

    Each new change is made orthogonal to the ones held. So there is no system to solve and nothing to regularise, the
    scale of a problem plays no part, and on a linear symmetric map a short memory does what an unlimited one would.
    When the memory is full, the two newest changes stay, and of the others the one goes that the newest has least of.
    A change that the others nearly hold replaces the one that it repeats most.

    A model fails when the change that was dropped last was still needed, or when the residual is far from the predicted
    one. Its row then forgets it and takes a plain step, ``z_next = f(z)``. So does a row whose own step would go
    backwards, ``(z_next - z) . g < 0``: it was drawn to a point that f repels from, such as a saddle of the likelihood
    in expectation-maximisation.

    Args:
        memory: Number of changes held. Two states per row are held for each, and four more, or six of float16 and
            bfloat16. None holds as many as are needed: where less than a hundredth of the newest, by length, lies along
            a change, that one makes room for the next. There is room for 20 changes of rows of up to 4 KiB, for fewer
            of longer ones, and for 5 from 16 KiB on. 5 is enough for symmetric and for strongly contracting maps; 50
            or 100 save more on non-symmetric, slowly converging ones.
        damping: Mixing in (0, 1]; 1 trusts the accelerated step wholly.
        ridge: Tikhonov weight on the coefficients of the orthonormal basis: each is divided by ``1 + ridge``.
        history_dtype: Precision of the histories, such as ``torch.bfloat16`` to halve their memory; None takes the
            state's own.

    Raises:
        TypeError, ValueError: If an option is out of range.

    Source: D. G. Anderson, J. ACM 12 (1965); truncated Gram-Schmidt as in Tang et al., arXiv:2403.14961. Which change
    is dropped, the tests of the model and of the step, and the plain steps after a failure are this project's own.

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
        allowed = _ROW_BYTES // max(dim * kept.itemsize, 1)  # of one row: others beside it must not change its course
        count = 1 + (self.memory or min(max(allowed, _LEAST), _MOST))
        changes, images = (torch.zeros(rows, count, dim, dtype=kept, device=z.device) for _ in range(2))
        xp = arithmetic(changes)
        # Where the host can read them, there are as many numbers a row as changes so far: a step reads no empty place.
        lengths = torch.full((rows, 1 if xp.readable else count), _NONE, dtype=gram_dtype(z), device=z.device)
        numbers = torch.arange(rows, device=z.device)
        nothing = xp.take(torch.zeros_like(numbers))
        return AndersonState(changes, images, xp.take(lengths), xp.take(numbers), nothing, nothing)

    def step(self, z: Tensor, fz: Tensor, state: AndersonState) -> tuple[Tensor, AndersonState]:
        dtype, wide = fz.dtype, gram_dtype(fz)
        if dtype != wide:
            z, fz = z.to(wide), fz.to(wide)
        xp = arithmetic(z, fz, kept=state.lengths)
        states = states_for(xp, fz, self.history_dtype or dtype)
        now, image, tiny = states.take(z), states.take(fz), torch.finfo(wide).tiny
        changes, images = states.take(state.changes), states.take(state.images)
        places = changes.shape[1]
        lengths, rows, free = xp.whole(xp.own(state.lengths), places), xp.own(state.rows), xp.own(state.free)
        with xp.quiet():
            if state.fz is None:
                g = image - now
                first = xp.detach(xp.take(states.dots(g[:, None], g[:, None])))[:, 0, 0]
                z_next = fz if self.damping == 1 else z + self.damping * states.tensor(g)
                return z_next.to(dtype), state._replace(z=now, fz=image, first=first)

            # The residual g and its change.
            before = states.take(state.fz)
            both = states.differences(now, image, states.take(state.z), before)
            g, change = both[:, :1], both[:, 1:]
            held, held_images = states.among(changes, 0, lengths.shape[1]), states.among(images, 0, lengths.shape[1])
            coordinates, squares = xp.take(states.dots(both, held)), xp.take(states.dots(both, both))
            along, outside, cross, fresh, lengths, needed = _Split.of(
                xp, coordinates, squares, lengths, sparing=self.memory is None
            )
            square = xp.detach(squares[:, 0, 0])
            # Where nothing has changed, its gradient is finite all the same.
            length = fresh + (fresh <= tiny)
            newest = cross / length
            guard = state.guard or _Guard.start(xp, xp.own(state.first), square)
            if not xp.readable:
                guard = _Guard(*map(xp.own, guard))  # the step before may have kept arrays
            good, guard = guard.judge(xp, square, xp.detach(xp.minus_product(outside, newest, cross)))
            if self.ridge > 0:
                shrink = 1 / (1 + self.ridge)
                newest, along = shrink * newest, xp.concatenate((shrink * along[:, :1], along[:, 1:]), 1)
            by, first = states.take(along), state.guard is None
            weights, shared, weight = by[:, :1], by[:, 1:], states.take(newest)[:, None, None]
            change = states.less(change, shared, held)
            image_change = states.less((image - before)[:, None], shared, held_images)
            if self.damping < 1:
                share = 1 - self.damping
                rest = states.less(share * g - share * weight * change, share * weights, held)
            changes = states.write(changes, rows, free, change[:, 0], first=first)
            images = states.write(images, rows, free, image_change[:, 0], first=first)
            step = states.less(states.minus(g, weight, image_change), weights, held_images)
            # The exact step s solves (I - J) s = g, so s . g = s . (I - J) s is positive wherever f does not expand.
            # Where it is not, the model aims at a point that f repels from: the row follows f instead, and forgets.
            # It is the step with its damping that is judged, for that is the one to be taken.
            if self.damping < 1:
                step = step - rest
            good = good & (xp.detach(xp.take(states.dots(step, g)))[:, 0, 0] >= 0)
            z_next = states.sum(step[:, 0], now)
            lengths = xp.put(xp.copy(lengths), rows, free, length)
            if not xp.holds(good):
                lengths = xp.where(good[:, None], lengths, _NONE)
                z_next = states.where(good, z_next, image)
                guard = guard.where(good)
            # A place for the next change: an empty one, or that of one that is not needed; where all are, of the least
            # needed. The two newest stay. With memory=1 there are no others, and the first place is taken: that needs
            # fewer evaluations than always dropping the older one.
            needed = xp.put(needed, rows, free, float("inf"))
            needed = xp.put(needed, rows, xp.own(state.newest), float("inf"))
            lengths, place = xp.least_needed(lengths, needed, rows, places)
            lengths = xp.put(lengths, rows, place, _NONE)
        z_next = states.tensor(z_next)
        return z_next.to(dtype), AndersonState(changes, images, lengths, rows, place, free, now, image, None, guard)

    def forget(self, state: AndersonState, rows: Tensor) -> AndersonState:
        xp = arithmetic(kept=state.lengths)
        forgotten = xp.take(rows)
        guard = state.guard
        if guard is not None:  # nothing is as small as this: the next step is plain, for it finds a change of the map
            guard = guard._replace(bound=xp.where(forgotten, -1.0, guard.bound))
        return state._replace(lengths=xp.where(forgotten[:, None], _NONE, state.lengths), guard=guard)
