"""The implicit layer of the embedded FPDM: cost by solver and timestep, with and without reuse (FPDM, Figure 6)."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fixpoint import Anderson, Broyden, Picard, Solution, Solver, bench, solve
from fixpoint_diffusion.denoisers import FPDMDenoiser, embedded
from fixpoint_diffusion.evaluation import digit_quality
from fixpoint_diffusion.experiments.papers.fpdm.reuse import STARTS, convergence, curves
from fixpoint_diffusion.models import FPDM, FPDMLayerProblem, fpdm_layer_problem
from fixpoint_diffusion.processes import NoiseSchedule, Transitions, initial_noise, wide
from fixpoint_diffusion.sampling import sample_fpdm

SOLVERS: dict[str, Solver] = {"Picard": Picard(), "Anderson": Anderson(), "Broyden": Broyden()}
RTOLS = (1e-2, 1e-3, 1e-4)
MAX_EVALS = 100
Solved = dict[tuple[int, str, str, float], Solution]  # by timestep, start, solver and tolerance


def embedded_fpdm() -> tuple[FPDM, NoiseSchedule]:
    """The embedded model, in evaluation mode, and the schedule that it was trained on."""
    denoiser = embedded("fpdm-digits")
    assert isinstance(denoiser, FPDMDenoiser)
    return denoiser.model.eval(), NoiseSchedule.from_diffusers(denoiser.schedule_config)


def classes_of(samples: int) -> Tensor:
    """0, 1, ..., 9, 0, 1, ...: the digits that the embedded model is asked for."""
    return torch.arange(samples) % 10


def embedded_layer(*, timestep: int, samples: int, seed: int) -> FPDMLayerProblem:
    """The layer's problem at the sampler's own latents at ``timestep``, which it reaches in 20 steps."""
    model, schedule = embedded_fpdm()
    last = len(schedule.alphas_cumprod) - 1
    if not 0 <= timestep <= last:
        raise ValueError(f"timestep must be from 0 to {last}, got {timestep}")
    timesteps = torch.linspace(last, timestep, 20 if timestep < last else 1).round().long().unique().flip(0)
    *_, (_, cold, _) = _trajectory(model, schedule, timesteps, samples, seed)
    return cold


def fpdm_study(quick: bool) -> bench.Study:
    """Evaluations of each solver at nine timesteps of a sampling run, and images at few iterations per step."""
    model, schedule = embedded_fpdm()
    steps, samples = (10, 4) if quick else (50, 16)
    timesteps = schedule.timesteps(steps, "linspace")
    chosen = {int(timesteps[k]) for k in torch.linspace(1, steps - 1, 9).round().long()}
    solved: Solved = {}
    x_T = initial_noise(0, range(samples), model.config.sample_shape)
    for t, cold, reused in _trajectory(model, schedule, timesteps, samples, seed=0):
        for start, problem in zip(STARTS, (cold, reused), strict=True) if t in chosen else ():
            for (label, solver), rtol in itertools.product(SOLVERS.items(), RTOLS):
                solved[t, start, label, rtol] = solve(
                    problem,
                    solver=solver,
                    backward=None,
                    rtol=rtol,
                    max_evals=MAX_EVALS,
                    on_failure="ignore",
                )
    order = sorted(chosen, reverse=True)
    return bench.Study(
        "fpdm-layer",
        "FPDM: the implicit layer along a sampling run",
        [
            _summary(solved, order),
            *_by_timestep(solved, order),
            *curves([convergence(model, x_T, schedule, steps=steps, timesteps=9, iterations=5 if quick else 50)]),
            *_samples(model, schedule, steps=steps, samples=samples),
        ],
        f"DDIM with {steps} steps and {samples} images, digits 0 to 9 in turn; the layer's problem is taken at nine of "
        "its timesteps, started from the output of the explicit blocks, or from the last step's solution (reuse).",
    )


def _trajectory(
    model: FPDM, schedule: NoiseSchedule, timesteps: Tensor, samples: int, seed: int
) -> Iterator[tuple[int, FPDMLayerProblem, FPDMLayerProblem]]:
    """At each step of DDIM sampling: the timestep, its problem from a cold start, and with the last solution reused.

    Both are at the same latents: every step is solved to a tolerance from a cold start.
    """
    transitions = Transitions.of(schedule, timesteps, prediction_type=model.config.prediction_type)
    x = initial_noise(seed, range(samples), model.config.sample_shape)
    y = classes_of(samples)
    previous: Tensor | None = None
    for k, t in enumerate(timesteps):
        yield int(t), fpdm_layer_problem(model, x, t, y=y), fpdm_layer_problem(model, x, t, previous, y=y)
        with torch.no_grad():
            out, solution = model(
                x, t, y, solver=Anderson(), rtol=min(RTOLS), max_evals=MAX_EVALS, return_solution=True
            )
        previous = solution.value
        x = transitions.step(wide(x), wide(out), k).to(x.dtype)


def _evaluations(solution: Solution) -> float:
    """Mean over images of the evaluations spent; one that never met the tolerance counts with the limit."""
    return float(solution.evals.double().mean())


def _summary(solved: Solved, order: Sequence[int]) -> bench.Table:
    rows: list[tuple[str | float, ...]] = []
    for label in SOLVERS:
        for start in STARTS:
            figures = [[_evaluations(solved[t, start, label, rtol]) for t in order] for rtol in RTOLS]
            done = [solved[t, start, label, min(RTOLS)].converged for t in order]
            share = f"{int(torch.cat(done).sum())} of {sum(len(d) for d in done)}"
            rows.append((label, start, *(sum(row) / len(row) for row in figures), share))
    return bench.Table(
        "Evaluations of the implicit layer, mean over nine timesteps",
        ("solver", "start", *(f"to {rtol:g}" for rtol in RTOLS), f"converged to {min(RTOLS):g}"),
        rows,
        "Evaluations until ||f(z) - z|| <= rtol ||f(z)||, mean over images and timesteps; an image that never got "
        f"there counts with the limit of {MAX_EVALS}. Converged: images times timesteps.",
    )


def _by_timestep(solved: Solved, order: Sequence[int]) -> list[bench.Block]:
    columns = [f"{label} {rtol:g}" for label in SOLVERS for rtol in RTOLS]
    return [
        bench.Table(
            f"Evaluations at each timestep, {start}",
            ("timestep", *columns),
            [(t, *(_evaluations(solved[t, start, label, rtol]) for label in SOLVERS for rtol in RTOLS)) for t in order],
            "Mean over images. Timestep 999 is pure noise.",
        )
        for start in STARTS
    ]


def _samples(model: FPDM, schedule: NoiseSchedule, *, steps: int, samples: int) -> list[bench.Block]:
    """Images at 1, 2, 4 and 8 iterations per step, with reuse on and off."""
    x_T = initial_noise(0, range(samples), model.config.sample_shape)
    rows, grid, labels = [], [], []
    for iterations in (1, 2, 4, 8):
        for reuse in (False, True):
            start = time.perf_counter()
            result = sample_fpdm(
                model, x_T, schedule, steps=steps, iterations=iterations, reuse=reuse, y=classes_of(samples)
            )
            seconds = time.perf_counter() - start
            quality = digit_quality(result.images)
            label = f"{iterations} per step, {STARTS[reuse]}"
            rows.append((label, result.block_passes, seconds, quality.confidence, quality.relative_confidence))
            labels.append(label)
            grid.append(result.images)
    return [
        bench.Table(
            f"FPDM samples, DDIM with {steps} steps",
            ("iterations per step", "block passes", "seconds", "classifier's confidence", "of that on real digits"),
            rows,
            "Block passes: (pre + iterations + post) blocks at every step. Confidence: mean probability of the "
            f"likeliest digit over {samples} images, by a classifier trained on the real digits.",
        ),
        bench.Images.of(
            "FPDM samples by iterations per step",
            torch.stack(grid),
            row_labels=labels,
            caption="One column a starting noise.",
        ),
    ]
