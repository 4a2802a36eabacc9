"""What a solver does with whole states, for torch and for NumPy: of a small state on the host, NumPy asks less.

    states = states_for(xp, fz, dtype)  # one of the two, for this step
    z, fz = states.take(z), states.take(fz)

As in ``small``, both have the same methods, so that a solver is written once. A tensor and its array share memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fixpoint.solvers.history import recording
from fixpoint.solvers.small import NUMPY, NumPyArithmetic, Small

State = Any  # a NumPy array or a tensor

_SMALL = 1 << 16  # entries of a state; of a larger one, what a call does outweighs what calling costs
_DTYPES = (torch.float32, torch.float64)


class Columns:
    """A history ``(rows, n, dim)`` that autograd records: what was written stays, so no step needs a copy of it.

    Attributes:
        written: All that was written so far, each ``(rows, dim)``.
        at: Number of what stands at each place of each row now ``(rows, n)``.
    """

    def __init__(self, written: Sequence[Tensor], at: Tensor) -> None:
        self.written, self.at, self.dtype, self.shape = written, at, written[0].dtype, (*at.shape, written[0].shape[1])

    def dots(self, xs: Tensor) -> Tensor:
        """As ``TorchStates.dots``."""
        products = torch.stack([(xs * x[:, None].to(xs.dtype)).sum(dim=2) for x in self.written], dim=2)
        return products.gather(2, self.at[:, None].expand(-1, xs.shape[1], -1))

    def less(self, x: Tensor, weights: Tensor) -> Tensor:
        """As ``TorchStates.less``."""
        nothing = weights.new_zeros(*weights.shape[:2], len(self.written))
        at = self.at[:, None].expand_as(weights)
        for y, weight in zip(self.written, nothing.scatter_add(2, at, weights).unbind(2), strict=True):
            x = torch.addcmul(x, y[:, None].to(x.dtype), weight[..., None], value=-1)
        return x

    def write(self, places: Tensor, value: Tensor) -> Columns:
        """As ``TorchStates.write``."""
        return Columns([*self.written, value], self.at.scatter(1, places[:, None], len(self.written)))


class TorchStates:
    """Whole states as tensors."""

    def take(self, x: State) -> State:
        """A state, or numbers for each row, whatever an earlier step kept them as."""
        return torch.from_numpy(x) if isinstance(x, np.ndarray) else x

    def tensor(self, x: State) -> Tensor:
        """The tensor of a state."""
        return x

    def where(self, rows: Small, x: State, y: State) -> State:
        """``x`` in the rows of a mask ``(rows,)``, ``y`` in the others."""
        return torch.where(self.take(rows)[:, None], x, y)

    def differences(self, z: State, fz: State, g: State) -> State:
        """``(rows, 2, dim)``: the residual ``fz - z``, and how it differs from ``g``."""
        if recording(z, fz, g):
            now = fz - z
            return torch.stack((now, now - g), dim=1)
        both = fz.new_empty(2, *fz.shape)  # each of the two is contiguous: what is done to it in place needs that
        now, change = both.unbind()
        torch.sub(fz, z, out=now)
        torch.sub(now, g, out=change)
        return both.transpose(0, 1)

    def dots(self, xs: State, ys: State) -> State:
        """Products ``(rows, k, n)`` of ``xs`` ``(rows, k, dim)`` and ``ys`` ``(rows, n, dim)``."""
        if isinstance(ys, Columns):
            return ys.dots(xs)
        if xs.dtype == ys.dtype:
            return torch.bmm(xs, ys.transpose(1, 2))
        return torch.stack([(xs * y[:, None].to(xs.dtype)).sum(dim=2) for y in ys.unbind(1)], dim=2)

    def first(self, x: State, n: int) -> State:
        """The first ``n`` places of a history ``(rows, count, dim)``."""
        return x if n == x.shape[1] else x[:, :n]

    def less(self, x: State, weights: State, ys: State) -> State:
        """``x - weights ys``: ``(rows, k, dim)``, ``(rows, k, n)`` and ``(rows, n, dim)``; ``x`` may be overwritten."""
        if isinstance(ys, Columns):
            return ys.less(x, weights)
        if x.dtype == ys.dtype:
            return (x.baddbmm if recording(x, weights, ys) else x.baddbmm_)(weights, ys, alpha=-1)
        for y, weight in zip(ys.split(1, dim=1), weights.split(1, dim=2), strict=True):
            x = torch.addcmul(x, y.to(x.dtype), weight, value=-1)
        return x

    def minus(self, x: State, weight: State, y: State) -> State:
        """``x - weight y``: ``(rows, 1, dim)`` but for ``weight`` ``(rows, 1, 1)``; ``y`` may be overwritten.

        A fresh tensor as large as a large state costs more than reading a history.
        """
        return torch.addcmul(x, weight, y, value=-1, out=None if recording(x, weight, y) else y)

    def sum(self, x: State, y: State) -> State:
        """``x + y``, in the memory of ``x`` unless autograd records."""
        return x + y if recording(x, y) else x.add_(y)

    def write(self, x: State, rows: Small, places: Small, value: State, *, first: bool) -> State:
        """``x`` ``(rows, n, dim)`` with ``value`` ``(rows, dim)`` at a place of each row: in place, unless recorded.

        ``first``: nothing was written before.
        """
        value = value.to(x.dtype)
        if isinstance(x, Tensor) and recording(x, value):
            width = x.shape[1]
            at = torch.arange(width, device=x.device).expand(len(x), width)
            x = Columns([x[:, 0]], torch.zeros_like(at)) if first else Columns(x.unbind(1), at)
        if isinstance(x, Columns):
            kept = value if recording(value) else value.clone()  # what is not recorded is overwritten later
            return x.write(self.take(places), kept)
        if isinstance(places, np.ndarray) and len(places) and (places == places[0]).all():  # nearly always, and faster
            x[:, int(places[0])].copy_(value)
            return x
        return x.index_put_((self.take(rows), self.take(places)), value)


class NumPyStates(TorchStates):
    """Whole states as NumPy arrays."""

    def take(self, x: State) -> State:
        return x.detach().numpy() if isinstance(x, Tensor) else x

    def tensor(self, x: State) -> Tensor:
        return torch.from_numpy(x)

    def where(self, rows: Small, x: State, y: State) -> State:
        return np.where(rows[:, None], x, y)

    def differences(self, z: State, fz: State, g: State) -> State:
        both = np.empty((2, *fz.shape), fz.dtype)
        np.subtract(fz, z, out=both[0])
        np.subtract(both[0], g, out=both[1])
        return both.swapaxes(0, 1)

    def dots(self, xs: State, ys: State) -> State:
        if xs is ys:  # NumPy has a way of its own for a product with the transpose, which is several times slower
            ys = xs.copy()
        return xs @ ys.swapaxes(1, 2)

    def less(self, x: State, weights: State, ys: State) -> State:
        return x - weights @ ys

    def minus(self, x: State, weight: State, y: State) -> State:
        return x - weight * y

    def sum(self, x: State, y: State) -> State:
        return np.add(x, y, out=x)

    def write(self, x: State, rows: Small, places: Small, value: State, *, first: bool) -> State:
        x[rows, places] = value
        return x


_TORCH, _NUMPY = TorchStates(), NumPyStates()


def states_for(xp: NumPyArithmetic, fz: Tensor, kept: torch.dtype) -> TorchStates:
    """NumPy's for small states where the numbers of each row are NumPy's, too; torch's for all others."""
    small = xp is NUMPY and fz.numel() <= _SMALL and kept == fz.dtype and kept in _DTYPES
    return _NUMPY if small else _TORCH
