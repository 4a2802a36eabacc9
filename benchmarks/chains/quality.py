"""Quality for the time: DDIM, sequential and by ours, beside DPM-Solver++ and UniPC of diffusers."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cache

import torch
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler
from torch import Tensor
from tqdm import tqdm

from benchmarks.chains.cases import SHAPE, batch
from benchmarks.chains.methods import ours
from fixpoint_diffusion import embedded, initial_noise
from fixpoint_diffusion.data import load_digits, split_held_out
from fixpoint_diffusion.metrics import frechet_distance

_BATCH = 250
Sampler = Callable[[range], Tensor]


@dataclass(frozen=True)
class Quality:
    """A sampler: Frechet distance of its images, seconds for one image alone, and for one of a large batch."""

    name: str
    distance: float
    alone: float
    batched: float


def samplers(*, ddim_steps: tuple[int, ...], other_steps: tuple[int, ...]) -> dict[str, tuple[Sampler, Sampler]]:
    """By name: the sampler of a batch, and that of one image alone."""
    found = {f"DDIM T={steps}": (_sequential(steps), _sequential(steps)) for steps in ddim_steps}
    # Ours makes the same images, to 1e-3: a large batch keeps the processor busy in any case.
    found |= {f"DDIM T={steps}, ours": (_sequential(steps), _ours(steps)) for steps in ddim_steps}
    for name, kind in (("DPM-Solver++", DPMSolverMultistepScheduler), ("UniPC", UniPCMultistepScheduler)):
        found |= {f"{name} {steps} steps": (_scheduler(kind, steps),) * 2 for steps in other_steps}
    return found


def measure(chosen: Mapping[str, tuple[Sampler, Sampler]], *, images: int, repeats: int = 3) -> list[Quality]:
    """Every sampler's distance to the training digits, from the same initial noise, and its times."""
    reference = split_held_out(load_digits())[0].images
    batches = [range(first, min(first + _BATCH, images)) for first in range(0, images, _BATCH)]
    made: dict[Sampler, tuple[float, float]] = {}
    results = []
    for name, (many, one) in tqdm(chosen.items(), unit="sampler"):
        if many not in made:
            start = time.perf_counter()
            pictures = torch.cat([many(samples) for samples in batches])
            made[many] = (time.perf_counter() - start) / images, frechet_distance(pictures, reference)
        alone = min(_timed(one, range(k, k + 1)) for k in range(repeats))
        batched, distance = made[many]
        results.append(Quality(name, distance, alone, batched))
    return results


def text(results: list[Quality], images: int) -> str:
    """The table, with the distance of real digits as a floor."""
    train, held_out = split_held_out(load_digits())
    floor = frechet_distance(held_out.images, train.images)
    lines = [
        f"Frechet distance to the {len(train)} training digits in the classifier's features, {images} images; "
        f"{len(held_out)} held-out digits have {floor:.2f}.",
        f"ms: for one image alone (least of three), and for one of a batch of up to {_BATCH}, made sequentially.",
        "",
        f"{'':24} {'distance':>9} {'ms alone':>9} {'ms in batch':>12}",
    ]
    lines += [
        f"{each.name:24} {each.distance:>9.2f} {1e3 * each.alone:>9.1f} {1e3 * each.batched:>12.2f}" for each in results
    ]
    return "\n".join(lines)


def as_json(results: list[Quality], images: int) -> dict[str, object]:
    """Every figure."""
    return {"images": images, "samplers": [asdict(each) for each in results]}


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
