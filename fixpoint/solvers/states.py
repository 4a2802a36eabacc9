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

from fixpoint.engine.norms import vecdot
from fixpoint.engine.transforms import recording
from fixpoint.solvers.small import NUMPY, NumPyArithmetic, Small

State = Any  # a NumPy array or a tensor

_SMALL = 1 << 16  # entries of a state; of a larger one, what a call does outweighs what calling costs
_DTYPES = (torch.float32, torch.float64)


class Columns:
    """A history ``(rows, n, dim)`` that autograd records: what was written stays, so no step needs a copy of it.

    Attributes:
        written: All that was written so far, each ``(rows, dim)``.
        at: Number of what stands at each place of each row now ``(rows, n)``; None where all rows hold, at place j,
            the j-th of ``written``.
    """

    def __init__(self, written: Sequence[Tensor], at: Tensor | None = None) -> None:
        self.written, self.at, self.dtype = written, at, written[0].dtype
        rows, dim = written[0].shape
        self.shape = (rows, len(written) if at is None else at.shape[1], dim)

    def dots(self, xs: Tensor) -> Tensor:
        """As ``TorchStates.dots``."""
        products = torch.stack([(xs * x[:, None].to(xs.dtype)).sum(dim=2) for x in self.written], dim=2)
        return products if self.at is None else products.gather(2, self.at[:, None].expand(-1, xs.shape[1], -1))

    def less(self, x: Tensor, weights: Tensor) -> Tensor:
        """As ``TorchStates.less``."""
        if self.at is not None:
            nothing = weights.new_zeros(*weights.shape[:2], len(self.written))
            weights = nothing.scatter_add(2, self.at[:, None].expand_as(weights), weights)
        for y, weight in zip(self.written, weights.unbind(2), strict=True):
            x = torch.addcmul(x, y[:, None].to(x.dtype), weight[..., None], value=-1)
        return x

    def write(self, places: Tensor, value: Tensor) -> Columns:
        """As ``TorchStates.write``."""
        assert self.at is not None
        return Columns([*self.written, value], self.at.scatter(1, places[:, None], len(self.written)))

    def put(self, place: int, value: Tensor) -> Columns:
        """As ``TorchStates.put``."""
        return Columns([*self.written[:place], value, *self.written[place + 1 :]])


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

    def differences(self, z: State, fz: State, z_before: State, fz_before: State) -> State:
        """``(rows, 2, dim)``: the residual ``fz - z``, and how it differs from the one before."""
        if recording(z, fz, z_before, fz_before):
            now = fz - z
            return torch.stack((now, now - (fz_before - z_before)), dim=1)
        both = fz.new_empty(2, *fz.shape)  # each of the two is contiguous: what is done to it in place needs that
        now, change = both.unbind()
        torch.sub(fz, z, out=now)
        torch.sub(fz_before, z_before, out=change)
        torch.sub(now, change, out=change)
        return both.transpose(0, 1)

    def dots(self, xs: State, ys: State) -> State:
        """Products ``(rows, k, n)`` of ``xs`` ``(rows, k, dim)`` and ``ys`` ``(rows, n, dim)``."""
        if isinstance(ys, Columns):
            return ys.dots(xs)
        if xs.dtype == ys.dtype:
            return torch.bmm(xs, ys.transpose(1, 2))
        return torch.stack([(xs * y[:, None].to(xs.dtype)).sum(dim=2) for y in ys.unbind(1)], dim=2)

    def among(self, x: State, start: int, stop: int) -> State:
        """The places from ``start`` to before ``stop`` of a history ``(rows, count, dim)``."""
        if stop - start == x.shape[1]:
            return x
        return Columns(x.written[start:stop]) if isinstance(x, Columns) else x[:, start:stop]

    def place(self, x: State, place: int) -> State:
        """What stands at a place of a history, ``(rows, dim)``."""
        return x.written[place] if isinstance(x, Columns) else x[:, place]

    def like(self, x: State, y: State) -> State:
        """``x`` in the dtype of ``y``."""
        return self.take(x).to(y.dtype)

    def copy(self, x: State) -> State:
        """A history that nobody else writes to."""
        return x if isinstance(x, Columns) else x.clone()

    def less(self, x: State, weights: State, ys: State, *, keep: bool = False) -> State:
        """``x - weights ys``: ``(rows, k, dim)``, ``(rows, k, n)`` and ``(rows, n, dim)``.

        ``x`` may be overwritten, unless it is to be kept.
        """
        if isinstance(ys, Columns):
            return ys.less(x, weights)
        if x.dtype == ys.dtype:
            return (x.baddbmm if keep or recording(x, weights, ys) else x.baddbmm_)(weights, ys, alpha=-1)
        for y, weight in zip(ys.split(1, dim=1), weights.split(1, dim=2), strict=True):
            x = torch.addcmul(x, y.to(x.dtype), weight, value=-1)
        return x

    def minus(self, x: State, weight: State, y: State) -> State:
        """``x - weight y``: ``(rows, 1, dim)`` but for ``weight`` ``(rows, 1, 1)``; ``y`` may be overwritten.

        A fresh tensor as large as a large state costs more than reading a history.
        """
        return torch.addcmul(x, weight, y, value=-1, out=None if recording(x, weight, y) else y)

    def plus(self, x: State, weight: State, y: State, *, into: State) -> State:
        """``x + weight y`` ``(rows, dim)``, with a number or ``(rows, 1)`` as weight; ``into`` may be overwritten."""
        out = None if recording(x, y, into) else into
        if isinstance(weight, Tensor):
            return torch.addcmul(x, weight, y, out=out)
        return torch.add(x, y, alpha=weight, out=out)

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

    def put(self, x: State, place: int, value: State, *, first: bool = False) -> State:
        """As ``write``, at the same place of all rows; nobody may write to ``value`` later.

        ``first``: of what was written before, nothing is needed.
        """
        if isinstance(x, Tensor) and recording(x, value):
            x = Columns(x.unbind(1))
        if isinstance(x, Columns):
            value = value.to(x.dtype)
            return Columns([value]) if first else x.put(place, value)
        x.select(1, place).copy_(value)  # an index in brackets is compiled again for each place
        return x

    def put_quotient(self, x: State, place: int, dividend: State, divisor: State) -> tuple[State, State]:
        """The history after ``put`` of a quotient, and that: ``(rows, dim)`` by ``(rows, 1)``."""
        kept = isinstance(x, Columns) or recording(x, dividend, divisor)
        if kept or x.dtype != dividend.dtype or torch.compiler.is_compiling():
            quotient = dividend / divisor
            return self.put(x, place, quotient), quotient
        return x, torch.div(dividend, divisor, out=x.select(1, place))


