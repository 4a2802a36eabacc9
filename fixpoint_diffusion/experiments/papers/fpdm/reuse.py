"""Figure 6: what reusing the last step's solution gains, in images and in residuals of the layer."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fixpoint import Anderson, Picard, bench, solve
from fixpoint_diffusion.denoisers import FPDMDenoiser
from fixpoint_diffusion.experiments.experiment import MISSING, Experiment, Kind, Verdict
from fixpoint_diffusion.experiments.papers.fpdm import drawing, sampling
from fixpoint_diffusion.experiments.plans import published
from fixpoint_diffusion.experiments.records import Config, Measures, Record
from fixpoint_diffusion.experiments.resources import Resources
from fixpoint_diffusion.experiments.summaries import grouped, lower, mean, mean_spread, values
from fixpoint_diffusion.models import cost, fpdm_layer_problem
from fixpoint_diffusion.processes import NoiseSchedule
from fixpoint_diffusion.sampling import fpdm_steps
from fixpoint_diffusion.sampling.fpdm import ToTolerance

_STARTS = ("without reuse", "with reuse")


def _layer(config: Config, resources: Resources) -> Measures:
    """``model``, ``steps``, ``timesteps`` (how many), ``iterations``, ``images``, ``seed``.

    Both starts are tried at the latents of one trajectory, whose every layer was solved to a tolerance without reuse.
    """
    denoiser = resources.denoiser(config["model"])
    assert isinstance(denoiser, FPDMDenoiser)
    model, schedule = denoiser.model.eval(), NoiseSchedule.from_diffusers(denoiser.schedule_config)
    run = fpdm_steps(
        model,
        resources.noise(config, range(config["images"])),
        schedule,
        steps=config["steps"],
        iterations=ToTolerance(rtol=1e-5, max_iterations=200),
        solver=Anderson(),
        reuse=False,
    )
    chosen = {int(k) for k in torch.linspace(1, config["steps"] - 1, config["timesteps"]).round()}
    curves: dict[str, dict[str, list[float]]] = {start: {} for start in _STARTS}
    before: Tensor | None = None
    for number, step in enumerate(run):
        if number in chosen:
            for start, z0 in zip(_STARTS, (None, before), strict=True):
                problem = fpdm_layer_problem(model, step.latent, torch.tensor(step.timestep), z0)
                # Nothing is ended early, so that every curve is as long.
                limits: dict[str, Any] = {"rtol": 0.0, "atol": 0.0, "max_evals": config["iterations"]}
                found = solve(problem, solver=Picard(), backward=None, record=True, on_failure="ignore", **limits)
                assert found.trace is not None
                trace = found.trace.double().median(dim=1).values.tolist()
                curves[start][str(step.timestep)] = [*trace, *[trace[-1]] * (config["iterations"] - len(trace))]
        before = step.solution.value
    return {"delta": curves}


def _flops(config: Config) -> float:
    iterations = 30 * config["steps"] + 2 * config["timesteps"] * config["iterations"]
    return cost(published("fpdm"), iterations=1).flops * iterations * config["images"]


LAYERS = Kind(name="fpdm-layer", run=_layer, flops=_flops)


def _curves(records: Sequence[Record]) -> list[bench.Block]:
    def median(start: str, timestep: str) -> list[float]:
        return [
            statistics.median(each)
            for each in zip(*(r.measures["delta"][start][timestep] for r in records), strict=True)
        ]

    timesteps = sorted(records[0].measures["delta"]["without reuse"], key=int, reverse=True)
    by_iteration = [
        bench.Lines(
            f"Convergence at nine timesteps, {start}",
            {f"t = {t}": (list(range(1, len(median(start, t)) + 1)), median(start, t)) for t in timesteps},
            "iterations",
            "delta_t, median of the batches",
            caption="Figure 6 (b).",
        )
        for start in _STARTS
    ]
    last = len(median(_STARTS[0], timesteps[0]))
    by_timestep = bench.Lines(
        "Convergence along sampling",
        {
            f"{start}, iteration {n}": ([int(t) for t in timesteps], [median(start, t)[n - 1] for t in timesteps])
            for n in (1, 4, 8)
            if n <= last
            for start in _STARTS
        },
        "timestep (sampling runs from right to left)",
        "delta_t, median of the batches",
        caption="Figure 6 (c).",
    )
    return [*by_iteration, by_timestep]


def _gains(records: Sequence[Record]) -> Verdict:
    """Reuse lowers delta_t at all but the noisiest third of the timesteps, and most where there is least noise."""
    timesteps = sorted(records[0].measures["delta"]["without reuse"], key=int)
    at = min(3, len(next(iter(records[0].measures["delta"]["with reuse"].values()))) - 1)

    def gain(t: str) -> float:
        ratios = [
            r.measures["delta"]["without reuse"][t][at] / r.measures["delta"]["with reuse"][t][at] for r in records
        ]
        return statistics.fmean(ratios)

    gains = {t: gain(t) for t in timesteps}
    quiet = timesteps[: 2 * len(timesteps) // 3]
    third = max(len(timesteps) // 3, 1)
    clean, noisy = (statistics.fmean(gains[t] for t in part) for part in (timesteps[:third], timesteps[-third:]))
    holds = all(gains[t] > 1 for t in quiet) and clean > noisy
    text = ", ".join(f"t={t} {gains[t]:.2g}" for t in reversed(timesteps))
    return Verdict(holds, f"delta_t without reuse over that with it, iteration {at + 1}: {text}")


def _layer_config(batch: int, *, model: str = "fpdm-digits", images: int = 32) -> Config:
    usual = {"model": model, "steps": 50, "timesteps": 9, "iterations": 20}
    return {**usual, "images": images, "seed": batch}


FIGURE_6 = Experiment(
    name="fpdm/figure-6",
    claim="Reuse brings the layer nearer to its solution at all but the noisiest timesteps, most at the least noisy.",
    theirs="delta_t of nine timesteps and along sampling, 10 batches of 32; part (a) is fpdm/figure-6a",
    kind=LAYERS,
    grid={
        "quick": [{"model": "fpdm-digits", "steps": 4, "timesteps": 3, "iterations": 4, "images": 2, "seed": 0}],
        "mini": [_layer_config(batch) for batch in range(10)],
        "paper": [_layer_config(batch, model="fpdm-imagenet") for batch in range(10)],
    },
    blocks=_curves,
    trend=_gains,
    minutes=2,
)


def _by_reuse(records: Sequence[Record]) -> list[bench.Block]:
    series = {
        _STARTS[reuse]: (
            [key[0] for key in grouped(group, "iterations")],
            [mean(each, "distance") for each in grouped(group, "iterations").values()],
        )
        for (reuse,), group in grouped(records, "reuse").items()
    }
    rows = [
        (k, *(mean_spread(values(each, "distance")) for each in grouped(group, "reuse").values()))
        for (k,), group in grouped(records, "iterations").items()
    ]
    return [
        bench.Table("Images with and without reuse", ("iterations per step", *_STARTS), rows, "Fréchet distance."),
        bench.Lines("Images with and without reuse", series, "iterations per step", "Fréchet distance"),
    ]


def _helps_few(records: Sequence[Record]) -> Verdict:
    """Images are better with reuse at the fewest iterations, and the gain is less than a tenth of it at the most."""
    gains = {}
    for (k,), group in grouped(records, "iterations").items():
        by = {reuse: values(each, "distance") for (reuse,), each in grouped(group, "reuse").items()}
        if len(by) == 2:
            gains[k] = ([x - y for x, y in zip(by[False], by[True], strict=True)], by)
    if len(gains) < 2:
        return MISSING
    few, many = min(gains), max(gains)
    parts = ", ".join(f"k={k} {mean_spread(each)}" for k, (each, _) in gains.items())
    helps = lower(gains[few][1][True], gains[few][1][False])
    fades = abs(statistics.fmean(gains[many][0])) < statistics.fmean(gains[few][0]) / 10
    return Verdict(helps and fades, f"distance without reuse minus that with it: {parts}")


FIGURE_6A = Experiment(
    name="fpdm/figure-6a",
    claim="Reuse makes images much better at few iterations per step, and no different at many.",
    theirs="part (a) of Figure 6: FID by iterations, 1000 images",
    kind=drawing.DRAWS,
    grid={
        "quick": [sampling._config(k, 3, 0, images=8, reuse=reuse) for k in (1, 4) for reuse in (False, True)],
        "mini": [
            sampling._config(k, 20, seed, reuse=reuse)
            for k in (1, 2, 4, 8, 16)
            for reuse in (False, True)
            for seed in range(3)
        ],
        "paper": [
            sampling._published(k, 20, images=1000, reuse=reuse)
            for k in (1, 2, 4, 8, 16, 26)
            for reuse in (False, True)
        ],
    },
    blocks=_by_reuse,
    trend=_helps_few,
    minutes=3,
)
ENTRIES = (FIGURE_6, FIGURE_6A)
