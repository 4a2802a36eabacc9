"""Figures 4, 5 and 6a and Table 5: where the iterations of one trained FPDM go."""

from __future__ import annotations

from collections.abc import Sequence

from fixpoint import bench
from fixpoint_diffusion.experiments.experiment import Experiment, Verdict
from fixpoint_diffusion.experiments.papers.fpdm.drawing import DRAWS
from fixpoint_diffusion.experiments.records import Config, Record
from fixpoint_diffusion.experiments.summaries import first_seed, grouped, lower, mean, mean_spread, stacked, values

# Iterations per step and steps, at equal block passes; the digits' budget of 120 stands for the paper's 280.
_SPLITS = ((1, 40), (2, 30), (3, 24), (4, 20), (6, 15), (8, 12), (13, 8), (18, 6), (28, 4), (58, 2))
_PAPER_SPLITS = ((1, 93), (3, 56), (4, 46), (5, 40), (6, 35), (8, 28), (12, 20), (26, 10), (68, 4))
_PAPER_FID = {3: (48.0, 48.0, 46.7), 5: (45.8, 46.3, 44.8), 6: (46.6, 47.3, 45.9), 8: (47.3, 48.3, 45.6)}
_PAPER_FID |= {12: (48.5, 49.1, 48.0), 26: (62.5, 63.2, 61.7)}


def config(
    iterations: int,
    steps: int,
    seed: int,
    *,
    model: str = "fpdm-digits",
    data: str = "digits",
    allocation: str = "constant",
    reuse: bool = True,
    eta: float = 0.0,
    images: int = 128,
) -> Config:
    return {
        "model": model,
        "data": data,
        "iterations": iterations,
        "steps": steps,
        "allocation": allocation,
        "reuse": reuse,
        "eta": eta,
        "images": images,
        "seed": seed,
    }


def published(
    iterations: int, steps: int, *, images: int = 50_000, allocation: str = "constant", reuse: bool = True
) -> Config:
    return config(
        iterations,
        steps,
        0,
        model="fpdm-imagenet",
        data="imagenet",
        images=images,
        allocation=allocation,
        reuse=reuse,
        eta=1.0,
    )


def _smoothing(records: Sequence[Record]) -> list[bench.Block]:
    rows = [
        (k, steps, round(mean(group, "block_passes")), mean_spread(values(group, "distance")))
        for (k, steps), group in grouped(records, "iterations", "steps").items()
    ]
    curve = {k: mean(group, "distance") for (k,), group in grouped(records, "iterations").items()}
    return [
        bench.Table("Iterations or steps", ("iterations per step", "steps", "block passes", "distance"), rows),
        bench.Lines(
            "Distance by iterations per step, equal block passes",
            {"FPDM": (list(curve), list(curve.values()))},
            "iterations per step",
            "Fréchet distance",
        ),
    ]


def _interior(records: Sequence[Record]) -> Verdict:
    """The best number of iterations is neither the least nor the most, and better than both."""
    distances = {k: values(group, "distance") for (k,), group in grouped(records, "iterations").items()}
    best = min(distances, key=lambda k: sum(distances[k]) / len(distances[k]))
    least, most = min(distances), max(distances)
    holds = best not in (least, most) and all(lower(distances[best], distances[end]) for end in (least, most))
    text = ", ".join(f"k={k} {mean_spread(distances[k])}" for k in dict.fromkeys((least, best, most)))
    return Verdict(holds, f"best at k={best} of {', '.join(map(str, sorted(distances)))}: {text}")


FIGURE_4 = Experiment(
    name="fpdm/figure-4",
    claim="At equal block passes a middle number of iterations per step is best.",
    theirs="280 passes, ImageNet: best for k = 4 to 8 of 1 to 68, ahead of DiT (for DiT see fpdm/table-1)",
    kind=DRAWS,
    grid={
        "quick": [config(k, steps, 0, images=8) for k, steps in ((1, 4), (2, 3), (4, 2))],
        "mini": [config(k, steps, seed) for k, steps in _SPLITS for seed in range(3)],
        "paper": [published(k, steps) for k, steps in _PAPER_SPLITS],
    },
    blocks=_smoothing,
    trend=_interior,
    minutes=5,
)
FIGURE_5 = Experiment(
    name="fpdm/figure-5",
    claim="Images at equal block passes are best with few iterations in each of many steps.",
    kind=DRAWS,
    grid={**FIGURE_4.grid, "paper": [published(k, steps, images=64) for k, steps in _PAPER_SPLITS]},
    blocks=lambda records: [
        stacked(
            "Samples by iterations x steps",
            [record.measures["images"] for record in first_seed(records)],
            "One column a starting noise.",
        )
    ],
    trend=_interior,
    minutes=5,
)


def _allocations(records: Sequence[Record]) -> list[bench.Block]:
    names = ("constant", "decreasing", "increasing")
    rows = []
    for (k, steps), group in grouped(records, "iterations", "steps").items():
        found = {name: values(each, "distance") for (name,), each in grouped(group, "allocation").items()}
        theirs = _PAPER_FID.get(k, (None,) * 3)
        rows.append((k, steps, *theirs, *(mean_spread(found.get(name, [])) for name in names)))
    columns = ("iterations", "steps", *(f"their {name}" for name in names), *names)
    caption = "Increasing: more at the end, where there is little noise. Fréchet distance, mean and standard deviation."
    return [bench.Table("Allocation of iterations", columns, rows, caption)]


def _increasing_wins(records: Sequence[Record]) -> Verdict:
    """Increasing is below constant and decreasing, over all budgets: differences seed by seed."""
    by = {
        name: {(r.config["iterations"], r.config["seed"]): r.measures["distance"] for r in group}
        for (name,), group in grouped(records, "allocation").items()
    }
    parts, holds = [], True
    for other in ("constant", "decreasing"):
        gaps = [by["increasing"][key] - value for key, value in by[other].items() if key in by["increasing"]]
        holds = holds and lower(gaps, [0.0] * len(gaps))
        parts.append(f"increasing minus {other} {mean_spread(gaps)}")
    return Verdict(holds, f"distance: {', '.join(parts)}")


_ALLOCATIONS = ("constant", "decreasing", "increasing")
TABLE_5 = Experiment(
    name="fpdm/table-5",
    claim="More iterations at the end of sampling are better than as many in every step, or more at the start.",
    theirs="FID, constant/decreasing/increasing: k=3 48.0/48.0/46.7, k=5 45.8/46.3/44.8, k=8 47.3/48.3/45.6, "
    "k=26 62.5/63.2/61.7",
    kind=DRAWS,
    grid={
        "quick": [config(3, 3, 0, images=8, allocation=name) for name in _ALLOCATIONS],
        "mini": [
            config(k, steps, seed, allocation=name)
            for k, steps in ((3, 24), (4, 20), (6, 15), (8, 12), (13, 8))
            for name in _ALLOCATIONS
            for seed in range(3)
        ],
        "paper": [
            published(k, steps, images=1000, allocation=name)
            for k, steps in ((3, 56), (5, 40), (6, 35), (8, 28), (12, 20), (26, 10))
            for name in _ALLOCATIONS
        ],
    },
    blocks=_allocations,
    trend=_increasing_wins,
    minutes=4,
)
ENTRIES = (FIGURE_4, FIGURE_5, TABLE_5)
