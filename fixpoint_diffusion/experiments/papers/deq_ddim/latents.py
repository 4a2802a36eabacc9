"""Figures 2, 10 and 18: the latents of one sample as the solver works on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fixpoint import bench
from fixpoint_diffusion.experiments.experiment import Experiment, Grid, Verdict
from fixpoint_diffusion.experiments.papers.deq_ddim.solving import SOLVES
from fixpoint_diffusion.experiments.records import Config, Record
from fixpoint_diffusion.experiments.summaries import first_seed, grouped, lower, mean_spread, stacked

_NEAR = 0.1  # error of x_0, of its size, that is hardly seen
_CAPTION = "From noise (left) to image (right): ten latents evenly along the chain, then the last five."


def _config(model: str, steps: int, seed: int, show: Sequence[int], init: str = "x_T") -> Config:
    return {
        "model": model,
        "steps": steps,
        "eta": 0.0,
        "solver": "paper",
        "rounds": max(show),
        "init": init,
        "samples": 1,
        "seed": seed,
        "show": list(show),
    }


def _pictures(title: str) -> Callable[[Sequence[Record]], list[bench.Block]]:
    def make(records: Sequence[Record]) -> list[bench.Block]:
        first = first_seed(records)
        return [stacked(title, [record.measures["latents"] for record in first], _CAPTION)]

    return make


def _shown(records: Sequence[Record], *keys: str) -> dict[tuple[Any, ...], list[float]]:
    """Errors of x_0 by the entries of the configuration and by round."""
    return {
        (*key, int(number)): [record.measures["shown_error"][number] for record in group]
        for key, group in grouped(records, *keys).items()
        for number in group[0].measures["shown_error"]
    }


def _near_after_fifteen(records: Sequence[Record]) -> Verdict:
    errors = {key: each for key, each in _shown(records, "steps").items() if key[1] == records[0].config["rounds"]}
    parts = ", ".join(f"T={steps}: {mean_spread(each)}" for (steps, _), each in errors.items())
    found = f"error of x_0 after {records[0].config['rounds']} rounds, {parts}"
    return Verdict(all(sum(each) / len(each) <= _NEAR for each in errors.values()), found)


def _x_t_is_nearer(records: Sequence[Record]) -> Verdict:
    errors = _shown(records, "init")
    early, late = sorted({number for _, number in errors})[0], sorted({number for _, number in errors})[-1]
    means = {key: sum(each) / len(each) for key, each in errors.items()}
    found = ", ".join(
        f"from {start} after {number} rounds {mean_spread(errors[start, number])}" for start, number in errors
    )
    holds = lower(errors["x_T", early], errors["zeros", early]) and means["zeros", late] <= _NEAR
    return Verdict(holds, f"error of x_0 {found}")


def _grid(lengths: Sequence[int]) -> Grid:
    return {
        "quick": [_config("ddpm-digits", 6, 0, (1, 3))],
        "mini": [_config("ddpm-digits", steps, seed, (1, 5, 15)) for steps in lengths for seed in range(3)],
        "paper": [
            _config(model, steps, 0, (15,))
            for model, lengths in (
                ("ddpm-cifar10-32", (1000, 500, 50)),
                ("ddpm-celeba-64", (500,)),
                ("ddpm-bedroom-256", (50,)),
                ("ddpm-church-256", (50,)),
            )
            for steps in lengths
        ],
    }


FIGURE_2 = Experiment(
    name="deq-ddim/figure-2",
    claim="After 15 solver steps the image is there, on chains of up to 500 steps.",
    kind=SOLVES,
    grid=_grid((50, 500)),
    blocks=_pictures("Latents over solver steps"),
    trend=_near_after_fifteen,
    minutes=1,
)
FIGURE_18 = Experiment(
    name="deq-ddim/figure-18",
    claim="After 15 solver steps the image is there, for T = 1000, 500 and 50.",
    kind=SOLVES,
    grid=_grid((1000, 500, 50)),
    blocks=_pictures("Latents after solver steps, by length"),
    trend=_near_after_fifteen,
    minutes=2,
)


def _starts(model: str, steps: int, seeds: int, early: int, late: int) -> list[Config]:
    return [_config(model, steps, seed, (early, late), init) for init in ("x_T", "zeros") for seed in range(seeds)]


FIGURE_10 = Experiment(
    name="deq-ddim/figure-10",
    claim="From x_T the latents look right after 10 solver steps; from zeros they need 30.",
    kind=SOLVES,
    grid={
        "quick": _starts("ddpm-digits", 6, 1, 2, 7),
        "mini": _starts("ddpm-digits", 50, 3, 10, 30),
        "paper": _starts("ddpm-celeba-64", 50, 1, 10, 30),
    },
    blocks=_pictures("Latents by start"),
    trend=_x_t_is_nearer,
    minutes=1,
)
ENTRIES = (FIGURE_2, FIGURE_10, FIGURE_18)
