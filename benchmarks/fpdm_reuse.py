"""What the starts of the layer, the allocation of iterations and the timesteps do for images of the embedded FPDM.

    python -m benchmarks.fpdm_reuse [--images 128] [--seeds 3] [--out benchmarks/results/fpdm_reuse.json]

Images are digits 0 to 9 in turn, without guidance. For each run: the classifier's confidence, over that in real digits
which it has not seen; the Fréchet distance to these digits in the classifier's features; and the last residual of the
layer, the median of the images in each step and of these the geometric mean. Every figure is the mean over the seeds
1, 2, ... (the embedded model was chosen on seed 0).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fixpoint import Anderson, Picard
from fixpoint.bench import provenance
from fixpoint_diffusion.evaluation import digit_frechet_distance, digit_quality
from fixpoint_diffusion.experiments.fpdm import classes_of, embedded_fpdm
from fixpoint_diffusion.models import allocate
from fixpoint_diffusion.processes import initial_noise
from fixpoint_diffusion.sampling import adaptive_tolerance, sample_fpdm
from fixpoint_diffusion.training.data import load_digits, split_held_out

STARTS = {"anew": False, "reuse": True, "extrapolate": "extrapolate"}
# Iterations per step and steps, with the block passes that both cost.
SPLITS = {60: ((1, 20), (2, 15), (4, 10)), 120: ((1, 40), (2, 30), (4, 20))}
QUICK = {6: ((1, 2),)}


class Runs:
    """Sampling runs of the embedded model, each with every seed."""

    def __init__(self, images: int, seeds: int) -> None:
        self.model, self.schedule = embedded_fpdm()
        self._digits = split_held_out(load_digits())[1].images
        self.noise = [
            initial_noise(seed, range(images), self.model.config.sample_shape) for seed in range(1, seeds + 1)
        ]

    def __call__(self, **options: Any) -> dict[str, Any]:
        """Means over the seeds, and what each seed gave."""
        each = []
        for x_T in self.noise:
            samples = sample_fpdm(self.model, x_T, self.schedule, y=classes_of(len(x_T)), record=True, **options)
            assert samples.deltas is not None
            each.append(
                {
                    "confidence": digit_quality(samples.images).relative_confidence,
                    "frechet": digit_frechet_distance(samples.images, self._digits),
                    "residual": float(samples.deltas.double().median(dim=1).values.log().mean().exp()),
                    "block_passes": samples.block_passes,
                }
            )
        return {"mean": {name: sum(run[name] for run in each) / len(each) for name in each[0]}, "seeds": each}


def starts(runs: Runs, splits: dict[int, Sequence[tuple[int, int]]]) -> dict[str, Any]:
    """Each start of the layer at equal block passes and equal iterations."""
    found = {}
    print("block passes  iterations x steps  " + "".join(f"{name:>24}" for name in STARTS))
    for passes, pairs in splits.items():
        for iterations, steps in pairs:
            cells = {name: runs(steps=steps, iterations=iterations, reuse=reuse) for name, reuse in STARTS.items()}
            found[f"{iterations}x{steps}"] = cells
            print(f"{passes:12}  {f'{iterations} x {steps}':18}  " + "".join(map(_cell, cells.values())), flush=True)
    return found


def allocations(runs: Runs, steps: int, mean: int) -> dict[str, Any]:
    """Ways to spend the same iterations, with reuse."""
    total = steps * mean
    probe = initial_noise(0, range(len(runs.noise[0])), runs.model.config.sample_shape)
    ways: dict[str, dict[str, Any]] = {
        name: {"iterations": allocate(total, steps, name)} for name in ("constant", "increasing", "decreasing")
    }
    for name, per_sample in (("adaptive", False), ("adaptive, per image", True)):
        how = {"steps": steps, "solver": Picard(), "y": classes_of(len(probe))}  # as in the paper
        until = adaptive_tolerance(runs.model, probe, runs.schedule, budget=total, per_sample=per_sample, **how)
        ways[name] = {"iterations": until, "solver": Picard()}
    ways["constant, Anderson"] = {"iterations": mean, "solver": Anderson()}
    print(f"\n{mean} iterations a step, {steps} steps")
    found = {}
    for name, options in ways.items():
        found[name] = runs(steps=steps, **options)
        print(f"{name:22}{_cell(found[name])}  {found[name]['mean']['block_passes']:.1f} block passes", flush=True)
    return found


def spacings(runs: Runs, lengths: Sequence[int]) -> dict[str, Any]:
    """Rules that choose the timesteps, with 4 iterations a step and reuse."""
    found = {}
    print("\ntimesteps" + "".join(f"{f'{steps} steps':>24}" for steps in lengths))
    for spacing in ("trailing", "linspace"):
        found[spacing] = {str(steps): runs(steps=steps, iterations=4, spacing=spacing) for steps in lengths}
        print(f"{spacing:9}" + "".join(map(_cell, found[spacing].values())), flush=True)
    return found


def _cell(found: dict[str, Any]) -> str:
    figures = found["mean"]
    return f"{figures['confidence']:.3f} {figures['frechet']:.2f} {figures['residual']:.2g}".rjust(24)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table for each question and write every figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="the shortest runs, to see that they work")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/fpdm_reuse.json"))
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    runs = Runs(options.images, options.seeds)
    print(f"{options.images} images, mean of {options.seeds} seeds")
    print("each cell: relative confidence, Frechet distance, last residual\n")
    figures = {
        "starts": starts(runs, QUICK if options.quick else SPLITS),
        "allocations": allocations(runs, *((5, 3) if options.quick else (10, 4))),
        "spacings": spacings(runs, (2,) if options.quick else (5, 10)),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    about = {"machine": provenance.machine(), "versions": provenance.versions(), "commit": provenance.commit()}
    about |= {"images": options.images, "seeds": options.seeds}
    options.out.write_text(json.dumps({**about, **figures}, indent=1) + "\n")


if __name__ == "__main__":
    main()
