"""The states that a solver remembers, as one tensor."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fixpoint.engine.private import transforming


class History:
    """A fixed number of states ``(count, rows, dim)``, written in place unless autograd records.

    A solver state that holds a history is a value all the same, as long as a step writes only to slots that the state
    it was given does not read.

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

    def product(self, slot: int, x: Tensor) -> Tensor:
        """Products ``(rows, 1, 1)`` of ``x`` ``(rows, 1, dim)`` with the state at ``slot``."""
        return torch.bmm(x, self._column[slot])

    def subtract(self, x: Tensor, weights: Tensor, among: slice | None = None, *, in_place: bool = False) -> Tensor:
        """``x - sum_j weights_j state_j``; ``in_place`` overwrites ``x``, unless autograd records.

        ``x`` is ``(rows, 1, dim)``, ``weights`` ``(rows, 1, count)`` for these states, or for those ``among`` them.
        """
        in_place = in_place and not recording(self.states, x, weights)
        if self.states.dtype == x.dtype:
            rows = self.rows if among is None else self.rows[:, among]
            return (x.baddbmm_ if in_place else x.baddbmm)(weights, rows, alpha=-1)
        for past, weight in zip(self.lines[among or slice(None)], weights.split(1, dim=2), strict=True):
            x = torch.addcmul(x, past.to(x.dtype), weight, value=-1, out=x if in_place else None)
        return x


def recording(*tensors: Tensor) -> bool:
    """Whether autograd records or torch.func follows what is done with these, so that nothing is written in place."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return True
    return not torch.compiler.is_compiling() and transforming()


def require_history_dtype(dtype: object) -> None:
    """Raise unless ``dtype`` is None or a floating point type of torch."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"history_dtype must be a floating point torch.dtype or None, found {dtype!r}")
