"""What a run has found: of every row the best state so far, and the result that is handed over in the end."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fixpoint.engine.norms import Array, plain_norms
from fixpoint.engine.tolerance import ROUNDINGS, Figures, Status, Tolerance

ACTIVE = -1  # status of a row that has not ended

# A row has stagnated when its best residual is this near to rounding, and neither so many evaluations nor so many
# checks brought one that is smaller by this share of a rounding: less is luck.
_ROUNDING_FLOOR = 50.0
_PATIENCE = 10
_PATIENT_CHECKS = 4
_NOTABLE = 1 / 64
_LARGEST_FLOOR = 0.05  # a row that is farther off has not been stopped by rounding, not even that of bfloat16


@dataclass(frozen=True)
class LoopResult:
    """Outcome of a run on ``rows`` rows: a state and, per row, how good it is.

    Attributes:
        z: The state ``(rows, dim)``.
        residual: Norm of ``f(z) - z`` ``(rows,)``; NaN where nobody has evaluated f at z.
        scale: Norm of ``f(z)`` ``(rows,)``.
        status: Why each row ended, as numbers of ``Status`` ``(rows,)``.
        evals: Evaluations until the row ended ``(rows,)``.
        nfev: Evaluations of f in the run.
        trace: Residuals of all evaluations ``(nfev, rows)``, if recorded.
        fixed_depth: Whether so many steps were asked for, and not a tolerance: z was handed over unverified.
        coupled: Whether the image of a row was seen to depend on other rows.
        state: The solver's state after its last step.
        predicted_error: Norm of the predicted errors ``(rows,)``, from a solver that judges by them.
        amplification: How many times larger a chain makes relative errors ``(rows,)``, from a solver of chains.
        lyapunov: Mean logarithm of what a step of a chain makes of a small change ``(rows,)``, from a solver of chains.

    Example:
        See :class:`fixpoint.Backward`, whose ``attach`` returns one.
    """

    z: Tensor
    residual: Tensor
    scale: Tensor
    status: Tensor
    evals: Tensor
    nfev: int
    trace: Tensor | None = None
    fixed_depth: bool = False
    coupled: bool = False
    state: Any = None
    predicted_error: Tensor | None = None
    amplification: Tensor | None = None
    lyapunov: Tensor | None = None

    def measured(self, fz: Tensor, tolerance: Tolerance) -> LoopResult:
        """The same run with the figures that ``fz = f(self.z)`` gives; for states handed over unverified."""
        figures = tolerance.measure(self.z, fz)
        status = np.where(tolerance.done(figures), Status.CONVERGED, self.status.cpu().numpy())
        status = np.where(np.isfinite(figures.residual), status, Status.NON_FINITE)
        residual, scale = figures_like(self.z, np.stack(figures[:2]))
        return replace(self, residual=residual, scale=scale, status=tensor_like(self.z, status))


class BestSoFar:
    """The best evaluated state of every row so far and its figures, kept on the host; and whether the row has ended."""

    def __init__(self, z: Tensor, rounding: float) -> None:
        rows = len(z)
        self.z = z  # a reference is enough: the loop writes to no state that has been evaluated
        self._own = False  # whether self.z was made here and may be written to
        self.residual = np.full(rows, np.inf)
        self.scale = np.full(rows, np.inf)
        self.merit = np.full(rows, np.inf)
        self.status = np.full(rows, ACTIVE)
        self.evals = np.zeros(rows, dtype=np.int64)
        self.mark = np.full(rows, np.inf)  # a residual below is a notable improvement
        self.improved_at: Array | int = 0  # number of evaluations; one number stands for all rows
        self.unimproved_checks: Array | int = 0
        self.active = np.ones(rows, dtype=bool)
        self.remaining = rows
        self.unconfirmed = np.zeros(rows, dtype=bool)  # the best state was evaluated with a part of the rows alone
        self.together = False  # rows depend on one another: they end at the same check
        self.nfev = 0
        self.trace: list[Array] = []
        self._rounding = max(torch.finfo(z.dtype).eps, rounding)
        self._notable = _NOTABLE * self._rounding
        self._floor = min(_ROUNDING_FLOOR * self._rounding, _LARGEST_FLOOR)
        low, self._high = plain_norms(z.dtype)
        self._low = low / (
            ROUNDINGS * self._rounding
        )  # of a row above, squares that are lost change nothing that counts

    def current(self, residual: Array) -> Array:
        """``residual`` of the rows that have not ended, and the final one of those that have."""
        return residual if self.remaining == len(residual) else np.where(self.active, residual, self.residual)

    @property
    def any_unconfirmed(self) -> bool:
        """Whether something is known from an evaluation of a part of the rows alone."""
        return bool(np.count_nonzero(self.unconfirmed))

    @property
    def unsettled(self) -> int:
        """How many rows have not ended; once all have, how many of them are still to be confirmed."""
        return self.remaining or int(np.count_nonzero(self.unconfirmed))

    def ended(self) -> tuple[Tensor, Tensor] | None:
        """Numbers of the rows that have ended, and their states ``(n, dim)``; None if no row has."""
        if self.remaining == len(self.active):
            return None
        index = tensor_like(self.z, np.flatnonzero(~self.active))
        return index, self.z.index_select(0, index)

    @property
    def to_be_repaired(self) -> Array:
        """The rows whose figures must be right to the last digit, also where squares left the range of their dtype.

        Of a row that has ended, ordinary figures tell whether its image is another one.
        """
        ordinary = (self.scale > self._low) & (self.scale < self._high) | (self.scale == 0)
        return self.active | ~ordinary

    def advances(self, z: Tensor, figures: Figures, tolerance: Tolerance) -> bool:
        """Take in the figures of ``z`` if every row goes on and has got better; nearly every check is one of these.

        Returns:
            Whether it is. If not, nothing is taken in.
        """
        (residual, scale, merit), rows = figures, len(self.active)
        if self.remaining < rows or self.together:
            return False
        # A residual below the mark is finite, and below the best one. Where merit is something else, see the last test.
        if not (np.count_nonzero(residual < self.mark) == np.count_nonzero(np.isfinite(scale)) == rows):
            return False
        if np.count_nonzero(tolerance.met(figures)):
            return False
        if merit is not residual and np.count_nonzero(merit < self.merit) < rows:
            return False
        self.z, self._own = z, False
        self.residual, self.scale, self.merit = residual, scale, merit
        self.mark = residual - self._notable * scale
        self.improved_at, self.unimproved_checks = self.nfev, 0
        return True

    def update(
        self,
        z: Tensor,
        figures: Figures,
        tolerance: Tolerance,
        retreating: Array | None = None,
        *,
        all_rows: bool = True,
    ) -> bool:
        """Take in the figures of ``z``, and say whether that ended rows.

        The rows ``retreating`` go on although their image is not finite. ``all_rows``: whether f saw all rows.
        """
        active, nfev = self.active, self.nfev
        done, finite = tolerance.done(figures) & active, figures.finite
        if self.together and np.count_nonzero(done) < self.remaining:
            done[:] = False
        # A row that meets the tolerance ends there, even when an earlier absolute residual was smaller.
        best = done | (active & self._better(figures.merit))
        self._take(z, best)
        self.residual, self.scale, self.merit = np.where(best, figures, (self.residual, self.scale, self.merit))
        self.unconfirmed[best] = not all_rows
        # Where each leaf has a tolerance of its own, residuals are now of this leaf and now of that.
        improved = best & (figures.residual < self.mark) if figures.merit is figures.residual else best
        with np.errstate(invalid="ignore"):
            self.mark = np.where(improved, self.residual - self._notable * self.scale, self.mark)
        self.improved_at = np.where(improved, nfev, self.improved_at)
        self.unimproved_checks = np.where(improved, 0, self.unimproved_checks + 1)
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
        """Which rows have another residual now, when f has seen all rows, than when their state became the best.

        Compared are rows that are evaluated at that state: those that have converged, and of the unconfirmed ones those
        that have ended, or all if every row is evaluated at its best state (``at_best``). If none of these has another
        residual, they are confirmed.
        """
        known = (self.status == Status.CONVERGED) | (self.unconfirmed & (~self.active | at_best))
        with np.errstate(invalid="ignore"):
            same = np.abs(figures.residual - self.residual) <= ROUNDINGS * self._rounding * self.scale
        moved = known & ~same
        if not np.count_nonzero(moved):
            self.unconfirmed &= ~known
        return moved

    def reopen(self, rows: Array) -> None:
        """The ``rows`` go on from where they are. Their figures are forgotten."""
        self.status[rows] = ACTIVE
        self.active = self.active | rows
        self.remaining = int(np.count_nonzero(self.active))
        self.residual, self.scale, self.merit, self.mark = np.where(
            rows, np.inf, (self.residual, self.scale, self.merit, self.mark)
        )
        self.improved_at = np.where(rows, self.nfev, self.improved_at)
        self.unimproved_checks = np.where(rows, 0, self.unimproved_checks)
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

    def _take(self, z: Tensor, best: Array) -> None:
        """The rows ``best`` of ``z`` become their best states. Those that have ended stand in ``z`` unchanged."""
        count = np.count_nonzero(best)
        if count == self.remaining:
            self.z, self._own = z, False
        elif count:
            index = tensor_like(z, np.flatnonzero(best))
            if self._own:
                self.z.index_copy_(0, index, z.index_select(0, index))
            else:
                self.z, self._own = self.z.index_copy(0, index, z.index_select(0, index)), True

    def result(self, otherwise: Status = Status.MAX_EVALS, state: Any = None) -> LoopResult:
        """What is known by now; ``otherwise`` is said of rows that have not ended, ``state`` is the solver's."""
        residual, scale = figures_like(self.z, np.stack((self.residual, self.scale)))
        status = tensor_like(self.z, np.where(self.active | self.unconfirmed, otherwise, self.status))
        evals = tensor_like(self.z, np.where(self.active, self.nfev, self.evals))
        trace = figures_like(self.z, np.stack(self.trace)) if self.trace else None
        return LoopResult(self.z, residual, scale, status, evals, self.nfev, trace, coupled=self.together, state=state)


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


def tensor_like(z: Tensor, array: Array) -> Tensor:
    """``array`` where ``z`` is, without waiting for the device."""
    return torch.from_numpy(array).to(z.device, non_blocking=True)


def figures_like(z: Tensor, figures: Array) -> Tensor:
    """A copy, in at least float32: float64 only where ``z`` has it. Who is shown figures may write to them."""
    dtype = torch.promote_types(z.dtype, torch.float32)
    # Not by torch.tensor: where torch.compile traces this, an array is a tensor, and a copy in that way warns.
    # NumPy would warn of what leaves the range of float32.
    return torch.from_numpy(figures.astype(np.float64)).to(dtype).to(z.device, non_blocking=True)
