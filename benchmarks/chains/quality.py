"""Quality for the time: DDIM, sequential and by ours, beside DPM-Solver++ and UniPC of diffusers."""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Mapping
from dataclasses import asdict, dataclass
from functools import cache

import torch
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler
from torch import Tensor
from tqdm import tqdm

from benchmarks.chains.cases import SHAPE, batch
from benchmarks.chains.methods import ours
from fixpoint_diffusion import embedded, initial_noise
from fixpoint_diffusion.evaluation import digit_frechet_distance
from fixpoint_diffusion.training.data import load_digits, split_held_out

_BATCH = 250
Sampler = Callable[[range], Tensor]


@dataclass(frozen=True)
class Quality:
    """A sampler: Frechet distance of its images, seconds for one image alone, and for one of a large batch."""

    name: str
    alone: float
    distance: float | None = None  # these two None: made no batch
    batched: float | None = None


def samplers(*, ddim_steps: tuple[int, ...], other_steps: tuple[int, ...]) -> dict[str, Sampler]:
    """By name: what makes the images of a range of samples."""
    found = {f"DDIM T={steps}": _sequential(steps) for steps in ddim_steps}
    found |= {f"DDIM T={steps}, ours": _ours(steps) for steps in ddim_steps}
    for name, kind in (("DPM-Solver++", DPMSolverMultistepScheduler), ("UniPC", UniPCMultistepScheduler)):
        found |= {f"{name} {steps} steps": _scheduler(kind, steps) for steps in other_steps}
    return found


def measure(
    chosen: Mapping[str, Sampler], *, images: int, repeats: int = 3, alone_only: Container[str] = ()
) -> list[Quality]:
    """Every sampler's distance to the training digits, from the same initial noise, and its times.

    Those named in ``alone_only`` make single images and no batch.
    """
    reference = split_held_out(load_digits())[0].images
    batches = [range(first, min(first + _BATCH, images)) for first in range(0, images, _BATCH)]
    results = []
    for name, sampler in tqdm(chosen.items(), unit="sampler"):
        alone = min(_timed(sampler, range(k, k + 1)) for k in range(repeats))
        if name in alone_only:
            results.append(Quality(name, alone))
            continue
        start = time.perf_counter()
        pictures = torch.cat([sampler(samples) for samples in batches])
        batched = (time.perf_counter() - start) / images
        results.append(Quality(name, alone, digit_frechet_distance(pictures, reference), batched))
    return results


def text(results: list[Quality], images: int) -> str:
    """The table, with the distance of real digits as a floor."""
    train, held_out = split_held_out(load_digits())
    floor = digit_frechet_distance(held_out.images, train.images)
    lines = [
        f"Frechet distance to the {len(train)} training digits in the classifier's features, {images} images; "
        f"{len(held_out)} held-out digits have {floor:.2f}.",
        f"ms: for one image alone (least of three), and for one of a batch of up to {_BATCH}, where ours chooses by",
        "itself how many rows it asks for in a round; -: not made in batches.",
        "",
        f"{'':24} {'distance':>9} {'ms alone':>9} {'ms in batch':>12}",
    ]
    lines += [
        f"{each.name:24} {_figure(each.distance):>9} {1e3 * each.alone:>9.1f} "
        f"{_figure(each.batched and 1e3 * each.batched):>12}"
        for each in results
    ]
    return "\n".join(lines)


def as_json(results: list[Quality], images: int) -> dict[str, object]:
    """Every figure."""
    return {"images": images, "samplers": [asdict(each) for each in results]}


def _figure(figure: float | None) -> str:
    return "-" if figure is None else f"{figure:.2f}"


def _timed(sampler: Sampler, samples: range) -> float:
    start = time.perf_counter()
    sampler(samples)
    return time.perf_counter() - start


def _ours(steps: int) -> Sampler:
    return lambda samples: ours()(batch("unet", steps, 0.0, samples), None, steps).images


@cache
def _sequential(steps: int) -> Sampler:
    @torch.no_grad()
    def sampler(samples: range) -> Tensor:
        return batch("unet", steps, 0.0, samples).sequential()[:, -1]

    return sampler


def _scheduler(kind: type, steps: int) -> Sampler:
    denoiser = embedded("ddpm-digits")

    @torch.no_grad()
    def sampler(samples: range) -> Tensor:
        scheduler = kind.from_config(denoiser.schedule_config)
        scheduler.set_timesteps(steps)
        x = initial_noise(0, samples, SHAPE)
        for t in scheduler.timesteps:
            x = scheduler.step(denoiser(x, t.repeat(len(x))), t, x).prev_sample
        return x

    return sampler
