"""Runs that draw many images by one sampler: their distance to the data, and seconds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fixpoint_diffusion.chains import chain_from_scheduler
from fixpoint_diffusion.experiments.experiment import Kind
from fixpoint_diffusion.experiments.papers.deq_ddim.solving import relative_errors, solver_settings
from fixpoint_diffusion.experiments.plans import call_flops
from fixpoint_diffusion.experiments.records import Config, Measures
from fixpoint_diffusion.experiments.resources import Resources
from fixpoint_diffusion.extras import needed_for
from fixpoint_diffusion.sampling import SamplingResult, sample

_BATCH = 64
_COMPARED = 16  # images of each run that are compared with the sequential sampler's
_FEWEST = 100  # images of which a distance in 64 features says something
PARALLEL = ("paper", "released-code", "ours")


def _sample(config: Config, resources: Resources) -> Measures:
    """``model``, ``data``, ``method``, ``steps``, ``eta``, ``images``, ``seed``."""
    draw, images, first = _samplers(config, resources), config["images"], range(min(_COMPARED, config["images"]))
    _, rounds, rows = draw(range(1))  # not timed: a first call makes buffers
    measures: Measures = {"rounds_alone": rounds, "rows_alone": rows, "seconds_alone": _seconds(lambda: draw(range(1)))}
    if config["method"] in PARALLEL:
        exact, _, _ = _samplers({**config, "method": "sequential"}, resources)(first)
        measures["error"] = relative_errors(draw(first)[0], exact)
    start = time.perf_counter()

    def batches() -> Iterator[Tensor]:
        for number in range(0, images, _BATCH):
            yield draw(range(number, min(number + _BATCH, images)))[0]

    if images >= _FEWEST:
        measures["distance"] = resources.distance(batches(), config["data"])
        measures["seconds_batched"] = (time.perf_counter() - start) / images
    return measures


def _seconds(draw: Callable[[], object]) -> float:
    """The least of three, or of as many as fit into two seconds."""
    times: list[float] = []
    while len(times) < 3 and sum(times) < 2:
        start = time.perf_counter()
        draw()
        times.append(time.perf_counter() - start)
    return min(times)


def _samplers(config: Config, resources: Resources) -> Callable[[range], tuple[Tensor, int, int]]:
    """What makes the images of a range of samples: with rounds and rows of the network."""
    method, steps = config["method"], config["steps"]

    @torch.no_grad()
    def sequential(samples: range) -> tuple[Tensor, int, int]:
        chain = resources.chain(config, resources.noise(config, samples), first_sample=samples.start)
        images = chain.sequential(trajectory=False)
        return images, chain.rounds, chain.evals

    @torch.no_grad()
    def ddpm(samples: range) -> tuple[Tensor, int, int]:
        denoiser = resources.denoiser(config["model"])
        # The larger variance, as in the paper's column.
        scheduler = {
            **(denoiser.schedule_config or {}),
            "_class_name": "DDPMScheduler",
            "variance_type": "fixed_large",
            "clip_sample": False,
        }
        x_T = resources.noise(config, samples)
        options = {"steps": steps, "seed": config["seed"], "first_sample": samples.start}
        chain = chain_from_scheduler(denoiser, x_T, scheduler, **options)
        return chain.sequential(trajectory=False), chain.rounds, chain.evals

    @torch.no_grad()
    def dpm_solver(samples: range) -> tuple[Tensor, int, int]:
        with needed_for("DPM-Solver++"):
            from diffusers import DPMSolverMultistepScheduler

        denoiser = resources.denoiser(config["model"])
        scheduler = DPMSolverMultistepScheduler.from_config({**(denoiser.schedule_config or {}), "thresholding": False})
        scheduler.set_timesteps(steps)
        x = resources.noise(config, samples)
        for t in scheduler.timesteps:
            x = scheduler.step(denoiser(x, t.repeat(len(x)).to(x.device)), t, x).prev_sample
        return x, steps, steps * len(x)

    def parallel(samples: range) -> tuple[Tensor, int, int]:
        chain = resources.chain(config, resources.noise(config, samples), first_sample=samples.start)
        found: SamplingResult = sample(chain, on_failure="ignore", **solver_settings(chain, method))
        return found.images, found.rounds, found.evals

    return {"sequential": sequential, "ddpm": ddpm, "dpm-solver++": dpm_solver}.get(method, parallel)


def _flops(config: Config) -> float:
    rounds = {"paper": 50 if config["eta"] else 15, "released-code": 50 if config["eta"] else 15, "ours": 4}
    calls = config["steps"] * rounds.get(config["method"], 1)
    return call_flops(config["model"]) * (config["images"] + _COMPARED + 1) * calls


SAMPLES = Kind(name="chain-sample", run=_sample, flops=_flops)
