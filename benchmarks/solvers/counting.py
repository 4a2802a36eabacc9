"""The one way in which every solver is counted: from outside, by the map that it is given."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from benchmarks.solvers.cases import Case

# Norms of a float32 state summed in another order differ by this much; a solver must not fail for it.
_ROUNDING = 1e-6


class EndedError(Exception):
    """Raised by the map when a solver asks for more: the case is solved, or its evaluations are spent."""


def solves(z: Tensor, fz: Tensor, rtol: float) -> bool:
    """Whether ``||fz - z|| <= rtol ||fz||`` for one row, with norms in float64. False unless both are finite."""
    size = float(torch.linalg.vector_norm(fz, dtype=torch.float64))
    residual = float(torch.linalg.vector_norm(fz - z, dtype=torch.float64))
    return math.isfinite(size) and residual <= rtol * size * (1 + _ROUNDING)


class Counted:
    """The map of cases that differ in tolerance alone. It notes the first evaluation at whose point each is solved.

    Args:
        cases: Loosest first; their map, start and limit are the first one's.

    Attributes:
        case: The tightest.
        calls: Evaluations so far.
        solved_at: For each case the number of the first evaluation that solved it, as far as they are solved.
    """

    def __init__(self, cases: Sequence[Case]) -> None:
        self.cases, self.case = cases, cases[-1]
        self.calls = 0
        self.solved_at: list[int] = []

    def __call__(self, z: Tensor) -> Tensor:
        """``f(z)`` for ``z`` of shape ``(1, dim)``.

        Raises:
            EndedError: If every case was solved at an earlier call, or no evaluation is left.
        """
        if len(self.solved_at) == len(self.cases) or self.calls == self.case.max_evals:
            raise EndedError
        fz = self.case.f(z)
        self.calls += 1
        while len(self.solved_at) < len(self.cases) and solves(z, fz, self.cases[len(self.solved_at)].rtol):
            self.solved_at.append(self.calls)
        return fz

    def numpy(self, x: np.ndarray) -> np.ndarray:
        """``f`` on one row as an array ``(dim,)``, in the case's dtype whatever the dtype of ``x``."""
        z = torch.tensor(x, dtype=self.case.z0.dtype)
        return self(z[None])[0].numpy()