class NumPyStates(TorchStates):
    """Whole states as NumPy arrays."""

    def take(self, x: State) -> State:
        return x.numpy(force=True) if isinstance(x, Tensor) else x

    def tensor(self, x: State) -> Tensor:
        return torch.from_numpy(x)

    def where(self, rows: Small, x: State, y: State) -> State:
        return np.where(rows[:, None], x, y)

    def differences(self, z: State, fz: State, z_before: State, fz_before: State) -> State:
        both = np.empty((2, *fz.shape), fz.dtype)
        now, change = both
        np.subtract(fz, z, out=now)
        np.subtract(fz_before, z_before, out=change)
        np.subtract(now, change, out=change)
        return both.swapaxes(0, 1)

    def dots(self, xs: State, ys: State) -> State:
        if xs is ys or xs.shape[1] == 1:  # such products of matrices are slower
            return vecdot(xs[:, :, None], ys[:, None])
        return xs @ ys.swapaxes(1, 2)

    def like(self, x: State, y: State) -> State:
        return self.take(x).astype(y.dtype, copy=False)

    def copy(self, x: State) -> State:
        return x.copy()

    def less(self, x: State, weights: State, ys: State, *, keep: bool = False) -> State:
        return x - weights @ ys

    def minus(self, x: State, weight: State, y: State) -> State:
        return x - weight * y

    def plus(self, x: State, weight: State, y: State, *, into: State) -> State:
        return x + weight * y

    def sum(self, x: State, y: State) -> State:
        return np.add(x, y, out=x)

    def write(self, x: State, rows: Small, places: Small, value: State, *, first: bool) -> State:
        x[rows, places] = value
        return x

    def put(self, x: State, place: int, value: State, *, first: bool = False) -> State:
        x[:, place] = value
        return x

    def put_quotient(self, x: State, place: int, dividend: State, divisor: State) -> tuple[State, State]:
        quotient = dividend / divisor
        return self.put(x, place, quotient), quotient


TORCH_STATES, NUMPY_STATES = TorchStates(), NumPyStates()


def states_for(xp: NumPyArithmetic, fz: Tensor, kept: torch.dtype) -> TorchStates:
    """NumPy's for small states where the numbers of each row are NumPy's, too; torch's for all others."""
    small = xp is NUMPY and fz.numel() <= _SMALL and kept == fz.dtype and kept in _DTYPES
    return NUMPY_STATES if small else TORCH_STATES
