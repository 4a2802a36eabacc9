"""What solvers that remember have in common: the states they keep, and the small arithmetic on their products."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

# What is small is kept on the host where the host can read it for free: there, several operations on arrays of a few
# numbers cost what one on tensors does. NumPy and torch share what little is needed, so that it is written once.
Small = Any


class History:
    """A fixed number of states ``(count, rows, dim)``, written in place unless autograd watches.

    Attributes:
        slots: Each state ``(rows, dim)``; views, made once because making them costs as much as using them.
        rows: All of them as ``(rows, count, dim)``; a view too.
    """

    def __init__(self, states: Tensor) -> None:
        self.states = states
        self.slots = states.unbind(0)
        self._columns = states.permute(1, 2, 0)
        self.rows = states.transpose(0, 1)

    @classmethod
    def empty(cls, count: int, z: Tensor, dtype: torch.dtype) -> History:
        """Zeros for ``count`` states like ``z`` ``(rows, dim)``."""
        return cls(torch.zeros(count, *z.shape, dtype=dtype, device=z.device))

    def put(self, slot: int, operation: Callable[..., Tensor], *operands: Tensor) -> History:
        """Write ``operation(*operands, out=...)`` at ``slot``; the history to go on with is returned."""
        if recording(self.states, *operands):
            value = operation(*operands).to(self.states.dtype)
            return History(torch.cat((self.states[:slot], value[None], self.states[slot + 1 :])))
        operation(*operands, out=self.slots[slot])
        return self

    def first(self, count: int, start: int = 0) -> History:
        """The states from ``start`` to before ``count``."""
        return History(self.states[start:count])

    def dots(self, xs: Tensor) -> Tensor:
        """Products ``(rows, k, count)`` of ``xs`` ``(rows, k, dim)`` with these states."""
        if self.states.dtype == xs.dtype:
            # Few rows on the left: the other order is several times slower on a CPU.
            return torch.bmm(xs, self._columns)
        return torch.stack([(xs * past[:, None].to(xs.dtype)).sum(dim=2) for past in self.slots], dim=2)

    def subtract(self, x: Tensor, weights: Tensor, out: Tensor | None = None) -> Tensor:
        """``x - sum_j weights_j state_j`` for each row of ``x`` ``(rows, dim)``; ``out`` may be ``x``."""
        if self.states.dtype == x.dtype:
            if out is x:
                x[:, None].baddbmm_(weights[:, None], self.rows, alpha=-1)
                return x
            target = None if out is None else out[:, None]
            return torch.baddbmm(x[:, None], weights[:, None], self.rows, alpha=-1, out=target)[:, 0]
        for past, weight in zip(self.slots, weights.unbind(1), strict=True):
            x = torch.addcmul(x, past.to(x.dtype), weight[:, None], value=-1, out=out)
        return x


def recording(*tensors: Tensor) -> bool:
    """Whether autograd watches, so that nothing may be written in place."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def small(x: Tensor) -> Small:
    """``x`` as an array that shares its memory, if it lies in the host's and nobody traces; else ``x`` itself."""
    if x.device.type == "cpu" and not x.requires_grad and not torch.compiler.is_compiling():
        return x.numpy()
    return x


def large(x: Small) -> Tensor:
    """The tensor for what ``small`` gave."""
    return x if isinstance(x, Tensor) else torch.from_numpy(x)


def alike(x: Small, other: Small) -> Small:
    """``x`` as a tensor if ``other`` is one: autograd may come in at any step."""
    return large(x) if isinstance(other, Tensor) else x


def constant(x: Small) -> Small:
    """``x`` without its gradient."""
    return x.detach() if isinstance(x, Tensor) else x


def writable(x: Small) -> Small:
    """``x`` to write to: a tensor that autograd may have saved is copied first."""
    return x.clone() if isinstance(x, Tensor) else x


def namespace(x: Small) -> Any:
    """The module with ``where``, ``maximum`` and so on for ``x``: numpy or torch."""
    return torch if isinstance(x, Tensor) else np


def solve_lower(matrix: Small, target: Small) -> Small:
    """``x`` ``(rows, n)`` with ``matrix x = target``; ``matrix`` ``(rows, n, n)`` is lower triangular and regular."""
    if isinstance(matrix, Tensor):
        return torch.linalg.solve_triangular(matrix, target[..., None], upper=False)[..., 0]
    return np.linalg.solve(matrix, target[..., None])[..., 0]


def silent(x: Small) -> contextlib.AbstractContextManager[object]:
    """No warnings about overflow and NaN from what is done with ``x``: they are told from the result."""
    return contextlib.nullcontext() if isinstance(x, Tensor) else np.errstate(all="ignore")


def require_history_dtype(dtype: object) -> None:
    """Raise unless ``dtype`` is None or a floating point type of torch."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"history_dtype must be a floating point torch.dtype or None, found {dtype!r}")
