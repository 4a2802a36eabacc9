"""Digits for so many block passes an image: an FPDM, in several ways to spend them, beside a DiT of equal training.

    python -m benchmarks.fpdm_budget [--images 1024] [--seeds 3] [--fpdm FOLDER] [--dit FOLDER] [--only WAY ...]

What is in the record already, of the same models and as many images, is not computed again. Without folders the models
are those that the package ships. Each way takes as many steps as the budget allows; a DiT of depth D has budget / D of
them. DDIM without guidance, classes 0 to 9 in turn. A seed is one of the noise that images start from; each model was
trained once. Written are the Frechet distance to held-out digits, the classifier's confidence, the share of images that
are read as their class, and the block passes and operations (FLOPs) that were spent: an iteration of the FPDM's layer
has, beside its block, the two projections of the injection. Last come the two targets of the shipped FPDM, the second
one beside the shipped U-Net, which is told no class.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from benchmarks.fpdm_measures import dit_quality, sample_quality
from fixpoint.bench import provenance
from fixpoint_diffusion.denoisers import embedded, embedded_folder, load_denoiser
from fixpoint_diffusion.evaluation import digit_frechet_distance
from fixpoint_diffusion.experiments.fpdm import classes_of
from fixpoint_diffusion.files import sha256_of
from fixpoint_diffusion.models import cost
from fixpoint_diffusion.models.checkpoint import WEIGHTS_FILE
from fixpoint_diffusion.processes import NoiseSchedule, initial_noise
from fixpoint_diffusion.sampling import adaptive_tolerance
from fixpoint_diffusion.sampling.job import SamplingJob
from fixpoint_diffusion.sampling.options import SamplingOptions
from fixpoint_diffusion.training.data import load_digits, split_held_out

BUDGETS = (40, 80, 160, 320)
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
        self.fpdm, self.dit, self.images = first.model.eval(), second.model.eval(), images
        assert first.schedule_config is not None
        self.schedule = NoiseSchedule.from_diffusers(first.schedule_config)
        self._outside = cost(self.fpdm, iterations=0).flops
        self._iteration = cost(self.fpdm, iterations=1).flops - self._outside

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
    parser.add_argument("--fpdm", type=Path, default=None, help="model folder (default: the shipped one)")
    parser.add_argument("--dit", type=Path, default=None, help="model folder (default: the shipped one)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/fpdm-budget.json"))
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    fpdm = options.fpdm or embedded_folder("fpdm-digits")
    dit = options.dit or embedded_folder("dit-digits")
    models = Models(fpdm, dit, options.images)
    about = {"images": options.images, "fpdm": sha256_of(fpdm / WEIGHTS_FILE), "dit": sha256_of(dit / WEIGHTS_FILE)}
    kept = json.loads(options.out.read_text()) if options.out.exists() else {}
    same = {name: kept.get(name) == value for name, value in about.items()}
    for way in list(kept.get("runs", ())):
        if not (same["images"] and same["dit" if way == "DiT" else "fpdm"]):
            del kept["runs"][way]
    kept = {"runs": {}, **kept, "targets": kept["targets"] if same["images"] and same["fpdm"] else []}
    kept |= {**about, "machine": provenance.machine(), "versions": provenance.versions(), "commit": provenance.commit()}

    def write() -> None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(kept, indent=1) + "\n")

    print(f"Frechet distance of {options.images} images (lowest..highest of {options.seeds} seeds of the noise)")
    print(f"{'block passes':22}" + "".join(f"{budget:>20}" for budget in options.budgets), flush=True)
    for way in options.only:
        cells = []
        for budget in options.budgets:
            runs = kept["runs"].setdefault(way, {}).setdefault(str(budget), [])
            for seed in range(len(runs) + 1, options.seeds + 1):
                found = models.of_dit(budget, seed) if way == "DiT" else models.of_fpdm(way, budget, seed)
                runs.append(found)
                write()
            frechet = [run["frechet"] for run in runs]
            cells.append(f"{mean(frechet):.2f} ({min(frechet):.2f}..{max(frechet):.2f})".rjust(20))
        print(f"{way if way == 'DiT' else f'FPDM {way}':22}" + "".join(cells), flush=True)
    print("\nTargets in 50 steps, 4 iterations each with reuse")
    kept["targets"] = kept["targets"] or targets(models)
    write()
    for each in kept["targets"]:
        words = [f"{name} {value:.3f}" for name, value in each.items() if name not in ("name", "found")]
        print(f"{each['name']}: {each['found']:.3f} ({', '.join(words)})")


if __name__ == "__main__":
    main()
