"""Arithmetic on the few numbers that a solver keeps for each row, written once for NumPy and for torch.

A product of two states is one number a row, and a solver's small systems are made of such numbers. Where the states
lie in the host's memory, these numbers are NumPy arrays: an operation on a tiny tensor costs several on a tiny array.
Elsewhere (on a GPU, under autograd, while compiling) they stay tensors, so that no step waits for the device.

    xp = arithmetic(products)  # one of the two, for this step
    numbers = xp.take(products)
"""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

Small = Any  # a NumPy array or a tensor, (rows, ...)


class NumPyArithmetic:
    """Small numbers as NumPy arrays."""

    # Static, or they would be bound as methods.
    where: Any = staticmethod(np.where)
    maximum: Any = staticmethod(np.maximum)
    minimum: Any = staticmethod(np.minimum)
    amax: Any = staticmethod(np.amax)
    sqrt: Any = staticmethod(np.sqrt)
    hypot: Any = staticmethod(np.hypot)
    concatenate: Any = staticmethod(np.concatenate)
    zeros_like: Any = staticmethod(np.zeros_like)

    def take(self, x: Tensor) -> Small:
        """The numbers in a small tensor; they share its memory."""
        return x.numpy()

    def own(self, x: Small) -> Small:
        """Numbers that an earlier step kept, as this step wants them: autograd may come and go at any step."""
        return x.detach().numpy() if isinstance(x, Tensor) else x

    def tensor(self, x: Small) -> Tensor:
        """The tensor of these numbers; it shares their memory."""
        return torch.from_numpy(x)

    def detach(self, x: Small) -> Small:
        """``x`` without its gradient."""
        return x

    def copy(self, x: Small) -> Small:
        """``x`` in memory of its own."""
        return x.copy()

    def products(self, x: Small, y: Small) -> Small:
        """``(rows, 2, 2)``: all products of each row of ``x`` ``(rows, n)`` and that of ``y``."""
        both = self.concatenate((x[:, None], y[:, None]), 1)
        return both @ both.swapaxes(1, 2)

    def writable(self, x: Small) -> Small:
        """``x`` to write to: autograd may have saved a tensor, so that is copied."""
        return x

    def identity(self, like: Small, n: int) -> Small:
        """``(n, n)``, in the dtype of ``like``."""
        return np.eye(n, dtype=like.dtype)

    def holds(self, mask: Small) -> bool:
        """Whether ``mask`` ``(rows,)`` is known to be true for every row."""
        return np.count_nonzero(mask) == len(mask)

    def solve_triangular(self, matrix: Small, target: Small, *, upper: bool) -> Small:
        """``x`` ``(rows, n)`` with ``matrix x = target``, where ``matrix`` ``(rows, n, n)`` is triangular.

        By substitution, without pivoting: a singular system gives infinity or NaN in its own row, and no error.
        """
        return TORCH.solve_triangular(torch.from_numpy(matrix), torch.from_numpy(target), upper=upper).numpy()

    def quiet(self) -> contextlib.AbstractContextManager[object]:
        """No warnings about overflow and NaN: a step tells them from its results."""
        return np.errstate(all="ignore")


class TorchArithmetic(NumPyArithmetic):
    """The same on tensors."""

    where = staticmethod(torch.where)
    maximum = staticmethod(torch.maximum)
    minimum = staticmethod(torch.minimum)
    amax = staticmethod(torch.amax)
    sqrt = staticmethod(torch.sqrt)
    hypot = staticmethod(torch.hypot)
    concatenate = staticmethod(torch.concatenate)
    zeros_like = staticmethod(torch.zeros_like)

    def take(self, x: Tensor) -> Small:
        return x

    def own(self, x: Small) -> Small:
        return x if isinstance(x, Tensor) else torch.from_numpy(x)

    def tensor(self, x: Small) -> Tensor:
        return x

    def detach(self, x: Small) -> Small:
        return x.detach()

    def copy(self, x: Small) -> Small:
        return x.clone()

    def writable(self, x: Small) -> Small:
        return x.clone()

    def identity(self, like: Small, n: int) -> Small:
        return torch.eye(n, dtype=like.dtype, device=like.device)

    def holds(self, mask: Small) -> bool:
        return False  # nothing is known of a tensor without waiting for its device

    def solve_triangular(self, matrix: Small, target: Small, *, upper: bool) -> Small:
        return torch.linalg.solve_triangular(matrix, target[..., None], upper=upper)[..., 0]

    def quiet(self) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext()


NUMPY, TORCH = NumPyArithmetic(), TorchArithmetic()


def arithmetic(*xs: Tensor, kept: Small = None) -> NumPyArithmetic:
    """NumPy's for what lies in the host's memory, torch's elsewhere and while autograd or a compiler traces.

    ``xs`` are the tensors that the numbers come from; ``kept`` are numbers that an earlier step kept. Once they are
    tensors they stay tensors.
    """
    if isinstance(kept, Tensor) or torch.compiler.is_compiling():
        return TORCH
    for x in xs:
        if not x.is_cpu or x.requires_grad:
            return TORCH
    return NUMPY
