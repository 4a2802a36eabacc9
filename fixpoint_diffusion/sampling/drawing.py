"""Sampling as the command line does it: from a model and plain options to images and the figures of the run."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fixpoint import Anderson, Broyden, CausalQuasiNewton, Picard, Solver
from fixpoint_diffusion.chains import DDIMChain, StochasticDDIMChain
from fixpoint_diffusion.denoisers import FPDMDenoiser, NetworkDenoiser
from fixpoint_diffusion.processes import NoiseSchedule, initial_noise
from fixpoint_diffusion.sampling.fpdm import sample_fpdm
from fixpoint_diffusion.sampling.sample import sample

SOLVERS: dict[str, Solver] = {
    "causal": CausalQuasiNewton(),
    "picard": Picard(),
    "anderson": Anderson(),
    "broyden": Broyden(),
}
DEFAULT_ITERATIONS = 4


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """Images ``(N, C, H, W)`` and the JSON-able figures of how they came about."""

    images: Tensor
    figures: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class DrawOptions:
    """What to draw and how.

    Attributes:
        num_images, steps, seed: how many images, sampling steps, and the seed of all noise.
        eta: noise per step, from 0 (DDIM) to 1 (as much as DDPM).
        solver: ``"sequential"``, or a key of ``SOLVERS`` for all steps at once.
        rtol, max_rounds: of a parallel solver; max_rounds None: steps + 1, by when Picard is exact.
        max_rows: most denoiser rows in a round of the causal solver; None: by the denoiser's measured cost.
        iterations: of an FPDM per step; None: 4.
        reuse: whether an FPDM's iterations start at the last step's solution; None: yes where steps follow each other.
    """

    num_images: int = 16
    steps: int = 50
    seed: int = 0
    eta: float = 0.0
    solver: str = "sequential"
    rtol: float = 1e-3
    max_rounds: int | None = None
    max_rows: int | None = None
    iterations: int | None = None
    reuse: bool | None = None


def draw(denoiser: NetworkDenoiser, options: DrawOptions, *, progress: bool = True) -> Drawn:
    """Draw images from a loaded denoiser.

    Raises:
        ValueError: for options that do not fit the model or each other, or a model that lacks a schedule or a size.
    """
    if denoiser.schedule_config is None or denoiser.sample_shape is None:
        missing = "scheduler_config.json" if denoiser.schedule_config is None else "sample_size in its config.json"
        raise ValueError(f"cannot sample from this model folder: it has no {missing}")
    if options.max_rows is not None and options.solver != "causal":
        raise ValueError(f"--max-rows is for --solver causal, not for --solver {options.solver}")
    schedule = NoiseSchedule.from_diffusers(denoiser.schedule_config)
    device = denoiser.device
    x_T = initial_noise(options.seed, range(options.num_images), denoiser.sample_shape, device=device)
    if isinstance(denoiser, FPDMDenoiser):
        if options.solver == "sequential":
            return _draw_fpdm(denoiser, x_T, schedule, options, progress=progress)
        if options.reuse:
            raise ValueError("--reuse needs steps that follow each other: leave it out, or use --solver sequential")
        denoiser = FPDMDenoiser(
            denoiser.model,
            schedule_config=denoiser.schedule_config,
            depth=options.iterations or DEFAULT_ITERATIONS,
            prior=denoiser.prior,
        )
    elif options.iterations is not None or options.reuse is not None:
        raise ValueError("--iterations and --reuse are for FPDM models, and this model is none")
    return _draw_chain(denoiser, x_T, schedule, options, progress=progress)


def _draw_chain(
    denoiser: NetworkDenoiser,
    x_T: Tensor,
    schedule: NoiseSchedule,
    options: DrawOptions,
    *,
    progress: bool,
) -> Drawn:
    chain = (
        DDIMChain(denoiser, x_T, schedule, steps=options.steps)
        if options.eta == 0
        else StochasticDDIMChain(denoiser, x_T, schedule, steps=options.steps, eta=options.eta, seed=options.seed)
    )
    began = time.perf_counter()
    if options.solver == "sequential":
        with torch.no_grad():
            images = chain.sequential(progress=progress)[:, -1]
        outcome: dict[str, Any] = {}
    else:
        solver = SOLVERS[options.solver]
        if options.max_rows is not None:
            solver = CausalQuasiNewton(max_rows=options.max_rows)
        result = sample(chain, solver=solver, rtol=options.rtol, max_evals=options.max_rounds, progress=progress)
        images = result.images
        outcome = {"rtol": options.rtol, "converged": int(result.solution.converged.sum())}
    counts = {"rounds": chain.rounds, "evals": chain.evals}
    return Drawn(images=images, figures=_figures(options, counts | outcome, began))


def _draw_fpdm(
    denoiser: FPDMDenoiser, x_T: Tensor, schedule: NoiseSchedule, options: DrawOptions, *, progress: bool
) -> Drawn:
    iterations = options.iterations or DEFAULT_ITERATIONS
    reuse = options.reuse is not False
    began = time.perf_counter()
    samples = sample_fpdm(
        denoiser.model,
        x_T,
        schedule,
        steps=options.steps,
        iterations=iterations,
        reuse=reuse,
        eta=options.eta,
        seed=options.seed,
        progress=progress,
    )
    counts = {"iterations": iterations, "reuse": reuse, "block_passes": samples.block_passes}
    return Drawn(images=samples.images, figures=_figures(options, counts, began))


def _figures(options: DrawOptions, outcome: dict[str, Any], began: float) -> dict[str, Any]:
    seconds = round(time.perf_counter() - began, 3)
    names = ("num_images", "steps", "eta", "seed", "solver")
    return {name: getattr(options, name) for name in names} | outcome | {"seconds": seconds}
