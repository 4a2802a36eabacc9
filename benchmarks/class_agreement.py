"""How often a class-conditional model of digits draws the digit that it was asked for.

    fixpoint-diffusion train fpdm --data digits --classes --class-dropout 0.1 --out runs/fpdm-classes
    python -m benchmarks.class_agreement runs/fpdm-classes

A classifier that was trained on real digits reads the samples. The target is an agreement of 0.9 without guidance.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from fixpoint_diffusion.denoisers import load_denoiser
from fixpoint_diffusion.evaluation import digit_probabilities
from fixpoint_diffusion.options.sampling import SamplingOptions
from fixpoint_diffusion.sampling.job import SamplingJob

TARGET = 0.9


def agreement(model: str | Path, *, guidance: float, num_images: int, steps: int, seed: int) -> tuple[float, float]:
    """Share of samples that the classifier reads as their class, and its mean confidence."""
    options = SamplingOptions(num_images=num_images, steps=steps, seed=seed, classes="all", guidance=guidance)
    batches = list(SamplingJob(load_denoiser(model), options).batches(progress=False))
    labels = torch.cat([batch.labels for batch in batches if batch.labels is not None])
    probabilities = digit_probabilities(torch.cat([batch.images for batch in batches]))
    return float((probabilities.argmax(1) == labels).double().mean()), float(probabilities.amax(1).mean())


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a line for each guidance scale; the exit status is 1 if the target is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of a model with ten classes")
    parser.add_argument("--num-images", type=int, default=500, help="samples for each guidance scale")
    parser.add_argument("--steps", type=int, default=50, help="sampling steps")
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    met = True
    for guidance in (1.0, 1.5):
        share, confidence = agreement(
            options.model,
            guidance=guidance,
            num_images=options.num_images,
            steps=options.steps,
            seed=options.seed,
        )
        met &= guidance != 1.0 or share >= TARGET
        print(f"guidance {guidance}: agreement {share:.3f} of {options.num_images}, confidence {confidence:.3f}")
    print(f"target {TARGET} without guidance: {'met' if met else 'missed'}")
    return int(not met)


if __name__ == "__main__":
    sys.exit(main())
