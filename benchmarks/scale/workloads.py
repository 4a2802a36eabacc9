"""Models and devices that are not here: their cost from floating-point operations, with what is assumed."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DiTTransformer2DModel, UNet2DModel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.scale.prediction import Link, Network, Workload
from fixpoint_diffusion.sampling.batch_cost import BatchCost

# An H100 SXM: dense bfloat16 as its data sheet has it, and the share of it that large transformers reach.
PEAK, SHARE = 989e12, 0.4
# Seconds of the host for an array call of eager PyTorch.
CALL = 8e-6
# Array calls of a round beyond the model: `python -m benchmarks.launches`.
SWEEP_CALLS = 323
# NVLink and InfiniBand NDR, one direction, eight devices in a machine.
NETWORK = Network(
    inside=Link(latency=3e-6, bandwidth=450e9), between=Link(latency=10e-6, bandwidth=50e9), per_machine=8
)
ASSUMED = "\n".join(
    [
        f"Assumed: an H100 that reaches {SHARE:.0%} of {PEAK / 1e12:.0f} TFLOP/s, and takes at least "
        f"{CALL * 1e6:.0f} us for each array call",
        f"(eager, no CUDA graphs); the solver's round has {SWEEP_CALLS} of them. Outputs in float32 go round a ring:",
        f"{NETWORK.inside.bandwidth / 1e9:.0f} GB/s and {NETWORK.inside.latency * 1e6:.0f} us a hop within "
        f"{NETWORK.per_machine} devices, {NETWORK.between.bandwidth / 1e9:.0f} GB/s and "
        f"{NETWORK.between.latency * 1e6:.0f} us beyond.",
        "Rounds and rows are measured with the embedded model of digits.",
    ]
)


class _Calls(TorchDispatchMode):
    """Counts array calls."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def count(model: torch.nn.Module, *inputs: torch.Tensor, **named: torch.Tensor) -> tuple[int, int]:
    """Floating-point operations and array calls of a call of one row, without weights."""
    with torch.no_grad(), FlopCounterMode(display=False) as flops, _Calls() as calls:
        model.eval()(*inputs, **named)
    return flops.get_total_flops(), calls.count


def workloads() -> dict[str, tuple[Workload, int]]:
    """By name: what a sample costs on an H100, and the steps of its chain."""
    with torch.device("meta"):
        unet = UNet2DModel(
            sample_size=32,
            block_out_channels=(128, 256, 256, 256),
            down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=None,
        )
        t = torch.zeros(1, dtype=torch.long)
        of_unet = count(unet, torch.zeros(1, 3, 32, 32), t)
        dit = DiTTransformer2DModel(sample_size=32, out_channels=8)
        labels = torch.zeros(2, dtype=torch.long)
        of_dit = count(dit, torch.zeros(2, 4, 32, 32), timestep=t.expand(2), class_labels=labels)  # with guidance
    # 12B parameters, 4096 tokens of a picture of 1024 x 1024 and 512 of text, 57 blocks of width 3072.
    tokens, blocks, width = 4096 + 512, 57, 3072
    flow = 2 * 12_000_000_000 * tokens + blocks * 4 * tokens**2 * width
    return {
        "CIFAR10 U-Net": (_on_h100("CIFAR10 U-Net", *of_unet, 3 * 32 * 32), 1000),
        "DiT-XL/2, guidance": (_on_h100("DiT-XL/2, guidance", *of_dit, 4 * 32 * 32), 250),
        "12B flow transformer": (_on_h100("12B flow transformer", flow, 30 * blocks, 64 * 4096), 50),
    }


def _on_h100(name: str, flops: int, calls: int, entries: int) -> Workload:
    rows = tuple(2**n for n in range(12))
    seconds = tuple(max(calls * CALL, each * flops / (PEAK * SHARE)) for each in rows)
    return Workload(name=name, cost=BatchCost(rows, seconds), row_bytes=4 * entries, sweep=SWEEP_CALLS * CALL)
