"""Digits for so many block passes an image: an FPDM, in several ways to spend them, beside a DiT of equal training.

    python -m benchmarks.fpdm_budget [--images 1024] [--seeds 3] [--pair FPDM DIT]... [--only WAY ...]

What is in the record already, of the same models and as many images, is not computed again. Each `--pair` is two
model folders, or names of shipped models (the default), of one training each. Each way takes as many steps as the
budget allows; a DiT of depth D has budget / D of them. DDIM without guidance, classes 0 to 9 in turn. A seed is one
of the noise that images start from; the spread is over seeds and trainings. Written are the Frechet distance to held-
out digits, the classifier's confidence, the share of images that are read as their class, and the block passes and
operations (FLOPs) that were spent: an iteration of the FPDM's layer has, beside its block, the two projections of the
injection. Last come the two targets of the shipped FPDM, the second one beside the shipped U-Net, which is told no
class.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from benchmarks.fpdm_measures import dit_quality, sample_quality
from fixpoint.bench import provenance
from fixpoint_diffusion.denoisers import EMBEDDED_MODELS, embedded, embedded_folder, load_denoiser
from fixpoint_diffusion.evaluation import digit_frechet_distance
from fixpoint_diffusion.experiments.fpdm import classes_of
from fixpoint_diffusion.files import sha256_of
from fixpoint_diffusion.models import cost
from fixpoint_diffusion.models.checkpoint import WEIGHTS_FILE
from fixpoint_diffusion.options.sampling import SamplingOptions
from fixpoint_diffusion.processes import NoiseSchedule, initial_noise
from fixpoint_diffusion.sampling import adaptive_tolerance
from fixpoint_diffusion.sampling.job import SamplingJob
from fixpoint_diffusion.training.data import load_digits, split_held_out

BUDGETS = (40, 80, 160, 320)
SHIPPED = ("fpdm-digits", "dit-digits")
# Mean iterations a step, and how they are spent.
WAYS: dict[str, tuple[int, dict[str, Any]]] = {
    "4, reuse": (4, {}),
    "2, reuse": (2, {}),
    "2, extrapolate": (2, {"reuse": "extrapolate"}),
    "1, extrapolate": (1, {"reuse": "extrapolate"}),
    "2, reuse, adaptive": (2, {}),
}


class Models:
    """The FPDM and the DiT, and what each way makes of a budget."""

    def __init__(self, fpdm: Path, dit: Path, images: int) -> None:
        first, second = load_denoiser(fpdm), load_denoiser(dit)
        self.weights = {"fpdm": sha256_of(fpdm / WEIGHTS_FILE), "dit": sha256_of(dit / WEIGHTS_FILE)}
        self.fpdm, self.dit, self.images = first.model.eval(), second.model.eval(), images
        assert first.schedule_config is not None
        self.schedule = NoiseSchedule.from_diffusers(first.schedule_config)
        self._outside = cost(self.fpdm, iterations=0).flops
        self._iteration = cost(self.fpdm, iterations=1).flops - self._outside

    def key(self, way: str) -> dict[str, Any]:
        """By what a run of that way is found again, beside its budget and its seed."""
        return {"model": self.weights["dit" if way == "DiT" else "fpdm"], "images": self.images}

    def quality(self, way: str, budget: int, seed: int) -> dict[str, float]:
        return self.of_dit(budget, seed) if way == "DiT" else self.of_fpdm(way, budget, seed)

    def of_dit(self, budget: int, seed: int) -> dict[str, float]:
        steps = budget // self.dit.config.depth
        found = dit_quality(self.dit, self.schedule, images=self.images, steps=steps, seed=seed)
        return {**found, "steps": steps, "flops": steps * cost(self.dit).flops}

    def of_fpdm(self, way: str, budget: int, seed: int) -> dict[str, float]:
        mean_iterations, options = WAYS[way]
        steps = budget // self.fpdm.config.block_passes(mean_iterations)
        iterations: Any = mean_iterations
        if "adaptive" in way:
            probe = min(self.images, 128)
            iterations = adaptive_tolerance(
                self.fpdm,
                initial_noise(0, range(probe), self.fpdm.config.sample_shape),
                self.schedule,
                budget=mean_iterations * steps,
                steps=steps,
                y=classes_of(probe),
            )
        found = sample_quality(
            self.fpdm,
            self.schedule,
            images=self.images,
            steps=steps,
            seed=seed,
            iterations=iterations,
            **options,
        )
        made = (found["block_passes"] - steps * self.fpdm.config.block_passes(0)) / self.fpdm.config.implicit_blocks
        return {**found, "steps": steps, "flops": steps * self._outside + made * self._iteration}


def targets(models: Models) -> list[dict[str, Any]]:
    """What the FPDM is to reach in 50 steps of 4 iterations, with reuse, and what it does."""
    options: dict[str, Any] = {"steps": 50, "iterations": 4, "seed": 1}
    few = sample_quality(models.fpdm, models.schedule, images=min(256, models.images), **options)
    many = sample_quality(models.fpdm, models.schedule, images=models.images, **options)
    job = SamplingJob(embedded("ddpm-digits"), SamplingOptions(num_images=models.images, steps=50, seed=1))
    unet = torch.cat([batch.images for batch in job.batches(progress=False)])
    distance = digit_frechet_distance(unet, split_held_out(load_digits())[1].images)
    return [
        {"name": "confidence of 256 images", "found": few["confidence"], "at least": 0.97},
        {"name": "Frechet distance", "found": many["frechet"], "at most": 1.25 * distance, "U-Net": distance},
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table of Frechet distances and write every figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--budgets", type=int, nargs="+", default=list(BUDGETS))
    parser.add_argument("--only", nargs="+", choices=("DiT", *WAYS), default=["DiT", *WAYS], metavar="WAY")
    parser.add_argument("--pair", nargs=2, action="append", metavar=("FPDM", "DIT"), help="folders or shipped models")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/fpdm-budget.json"))
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    pairs = [Models(_folder(fpdm), _folder(dit), options.images) for fpdm, dit in options.pair or [SHIPPED]]
    kept = json.loads(options.out.read_text()) if options.out.exists() else {"runs": [], "targets": []}
    kept |= {"machine": provenance.machine(), "versions": provenance.versions(), "commit": provenance.commit()}

    def found(part: str, key: dict[str, Any], compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What is in that part of the record under this key, which is computed and written if it is not there."""
        for each in kept[part]:
            if key.items() <= each.items():
                return each  # type: ignore[no-any-return]
        kept[part].append({**key, **compute()})
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(kept, indent=1) + "\n")
        return kept[part][-1]  # type: ignore[no-any-return]

    print(
        f"Frechet distance of {options.images} images "
        f"(lowest..highest of {len(pairs)} training(s) with {options.seeds} seed(s) of the noise each)"
    )
    print(f"{'block passes':22}" + "".join(f"{budget:>20}" for budget in options.budgets), flush=True)
    every: dict[str, list[list[float]]] = {}
    for way in options.only:
        every[way], cells = [], []
        for budget in options.budgets:
            frechet = []
            for models, seed in itertools.product(pairs, range(1, options.seeds + 1)):
                key = {"way": way, "budget": budget, "seed": seed, **models.key(way)}
                frechet.append(found("runs", key, partial(models.quality, way, budget, seed))["frechet"])
            every[way].append(frechet)
            cells.append(f"{mean(frechet):.2f} ({min(frechet):.2f}..{max(frechet):.2f})".rjust(20))
        print(f"{way if way == 'DiT' else f'FPDM {way}':22}" + "".join(cells), flush=True)
    if "DiT" in every and len(every) > 1:
        print("\nAhead of the DiT of the same pair with the same seed, of all of them")
        for way in [each for each in every if each != "DiT"]:
            ahead = [
                f"{sum(a < b for a, b in zip(mine, theirs, strict=True))} of {len(mine)}"
                for mine, theirs in zip(every[way], every["DiT"], strict=True)
            ]
            print(f"{f'FPDM {way}':22}" + "".join(f"{count:>20}" for count in ahead), flush=True)
    print("\nTargets in 50 steps, 4 iterations each with reuse" + (", of the first training" if len(pairs) > 1 else ""))
    for each in found("targets", pairs[0].key("FPDM"), lambda: {"targets": targets(pairs[0])})["targets"]:
        words = [f"{name} {value:.3f}" for name, value in each.items() if name not in ("name", "found")]
        print(f"{each['name']}: {each['found']:.3f} ({', '.join(words)})")


def _folder(name: str) -> Path:
    return embedded_folder(name) if name in EMBEDDED_MODELS else Path(name)


if __name__ == "__main__":
    main()
