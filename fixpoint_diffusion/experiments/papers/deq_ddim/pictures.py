"""Figures 4, 5, 12 to 15 and 19 to 25: images that were inverted, and images at several levels of noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import torch

from fixpoint import bench
from fixpoint_diffusion.experiments.experiment import Experiment, Kind, Verdict
from fixpoint_diffusion.experiments.papers.deq_ddim import inversion
from fixpoint_diffusion.experiments.papers.deq_ddim.inversion import mini, published, quick
from fixpoint_diffusion.experiments.papers.deq_ddim.inverting import INVERSIONS, LABELS
from fixpoint_diffusion.experiments.papers.deq_ddim.solving import relative_errors, solver_settings
from fixpoint_diffusion.experiments.plans import call_flops
from fixpoint_diffusion.experiments.records import Config, Measures, Record
from fixpoint_diffusion.experiments.resources import Resources
from fixpoint_diffusion.experiments.summaries import first_seed, grouped, lower, mean_spread, of_which, stacked, values
from fixpoint_diffusion.sampling import sample


def _triplets(records: Sequence[Record]) -> list[bench.Block]:
    first = first_seed(records)
    grids = [record.measures["back"] for record in first]
    if len(grouped(first, "eta")) > 1:
        grids = [of_which(record.measures["back"], f"eta={record.config['eta']:g}") for record in first]
    return [stacked("Images and their reconstructions", grids, "One column an image; the first row is the real one.")]


def _over_epochs(records: Sequence[Record]) -> list[bench.Block]:
    first = [record.measures["epochs"] for record in first_seed(records)]
    return [stacked("What the sampler makes of x_T after so many updates", first)]


def _nearer(records: Sequence[Record]) -> Verdict:
    """The fixed point's reconstructions are nearer to the images than the baseline's."""
    losses = {method: values(group, "loss") for (method,), group in grouped(records, "method").items()}
    text = ", ".join(f"{LABELS[method]} {mean_spread(each)}" for method, each in losses.items())
    return Verdict(lower(losses["paper"], losses["baseline"]), f"squared distance: {text}")


def _sooner(records: Sequence[Record]) -> Verdict:
    """After as many updates as the shorter descent makes, the fixed point's loss is below the baseline's."""
    curves = {
        method: [record.measures["losses"] for record in group]
        for (method,), group in grouped(records, "method").items()
    }
    updates = min(len(each) for group in curves.values() for each in group)
    losses = {method: [each[updates - 1] for each in group] for method, group in curves.items()}
    text = ", ".join(f"{LABELS[method]} {mean_spread(each)}" for method, each in losses.items())
    return Verdict(lower(losses["paper"], losses["baseline"]), f"loss after {updates} updates: {text}")


def _all_noise_inverted(records: Sequence[Record]) -> Verdict:
    """Reconstructions are nearer than a quarter of the distance that the descent began with, at every eta."""
    parts, holds = [], True
    for (eta,), group in grouped(records, "eta").items():
        begun = sum(record.measures["losses"][0] for record in group) / len(group)
        ended = values(group, "best")
        holds = holds and sum(ended) / len(ended) < begun / 4
        parts.append(f"eta={eta:g} {mean_spread(ended)} of {begun:.3g} at the start")
    return Verdict(holds, f"squared distance: {', '.join(parts)}")


def _inverted(number: int, what: str, sets: Sequence[int], *, over_epochs: bool) -> Experiment:
    methods = ("baseline", "paper")
    claim = (
        f"The fixed point's reconstruction of {what} improves faster over updates."
        if over_epochs
        else f"Inversion through the fixed point keeps details of {what} that the baseline loses."
    )
    return Experiment(
        name=f"deq-ddim/figure-{number}",
        claim=claim,
        kind=INVERSIONS,
        grid={
            "quick": [quick(method) for method in methods],
            "mini": [mini(10, method, seed) for method in methods for seed in range(3)],
            "paper": [
                published(inversion.PAPER_SETS[k], method, seed)
                for k in sets
                for method in methods
                for seed in range(3)
            ],
        },
        blocks=_over_epochs if over_epochs else _triplets,
        trend=_sooner if over_epochs else _nearer,
        minutes=3,
    )


def _inverted_with_noise(number: int, what: str) -> Experiment:
    source = inversion.FIGURE_17
    wanted = {14: "cifar10", 15: "celeba"}[number]
    return Experiment(
        name=f"deq-ddim/figure-{number}",
        claim=f"{what} is inverted at every noise level.",
        kind=INVERSIONS,
        grid={**source.grid, "paper": [config for config in source.grid["paper"] if config["data"] == wanted]},
        blocks=_triplets,
        trend=_all_noise_inverted,
        minutes=3,
    )


def _draw(config: Config, resources: Resources) -> Measures:
    """``model``, ``steps``, ``etas``, ``images``, ``seed``: images from one x_T by the paper's solver."""
    x_T = resources.noise(config, range(config["images"]))
    rows, errors = [], {}
    for eta in config["etas"]:
        chain = resources.chain({**config, "eta": eta}, x_T)
        rows.append(sample(chain, on_failure="ignore", **solver_settings(chain, "paper")).images)
        with torch.no_grad():
            errors[f"{eta:g}"] = relative_errors(rows[-1], chain.sequential(trajectory=False))
    labels = [f"eta={eta:g}" for eta in config["etas"]]
    return {"images": asdict(bench.Images.of("images", torch.stack(rows), row_labels=labels)), "error": errors}


