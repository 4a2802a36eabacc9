"""Recipes for training an FPDM: what keeps its layer a fixed point, and what that does for samples.

    python -m benchmarks.fpdm_recipes [--folder runs/fpdm-recipes] [--seeds 2] [--only NAME ...] [--table]

Small class-conditional FPDMs of digits are trained, one after the other, on one thread. They differ in one thing each
from "none". The last five ask where one recorded iteration (JFB) is too little, after 6 or 24 that record nothing.
Every finished run is written to the record at once, keyed by its name and seed. A second call does only what is
missing, and goes on with a run that was interrupted.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from benchmarks.fpdm_measures import MULTIPLES, beyond_training, layer_figures, sample_quality
from fixpoint.bench import provenance
from fixpoint_diffusion.denoisers import load_denoiser
from fixpoint_diffusion.processes import NoiseSchedule
from fixpoint_diffusion.training import TrainingRun
from fixpoint_diffusion.training.checkpoints import CHECKPOINT

SETTINGS: dict[str, Any] = {"width": 48, "heads": 4, "max_no_grad": 6, "max_grad": 2}
TRAINING: dict[str, Any] = {"steps": 1500, "batch_size": 32, "weight_decay": 0.01, "checkpoint_every": 500}
# Two calls a step, of half the iterations each: as deep, and about as long, as the others.
_TWICE = {"max_no_grad": 3, "max_grad": 1}
# What differs from the above, in settings of the model and of the training. The first ones are of most interest.
RECIPES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "none": ({}, {}),
    "weight decay 0.2": ({}, {"weight_decay": 0.2}),
    "start noise 0.5": ({"start_noise": 0.5}, {}),
    "Jacobian penalty 0.1": ({}, {"jacobian_penalty": 0.1}),
    "gate below 0.9": ({"gate_cap": 0.9}, {}),
    "self-distilled": (_TWICE, {"state_loss": "self-distilled"}),
    "supervised": (_TWICE, {"state_loss": "supervised"}),
    "min-SNR weight": ({}, {"weighting": "min-snr"}),
    "JFB, N = 6": ({"backward": "jfb"}, {}),
    "JFB, N = 24": ({"backward": "jfb", "max_no_grad": 24}, {}),
    "S-JFB, N = 24": ({"max_no_grad": 24}, {}),
    "multi-step, N = 6": ({"backward": "multi-jfb"}, {}),
    "multi-step, N = 24": ({"backward": "multi-jfb", "max_no_grad": 24}, {}),
}
# Iterations of the deepest training step but those of the rules with N = 24.
DEPTH = 8
IMAGES, STEPS, LAYER_IMAGES = 1024, 10, 64


def run_one(name: str, seed: int, folder: Path, training: dict[str, Any]) -> dict[str, Any]:
    """Train that recipe in ``folder``, or go on with it, and measure the model."""
    settings, own = RECIPES[name]
    training = {**training, **own, "seed": seed}
    if (folder / CHECKPOINT).exists():
        run = TrainingRun.resume(folder)
    else:
        run = TrainingRun.start(folder, kind="fpdm", classes=True, settings={**SETTINGS, **settings}, training=training)
    from_the_start, start = run.steps_done == 0, time.process_time()
    run.run(progress=False)
    seconds = time.process_time() - start
    denoiser: Any = load_denoiser(folder)
    model, schedule = denoiser.model, NoiseSchedule.from_diffusers(denoiser.schedule_config)
    sizes = {"images": IMAGES, "steps": STEPS, "seed": seed}
    return {
        "name": name,
        "seed": seed,
        "settings": settings,
        "training": training,
        "seconds": round(seconds, 1) if from_the_start else None,
        "reuse_4": sample_quality(model, schedule, iterations=4, **sizes),
        "beyond": beyond_training(model, schedule, depth=DEPTH, **sizes),
        "layer": layer_figures(model, schedule, depth=DEPTH, **{**sizes, "images": LAYER_IMAGES}),
    }


def table(records: Sequence[dict[str, Any]]) -> str:
    """A line a recipe: means over its seeds, of the main figure the lowest and the highest too."""
    width = max(len(name) for name in RECIPES)
    lines = [
        f"{IMAGES} images in {STEPS} steps, started anew but for the first two columns. Residual: the layer's after "
        f"{DEPTH} iterations,",
        f"median and 99 % quantile. Unsettled: problems with a residual above 1e-4 after {4 * DEPTH}. Cosine: of the "
        "states that two starts",
        "lead to, 1 % quantile. Seconds: of the training, on one processor.",
        "",
        f"{'':{width}}         4 iterations, reuse         Frechet distance at",
        f"{'recipe':{width}}  seeds  Frechet distance    conf."
        + "".join(f"{times * DEPTH:>6}" for times in MULTIPLES)
        + "  residual         unsettled  cosine  seconds",
    ]
    for name in RECIPES:
        found = [record for record in records if record["name"] == name]
        if not found:
            continue
        frechet = [record["reuse_4"]["frechet"] for record in found]
        seconds = [record["seconds"] for record in found if record["seconds"] is not None]
        layer = {key: mean(record["layer"][key] for record in found) for key in found[0]["layer"]}
        lines.append(
            f"{name:{width}}  {len(found):5}  {f'{mean(frechet):.2f} ({min(frechet):.2f}..{max(frechet):.2f})':18}"
            f"  {mean(record['reuse_4']['confidence'] for record in found):.3f}"
            + "".join(
                f"{mean(record['beyond'][str(times)]['frechet'] for record in found):6.2f}" for times in MULTIPLES
            )
            + f"  {layer['residual']:.1e} {layer['worst_residual']:.1e}"
            f"  {layer['unsettled']:8.1%}  {layer['lowest_cosine']:6.3f}"
            f"  {f'{mean(seconds):.0f}' if seconds else '-':>7}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train and measure what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/fpdm-recipes"), help="where the trainings are")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--only", nargs="+", choices=RECIPES, default=list(RECIPES), metavar="NAME")
    parser.add_argument("--steps", type=int, default=TRAINING["steps"], help="of each training")
    parser.add_argument("--table", action="store_true", help="train nothing, print what there is")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/fpdm-recipes.json"))
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    kept = json.loads(options.out.read_text()) if options.out.exists() else {"runs": []}
    training = {**TRAINING, "steps": options.steps}
    done = {(record["name"], record["seed"], record["training"]["steps"]) for record in kept["runs"]}
    for seed in range(1, options.seeds + 1):
        for name in options.only if not options.table else ():
            if (name, seed, options.steps) in done:
                continue
            folder = options.folder / f"{name.replace(' ', '-').replace(',', '')}-{options.steps}-{seed}"
            record = {**run_one(name, seed, folder, training), "commit": provenance.commit()}
            kept |= {"machine": provenance.machine(), "versions": provenance.versions()}
            kept["runs"].append(record)
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(kept, indent=1) + "\n")
            print(f"{name}, seed {seed}: {record['reuse_4']['frechet']:.2f}", flush=True)
    print(table([record for record in kept["runs"] if record["training"]["steps"] == options.steps]))


if __name__ == "__main__":
    main()
