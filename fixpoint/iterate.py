"""The loop: it alone evaluates f in a forward solve, measures residuals and decides which rows are done."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fixpoint.convergence import Status, Tolerance
from fixpoint.solvers.base import Solver

Map = Callable[[Tensor], Tensor]
Watcher = Callable[[int, Tensor, int, Tensor], object]  # nfev, residual per row, rows not ended, z; true stops the loop

_ACTIVE = -1
# A row has stagnated when its best residual is this near to rounding and did not fall for this many evaluations.
_ROUNDING_FLOOR = 50.0
_PATIENCE = 10


@dataclass(frozen=True)
class Iterates:
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

    def measured(self, fz: Tensor, tolerance: Tolerance) -> Iterates:
        """The same run with the figures that ``fz = f(self.z)`` gives; for states handed over unverified."""
        residual, scale = tolerance.measure(self.z, fz)
        status = torch.where(tolerance.satisfied(residual, scale), int(Status.CONVERGED), self.status)
        return replace(self, residual=residual, scale=scale, status=_flag_non_finite(status, residual))


def _flag_non_finite(status: Tensor, values: Tensor) -> Tensor:
    return torch.where(torch.isfinite(values), status, int(Status.NON_FINITE))


@dataclass
class _Record:
    """Figures of every row so far: the best state that was evaluated, and whether the row has ended."""

    z: Tensor
    residual: Tensor
    scale: Tensor
    status: Tensor
    evals: Tensor
    improved_at: Tensor
    trace: list[Tensor] = field(default_factory=list)

    @classmethod
    def start(cls, z: Tensor, figures: Tensor) -> _Record:
        unknown = torch.full_like(figures, torch.inf)
        count = torch.zeros_like(figures, dtype=torch.int64)
        return cls(z=z, residual=unknown, scale=unknown, status=count + _ACTIVE, evals=count, improved_at=count)

    def update(self, z: Tensor, residual: Tensor, scale: Tensor, tolerance: Tolerance, nfev: int) -> None:
        active = self.status == _ACTIVE
        done = active & tolerance.satisfied(residual, scale)
        # A row that meets the tolerance ends there, even when an earlier absolute residual was smaller.
        best = done | (active & (residual < self.residual))
        self.z = torch.where(best[:, None], z, self.z)
        self.residual = torch.where(best, residual, self.residual)
        self.scale = torch.where(best, scale, self.scale)
        self.improved_at = torch.where(best, nfev, self.improved_at)
        self.evals = torch.where(active, nfev, self.evals)
        floor = _ROUNDING_FLOOR * torch.finfo(z.dtype).eps * self.scale
        stuck = active & (nfev - self.improved_at >= _PATIENCE) & (self.residual <= floor)
        broken = active & ~(torch.isfinite(residual) & torch.isfinite(scale))
        for ended, status in ((stuck, Status.STAGNATED), (broken, Status.NON_FINITE), (done, Status.CONVERGED)):
            self.status = torch.where(ended, int(status), self.status)

    def outcome(self, nfev: int, state: Any) -> Iterates:
        status = torch.where(self.status == _ACTIVE, int(Status.MAX_EVALS), self.status)
        trace = torch.stack(self.trace) if self.trace else None
        return Iterates(self.z, self.residual, self.scale, status, self.evals, nfev, trace, state=state)


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
) -> Iterates:
    """Evaluate ``f`` and step the solver until every row of ``z`` ``(rows, dim)`` has ended.

    Rows that ended stay where they are and are shown to the solver as solved, so it never sees NaN or infinity from
    ``f``. The host waits for the device once every ``check_every`` evaluations.
    """
    state = solver.init(z)
    best: _Record | None = None
    nfev = 0
    while True:
        fz = f(z)
        nfev += 1
        residual, scale = tolerance.measure(z, fz)
        best = best or _Record.start(z, residual)
        best.update(z, residual, scale, tolerance, nfev)
        active = best.status == _ACTIVE
        if record:
            best.trace.append(torch.where(best.evals == nfev, residual, best.residual))
        look = nfev % check_every == 0 or nfev == max_evals
        still = int(active.sum()) if look else z.shape[0]
        stop = watch is not None and look and watch(nfev, residual, still, z.detach())
        if nfev == max_evals or still == 0 or stop:
            return best.outcome(nfev, state)
        if still < z.shape[0] or check_every > 1:
            fz, z = torch.where(active[:, None], fz, best.z), torch.where(active[:, None], z, best.z)
            proposal, state = solver.step(z, fz, state)
            z = torch.where(active[:, None], proposal, best.z)
        else:
            z, state = solver.step(z, fz, state)


def advance(f: Map, z: Tensor, solver: Solver, tolerance: Tolerance, *, depth: int, record: bool = False) -> Iterates:
    """Apply exactly ``depth`` updates of the solver to ``z``: ``depth`` evaluations, the last state handed over.

    Nothing is verified: the residual of that state is not known (NaN) until somebody evaluates ``f`` there.
    """
    state = solver.init(z)
    trace: list[Tensor] = []
    for _ in range(depth):
        fz = f(z)
        if record:
            trace.append(tolerance.measure(z, fz)[0])
        z, state = solver.step(z, fz, state)
    size = tolerance.norm(z.detach())
    unknown = torch.full_like(size, torch.nan)
    count = torch.full_like(size, depth, dtype=torch.int64)
    status = _flag_non_finite(torch.full_like(count, int(Status.MAX_EVALS)), size)
    recorded = torch.stack([unknown, *trace])[1:] if record else None
    return Iterates(z, unknown, unknown, status, count, depth, recorded, True, state)
