"""When a row is done, and how that is said."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

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

    @property
    def advice(self) -> str:
        """What to change when a row ends like this."""
        return _ADVICE[self]


_ADVICE = {
    Status.CONVERGED: "nothing",
    Status.MAX_EVALS: "raise max_evals, loosen rtol or atol, or try another solver",
    Status.STAGNATED: "the tolerance lies below rounding: loosen rtol or atol, or use a wider dtype",
    Status.NON_FINITE: "f returned NaN or infinity: start nearer the solution, or damp the solver",
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
    return torch.linalg.vector_norm(x, dim=1, dtype=torch.promote_types(x.dtype, torch.float32))


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """A row is done when ``norm(f(z) - z) <= atol + rtol * norm(f(z))``."""

    rtol: float
    atol: float
    norm: Callable[[Tensor], Tensor] = row_norm

    def __post_init__(self) -> None:
        for name in ("rtol", "atol"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be at least 0, found {getattr(self, name)}")

    @torch.no_grad()
    def measure(self, z: Tensor, fz: Tensor) -> tuple[Tensor, Tensor]:
        """``(norm(fz - z), norm(fz))``, each ``(rows,)``."""
        return self.norm(fz - z), self.norm(fz)

    def satisfied(self, residual: Tensor, scale: Tensor) -> Tensor:
        """Which rows are done. False for NaN."""
        return (residual <= self.atol + self.rtol * scale) & torch.isfinite(residual)
