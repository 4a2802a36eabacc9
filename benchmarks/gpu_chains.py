"""Time our sweep against a compiled sequential sampler on a GPU, for networks of CIFAR10's and of DiT's size.

The weights are random: the networks cost what trained ones cost, and their chains are smooth, but how many rounds a
chain needs depends on what was learnt. The table says so.

    python -m benchmarks.gpu_chains [--out benchmarks/results] [--tiny]

Without a CUDA device it says so and ends; ``--tiny`` runs small networks on any device, to see that the script works.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path

import torch
from diffusers import DiTTransformer2DModel, UNet2DModel
from torch import Tensor, nn

from benchmarks.overhead import fastest
from fixpoint import CausalQuasiNewton
from fixpoint.bench import provenance
from fixpoint_diffusion import DDIMChain, NoiseSchedule, initial_noise, sample
from fixpoint_diffusion.denoisers import DiffusersDenoiser

GOAL = 12.0  # times as fast as compiled sequential sampling, T = 1000, one sample
NOTE = (
    "Random weights, no trained networks. Sequential: compiled. ours: CausalQuasiNewton() at rtol 1e-3, not compiled."
)


@dataclass(frozen=True)
class Row:
    """One network in one precision on chains of one length, some samples at a time."""

    network: str
    dtype: str
    steps: int
    batch: int
    sequential: float
    ours: float
    rounds: int
    rows_per_step: float
    error: float

    @property
    def times(self) -> float:
        """How many times as fast ours is."""
        return self.sequential / self.ours


def networks(tiny: bool) -> dict[str, Callable[[], nn.Module]]:
    """By name: the U-Net of Ho et al. for CIFAR10, and DiT-XL/2 for latents of 256 x 256 images; or small ones."""
    if tiny:
        unet = {"sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}
        unet |= {"down_block_types": ("DownBlock2D", "AttnDownBlock2D")}
        unet |= {"up_block_types": ("AttnUpBlock2D", "UpBlock2D"), "attention_head_dim": 8}
        dit = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "sample_size": 8}
    else:
        unet = {"sample_size": 32, "block_out_channels": (128, 256, 256, 256), "layers_per_block": 2}
        unet |= {"down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D")}
        unet |= {"up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"), "attention_head_dim": None}
        dit = {"num_attention_heads": 16, "attention_head_dim": 72, "num_layers": 28, "sample_size": 32}
    return {
        "UNet2DModel": partial(UNet2DModel, in_channels=3, out_channels=3, **unet),
        "DiTTransformer2DModel": partial(
            DiTTransformer2DModel, in_channels=4, out_channels=8, patch_size=2, num_embeds_ada_norm=1000, **dit
        ),
    }


def denoiser(make: Callable[[], nn.Module], dtype: torch.dtype, device: str) -> DiffusersDenoiser:
    """A network with random weights, the same for every run."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make().to(device, dtype).eval()
    labelled = isinstance(model, DiTTransformer2DModel)
    inputs = {"class_labels": torch.zeros(1, dtype=torch.int64, device=device)} if labelled else {}
    return DiffusersDenoiser(model, inputs=inputs)


def measure(name: str, network: DiffusersDenoiser, steps: int, batch: int, *, compiled: bool, repeats: int) -> Row:
    """Least seconds of a few runs in turn. Latents are float32: only the network runs in its own precision."""
    parameter = next(network.model.parameters())
    shape = network.sample_shape
    assert shape is not None
    x_T = initial_noise(0, range(batch), shape, device=parameter.device)
    schedule = NoiseSchedule.linear()
    parallel = DDIMChain(network, x_T, schedule, steps=steps)
    fast = DiffusersDenoiser(torch.compile(network.model), inputs=network.inputs) if compiled else network
    in_turn = DDIMChain(fast, x_T, schedule, steps=steps)

    def wait(run: Callable[[], object]) -> int:
        found[run] = run()
        if parameter.is_cuda:
            torch.cuda.synchronize()
        return 1

    def sequential() -> Tensor:
        return in_turn.sequential()[:, -1]

    def sweep() -> Tensor:
        parallel.reset_counters()
        return sample(parallel, solver=CausalQuasiNewton(), on_failure="ignore").images

    found: dict[Callable[[], object], object] = {}
    for run in (sequential, sweep):
        wait(run)  # compiles, and fills the caches
    seconds = fastest({"sequential": partial(wait, sequential), "ours": partial(wait, sweep)}, repeats)
    reference, images = found[sequential], found[sweep]
    assert isinstance(reference, Tensor)
    assert isinstance(images, Tensor)
    difference = (images - reference).flatten(1).norm(dim=1) / reference.flatten(1).norm(dim=1)
    return Row(
        network=name,
        dtype=str(parameter.dtype).removeprefix("torch."),
        steps=steps,
        batch=batch,
        sequential=seconds["sequential"],
        ours=seconds["ours"],
        rounds=parallel.rounds,
        rows_per_step=parallel.evals / (steps * batch),
        error=float(difference.max()),
    )


def table(rows: Sequence[Row]) -> str:
    """A line for each; the error in bfloat16 is the rounding of batches of different sizes, mostly."""
    lines = [
        NOTE,
        "",
        f"{'network':22} {'dtype':>9} {'T':>5} {'batch':>5} {'sequential s':>12} {'ours s':>8} {'times':>6}",
    ]
    lines[-1] += f" {'rounds':>6} {'rows/T':>7} {'error':>8}"
    for row in rows:
        lines.append(
            f"{row.network:22} {row.dtype:>9} {row.steps:>5} {row.batch:>5} {row.sequential:>12.3f} {row.ours:>8.3f} "
            f"{row.times:>6.2f} {row.rounds:>6} {row.rows_per_step:>7.1f} {row.error:>8.1e}"
        )
    long = [row.times for row in rows if (row.steps, row.batch) == (1000, 1)]
    if long:
        verdict = "PASS" if max(long) >= GOAL else "FAIL"
        lines += ["", f"{verdict}  {GOAL:g} times as fast at T=1000, one sample: at best {max(long):.2f} times"]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder for the results")
    parser.add_argument("--tiny", action="store_true", help="small networks and short chains, on any device")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available() and not options.tiny:
        print("no CUDA device: nothing measured")
        return 0
    device = "cuda" if torch.cuda.is_available() else "cpu"
    steps, batches, repeats = ((8,), (1, 2), 1) if options.tiny else ((25, 100, 1000), (1, 8), 3)
    rows = []
    with torch.no_grad():
        for (name, make), dtype in product(networks(options.tiny).items(), (torch.float32, torch.bfloat16)):
            network = denoiser(make, dtype, device)
            torch.compiler.reset()
            for length, batch in product(steps, batches):
                compiled = not options.tiny
                rows.append(measure(name, network, length, batch, compiled=compiled, repeats=repeats))
                print(rows[-1], flush=True)
    text = table(rows)
    print(text)
    options.out.mkdir(parents=True, exist_ok=True)
    document = {
        "machine": provenance.machine(),
        "versions": provenance.versions(),
        "commit": provenance.commit(),
        "note": NOTE,
        "rows": [asdict(row) | {"times": row.times} for row in rows],
    }
    (options.out / "gpu_chains.json").write_text(json.dumps(document, indent=1) + "\n")
    (options.out / "gpu_chains.txt").write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
