"""When a row is done, and how that is said."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fixpoint.engine.norms import Array, Meanwhile, residual_norms, residual_norms_on_host, row_norm, to_host

OnFailure = Literal["warn", "raise", "ignore"]


class Status(enum.IntEnum):
    """Why a row ended. ``Solution.status`` holds one per row, as integers that compare with these.

    ``Status(int(s)).name`` is the name of an entry ``s``, ``Status(int(s)).advice`` what to change.

    - CONVERGED: the row met the tolerance.
    - MAX_EVALS: the evaluations granted were spent.
    - STAGNATED: the residual is at rounding, and does not fall to the tolerance.
    - NON_FINITE: f returned NaN or infinity for the row.
    - STOPPED: the callback ended the solve.

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
    Status.STOPPED: "the callback returned true: return nothing to go on",
}
# For the adjoint rows of a backward solve, whose knobs are those of the rule.
ADJOINT_ADVICE = {
    Status.MAX_EVALS: "raise IFT(max_evals=...), loosen IFT(rtol=...), or take a rule without a solve (Phantom)",
    Status.STAGNATED: "the tolerance lies below rounding: loosen IFT(rtol=...)",
    Status.NON_FINITE: "the incoming gradient, or its product with the Jacobian at the solution, is not finite",
}


class ConvergenceWarning(UserWarning):
    """Some rows did not converge (``on_failure="warn"``), or an adjoint did not.

    By Python's default filter a training says it once for each cause, whatever the number of rows; with
    ``warnings.simplefilter("always")`` at every solve.

    Example:
        See :class:`fixpoint.Status`, whose advice the warning gives.
    """


class ConvergenceError(RuntimeError):
    """Some rows did not converge (``on_failure="raise"``). ``solution`` holds what was found all the same.

    Example:
        >>> import torch, fixpoint
        >>> try:
        ...     fixpoint.solve(torch.exp, torch.zeros(2, 1), solver=fixpoint.Picard(), on_failure="raise")
        ... except fixpoint.ConvergenceError as error:
        ...     print(error.solution.converged)
        tensor([False, False])
    """

    def __init__(self, message: str, solution: object) -> None:
        super().__init__(message)
        self.solution = solution

    def __reduce__(self) -> tuple[Any, ...]:
        # Errors are rebuilt from args, which is the message alone. A pool of processes hangs over one that cannot be.
        return type(self), (*self.args, self.solution), self.__dict__


# The same row, evaluated in the same batch or in another one, may have images that differ by so many roundings.
ROUNDINGS = 64.0


def same_images(found: Tensor, expected: Tensor, rounding: float) -> Tensor:
    """Which rows of two images ``(rows, dim)`` are the same but for rounding: bool ``(rows,)``; NaN never is.

    ``rounding`` is the relative rounding of f, where that is coarser than that of the dtype.
    """
    limit = ROUNDINGS * max(torch.finfo(expected.dtype).eps, rounding)
    return (found - expected).abs().amax(dim=1) <= limit * expected.abs().amax(dim=1)


# A limit of a leaf: residuals up to 1e108 are told apart by how often they hold it.
_LEAST = 1e-200
_ABOVE = float(np.nextafter(1.0, 2.0))  # the merit of a leaf that just misses its limit
# Of a row that has become this small beside its start, times rtol, nothing is left.
NOTHING = 1e-16


