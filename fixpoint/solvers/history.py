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
        lines: Each as ``(rows, 1, dim)``; views too.
        rows: All of them as ``(rows, count, dim)``; a view too.
    """

    def __init__(self, states: Tensor) -> None:
        self.states = states
        self.slots = states.unbind(0)
        self.lines = tuple(slot[:, None] for slot in self.slots)
        self.rows = states.transpose(0, 1)
        self._columns = states.permute(1, 2, 0)
        self._column = self._columns.split(1, dim=2)

    @classmethod
    def empty(cls, count: int, z: Tensor, dtype: torch.dtype) -> History:
        """Zeros for ``count`` states like ``z`` ``(rows, dim)``."""
        return cls(torch.zeros(count, *z.shape, dtype=dtype, device=z.device))

    def put(self, slot: int, operation: Callable[..., Tensor], *operands: Tensor) -> History:
        """Write ``operation(*operands, out=...)`` at ``slot``; the history to go on with is returned."""
        if recording(self.states, *operands):
            return self._with(slot, operation(*operands))
        operation(*operands, out=self.slots[slot])
        return self

    def _with(self, slot: int, value: Tensor) -> History:
        value = value.to(self.states.dtype)
        return History(torch.cat((self.states[:slot], value[None], self.states[slot + 1 :])))

    def dots(self, xs: Tensor, among: slice | None = None) -> Tensor:
        """Products ``(rows, k, count)`` of ``xs`` ``(rows, k, dim)`` with these states, or those ``among`` them."""
        if self.states.dtype == xs.dtype:
            # Few rows on the left: the other order is several times slower on a CPU.
            return torch.bmm(xs, self._columns if among is None else self._columns[..., among])
        return torch.stack([(xs * past.to(xs.dtype)).sum(dim=2) for past in self.lines[among or slice(None)]], dim=2)

    def product(self, slot: int, other: int) -> Tensor:
        """Products ``(rows, 1, 1)`` of the states at two slots."""
        return torch.bmm(self.lines[slot], self._column[other])

    def subtract(self, x: Tensor, weights: Tensor, among: slice | None = None, *, in_place: bool = False) -> Tensor:
        """``x - sum_j weights_j state_j``, in ``x`` if so wished.

        ``x`` is ``(rows, 1, dim)``, ``weights`` ``(rows, 1, count)`` for these states, or for those ``among`` them.
        """
        if self.states.dtype == x.dtype:
            rows = self.rows if among is None else self.rows[:, among]
            return (x.baddbmm_ if in_place else x.baddbmm)(weights, rows, alpha=-1)
        for past, weight in zip(self.lines[among or slice(None)], weights.split(1, dim=2), strict=True):
            x = torch.addcmul(x, past.to(x.dtype), weight, value=-1, out=x if in_place else None)
        return x

    def reduce(self, slot: int, by: History, weights: Tensor) -> History:
        """Take ``sum_j weights_j by_j`` off the state at ``slot``; the history to go on with is returned."""
        if recording(self.states, by.states, weights):
            return self._with(slot, by.subtract(self.lines[slot], weights)[:, 0])
        by.subtract(self.lines[slot], weights, in_place=True)
        return self


def recording(*tensors: Tensor) -> bool:
    """Whether autograd watches, so that nothing may be written in place."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def small(x: Tensor) -> Small:
    """``x`` as an array that shares its memory, if it lies in the host's and nobody traces; else ``x`` itself."""
    if x.is_cpu and not x.requires_grad and not torch.compiler.is_compiling():
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


def copy(x: Small) -> Small:
    """``x`` anew."""
    return x.clone() if isinstance(x, Tensor) else x.copy()


def writable(x: Small) -> Small:
    """``x`` to write to: a tensor that autograd may have saved is copied first."""
    return x.clone() if isinstance(x, Tensor) else x


def namespace(x: Small) -> Any:
    """The module with ``where``, ``maximum`` and so on for ``x``: numpy or torch."""
    return torch if isinstance(x, Tensor) else np


def products(x: Small, y: Small) -> Small:
    """``(rows, 2, 2)``: all products of each row of ``x`` ``(rows, n)`` and that of ``y``."""
    both = namespace(x).concatenate((x[:, None], y[:, None]), 1)
    return both @ both.swapaxes(1, 2)


def everywhere(mask: Small) -> bool:
    """Whether ``mask`` is known to hold for all rows: of a tensor nothing is known without waiting for its device."""
    return not isinstance(mask, Tensor) and np.count_nonzero(mask) == len(mask)


def solve_lower(matrix: Small, target: Small) -> Small:
    """``x`` ``(rows, n)`` with ``matrix x = target``; ``matrix`` ``(rows, n, n)`` is lower triangular and regular.

    By substitution for arrays too: NumPy's solver exchanges rows, and raises for all where that makes one singular.
    """
    if isinstance(matrix, Tensor):
        return torch.linalg.solve_triangular(matrix, target[..., None], upper=False)[..., 0]
    return solve_lower(torch.from_numpy(matrix), torch.from_numpy(target)).numpy()


def silent(x: Small) -> contextlib.AbstractContextManager[object]:
    """No warnings about overflow and NaN from what is done with ``x``: they are told from the result."""
    return contextlib.nullcontext() if isinstance(x, Tensor) else np.errstate(all="ignore")


def require_history_dtype(dtype: object) -> None:
    """Raise unless ``dtype`` is None or a floating point type of torch."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"history_dtype must be a floating point torch.dtype or None, found {dtype!r}")
