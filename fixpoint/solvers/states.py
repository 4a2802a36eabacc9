"""What a solver does with whole states, for torch and for NumPy: of a small state on the host, NumPy asks less.

    states = states_for(xp, fz, dtype)  # one of the two, for this step
    z, fz = states.take(z), states.take(fz)

As in ``small``, both have the same methods, so that a solver is written once. A tensor and its array share memory.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fixpoint.solvers.history import recording
from fixpoint.solvers.small import NUMPY, NumPyArithmetic, Small

State = Any  # a NumPy array or a tensor

_SMALL = 1 << 13  # entries of a state; of a larger one, what a call does outweighs what calling costs
_DTYPES = (torch.float32, torch.float64)


class TorchStates:
    """Whole states as tensors."""

    def take(self, x: State) -> State:
        """A state, or numbers for each row, whatever an earlier step kept them as."""
        return x if isinstance(x, Tensor) else torch.from_numpy(x)

    def tensor(self, x: State) -> Tensor:
        """The tensor of a state."""
        return x

    def copy(self, x: State) -> State:
        """``x`` in memory of its own; autograd has its own ways to keep memory."""
        return x if recording(x) else x.clone()

    def where(self, rows: Small, x: State, y: State) -> State:
        """``x`` in the rows of a mask ``(rows,)``, ``y`` in the others."""
        return torch.where(self.take(rows)[:, None], x, y)

    def differences(self, z: State, fz: State, g: State, before: State) -> State:
        """``(rows, 3, dim)``: the residual ``fz - z``, how it differs from ``g``, and fz from before."""
        if recording(z, fz, g, before):
            now = fz - z
            return torch.stack((now, now - g, fz - before), dim=1)
        all_three = fz.new_empty(fz.shape[0], 3, fz.shape[1])
        now, change, image = all_three.unbind(1)
        torch.sub(fz, z, out=now)
        torch.sub(now, g, out=change)
        torch.sub(fz, before, out=image)
        return all_three

    def dots(self, xs: State, ys: State) -> State:
        """Products ``(rows, k, n)`` of ``xs`` ``(rows, k, dim)`` and ``ys`` ``(rows, n, dim)``."""
        if xs.dtype == ys.dtype:
            return torch.bmm(xs, ys.transpose(1, 2))
        return torch.stack([(xs * y[:, None].to(xs.dtype)).sum(dim=2) for y in ys.unbind(1)], dim=2)

    def less(self, x: State, weights: State, ys: State) -> State:
        """``x - sum_j weights_j y_j``: ``(rows, 1, dim)``, ``(rows, 1, n)`` and ``(rows, n, dim)``."""
        if x.dtype == ys.dtype:
            return torch.baddbmm(x, weights, ys, alpha=-1)
        for y, weight in zip(ys.split(1, dim=1), weights.split(1, dim=2), strict=True):
            x = torch.addcmul(x, y.to(x.dtype), weight, value=-1)
        return x

    def write(self, x: State, rows: Small, places: Small, value: State) -> State:
        """``x`` ``(rows, n, dim)`` with ``value`` ``(rows, dim)`` at a place of each row: in place, unless recorded."""
        value = value.to(x.dtype)
        if isinstance(places, np.ndarray) and x.dtype in _DTYPES:
            x.numpy()[rows, places] = value.numpy()
            return x
        at = self.take(rows), self.take(places)
        return x.index_put(at, value) if recording(x, value) else x.index_put_(at, value)


class NumPyStates(TorchStates):
    """Whole states as NumPy arrays."""

    def take(self, x: State) -> State:
        return x.detach().numpy() if isinstance(x, Tensor) else x

    def tensor(self, x: State) -> Tensor:
        return torch.from_numpy(x)

    def copy(self, x: State) -> State:
        return x.copy()

    def where(self, rows: Small, x: State, y: State) -> State:
        return np.where(rows[:, None], x, y)

    def differences(self, z: State, fz: State, g: State, before: State) -> State:
        all_three = np.empty((fz.shape[0], 3, fz.shape[1]), fz.dtype)
        now = np.subtract(fz, z, out=all_three[:, 0])
        np.subtract(now, g, out=all_three[:, 1])
        np.subtract(fz, before, out=all_three[:, 2])
        return all_three

    def dots(self, xs: State, ys: State) -> State:
        if xs is ys:  # NumPy has a way of its own for a product with the transpose, which is several times slower
            ys = xs.copy()
        return xs @ ys.swapaxes(1, 2)

    def less(self, x: State, weights: State, ys: State) -> State:
        return x - weights @ ys

    def write(self, x: State, rows: Small, places: Small, value: State) -> State:
        x[rows, places] = value
        return x


_TORCH, _NUMPY = TorchStates(), NumPyStates()


def states_for(xp: NumPyArithmetic, fz: Tensor, kept: torch.dtype) -> TorchStates:
    """NumPy's for small states where the numbers of each row are NumPy's, too; torch's for all others."""
    small = xp is NUMPY and fz.numel() <= _SMALL and kept == fz.dtype and kept in _DTYPES
    return _NUMPY if small else _TORCH
