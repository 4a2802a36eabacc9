"""The loop: it alone evaluates f in a forward solve, measures residuals and decides which rows are done."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol, Required, TypedDict

import numpy as np
import torch
from torch import Tensor

from fixpoint.engine.ambient import without_autocast
from fixpoint.engine.compaction import Compaction
from fixpoint.engine.tolerance import Array, Status, Tolerance

if TYPE_CHECKING:
    from fixpoint.solvers.base import Solver

Map = Callable[[Tensor], Tensor]

_ACTIVE = -1
# A row has stagnated when its best residual is this near to rounding and did not fall for this many evaluations.
_ROUNDING_FLOOR = 50.0
_PATIENCE = 10
_LARGEST_FLOOR = 0.05  # a row that is farther off has not been stopped by rounding, not even that of bfloat16


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
    state: Any = None  # the solver's, as its last step left it
    predicted_error: Tensor | None = None  # of solvers that judge by one; the residual is NaN unless it was measured

    def measured(self, fz: Tensor, tolerance: Tolerance) -> LoopResult:
        """The same run with the figures that ``fz = f(self.z)`` gives; for states handed over unverified."""
        residual, scale = figures = tolerance.measure(self.z, fz)
        status = np.where(tolerance.satisfied(residual, scale), Status.CONVERGED, self.status.cpu().numpy())
        status = np.where(np.isfinite(residual), status, Status.NON_FINITE)
        on_device = figures_like(self.z, figures)
        return replace(self, residual=on_device[0], scale=on_device[1], status=like(self.z, status))


class LoopOptions(TypedDict, total=False):
    """Options of a loop beside the map, the start, the solver and the tolerance; see ``iterate``."""

    max_evals: Required[int]
    check_every: int
    record: bool
    watch: Watcher | None
    compaction: Compaction | None
    announce: Callable[[Any], object]


class BestSoFar:
    """Figures of every row so far, on the host: the best state that was evaluated, and whether the row has ended."""

    def __init__(self, z: Tensor, rounding: float) -> None:
        rows = len(z)
        self.z = z  # the best state of each row; tensors of the loop are never written to, so a reference will do
        self._own = False  # unless it was put together here
        self.residual = np.full(rows, np.inf)
        self.scale = np.full(rows, np.inf)
        self.status = np.full(rows, _ACTIVE)
        self.evals = np.zeros(rows, dtype=np.int64)
        self.improved_at = np.zeros(rows, dtype=np.int64)
        self.active = np.ones(rows, dtype=bool)
        self.remaining = rows
        self.nfev = 0
        self.trace: list[Array] = []
        self._floor = min(_ROUNDING_FLOOR * max(torch.finfo(z.dtype).eps, rounding), _LARGEST_FLOOR)

    def current(self, residual: Array) -> Array:
        """``residual`` of the rows that have not ended, and the final one of those that have."""
        return residual if self.remaining == len(residual) else np.where(self.active, residual, self.residual)

    def update(self, z: Tensor, figures: Array, tolerance: Tolerance) -> bool:
        """Take in the figures of ``z``, and say whether that ended rows."""
        (residual, scale), (active, nfev) = figures, (self.active, self.nfev)
        done, better, finite = tolerance.satisfied(residual, scale), residual < self.residual, np.isfinite(figures)
        rows = len(residual)
        if self.remaining == np.count_nonzero(better) == rows and not np.count_nonzero(done | ~finite[1]):
            # Nearly every look is one of these.
            self._keep(z, better)
            self.residual[:], self.scale[:], self.improved_at[:] = residual, scale, nfev
            return False
        sound = finite[0] & finite[1]
        done &= active & sound
        # A row that meets the tolerance ends there, even when an earlier absolute residual was smaller.
        best = done | (active & better)
        self._keep(z, best)
        for ours, new in ((self.residual, residual), (self.scale, scale), (self.improved_at, nfev)):
            np.copyto(ours, new, where=best)
        stuck = active & (nfev - self.improved_at >= _PATIENCE) & (self.residual <= self._floor * self.scale)
        ended = done | stuck | (active & ~sound)
        if not np.count_nonzero(ended):
            return False
        self.status[ended] = np.where(sound, Status.STAGNATED, Status.NON_FINITE)[ended]
        self.status[done] = Status.CONVERGED
        self.evals[ended] = nfev
        self.active = active & ~ended
        self.remaining = int(np.count_nonzero(self.active))
        return True

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

    def outcome(self) -> LoopResult:
        """What is known by now; rows that have not ended are called ``MAX_EVALS``."""
        residual, scale = figures_like(self.z, np.stack((self.residual, self.scale)))
        status = like(self.z, np.where(self.active, Status.MAX_EVALS, self.status))
        evals = like(self.z, np.where(self.active, self.nfev, self.evals))
        trace = figures_like(self.z, np.stack(self.trace)) if self.trace else None
        return LoopResult(self.z, residual, scale, status, evals, self.nfev, trace)


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
    announce: Callable[[BestSoFar], object] = lambda _: None,
) -> LoopResult:
    """Evaluate ``f`` and step the solver until every row of ``z`` ``(rows, dim)`` has ended.

    The loop *looks* after the first evaluation, every ``check_every`` ones and the last: only then does it measure, do
    rows end, and does the host wait for the device, once. Rows that ended stay where they are and are shown to the
    solver as solved, so it meets NaN or infinity from ``f`` between two looks at most. With a ``compaction``, rows that
    ended are left out of what ``f`` sees. ``announce`` is given the record before it is filled.
    """
    state = solver.init(z)
    best = BestSoFar(z, tolerance.rounding)
    announce(best)
    frozen: tuple[Tensor, Tensor] | None = None  # the rows that have ended, and their states
    due = 1
    while True:
        if compaction is None or frozen is None:
            fz, spent = f(z), 1
        else:
            fz, spent = compaction(z, spare=max_evals - best.nfev - 1)
        best.nfev += spent
        look = best.nfev >= due or best.nfev == max_evals
        if look or record:
            figures = tolerance.measure(z, fz, best.active)
            residual = best.current(figures[0])
            best.trace += [residual] * spent if record else []
        if look:
            due = (best.nfev // check_every + 1) * check_every
            ended = best.update(z, figures, tolerance)
            stop = watch and watch(best.nfev, figures_like(z, residual), best.remaining, z.detach())
            if stop or best.nfev == max_evals or best.remaining == 0:
                return replace(best.outcome(), state=state)
            if ended:
                if compaction is not None:
                    compaction.select(best.active, z, fz)
                index = like(z, np.flatnonzero(~best.active))
                frozen = index, best.z.index_select(0, index)
                z = z.index_copy(0, *frozen)
        if frozen is not None:
            fz = fz.index_copy(0, *frozen)
        z, state = solver.step(z, fz, state)
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
            trace.append(tolerance.measure(z, fz)[0])
        z, state = solver.step(z, fz, state)
    status = torch.where(torch.isfinite(z.detach()).all(dim=1), int(Status.MAX_EVALS), int(Status.NON_FINITE))
    unknown = figures_like(z, np.full(len(z), np.nan))
    recorded = figures_like(z, np.stack([*trace, np.empty(len(z))])[:-1]) if record else None
    return LoopResult(z, unknown, unknown, status, torch.full_like(status, depth), depth, recorded, True, state)


def like(z: Tensor, array: Array) -> Tensor:
    """``array`` where ``z`` is, without waiting for the device."""
    return torch.from_numpy(array).to(z.device, non_blocking=True)


def figures_like(z: Tensor, figures: Array) -> Tensor:
    """The same, in at least float32: float64 only where ``z`` has it."""
    return torch.from_numpy(figures).to(torch.promote_types(z.dtype, torch.float32)).to(z.device, non_blocking=True)
