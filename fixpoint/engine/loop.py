"""The loop: it alone evaluates f in a forward solve, measures residuals and decides which rows are done."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, Required, TypedDict

import numpy as np
import torch
from torch import Tensor

from fixpoint.engine.ambient import without_autocast
from fixpoint.engine.compaction import Compaction
from fixpoint.engine.norms import Array
from fixpoint.engine.outcome import BestSoFar, LoopResult, figures_like, handing_over, tensor_like
from fixpoint.engine.tolerance import Figures, Status, Tolerance
from fixpoint.engine.transforms import recording

if TYPE_CHECKING:
    from fixpoint.solvers.base import Solver

Map = Callable[[Tensor], Tensor]


class Watcher(Protocol):
    """Called at each check; returning something true stops the loop."""

    def __call__(
        self, nfev: int, residual: Tensor, active: int, z: Tensor, predicted_error: Tensor | None = None, /
    ) -> object:
        """``residual`` per row, rows not settled, the state ``(rows, dim)``, predicted error per row if any."""


class LoopOptions(TypedDict, total=False):
    """Options of a loop beside the map, the start, the solver and the tolerance; see ``iterate``."""

    max_evals: Required[int]
    check_every: int
    record: bool
    watch: Watcher | None
    compaction: Compaction | None


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
    run = _Run(
        f=f,
        solver=solver,
        tolerance=tolerance,
        best=best,
        max_evals=max_evals,
        check_every=check_every,
        record=record,
        watch=watch,
        compaction=compaction,
        retreat=_Retreat(len(z)),
        state=solver.init(z),
    )
    with handing_over(best.result):
        return run.to_the_end(z)


class _Evaluation(NamedTuple):
    """What is known of an evaluation."""

    check: bool  # whether rows may end now
    confirming: bool  # whether z are the best states, evaluated to confirm what was seen of a part of the rows
    all_rows: bool  # whether f saw all rows
    figures: Figures | None  # None where nothing was measured
    residual: Array | None  # the final one of rows that have ended


@dataclass(kw_only=True)
class _Run:
    """One run of the loop: ``to_the_end`` says what comes after what, each other method is one concern."""

    f: Map
    solver: Solver
    tolerance: Tolerance
    best: BestSoFar
    max_evals: int
    check_every: int
    record: bool
    watch: Watcher | None
    compaction: Compaction | None
    retreat: _Retreat
    state: Any  # the solver's
    ahead: tuple[Tensor, Any] | None = None  # the solver's next step, where it was made before the figures were read
    ended: tuple[Tensor, Tensor] | None = None  # numbers of the rows that have ended, and their states; None: no row
    next_check: int = 1  # number of evaluations
    stop: object = False  # what the watcher said

    def to_the_end(self, z: Tensor) -> LoopResult:
        best = self.best
        while True:
            z, fz, seen = self._evaluate(z)
            if seen.check:
                assert seen.figures is not None
                assert seen.residual is not None
                self.next_check = (best.nfev // self.check_every + 1) * self.check_every
                changed, lost = False, None
                if not best.advances(z, seen.figures, self.tolerance):
                    reopened = self._reopen_what_moved(z, seen)
                    lost = self.retreat.rows(z, seen.figures, best.active)
                    changed = best.update(z, seen.figures, self.tolerance, lost, all_rows=seen.all_rows) or reopened
                    if changed or lost is not None:
                        self.ahead = None  # made for other rows, or from another state
                if self.watch and not self.stop:
                    self.stop = self.watch(best.nfev, figures_like(z, seen.residual), best.unsettled, z.detach())
                if self.stop or best.nfev >= self.max_evals or best.remaining == 0:
                    if best.any_unconfirmed:
                        continue  # the next evaluation confirms
                    return best.result(Status.STOPPED if self.stop else Status.MAX_EVALS, self.state)
                if changed:
                    self.ended = best.ended()
                    z = self._with_ended(z)
                z, fz = self.retreat.back(z, fz, lost, best.nfev)
            z = self._step(z, fz)

    def _evaluate(self, z: Tensor) -> tuple[Tensor, Tensor, _Evaluation]:
        """The state evaluated and its image; measured where there is a check or everything is recorded."""
        best, left, self.ahead = self.best, self.max_evals - self.best.nfev, None
        confirming = bool(self.stop or left < 2 or best.remaining == 0) and best.any_unconfirmed
        if confirming:
            z = best.z
        # A part of the rows is worth an evaluation where two more remain: of all rows in its place, and to confirm.
        if confirming or self.compaction is None or self.ended is None or left < 3:
            fz, spent, all_rows = self.f(z), 1, True
        else:
            fz, spent, all_rows = self.compaction(z, best.active)
        first = best.nfev == 0
        best.nfev += spent
        check = confirming or best.nfev >= self.next_check or best.nfev == self.max_evals
        if not (check or self.record):
            return z, fz, _Evaluation(check, confirming, all_rows, None, None)
        figures = self._measure(z, fz, all_rows, check)
        if check and not all_rows and not np.isfinite(figures.residual[best.active]).all():
            assert self.compaction is not None
            self.compaction.refuse("a row has no finite image")  # which may be due to what f was shown
            fz, spent, all_rows = self.f(z), spent + 1, True
            best.nfev += 1
            figures = self._measure(z, fz, all_rows, check)
        if first:
            self.tolerance = self.tolerance.started(z, fz, figures)
        residual = best.current(figures.residual)
        best.trace += [residual] * spent if self.record else []
        return z, fz, _Evaluation(check, confirming, all_rows, figures, residual)

    def _measure(self, z: Tensor, fz: Tensor, all_rows: bool, check: bool) -> Figures:
        """The figures of all rows. While those of a check come, a device makes the next step; nearly all count."""
        best = self.best
        among = True if self.ended is None else best.to_be_repaired if all_rows else best.active
        if z.is_cpu or not check or self._is_last() or recording(z, fz):
            return self.tolerance.measure(z, fz, among)
        return self.tolerance.measure(z, fz, among, lambda: self._step_ahead(z, fz))

    def _is_last(self) -> bool:
        """Whether the evaluation is known to be the last one before its figures are."""
        return bool(self.stop) or self.best.nfev >= self.max_evals or self.best.remaining == 0

    def _step_ahead(self, z: Tensor, fz: Tensor) -> None:
        """Make the next step. A row that is not finite will end or go back, and then this step is thrown away."""
        z, fz = (torch.nan_to_num(x, 0.0, 0.0, 0.0) for x in (z, self._with_ended(fz)))
        try:
            self.ahead = self.solver.step(z, fz, self.state)
        except Exception:  # of a step that counts it is raised once more
            self.ahead = None

    def _reopen_what_moved(self, z: Tensor, seen: _Evaluation) -> bool:
        """Let rows that have ended go on, if f says something else of them than when they ended; whether it did."""
        if self.ended is None or not seen.all_rows:
            return False
        assert seen.figures is not None
        best = self.best
        moved = best.moved(seen.figures, at_best=seen.confirming)
        if not np.count_nonzero(moved):
            return False
        if best.any_unconfirmed:
            assert self.compaction is not None
            self.compaction.refuse("all rows together have other images")
            best.reopen(moved | best.unconfirmed)
            self.state = self.solver.init(z)  # what it remembers came from wrong images
        else:
            best.couple()
        return True

    def _step(self, z: Tensor, fz: Tensor) -> Tensor:
        """The next states. Rows that have ended stay, and the solver sees them as solved."""
        if self.ahead is None:
            fz = self._with_ended(fz)
            self.ahead = self.solver.step(z, fz, self.state)
        z, self.state = self.ahead
        z = self.retreat.step(z, fz, self.solver)
        # In place, for what a step returns is the loop's; no step of these rows counts any more.
        if self.ended is None or not z.is_contiguous() or z.is_inference() or recording(z, self.ended[1]):
            return self._with_ended(z)
        return z.index_copy_(0, *self.ended)

    def _with_ended(self, x: Tensor) -> Tensor:
        """A copy of ``x`` with the rows that have ended as they were left; ``x`` itself if no row has."""
        return x if self.ended is None else x.index_copy(0, *self.ended)


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
        if self._good is None or np.count_nonzero(figures.finite) == len(z):
            return None
        lost = active & ~figures.finite
        if not np.count_nonzero(lost):
            return None
        index = tensor_like(z, np.flatnonzero(lost))
        before, image = (x.detach().index_select(0, index) for x in self._good)
        sound = torch.isfinite(before).all(dim=1) & torch.isfinite(image).all(dim=1)
        stepped_plainly = (z.detach().index_select(0, index) == image).all(dim=1)
        lost[lost] = (sound & ~stepped_plainly).cpu().numpy() & (self._left[lost] == 0)
        return lost if np.count_nonzero(lost) else None

    def back(self, z: Tensor, fz: Tensor, lost: Array | None, nfev: int) -> tuple[Tensor, Tensor]:
        """State and image to go on with; remembered for the next check."""
        if lost is not None:
            assert self._good is not None
            index = tensor_like(z, np.flatnonzero(lost))
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

    def step(self, z_next: Tensor, fz: Tensor, solver: Solver) -> Tensor:
        """The next state, with plain steps where they are due."""
        if not np.count_nonzero(self._left):
            return z_next
        index = tensor_like(z_next, np.flatnonzero(self._left))
        self._left[self._left > 0] -= 1
        return z_next.index_copy(0, index, solver.plain(fz).index_select(0, index))


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
