"""What tests of gradients share: ``z = tanh(A z + b)``, solved, and its oracle."""

from __future__ import annotations

import torch

import fixpoint
from fixpoint import IFT

D = torch.float64
TIGHT = {"rtol": 1e-13, "max_evals": 300}
EXACT = IFT(rtol=1e-13, max_evals=300)
Z0 = torch.zeros(2, 3, dtype=D)


def f(z, A, b):
    return torch.tanh(z @ A.T + b)


def solved(A, b, *, backward=EXACT, **options):
    return fixpoint.solve(f, Z0, (A, b), backward=backward, **{**TIGHT, **options}).value


def iterated(A, b):
    """The oracle: plain iteration long past convergence, differentiated by PyTorch as it stands."""
    z = Z0
    for _ in range(80):
        z = f(z, A, b)
    return z


def squared(value):
    return lambda *arguments: value(*arguments).square().sum()


def gradients(value, *leaves):
    """Of the sum of squares."""
    return torch.autograd.grad(value.square().sum(), leaves)
