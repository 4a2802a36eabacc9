"""The benchmark of evaluations counts what it says."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

import fixpoint
from benchmarks.evaluations import Counted, ours


@dataclass(frozen=True)
class Affine:
    """z -> rate z + 1 from zeros, a rate for each row."""

    rates: Tensor

    @property
    def z0(self) -> Tensor:
        return torch.zeros(len(self.rates), 4)

    def __call__(self, z: Tensor) -> Tensor:
        return self.rates[:, None] * z + 1


def test_the_worst_row_counts_at_the_first_point_that_meets_the_tolerance() -> None:
    f = Counted(Affine(torch.tensor([0.1, 0.5])))
    ours(fixpoint.Picard())(f)
    # Relative to f's value, the residual of point n is rate^(n - 1) (1 - rate): 1e-5 lies between 0.5^17 and 0.5^16.
    assert f.done_at.tolist() == [6, 17]
    assert f.evaluations == 17


def test_an_iteration_that_overflows_has_not_met_the_tolerance() -> None:
    f = Counted(Affine(torch.tensor([3.0])))
    z = f.problem.z0
    while torch.isfinite(z).all():
        z = f(z)
    assert math.isinf(f.evaluations)
