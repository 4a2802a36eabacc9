"""Error, counts, seconds and bytes of one gradient."""

from __future__ import annotations

import gc
import statistics
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.gradients.cells import Setting
from benchmarks.gradients.methods import Method
from benchmarks.gradients.reference import flat
from fixpoint.memory import LiveBytes


class Counted(nn.Module):
    """A cell that counts its evaluations, and the gradients that come back to one of them."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell
        self.evaluations = self.products = 0

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        self.evaluations += 1
        fz = self.cell(z, x)
        if fz.requires_grad:
            fz.register_hook(self._count)
        return fz

    def _count(self, _: Tensor) -> None:
        self.products += 1


class SavedBytes:
    """Bytes of the tensors that graphs recorded inside keep for backward, as long as they keep them.

    Tensors that share memory count once, and those in ``free`` not at all: they would be there anyway.
    """

    def __init__(self, free: Sequence[Tensor]) -> None:
        self._free = {tensor.untyped_storage().data_ptr() for tensor in free}
        self._kept: weakref.WeakSet[_Kept] = weakref.WeakSet()
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda kept: kept.tensor)

    def __enter__(self) -> SavedBytes:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)

    def _pack(self, tensor: Tensor) -> _Kept:
        kept = _Kept(tensor)
        self._kept.add(kept)
        return kept

    @property
    def bytes(self) -> int:
        """What is kept now."""
        storages = {
            storage.data_ptr(): storage.nbytes() for storage in (k.tensor.untyped_storage() for k in self._kept)
        }
        return sum(size for place, size in storages.items() if place not in self._free)


class _Kept:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


@dataclass(frozen=True, kw_only=True)
class Figures:
    """One method at one setting, means over its draws; ``products`` are the vector-Jacobian products.

    ``seconds``: medians over the rounds, forward and backward. ``saved``: bytes kept for backward between the two.
    ``peak``: the most bytes that tensors made by operations had at once.
    """

    error: float
    evaluations: float
    products: float
    saved: float
    peak: float
    seconds: tuple[float, float] = (0.0, 0.0)


def gradient(setting: Setting, method: Method, cell: nn.Module | None = None) -> Tensor:
    """The method's gradient by x and by every parameter, as one vector."""
    return _differentiated(setting, *_solved(setting, method, cell or setting.cell))


def _solved(setting: Setting, method: Method, cell: nn.Module) -> tuple[Tensor, list[Tensor]]:
    x = setting.x.detach().requires_grad_()
    return method.run(cell, x), [x, *setting.cell.parameters()]


def _differentiated(setting: Setting, value: Tensor, inputs: list[Tensor]) -> Tensor:
    return flat(torch.autograd.grad((value * setting.target).sum(), inputs))


def relative_error(found: Tensor, exact: Tensor) -> float:
    """``|found - exact| / |exact|``."""
    return float((found - exact).norm() / exact.norm())


def measure(setting: Setting, method: Method, exact: Tensor) -> Figures:
    """Everything but the seconds."""
    runs = [_run(setting, method, exact) for _ in range(method.draws)]
    error, evaluations, products, saved, peak = (statistics.fmean(each) for each in zip(*runs, strict=True))
    return Figures(error=error, evaluations=evaluations, products=products, saved=saved, peak=peak)


def _run(setting: Setting, method: Method, exact: Tensor) -> tuple[float, int, int, int, int]:
    cell = Counted(setting.cell)
    with SavedBytes([setting.x, *setting.cell.parameters()]) as saved, LiveBytes() as live:
        value, inputs = _solved(setting, method, cell)
        kept = saved.bytes
        found = _differentiated(setting, value, inputs)
    return relative_error(found, exact), cell.evaluations, cell.products, kept, live.peak


def saved_bytes(setting: Setting, method: Method) -> int:
    """Bytes kept between forward and backward."""
    with SavedBytes([setting.x, *setting.cell.parameters()]) as saved:
        value, _ = _solved(setting, method, setting.cell)
        return saved.bytes if value.requires_grad else 0


def seconds(setting: Setting, methods: Sequence[Method], rounds: int) -> dict[str, tuple[float, float]]:
    """Median seconds forward and backward of each method; in a round all take their turn, after one that is not timed.

    Seconds are the processor's, which other work on the machine disturbs least; everything runs on one thread. Draws of
    one method are made within a round, and their mean counts.
    """
    found: dict[str, list[tuple[float, float]]] = {method.name: [] for method in methods}
    gc.collect()
    gc.disable()
    try:
        for count in range(rounds + 1):
            for method in methods:
                times = [_timed(setting, method) for _ in range(method.draws)]
                if count:
                    found[method.name].append(_means(times))
    finally:
        gc.enable()
    return {name: _medians(times) for name, times in found.items()}


def _timed(setting: Setting, method: Method) -> tuple[float, float]:
    start = time.process_time()
    value, inputs = _solved(setting, method, setting.cell)
    middle = time.process_time()
    _differentiated(setting, value, inputs)
    return middle - start, time.process_time() - middle


def _means(times: Sequence[tuple[float, float]]) -> tuple[float, float]:
    forward, backward = zip(*times, strict=True)
    return statistics.fmean(forward), statistics.fmean(backward)


def _medians(times: Sequence[tuple[float, float]]) -> tuple[float, float]:
    forward, backward = zip(*times, strict=True)
    return statistics.median(forward), statistics.median(backward)