def _draw_flops(config: Config) -> float:
    return call_flops(config["model"]) * config["images"] * config["steps"] * 51 * len(config["etas"])


DRAWINGS = Kind(name="chain-draw", run=_draw, flops=_draw_flops)


def _same_as_sequential(records: Sequence[Record]) -> Verdict:
    by_eta = {eta: [e for r in records for e in r.measures["error"][eta]] for eta in records[0].measures["error"]}
    text = ", ".join(f"eta={eta} {max(each):.2g}" for eta, each in by_eta.items())
    return Verdict(
        all(max(each) < 0.1 for each in by_eta.values()), f"worst error against the sequential sampler: {text}"
    )


def _drawn(number: int, model: str, steps: int, what: str) -> Experiment:
    etas = [0.0, 0.25, 0.5, 0.75, 1.0]

    def config(name: str, steps: int, images: int, seed: int, etas: list[float]) -> Config:
        return {"model": name, "steps": steps, "etas": etas, "images": images, "seed": seed}

    return Experiment(
        name=f"deq-ddim/figure-{number}",
        claim=f"The fixed point draws {what} at every noise level, from one x_T.",
        kind=DRAWINGS,
        grid={
            "quick": [config("ddpm-digits", 4, 1, 0, [0.0, 1.0])],
            "mini": [config("ddpm-digits", 25 if number == 13 else 50, 4, seed, etas) for seed in range(3)],
            "paper": [config(model, steps, 4, 0, etas)],
        },
        blocks=lambda records: [bench.Images(**records[0].measures["images"])],
        trend=_same_as_sequential,
        minutes=2,
    )


ENTRIES = (
    _inverted(4, "all four data sets", (0, 2, 3, 4), over_epochs=False),
    _inverted(5, "CelebA", (2,), over_epochs=True),
    _drawn(12, "ddpm-celeba-64", 500, "faces"),
    _drawn(13, "ddpm-bedroom-256", 25, "bedrooms"),
    _inverted_with_noise(14, "CIFAR10"),
    _inverted_with_noise(15, "CelebA"),
    _inverted(19, "CIFAR10", (0,), over_epochs=False),
    _inverted(20, "CelebA", (2,), over_epochs=False),
    _inverted(21, "LSUN Bedroom", (3,), over_epochs=False),
    _inverted(22, "LSUN Church", (4,), over_epochs=False),
    _inverted(23, "CIFAR10", (0,), over_epochs=True),
    _inverted(24, "LSUN Bedroom", (3,), over_epochs=True),
    _inverted(25, "LSUN Church", (4,), over_epochs=True),
)