class Figures(NamedTuple):
    """What was measured of a state, per row, as float64 ``(rows,)`` on the host.

    Attributes:
        residual: Norm of ``f(z) - z``; of the leaf farthest from its tolerance, where each has to meet its own.
        scale: Norm of ``f(z)``, of the same leaf.
        merit: What tells the better of two states of a row: the smaller.
    """

    residual: Array
    scale: Array
    merit: Array

    @property
    def finite(self) -> Array:
        """Of which rows residual and scale are finite."""
        return np.isfinite(self.residual) & np.isfinite(self.scale)


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """A row is done when ``norm(f(z) - z) <= atol + rtol * norm(f(z))``.

    Attributes:
        rtol, atol: Numbers, or one for each row ``(rows,)``.
        norm: Takes rows ``(rows, dim)`` to ``(rows,)``; None is the Euclidean norm.
        leaves: Lengths of the parts of a row that must each meet the tolerance; None: the row as a whole.
        rounding: The relative rounding of f where that is coarser than the state's. It alters no tolerance: it says
            where a row that gets no better has stagnated.

    Example:
        See :func:`fixpoint.solve`, whose ``rtol``, ``atol`` and ``norm`` make one.
    """

    rtol: float | Array
    atol: float | Array
    norm: Callable[[Tensor], Tensor] | None = None
    leaves: tuple[int, ...] | None = None
    rounding: float = 0.0

    def __post_init__(self) -> None:
        for name in ("rtol", "atol"):
            value = getattr(self, name)
            if not (value >= 0 if isinstance(value, float | int) else np.all(value >= 0)):
                raise ValueError(f"{name} must be at least 0, found {value}")

    def limit(self, scale: Array) -> Array | float:
        """The largest residual that is done, where ``norm(f(z)) = scale``, ``(..., rows)``."""
        atol, rtol = for_rows(self.atol, scale.shape[-1]), for_rows(self.rtol, scale.shape[-1])
        if not isinstance(rtol, np.ndarray) or rtol.ndim == 0:
            return atol + rtol * scale if rtol else atol  # 0 times infinity would be NaN
        with np.errstate(invalid="ignore"):
            return np.where(np.asarray(rtol) > 0, atol + rtol * scale, atol)

    def done(self, figures: Figures) -> Array:
        """Which rows are done, by what was measured. False for NaN and infinity."""
        return self.met(figures) & figures.finite

    def met(self, figures: Figures) -> Array:
        """The same, but of rows that are not finite it may be true."""
        return figures.merit <= 1 if self.leaves is not None else figures.residual <= self.limit(figures.scale)

    def started(self, z: Tensor, fz: Tensor, figures: Figures) -> Tolerance:
        """The same for a solve that starts at ``z`` with the image ``fz``: rows of which nothing is left are done, too.

        A row that tends to zero never meets a relative tolerance, for its residual and its scale fall alike. So the
        absolute tolerance is at least ``1e-16 rtol`` times the norm at the start: the smaller one of z and f(z).
        """
        if not np.any(self.rtol):
            return self
        z, fz = z.detach(), fz.detach()
        if self.leaves is None:
            size, scale = to_host(row_norm(z) if self.norm is None else self.norm(z)), figures.scale
        else:
            pairs = zip(z.split(self.leaves, dim=1), fz.split(self.leaves, dim=1), strict=True)
            norms = torch.stack([torch.stack([row_norm(x) for x in pair]) for pair in pairs], dim=1)
            size, scale = to_host(norms)
        start = np.minimum(size, scale)
        if not np.count_nonzero(start):  # as from zeros: the floor would be 0
            return self
        rtol = for_rows(self.rtol, len(z))
        floor = NOTHING * np.where(np.isfinite(rtol), rtol, 0) * np.where(np.isfinite(start), start, 0)
        return replace(self, atol=np.maximum(for_rows(self.atol, len(z)), floor))

    def measure(self, z: Tensor, fz: Tensor, among: Array | bool = True, meanwhile: Meanwhile = None) -> Figures:
        """Figures of the states ``z`` with the images ``fz``, both ``(rows, dim)``; they come to the host at once.

        Rows whose squares leave the range of their dtype are summed again in float64; of the rows outside the mask
        ``among`` nobody wants to know. For ``meanwhile`` see ``to_host``.
        """
        if z.is_cpu and self.leaves is None and self.norm is None:  # the usual case: no list, and no tensor more
            residual, scale = residual_norms_on_host(z, fz, among)
            return Figures(residual, scale, residual)
        if torch.is_grad_enabled():
            z, fz = z.detach(), fz.detach()
        if self.leaves is not None:
            return self._worst_leaf(z, fz, meanwhile)
        if self.norm is not None:
            residual, scale = to_host(torch.stack((self.norm(fz - z), self.norm(fz))), meanwhile)
        else:
            residual, scale = residual_norms([(z, fz)], among, meanwhile)[0]
        return Figures(residual, scale, residual)

    def _worst_leaf(self, z: Tensor, fz: Tensor, meanwhile: Meanwhile) -> Figures:
        assert self.leaves is not None
        parts = list(zip(z.split(self.leaves, dim=1), fz.split(self.leaves, dim=1), strict=True))
        residual, scale = np.stack(residual_norms(parts, True, meanwhile), axis=1)
        with np.errstate(all="ignore"):
            # A limit of 0 is met by 0 alone, and tells the better of two states all the same.
            limit = self.limit(scale)
            merit = np.where(residual == 0, 0, residual / np.maximum(limit, _LEAST))
            merit = np.where(residual > limit, np.maximum(merit, _ABOVE), merit)  # below _LEAST as well
        merit = np.where(np.isnan(merit) | ~np.isfinite(residual), np.inf, merit)
        worst = merit.argmax(axis=0), np.arange(len(fz))
        return Figures(residual[worst], scale[worst], merit[worst])


def for_rows(value: float | Array, rows: int) -> Any:
    """A tolerance ``(..., rows)`` for so many rows; under ``torch.vmap`` the rows of a solve come several times."""
    if isinstance(value, np.ndarray) and value.ndim and 0 < value.shape[-1] < rows:
        return np.tile(value, rows // value.shape[-1])
    return value
