"""The loop: it alone evaluates f in a forward solve, measures residuals and decides which rows are done."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol, Required, TypedDict

import numpy as np
import torch
from torch import Tensor

from fixpoint.engine.ambient import without_autocast
from fixpoint.engine.compaction import Compaction
from fixpoint.engine.tolerance import Array, Figures, Status, Tolerance, plain_norms

if TYPE_CHECKING:
    from fixpoint.solvers.base import Solver

Map = Callable[[Tensor], Tensor]

_ACTIVE = -1
# A row has stagnated when its best residual is this near to rounding, and neither so many evaluations nor so many
# checks brought a smaller one.
_ROUNDING_FLOOR = 50.0
_PATIENCE = 10
_PATIENT_CHECKS = 4
_LARGEST_FLOOR = 0.05  # a row that is farther off has not been stopped by rounding, not even that of bfloat16
# The same state, evaluated in the same batch, may differ by so many roundings.
_SAME = 64.0


class Watcher(Protocol):
    """Called at each check; returning something true stops the loop."""

    def __call__(
        self, nfev: int, residual: Tensor, active: int, z: Tensor, predicted_error: Tensor | None = None, /
    ) -> object:
        """``residual`` per row, rows that have not ended, the state ``(rows, dim)``, predicted error per row if any."""


@dataclass(frozen=True)
class LoopResult:
    """Outcome of a run on ``rows`` rows: the state ``z`` ``(rows, dim)`` and, per row, how good it is."""

    z: Tensor
    residual: Tensor
    scale: Tensor  # norm of f(z)
    status: Tensor
    evals: Tensor
    nfev: int
    trace: Tensor | None = None  # (nfev, rows)
    fixed_depth: bool = False  # handed over as it came, not solved to a tolerance
    coupled: bool = False  # the image of a row was seen to depend on other rows
    state: Any = None  # the solver's, as its last step left it
    predicted_error: Tensor | None = None  # of solvers that judge by one; the residual is NaN unless it was measured

    def measured(self, fz: Tensor, tolerance: Tolerance) -> LoopResult:
        """The same run with the figures that ``fz = f(self.z)`` gives; for states handed over unverified."""
        figures = tolerance.measure(self.z, fz)
        status = np.where(tolerance.done(figures), Status.CONVERGED, self.status.cpu().numpy())
        status = np.where(np.isfinite(figures.residual), status, Status.NON_FINITE)
        residual, scale = figures_like(self.z, np.stack(figures[:2]))
        return replace(self, residual=residual, scale=scale, status=like(self.z, status))


class LoopOptions(TypedDict, total=False):
    """Options of a loop beside the map, the start, the solver and the tolerance; see ``iterate``."""

    max_evals: Required[int]
    check_every: int
    record: bool
    watch: Watcher | None
    compaction: Compaction | None


class BestSoFar:
    """The best evaluated state of every row so far and its figures, kept on the host; and whether the row has ended."""

    def __init__(self, z: Tensor, rounding: float) -> None:
        rows = len(z)
        self.z = z  # tensors of the loop are never written to, so a reference will do
        self._own = False  # unless it was put together here
        self.residual = np.full(rows, np.inf)
        self.scale = np.full(rows, np.inf)
        self.merit = np.full(rows, np.inf)
        self.status = np.full(rows, _ACTIVE)
        self.evals = np.zeros(rows, dtype=np.int64)
        self.improved_at = np.zeros(rows, dtype=np.int64)
        self.unimproved_checks = np.zeros(rows, dtype=np.int64)
        self.active = np.ones(rows, dtype=bool)
        self.remaining = rows
        self.unconfirmed = np.zeros(rows, dtype=bool)  # what is known of the row was seen on a part of the rows alone
        self.together = False  # rows depend on one another: they end at the same check
        self.nfev = 0
        self.trace: list[Array] = []
        self._rounding = max(torch.finfo(z.dtype).eps, rounding)
        self._floor = min(_ROUNDING_FLOOR * self._rounding, _LARGEST_FLOOR)
        low, self._high = plain_norms(z.dtype)
        self._low = low / (_SAME * self._rounding)  # of a row above, squares that are lost change nothing that counts

    def current(self, residual: Array) -> Array:
        """``residual`` of the rows that have not ended, and the final one of those that have."""
        return residual if self.remaining == len(residual) else np.where(self.active, residual, self.residual)

    @property
    def closely(self) -> Array:
        """The rows to be measured to the last digit. Whether another one has moved is seen without."""
        ordinary = (self.scale > self._low) & (self.scale < self._high) | (self.scale == 0)
        return self.active | ~ordinary

    def update(
        self, z: Tensor, figures: Figures, tolerance: Tolerance, retreating: Array | None = None, *, whole: bool = True
    ) -> bool:
        """Take in the figures of ``z``, and say whether that ended rows.

        The rows ``retreating`` go on although their image is not finite. ``whole``: whether f saw all rows.
        """
        (residual, scale, merit), (active, nfev) = figures, (self.active, self.nfev)
        done, finite = tolerance.done(figures), np.isfinite(residual) & np.isfinite(scale)
        better = self._better(merit)
        rows = len(residual)
        if self.remaining == np.count_nonzero(better) == rows and not np.count_nonzero(done | ~finite):
            # Nearly every check is one of these.
            self._keep(z, better)
            self.residual[:], self.scale[:], self.merit[:] = residual, scale, merit
            self.improved_at[:], self.unimproved_checks[:] = nfev, 0
            self.unconfirmed[:] = not whole
            return False
        done &= active & finite
        if self.together and np.count_nonzero(done) < self.remaining:
            done[:] = False
        # A row that meets the tolerance ends there, even when an earlier absolute residual was smaller.
        best = done | (active & better)
        self._keep(z, best)
        for ours, new in ((self.residual, residual), (self.scale, scale), (self.merit, merit)):
            np.copyto(ours, new, where=best)
        self.improved_at[best] = nfev
        self.unconfirmed[best] = not whole
        self.unimproved_checks = np.where(best, 0, self.unimproved_checks + 1)
        waited = (nfev - self.improved_at >= _PATIENCE) & (self.unimproved_checks >= _PATIENT_CHECKS)
        stuck = active & waited & (self.residual <= self._floor * self.scale)
        if self.together and np.count_nonzero(stuck) < self.remaining:
            stuck[:] = False
        broken = active & ~finite if retreating is None else active & ~finite & ~retreating
        ended = done | stuck | broken
        if not np.count_nonzero(ended):
            return False
        self.status[ended] = np.where(finite, Status.STAGNATED, Status.NON_FINITE)[ended]
        self.status[done] = Status.CONVERGED
        self.evals[ended] = nfev
        self.active = active & ~ended
        self.remaining = int(np.count_nonzero(self.active))
        return True

    def moved(self, figures: Figures, *, at_best: bool) -> Array:
        """Which rows have other figures, now that f has seen all rows, than when their state was taken for the best.

        Looks at the rows that have converged and those that are not confirmed, as far as they stand in that state: when
        they have ended, and all of them if ``at_best``. Unless a row has moved, these are confirmed.
        """
        known = (self.status == Status.CONVERGED) | (self.unconfirmed & (~self.active | at_best))
        with np.errstate(invalid="ignore"):
            same = np.abs(figures.residual - self.residual) <= _SAME * self._rounding * self.scale
        moved = known & ~same
        if not np.count_nonzero(moved):
            self.unconfirmed &= ~known
        return moved

    def reopen(self, rows: Array) -> None:
        """The ``rows`` go on from where they are, and what was known of them is void."""
        self.status[rows] = _ACTIVE
        self.active = self.active | rows
        self.remaining = int(np.count_nonzero(self.active))
        for figures in (self.residual, self.scale, self.merit):
            figures[rows] = np.inf
        self.improved_at[rows], self.unimproved_checks[rows] = self.nfev, 0
        self.unconfirmed[rows] = False

    def couple(self) -> None:
        """Rows are seen to depend on one another: from now on they are one problem."""
        self.together = True
        self.reopen(self.status != Status.NON_FINITE)

    def _better(self, merit: Array) -> Array:
        """Which rows have a better state now. Rows that depend on one another have it together or not at all."""
        if not self.together:
            return merit < self.merit
        total, best = (float(np.square(np.where(self.active, x, 0)).sum()) for x in (merit, self.merit))
        return np.full(len(merit), total < best)

    def _keep(self, z: Tensor, best: Array) -> None:
        """``z`` is the best state of the rows ``best``; those that have ended stand in ``z`` as they were left."""
        count = np.count_nonzero(best)
        if count == self.remaining:
            self.z, self._own = z, False
        elif count:
            index = like(z, np.flatnonzero(best))
            if self._own:
                self.z.index_copy_(0, index, z.index_select(0, index))
            else:
                self.z, self._own = self.z.index_copy(0, index, z.index_select(0, index)), True

    def result(self, otherwise: Status = Status.MAX_EVALS) -> LoopResult:
        """What is known by now; ``otherwise`` is said of rows that have not ended."""
        residual, scale = figures_like(self.z, np.stack((self.residual, self.scale)))
        status = like(self.z, np.where(self.active | self.unconfirmed, otherwise, self.status))
        evals = like(self.z, np.where(self.active, self.nfev, self.evals))
        trace = figures_like(self.z, np.stack(self.trace)) if self.trace else None
        return LoopResult(self.z, residual, scale, status, evals, self.nfev, trace, coupled=self.together)


class _Retreat:
    """Rows whose accelerated step left the domain of f: back to the last good state, and on from there in plain steps.

    A plain step goes to ``f(z)`` itself. Each time that a row leaves the domain it takes twice as many of them. Where
    it was a plain step that led out, plain iteration fails as well, and so does the row.
    """

    def __init__(self, rows: int) -> None:
        self._good: tuple[Tensor, Tensor] | None = None  # the last checked state and its image
        self._left = np.zeros(rows, dtype=np.int64)  # plain steps still to take
        self._price = np.ones(rows, dtype=np.int64)  # plain steps that the next failure costs
        self._checked_at = 0

    def rows(self, z: Tensor, figures: Figures, active: Array) -> Array | None:
        """Which rows can go back; None if none has to."""
        lost = active & ~(np.isfinite(figures.residual) & np.isfinite(figures.scale))
        if self._good is None or not np.count_nonzero(lost):
            return None
        index = like(z, np.flatnonzero(lost))
        before, image = (x.detach().index_select(0, index) for x in self._good)
        sound = torch.isfinite(before).all(dim=1) & torch.isfinite(image).all(dim=1)
        stepped_plainly = (z.detach().index_select(0, index) == image).all(dim=1)
        lost[lost] = (sound & ~stepped_plainly).cpu().numpy() & (self._left[lost] == 0)
        return lost if np.count_nonzero(lost) else None

    def back(self, z: Tensor, fz: Tensor, lost: Array | None, nfev: int) -> tuple[Tensor, Tensor]:
        """State and image to go on with; remembered for the next check."""
        if lost is not None:
            assert self._good is not None
            index = like(z, np.flatnonzero(lost))
            z, fz = (
                new.index_copy(0, index, old.index_select(0, index))
                for new, old in zip((z, fz), self._good, strict=True)
            )
            # What the solver remembers of the row is spoilt if it has seen the broken image.
            unseen = nfev - self._checked_at == 1
            self._left[lost] = self._price[lost] if unseen else np.iinfo(np.int64).max
            self._price[lost] *= 2
        self._good, self._checked_at = (z, fz), nfev
        return z, fz

    def step(self, z_next: Tensor, fz: Tensor) -> Tensor:
        """The next state, with plain steps where they are due."""
        if not np.count_nonzero(self._left):
            return z_next
        index = like(z_next, np.flatnonzero(self._left))
        self._left[self._left > 0] -= 1
        return z_next.index_copy(0, index, fz.index_select(0, index))


@without_autocast
def iterate(
    f: Map,
    z: Tensor,
    solver: Solver,
    tolerance: Tolerance,
    *,
    max_evals: int,
    check_every: int = 1,
    record: bool = False,
    watch: Watcher | None = None,
    compaction: Compaction | None = None,
) -> LoopResult:
    """Evaluate ``f`` and step the solver until every row of ``z`` ``(rows, dim)`` has ended.

    The loop *checks* after the first evaluation, every ``check_every`` ones and the last: only then does it measure, do
    rows end, and does the host wait for the device, once. Rows that ended stay where they are and are shown to the
    solver as solved, so it meets NaN or infinity from ``f`` between two checks at most. A row that has converged and is
    seen to have another image at the same state depends on other rows: then all of them go on, and end together.

    With a ``compaction``, rows that ended are left out of what ``f`` sees. Before the loop ends, an evaluation of all
    rows at their best states confirms what came of that, or the loop goes on with all rows. It is part of
    ``max_evals``.

    Whatever is raised on the way carries the result so far, see ``result_of``.
    """
    best = BestSoFar(z, tolerance.rounding)
    with handing_over(best.result):
        return _iterate(f, z, solver, tolerance, best, max_evals, check_every, record, watch, compaction)


def _iterate(
    f: Map,
    z: Tensor,
    solver: Solver,
    tolerance: Tolerance,
    best: BestSoFar,
    max_evals: int,
    check_every: int,
    record: bool,
    watch: Watcher | None,
    compaction: Compaction | None,
) -> LoopResult:
    state = solver.init(z)
    retreat = _Retreat(len(z))
    frozen: tuple[Tensor, Tensor] | None = None  # the rows that have ended, and their states
    due = 1
    stop: object = False
    while True:
        spare = max_evals - best.nfev - 1
        confirming = bool(np.count_nonzero(best.unconfirmed)) and bool(stop or spare < 1 or best.remaining == 0)
        if confirming:
            z = best.z
        # A part of the rows is worth an evaluation where two more remain: of all rows in its place, and to confirm.
        if confirming or compaction is None or frozen is None or spare < 2:
            fz, spent, whole = f(z), 1, True
        else:
            fz, spent, whole = compaction(z, best.active)
        best.nfev += spent
        check = confirming or best.nfev >= due or best.nfev == max_evals
        if check or record:
            among = True if frozen is None else best.closely if whole else best.active
            figures = tolerance.measure(z, fz, among)
            if check and not whole and not np.isfinite(figures.residual[best.active]).all():
                assert compaction is not None
                compaction.refuse("a row has no finite image")  # which may be due to what f was shown
                fz, spent, whole = f(z), spent + 1, True
                best.nfev += 1
                figures = tolerance.measure(z, fz, best.closely)
            if best.nfev == spent:
                tolerance = tolerance.started(z, fz, figures)
            residual = best.current(figures.residual)
            best.trace += [residual] * spent if record else []
        if check:
            due = (best.nfev // check_every + 1) * check_every
            moved = best.moved(figures, at_best=confirming) if whole and frozen is not None else None
            reopened = moved is not None and bool(np.count_nonzero(moved))
            if reopened and np.count_nonzero(best.unconfirmed):
                assert compaction is not None
                compaction.refuse("all rows together have other images")
                best.reopen(moved | best.unconfirmed)
                state = solver.init(z)  # what it remembers has never been
            elif reopened:
                best.couple()
            lost = retreat.rows(z, figures, best.active)
            ended = best.update(z, figures, tolerance, lost, whole=whole)
            stop = stop or (watch and watch(best.nfev, figures_like(z, residual), best.remaining, z.detach()))
            if stop or best.nfev >= max_evals or best.remaining == 0:
                if np.count_nonzero(best.unconfirmed):
                    continue
                return replace(best.result(Status.STOPPED if stop else Status.MAX_EVALS), state=state)
            z, fz = retreat.back(z, fz, lost, best.nfev)
            if ended or reopened:
                frozen = None
                if best.remaining < len(z):
                    index = like(z, np.flatnonzero(~best.active))
                    frozen = index, best.z.index_select(0, index)
                    z = z.index_copy(0, *frozen)
        if frozen is not None:
            fz = fz.index_copy(0, *frozen)
        z, state = solver.step(z, fz, state)
        z = retreat.step(z, fz)
        if frozen is not None:
            z = z.index_copy(0, *frozen)


@without_autocast
def run_steps(
    f: Map, z: Tensor, solver: Solver, tolerance: Tolerance, *, depth: int, record: bool = False
) -> LoopResult:
    """Apply exactly ``depth`` updates of the solver to ``z``: ``depth`` evaluations, the last state handed over.

    Nothing is verified: the residual of that state is not known (NaN) until somebody evaluates ``f`` there.
    """
    state = solver.init(z)
    trace: list[Array] = []
    for _ in range(depth):
        fz = f(z)
        if record:
            trace.append(tolerance.measure(z, fz).residual)
        z, state = solver.step(z, fz, state)
    status = torch.where(torch.isfinite(z.detach()).all(dim=1), int(Status.MAX_EVALS), int(Status.NON_FINITE))
    unknown = figures_like(z, np.full(len(z), np.nan))
    recorded = figures_like(z, np.stack([*trace, np.empty(len(z))])[:-1]) if record else None
    return LoopResult(
        z, unknown, unknown, status, torch.full_like(status, depth), depth, recorded, fixed_depth=True, state=state
    )


@contextlib.contextmanager
def handing_over(so_far: Callable[[], LoopResult]) -> Iterator[None]:
    """Let what is raised, Ctrl-C too, carry the result so far, if f has been evaluated; see ``result_of``."""
    try:
        yield
    except BaseException as error:
        with contextlib.suppress(Exception):  # the device may be lost: nothing must hide the error itself
            result = so_far()
            if result.nfev:
                error.fixpoint_result = result  # type: ignore[attr-defined]
        raise


def result_of(error: BaseException) -> LoopResult | None:
    """The result so far of the outermost loop that ``error`` has come through."""
    return getattr(error, "fixpoint_result", None)


def like(z: Tensor, array: Array) -> Tensor:
    """``array`` where ``z`` is, without waiting for the device."""
    return torch.from_numpy(array).to(z.device, non_blocking=True)


def figures_like(z: Tensor, figures: Array) -> Tensor:
    """The same, in at least float32: float64 only where ``z`` has it."""
    return torch.from_numpy(figures).to(torch.promote_types(z.dtype, torch.float32)).to(z.device, non_blocking=True)
