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

from fixpoint.engine.norms import vecdot
from fixpoint.engine.private import transforming

Small = Any  # a NumPy array or a tensor, (rows, ...)


class NumPyArithmetic:
    """Small numbers as NumPy arrays."""

    # Static, or they would be bound as methods.
    where: Any = staticmethod(np.where)
    maximum: Any = staticmethod(np.maximum)
    minimum: Any = staticmethod(np.minimum)
    amax: Any = staticmethod(np.amax)
    sqrt: Any = staticmethod(np.sqrt)
    length: Any = staticmethod(np.sqrt)  # from a sum of squares
    hypot: Any = staticmethod(np.hypot)
    concatenate: Any = staticmethod(np.concatenate)
    zeros_like: Any = staticmethod(np.zeros_like)
    reciprocal: Any = staticmethod(np.reciprocal)
    readable = True  # whether the host can read them without waiting

    def plus(self, x: Small, y: Small, times: float) -> Small:
        """``x + times y``."""
        return x + times * y

    def minus_product(self, x: Small, y: Small, z: Small) -> Small:
        """``x - y z``."""
        return x - y * z

    def less(self, x: Small, y: Small, z: Small) -> Small:
        """``x - y z^T``, products of matrices ``(rows, k, n)``."""
        return x - vecdot(y[:, :, None], z[:, None])  # a product of such flat matrices is slower

    def take(self, x: Small) -> Small:
        """The numbers in a small tensor, if it is none yet; they share its memory."""
        return x.numpy() if isinstance(x, Tensor) else x

    def own(self, x: Small) -> Small:
        """Numbers that an earlier step kept, as this step wants them: autograd may come and go at any step."""
        return x.detach().numpy() if isinstance(x, Tensor) else x

    def tensor(self, x: Small) -> Tensor:
        """The tensor of these numbers; it shares their memory."""
        return torch.from_numpy(x)

    def like(self, x: Small, y: Small) -> Small:
        """``x`` in the dtype of ``y``."""
        return x.astype(y.dtype, copy=False)

    def detach(self, x: Small) -> Small:
        """``x`` without its gradient."""
        return x

    def outside(self, x: Small, low: float, high: float) -> Small:
        """Where not ``low <= x <= high``; where x is NaN, too."""
        return ~((x >= low) & (x <= high))

    def put_where(self, mask: Small, value: float, x: Small) -> Small:
        """``x``, but ``value`` where the mask is true."""
        return np.where(mask, value, x)

    def put(self, x: Small, rows: Small, places: Small, value: Small) -> Small:
        """``x`` ``(rows, n)`` with ``value``, a number or one each, at a place of each row; ``x`` may be written to."""
        x[rows, places] = value
        return x

    def put_row(self, x: Small, place: int, value: Small) -> Small:
        """``x`` ``(rows, n, n)``, written to: ``value`` ``(rows, k)`` is the start of a row of each matrix."""
        x[:, place, : value.shape[1]] = value
        return x

    def copy(self, x: Small) -> Small:
        """``x`` for ``put`` to write to; tensors are not written to."""
        return x.copy()

    def least_needed(self, x: Small, needed: Small, rows: Small, most: int) -> tuple[Small, Small]:
        """``x`` ``(rows, n)``, and where each row of ``needed`` ``(rows, n)`` is least; where it is NaN, if it is.

        Where all are above zero, that is a new place as long as ``n < most``: then each row of ``x`` has an infinity
        more.
        """
        place = needed.argmin(1)
        if x.shape[1] == most:
            return x, place
        full = needed[rows, place] > 0
        if not np.count_nonzero(full):
            return x, place
        place = np.where(full, x.shape[1], place)
        return np.concatenate((x, np.full((len(x), 1), np.inf, x.dtype)), 1), place

    def whole(self, x: Small, most: int) -> Small:
        """``x`` ``(rows, n)`` with all the places that there ever are, where shapes must not change; new: infinity."""
        return x

    def writable(self, x: Small, value: Small) -> Small:
        """``x`` to write ``value`` to: autograd may have saved a tensor, so that is copied."""
        return x

    def identity(self, like: Small, n: int) -> Small:
        """``(n, n)``, in the dtype of ``like``."""
        return np.eye(n, dtype=like.dtype)

    def holds(self, mask: Small) -> bool:
        """Whether ``mask`` ``(rows,)`` is known to be true for every row."""
        return np.count_nonzero(mask) == len(mask)

    def absent(self, mask: Small) -> bool:
        """Whether ``mask`` is known to be false everywhere."""
        return not np.count_nonzero(mask)

    def solve_triangular(self, matrix: Small, target: Small, *, upper: bool, unit: bool = False) -> Small:
        """``x`` ``(rows, n)`` with ``matrix x = target``, where ``matrix`` ``(rows, n, n)`` is triangular.

        By substitution, without pivoting: a singular system gives infinity or NaN in its own row, and no error.
        ``unit``: the diagonal is one, whatever stands there.
        """
        matrix, target = torch.from_numpy(matrix), torch.from_numpy(target)
        return TORCH.solve_triangular(matrix, target, upper=upper, unit=unit).numpy()

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
    concatenate = staticmethod(torch.concatenate)
    zeros_like = staticmethod(torch.zeros_like)
    reciprocal = staticmethod(torch.reciprocal)
    readable = False

    def length(self, x: Small) -> Small:
        # Of zero with a gradient of zero: rows that are solved have zeros, and infinity times zero would be NaN.
        return torch.where(x > 0, torch.where(x > 0, x, 1).sqrt(), x.detach().sqrt())

    def hypot(self, x: Small, y: Small) -> Small:
        zero = (x == 0) & (y == 0)
        return torch.where(zero, 0, torch.hypot(torch.where(zero, 1, x), y))

    def plus(self, x: Small, y: Small, times: float) -> Small:
        return torch.add(x, y, alpha=times)

    def minus_product(self, x: Small, y: Small, z: Small) -> Small:
        return torch.addcmul(x, y, z, value=-1)

    def less(self, x: Small, y: Small, z: Small) -> Small:
        return x.baddbmm(y, z.transpose(1, 2), alpha=-1)

    def take(self, x: Small) -> Small:
        return x

    def own(self, x: Small) -> Small:
        return x if isinstance(x, Tensor) else torch.from_numpy(x)

    def tensor(self, x: Small) -> Tensor:
        return x

    def detach(self, x: Small) -> Small:
        return x.detach()

    def put(self, x: Small, rows: Small, places: Small, value: Small) -> Small:
        return x.scatter(1, places[:, None], value[:, None] if isinstance(value, Tensor) else value)

    def least_needed(self, x: Small, needed: Small, rows: Small, most: int) -> tuple[Small, Small]:
        return x, needed.argmin(1)  # all places are there, since ``whole``

    def whole(self, x: Small, most: int) -> Small:
        return x if x.shape[1] == most else torch.nn.functional.pad(x, (0, most - x.shape[1]), value=float("inf"))

    def put_row(self, x: Small, place: int, value: Small) -> Small:
        x.select(1, place)[:, : value.shape[1]].copy_(value)  # an index in brackets is compiled again for each place
        return x

    def copy(self, x: Small) -> Small:
        return x

    def writable(self, x: Small, value: Small) -> Small:
        if not torch.compiler.is_compiling() and transforming():
            return x + torch.zeros_like(value).sum()  # under vmap, ``value`` may have a batch that ``x`` has not
        return x.clone()

    def identity(self, like: Small, n: int) -> Small:
        return torch.eye(n, dtype=like.dtype, device=like.device)

    def holds(self, mask: Small) -> bool:
        return False  # nothing is known of a tensor without waiting for its device

    def absent(self, mask: Small) -> bool:
        return False

    def like(self, x: Small, y: Small) -> Small:
        return x.to(y.dtype)

    def outside(self, x: Small, low: float, high: float) -> Small:
        return x.clamp(low, high) != x

    def put_where(self, mask: Small, value: float, x: Small) -> Small:
        return x.masked_fill(mask, value)

    def solve_triangular(self, matrix: Small, target: Small, *, upper: bool, unit: bool = False) -> Small:
        return torch.linalg.solve_triangular(matrix, target[..., None], upper=upper, unitriangular=unit)[..., 0]

    def quiet(self) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext()


NUMPY, TORCH = NumPyArithmetic(), TorchArithmetic()


def arithmetic(*xs: Tensor, kept: Small = None) -> NumPyArithmetic:
    """NumPy's for what lies in the host's memory, torch's elsewhere and while autograd, torch.func or a compiler trace.

    ``xs`` are the tensors that the numbers come from; ``kept`` are numbers that an earlier step kept. Once they are
    tensors they stay tensors.
    """
    if isinstance(kept, Tensor) or torch.compiler.is_compiling() or transforming():
        return TORCH
    for x in xs:
        if not x.is_cpu or x.requires_grad:
            return TORCH
    return NUMPY
