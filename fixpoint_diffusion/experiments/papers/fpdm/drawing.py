"""Runs that sample from an FPDM: iterations and steps, their allocation, reuse, and what comes out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from fixpoint import bench
from fixpoint_diffusion.denoisers import FPDMDenoiser
from fixpoint_diffusion.evaluation import digit_quality
from fixpoint_diffusion.experiments.experiment import Kind
from fixpoint_diffusion.experiments.plans import published_flops
from fixpoint_diffusion.experiments.records import Config, Measures
from fixpoint_diffusion.experiments.resources import Resources
from fixpoint_diffusion.models import allocate
from fixpoint_diffusion.processes import NoiseSchedule
from fixpoint_diffusion.sampling import sample_fpdm

_BATCH = 128
_SHOWN = 8


def _draw(config: Config, resources: Resources) -> Measures:
    """``model``, ``data``, ``iterations``, ``steps``, ``allocation``, ``reuse``, ``eta``, ``images``, ``seed``."""
    denoiser = resources.denoiser(config["model"])
    assert isinstance(denoiser, FPDMDenoiser)
    model, schedule = denoiser.model.eval(), NoiseSchedule.from_diffusers(denoiser.schedule_config)
    steps, first = config["steps"], []
    classes = model.config.num_classes
    iterations = allocate(config["iterations"] * steps, steps, config["allocation"])
    passes: list[float] = []
    deltas: list[Tensor] = []

    def batches() -> Iterator[Tensor]:
        for number in range(0, config["images"], _BATCH):
            samples = range(number, min(number + _BATCH, config["images"]))
            drawn = sample_fpdm(
                model,
                resources.noise(config, samples),
                schedule,
                steps=steps,
                iterations=iterations,
                reuse=config["reuse"],
                eta=config["eta"],
                seed=config["seed"],
                first_sample=number,
                y=None if classes is None else torch.arange(number, samples.stop, device=resources.device) % classes,
                record=True,
            )
            passes.append(drawn.block_passes)
            assert drawn.deltas is not None
            deltas.append(drawn.deltas)
            images = resources.pictures(drawn.images, config["data"])
            first.append(images)
            yield images

    distance = resources.distance(batches(), config["data"])
    last = torch.cat(deltas, dim=1)
    measures: Measures = {
        "distance": distance,
        "block_passes": passes[0],
        "delta": float(last.double().median(dim=1).values.log().mean().exp()),
        "images": pictures(first[0], f"{config['iterations']} x {steps}"),
    }
    if config["data"] == "digits":
        measures["confidence"] = digit_quality(torch.cat(first)).relative_confidence
    return measures


def pictures(images: Tensor, label: str) -> dict[str, Any]:
    """The first images as one row of a grid."""
    return asdict(bench.Images.of("images", images[None, :_SHOWN].clamp(-1, 1), row_labels=[label]))


def _flops(config: Config) -> float:
    return published_flops("fpdm", {}, config["iterations"]) * config["steps"] * config["images"]


DRAWS = Kind(name="fpdm-draw", run=_draw, flops=_flops)
