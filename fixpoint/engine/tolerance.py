"""When a row is done, and how that is said."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array = npt.NDArray[Any]
OnFailure = Literal["warn", "raise", "ignore"]


class Status(enum.IntEnum):
    """Why a row ended. ``Solution.status`` holds one per row, as integers that compare with these.

    Example:
        >>> import torch, fixpoint
        >>> sol = fixpoint.solve(torch.cos, torch.ones(2), rtol=1e-3)
        >>> bool((sol.status == fixpoint.Status.CONVERGED).all())
        True
    """

    CONVERGED = 0
    MAX_EVALS = 1
    STAGNATED = 2
    NON_FINITE = 3
    STOPPED = 4

    @property
    def advice(self) -> str:
        """What to change when a row ends like this."""
        return _ADVICE[self]


_ADVICE = {
    Status.CONVERGED: "nothing",
    Status.MAX_EVALS: "raise max_evals, loosen rtol or atol, or try another solver",
    Status.STAGNATED: "the tolerance lies below rounding: loosen rtol or atol, or use a wider dtype",
    Status.NON_FINITE: "f returned NaN or infinity: start nearer the solution, or damp the solver",
    Status.STOPPED: "a callback stopped the solve",
}


class ConvergenceWarning(UserWarning):
    """Some rows did not converge (``on_failure="warn"``), or an adjoint did not."""


class ConvergenceError(RuntimeError):
    """Some rows did not converge (``on_failure="raise"``). ``solution`` holds what was found all the same."""

    def __init__(self, message: str, solution: object) -> None:
        super().__init__(message)
        self.solution = solution


def row_norm(x: Tensor) -> Tensor:
    """Euclidean norm of each row of ``(rows, dim)``, summed in at least float32."""
    return torch.linalg.vector_norm(x, dim=1, dtype=None if x.dtype in _WIDE else torch.float32)


_WIDE = (torch.float32, torch.float64)


def _difference_norm(z: Tensor, fz: Tensor) -> Tensor:
    """``row_norm(fz - z)``; of a big state on the CPU block by block, in a scratch that stays in its cache.

    A fresh tensor as large as the state can cost the operating system several times what the arithmetic costs.
    """
    if z.numel() <= _BLOCK or z.device.type != "cpu":
        return row_norm(fz - z)
    width = min(z.shape[1], _BLOCK)
    height = _BLOCK // width
    scratch = z.new_empty(height, width)

    def norms(ours: Tensor, theirs: Tensor) -> Tensor:
        return row_norm(torch.sub(ours, theirs, out=scratch[: ours.shape[0], : ours.shape[1]]))

    strips = zip(fz.split(width, dim=1), z.split(width, dim=1), strict=True)
    parts = [torch.cat([*map(norms, ours.split(height), theirs.split(height))]) for ours, theirs in strips]
    return parts[0] if len(parts) == 1 else row_norm(torch.stack(parts, dim=1))


def _scaled_norm(x: Tensor) -> Tensor:
    """``row_norm`` in float64, of rows divided by their largest entry: no square leaves the range of float64."""
    largest = x.abs().amax(dim=1, keepdim=True)
    unit = torch.where(largest > 0, largest, 1)
    return (unit * torch.linalg.vector_norm(x / unit, dim=1, keepdim=True)).squeeze(1)


_BLOCK = 1 << 18  # entries
# A norm no larger than this may have lost squares below the range of its dtype; above the inverse, beyond it.
_LOW = {dtype: torch.finfo(dtype).tiny ** 0.4 for dtype in _WIDE}


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """A row is done when ``norm(f(z) - z) <= atol + rtol * norm(f(z))``.

    ``rounding`` is the relative rounding of f where that is coarser than the state's. It alters no tolerance: it says
    where a row that gets no better has stagnated.
    """

    rtol: float
    atol: float
    norm: Callable[[Tensor], Tensor] = row_norm
    rounding: float = 0.0

    def __post_init__(self) -> None:
        for name in ("rtol", "atol"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be at least 0, found {getattr(self, name)}")

    def measure(self, z: Tensor, fz: Tensor, among: Array | bool = True) -> Array:
        """``norm(fz - z)`` and ``norm(fz)`` as float64 ``(2, rows)`` on the host, brought there in one transfer.

        Rows whose squares leave the range of their dtype are summed again in float64; of the rows outside the mask
        ``among`` nobody wants to know.
        """
        if torch.is_grad_enabled():
            z, fz = z.detach(), fz.detach()
        if self.norm is not row_norm:
            return torch.stack((self.norm(fz - z), self.norm(fz))).detach().cpu().double().numpy()
        both = torch.stack((_difference_norm(z, fz), row_norm(fz)))
        return _repaired(both.cpu().numpy().astype(np.float64), z, fz, _LOW[both.dtype], among)

    def satisfied(self, residual: Array, scale: Array) -> Array:
        """Which rows are done. False for NaN and infinity."""
        limit = self.atol + self.rtol * scale if self.rtol else self.atol  # 0 times infinity would be NaN
        return (residual <= limit) & np.isfinite(residual)


def _repaired(figures: Array, z: Tensor, fz: Tensor, low: float, among: Array | bool) -> Array:
    """``figures`` with those outside ``(low, 1 / low)`` computed anew: squares may have under- or overflowed there."""
    doubtful = (figures <= low) | (figures >= 1 / low)
    if not np.count_nonzero(doubtful) or z.numel() == 0:
        return figures
    rows = np.flatnonzero(doubtful.any(axis=0) & among)
    if rows.size:
        index = torch.from_numpy(rows).to(z.device)
        ours, theirs = (x.index_select(0, index).cpu().double() for x in (fz, z))
        figures[:, rows] = torch.stack((_scaled_norm(ours - theirs), _scaled_norm(ours))).numpy()
    return figures
