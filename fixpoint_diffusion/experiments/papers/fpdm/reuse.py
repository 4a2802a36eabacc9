"""Figure 6: what reusing the last step's solution gains, in images and in residuals of the layer."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fixpoint import Anderson, Picard, bench, solve
from fixpoint_diffusion.denoisers import FPDMDenoiser
from fixpoint_diffusion.experiments.experiment import Experiment, Kind, Verdict
from fixpoint_diffusion.experiments.papers.fpdm import drawing, sampling
from fixpoint_diffusion.experiments.plans import published_flops
from fixpoint_diffusion.experiments.records import Config, Measures, Record
from fixpoint_diffusion.experiments.resources import Resources
from fixpoint_diffusion.experiments.summaries import grouped, lower, mean, mean_spread, values
from fixpoint_diffusion.models import FPDM, fpdm_layer_problem
from fixpoint_diffusion.processes import NoiseSchedule
from fixpoint_diffusion.sampling import fpdm_steps
from fixpoint_diffusion.sampling.fpdm import ToTolerance

STARTS = ("without reuse", "with reuse")


def convergence(
    model: FPDM, x_T: Tensor, schedule: NoiseSchedule, *, steps: int, timesteps: int, iterations: int
) -> dict[str, dict[str, list[float]]]:
    """How plain iteration converges at so many timesteps of one trajectory, with and without reuse.

    Every layer of the trajectory is solved to a tolerance without reuse, so that both starts are tried at the same
    latents; with reuse the layer starts at the solution of the step before.

    Returns:
        For each start and timestep the norms of the differences of successive iterates, medians over the images.
    """
    solved = fpdm_steps(
        model,
        x_T,
        schedule,
        steps=steps,
        iterations=ToTolerance(rtol=1e-5, max_iterations=200),
        solver=Anderson(),
        reuse=False,
    )
    chosen = {int(k) for k in torch.linspace(1, steps - 1, timesteps).round()}
    curves: dict[str, dict[str, list[float]]] = {start: {} for start in STARTS}
    before: Tensor | None = None
    for number, step in enumerate(solved):
        for start, z0 in zip(STARTS, (None, before), strict=True) if number in chosen else ():
            problem = fpdm_layer_problem(model, step.latent, torch.tensor(step.timestep), z0)
            found = solve(
                problem,
                solver=Picard(),
                backward=None,
                rtol=0.0,  # every curve is as long as the others
                max_evals=iterations,
                record=True,
                on_failure="ignore",
            )
            assert found.trace is not None
            trace = found.trace.double().median(dim=1).values.tolist()
            curves[start][str(step.timestep)] = [*trace, *[trace[-1]] * (iterations - len(trace))]
        before = step.solution.value
    return curves


def _layer(config: Config, resources: Resources) -> Measures:
    """``model``, ``steps``, ``timesteps`` (how many), ``iterations``, ``images``, ``seed``."""
    denoiser = resources.denoiser(config["model"])
    assert isinstance(denoiser, FPDMDenoiser)
    schedule = NoiseSchedule.from_diffusers(denoiser.schedule_config)
    sizes = {name: config[name] for name in ("steps", "timesteps", "iterations")}
    x_T = resources.noise(config, range(config["images"]))
    return {"delta": convergence(denoiser.model.eval(), x_T, schedule, **sizes)}


def _flops(config: Config) -> float:
    iterations = 30 * config["steps"] + 2 * config["timesteps"] * config["iterations"]
    outside, one = (published_flops("fpdm", {}, k) for k in (0, 1))
    return (outside * config["steps"] + (one - outside) * iterations) * config["images"]


LAYERS = Kind(name="fpdm-layer", run=_layer, flops=_flops)


def curves(batches: Sequence[Mapping[str, Mapping[str, list[float]]]]) -> list[bench.Block]:
    """Figures 6 (b) and (c) from what :func:`convergence` returned for some batches: medians over them."""
    timesteps = sorted(batches[0][STARTS[0]], key=int, reverse=True)

    def median(start: str, timestep: str) -> list[float]:
        return [statistics.median(each) for each in zip(*(batch[start][timestep] for batch in batches), strict=True)]

    by_iteration = [
        bench.Lines(
            f"Convergence of plain iteration, {start}",
            {f"t = {t}": (list(range(1, len(median(start, t)) + 1)), median(start, t)) for t in timesteps},
            "iterations",
            "||f(z) - z||, median",
            caption="As Figure 6 (b) of the FPDM paper. Both starts are tried at the same latents, those of one "
            "trajectory whose layers were solved to a tolerance without reuse.",
        )
        for start in STARTS
    ]
    last = len(median(STARTS[0], timesteps[0]))
    by_timestep = bench.Lines(
        "Convergence along the sampling run",
        {
            f"{start}, iteration {n}": ([int(t) for t in timesteps], [median(start, t)[n - 1] for t in timesteps])
            for n in (1, 4, 8)
            if n <= last
            for start in STARTS
        },
        "timestep (sampling runs from right to left)",
        "||f(z) - z||, median",
        caption="As Figure 6 (c) of the FPDM paper: what reuse gains at each timestep, after some iterations.",
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
    blocks=lambda records: curves([record.measures["delta"] for record in records]),
    trend=_gains,
    minutes=2,
)


def _by_reuse(records: Sequence[Record]) -> list[bench.Block]:
    series = {
        STARTS[reuse]: (
            [key[0] for key in grouped(group, "iterations")],
            [mean(each, "distance") for each in grouped(group, "iterations").values()],
        )
        for (reuse,), group in grouped(records, "reuse").items()
    }
    rows = []
    for (k,), group in grouped(records, "iterations").items():
        found = {reuse: values(each, "distance") for (reuse,), each in grouped(group, "reuse").items()}
        rows.append((k, *(mean_spread(found.get(reuse, [])) for reuse in (False, True))))
    return [
        bench.Table("Images with and without reuse", ("iterations per step", *STARTS), rows, "Fréchet distance."),
        bench.Lines("Images with and without reuse", series, "iterations per step", "Fréchet distance"),
    ]


def _helps_few(records: Sequence[Record]) -> Verdict:
    """Images are better with reuse at the fewest iterations, and the gain is less than a tenth of it at the most."""
    gains = {}
    for (k,), group in grouped(records, "iterations").items():
        by = {reuse: values(each, "distance") for (reuse,), each in grouped(group, "reuse").items()}
        gains[k] = ([x - y for x, y in zip(by[False], by[True], strict=True)], by)
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
        "quick": [sampling.config(k, 3, 0, images=8, reuse=reuse) for k in (1, 4) for reuse in (False, True)],
        "mini": [
            sampling.config(k, 20, seed, reuse=reuse)
            for k in (1, 2, 4, 8)
            for reuse in (False, True)
            for seed in range(3)
        ],
        "paper": [
            sampling.published(k, 20, images=1000, reuse=reuse) for k in (1, 2, 4, 8, 16, 26) for reuse in (False, True)
        ],
    },
    blocks=_by_reuse,
    trend=_helps_few,
    minutes=3,
)
ENTRIES = (FIGURE_6, FIGURE_6A)
