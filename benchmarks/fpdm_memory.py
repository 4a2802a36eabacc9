"""What one training step holds in memory at its most: an FPDM beside a DiT of the same width at 12 effective layers.

    python -m benchmarks.fpdm_memory [--device cpu] [--batch 8] [--out benchmarks/results/fpdm-memory.json]

The FPDM has one block before the layer and one after, and trains by multi-step JFB: N iterations that record nothing,
then M that do. With N + M = 10 it is 12 layers deep. Gradients count, parameters and the optimiser's state do not. On a
GPU the figures are those of PyTorch's allocator; on a CPU, the tensors that exist at once.
"""

from __future__ import annotations

import argparse
import json
import platform
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fixpoint_diffusion.models import FPDM, DiT, DiTConfig, FPDMConfig

SHAPE: dict[str, Any] = {"sample_size": 16, "patch_size": 2, "in_channels": 4, "width": 192, "heads": 3}
LAYERS = 12
RECORDED = (1, 2, 3, 4)
LONG = (24, 96)  # iterations that record nothing, with the third M


class _TensorBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that are made while it is on, and of those that still exist."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage(), given)
        return out

    def _count(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        number, size = storage._cdata, storage.nbytes()
        if number in self._alive or number in given:
            return
        self._alive.add(number)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, number, size)

    def _gone(self, number: int, size: int) -> None:
        self._alive.discard(number)
        self.now -= size


def peak_of(model: nn.Module, step: Callable[[], object]) -> int:
    """Bytes that a step holds at its most, beside what the model holds before it."""
    model.zero_grad(set_to_none=True)
    device = next(model.parameters()).device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    with _TensorBytes() as counted:
        step()
    return counted.peak


def measure(device: str, batch: int) -> dict[str, Any]:
    """Peaks in bytes, for the DiT and for the FPDM at each N."""
    x = torch.randn(batch, SHAPE["in_channels"], SHAPE["sample_size"], SHAPE["sample_size"], device=device)
    t = torch.randint(1000, (batch,), device=device)

    def peak(model: nn.Module) -> int:
        model.to(device).train()
        return peak_of(model, lambda: model(x, t).square().mean().backward())

    def fpdm(no_grad: int, grad: int) -> int:
        config = FPDMConfig(**SHAPE, backward="multi-jfb", max_no_grad=no_grad, max_grad=grad)
        return peak(FPDM(config))

    dit = peak(DiT(DiTConfig(**SHAPE, depth=LAYERS)))
    cases = [(LAYERS - 2 - grad, grad) for grad in RECORDED] + [(no_grad, RECORDED[2]) for no_grad in LONG]
    rows = [{"no_grad": n, "grad": m, "bytes": fpdm(n, m)} for n, m in cases]
    return {
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else platform.machine(),
        "torch": torch.__version__,
        "shape": SHAPE,
        "batch": batch,
        "dit": {"layers": LAYERS, "bytes": dit},
        "fpdm": [{**row, "of_dit": round(row["bytes"] / dit, 3)} for row in rows],
    }


def main() -> None:
    """Print the peaks and write them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/fpdm-memory.json"))
    options = parser.parse_args()
    figures = measure(options.device, options.batch)
    print(f"Peak of one training step, width {SHAPE['width']}, batch {options.batch}")
    print(f"{'DiT, 12 blocks':<20}{figures['dit']['bytes'] / 1e6:>8.1f} MB")
    for row in figures["fpdm"]:
        name = f"FPDM, N = {row['no_grad']}, M = {row['grad']}"
        print(f"{name:<20}{row['bytes'] / 1e6:>8.1f} MB{row['of_dit']:>7.2f} of the DiT's")
    options.out.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
