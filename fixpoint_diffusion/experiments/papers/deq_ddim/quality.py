"""Tables 1, 2 and 4: Fréchet distances and seconds of samplers, without noise and with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fixpoint import bench
from fixpoint_diffusion.experiments.experiment import Experiment, Verdict
from fixpoint_diffusion.experiments.papers.deq_ddim.sampling import PARALLEL, SAMPLES
from fixpoint_diffusion.experiments.records import Config, Record
from fixpoint_diffusion.experiments.summaries import grouped, lower, mean, mean_spread, values

_LABELS = {
    "ddpm": "DDPM",
    "sequential": "DDIM",
    "paper": "DEQ, as published",
    "released-code": "DEQ, as released",
    "ours": "causal quasi-Newton",
    "dpm-solver++": "DPM-Solver++",
}
# FID and seconds by data, steps, eta and method.
Theirs = Mapping[tuple[str, int, float, str], tuple[float, float]]
_THEIRS: Theirs = {
    **{
        (data, steps, 0.0, method): figures
        for data, steps, *rest in (
            ("cifar10", 1000, (3.17, 24.45), (4.07, 20.16), (3.79, 2.91)),
            ("celeba", 500, (5.32, 14.95), (3.66, 10.31), (2.92, 5.12)),
            ("lsun-bedroom", 25, (184.05, 1.72), (8.76, 1.19), (8.73, 3.82)),
            ("lsun-church", 25, (122.18, 1.77), (13.44, 1.68), (13.55, 3.99)),
        )
        for method, figures in zip(("ddpm", "sequential", "paper"), rest, strict=True)
    },
    **{
        ("celeba", steps, eta, method): figures
        for steps, eta, *rest in (
            (20, 0.2, (13.85, 0.42), (13.52, 1.53)),
            (20, 0.5, (15.67, 0.42), (15.27, 2.17)),
            (20, 1.0, (25.85, 0.42), (25.31, 2.35)),
            (50, 0.2, (9.33, 1.05), (8.66, 4.17)),
            (50, 0.5, (10.75, 1.05), (9.73, 5.18)),
            (50, 1.0, (18.22, 1.05), (15.57, 8.59)),
        )
        for method, figures in zip(("sequential", "paper"), rest, strict=True)
    },
}


def _grid(
    model: str,
    data: str,
    images: Mapping[int, int],
    *,
    etas: Sequence[float] = (0.0,),
    methods: Sequence[str],
    seeds: int,
    spacing: str | None = None,
) -> list[Config]:
    """``images`` for each number of steps; the 15 steps of DPM-Solver++ get those of the fewest."""
    usual = {"model": model, "data": data}
    extra = {} if spacing is None else {"spacing": spacing}
    found: list[Config] = [
        {**usual, "method": method, "steps": steps, "eta": eta, "images": count, "seed": seed, **extra}
        for steps, count in images.items()
        for eta in etas
        for method in methods
        for seed in range(seeds)
    ]
    if etas == (0.0,):
        most = max(images.values())
        found += [
            {**usual, "method": "dpm-solver++", "steps": 15, "eta": 0.0, "images": most, "seed": seed}
            for seed in range(seeds)
        ]
    return found


def _table(records: Sequence[Record]) -> list[bench.Block]:
    rows = []
    for (data, steps, eta, method, images), group in grouped(
        records, "data", "steps", "eta", "method", "images"
    ).items():
        theirs = _THEIRS.get((data, steps, eta, method), (None, None))
        has_distance = "distance" in group[0].measures
        rows.append(
            (
                data,
                steps,
                eta,
                _LABELS[method],
                theirs[0],
                mean_spread(values(group, "distance")) if has_distance else None,
                theirs[1],
                mean_spread(values(group, "seconds_alone")),
                round(mean(group, "rounds_alone")),
                f"{max(values(group, 'error')):.2g}" if method in PARALLEL else None,
                images,
            )
        )
    columns = ("data", "T", "eta", "sampler", "their FID", "distance", "their s", "s", "rounds", "error", "images")
    caption = (
        "Distance: Fréchet, in the bundled classifier's features for digits and in Inception's else, of so many "
        "images a seed; compare at equal numbers only. s and rounds: one image alone, where the records were made. "
        "Error: of the worst of 16 images a seed, against the sequential sampler with the same noise."
    )
    return [bench.Table("Samplers", columns, rows, caption)]


def _comparable(records: Sequence[Record]) -> Verdict:
    """The chain that is solved as published gives images as good as the sequential one, faster where T is long."""
    parts, holds, times, ours = [], True, [], []
    for (data, steps, eta), group in grouped(records, "data", "steps", "eta").items():
        methods = {method: each for (method,), each in grouped(group, "method").items()}
        if not {"sequential", "paper"} <= methods.keys():
            continue
        ddim, deq = methods["sequential"], methods["paper"]
        where = f"{data} T={steps}" + (f" eta={eta:g}" if eta else "")
        if "distance" in deq[0].measures and "distance" in ddim[0].measures:
            one, other = values(ddim, "distance"), values(deq, "distance")
            holds = holds and not lower(one, other)
            parts.append(f"{where}: distance {mean_spread(other)} against DDIM's {mean_spread(one)}")
        else:
            worst = max(values(deq, "error"))
            holds = holds and worst < 0.1
            parts.append(f"{where}: worst error of x_0 {worst:.2g}")
        alone = mean(ddim, "seconds_alone")
        times.append((steps, eta, alone / mean(deq, "seconds_alone")))
        if "ours" in methods:
            ours.append((steps, eta, alone / mean(methods["ours"], "seconds_alone")))
    long = [ratio for steps, eta, ratio in times if steps >= 500 and not eta]
    if long:
        holds = holds and min(long) > 1
    parts.append(f"times faster alone: {_speeds(times)}")
    if ours:
        parts.append(f"with this project's own solver: {_speeds(ours)}")
    return Verdict(holds, "; ".join(parts))


def _speeds(times: Sequence[tuple[int, float, float]]) -> str:
    return ", ".join(f"T={steps}{f' eta={eta:g}' if eta else ''} {ratio:.2g}" for steps, eta, ratio in times)


TABLE_1 = Experiment(
    name="deq-ddim/table-1",
    claim="Solved as a fixed point, DDIM gives images of the same quality, and faster where T is long.",
    theirs="FID and s, DDIM then DEQ: CIFAR10 T=1000 4.07 20.16, 3.79 2.91; CelebA T=500 3.66 10.31, 2.92 5.12; "
    "Bedroom T=25 8.76 1.19, 8.73 3.82; Church T=25 13.44 1.68, 13.55 3.99",
    kind=SAMPLES,
    grid={
        "quick": _grid("ddpm-digits", "digits", {2: 100}, methods=("sequential", "paper"), seeds=1),
        "mini": _grid(
            "ddpm-digits",
            "digits",
            {25: 128, 50: 16, 100: 16, 500: 1, 1000: 1},
            methods=("ddpm", "sequential", "paper", "released-code", "ours"),
            seeds=3,
        ),
        "paper": [
            config
            for model, data, steps, spacing in (
                ("ddpm-cifar10-32", "cifar10", 1000, "quadratic"),
                ("ddpm-celeba-64", "celeba", 500, None),
                ("ddpm-bedroom-256", "lsun-bedroom", 25, None),
                ("ddpm-church-256", "lsun-church", 25, None),
            )
            for config in _grid(
                model,
                data,
                {steps: 50_000},
                methods=("ddpm", "sequential", "paper", "released-code", "ours"),
                seeds=1,
                spacing=spacing,
            )
        ],
    },
    blocks=_table,
    trend=_comparable,
    minutes=20,
)
_STOCHASTIC = ("sequential", "paper", "ours")
TABLE_2 = Experiment(
    name="deq-ddim/table-2",
    claim="The stochastic chain, solved as a fixed point, gives images like the sequential one's or slightly better.",
    theirs="CIFAR10, T = 20 and 50; values not in the text that this page is made from",
    kind=SAMPLES,
    grid={
        "quick": _grid("ddpm-digits", "digits", {2: 100}, etas=(1.0,), methods=("sequential", "paper"), seeds=1),
        "mini": _grid("ddpm-digits", "digits", {20: 100}, etas=(0.2, 1.0), methods=_STOCHASTIC, seeds=3),
        "paper": _grid(
            "ddpm-cifar10-32",
            "cifar10",
            {20: 50_000, 50: 50_000},
            etas=(0.2, 0.5, 1.0),
            methods=_STOCHASTIC,
            seeds=1,
            spacing="quadratic",
        ),
    },
    blocks=_table,
    trend=_comparable,
    minutes=20,
)
TABLE_4 = Experiment(
    name="deq-ddim/table-4",
    claim="The same on CelebA: at every noise level the fixed point's images are no worse.",
    theirs="FID, DDIM then DEQ, eta .2/.5/1: T=20 13.85/15.67/25.85, 13.52/15.27/25.31; "
    "T=50 9.33/10.75/18.22, 8.66/9.73/15.57",
    kind=SAMPLES,
    grid={
        "quick": TABLE_2.grid["quick"],
        "mini": [
            *TABLE_2.grid["mini"],
            *_grid("ddpm-digits", "digits", {20: 100}, etas=(0.5,), methods=_STOCHASTIC, seeds=3),
            *_grid("ddpm-digits", "digits", {50: 16}, etas=(0.2, 0.5, 1.0), methods=_STOCHASTIC, seeds=3),
        ],
        "paper": _grid(
            "ddpm-celeba-64",
            "celeba",
            {20: 50_000, 50: 50_000},
            etas=(0.2, 0.5, 1.0),
            methods=_STOCHASTIC,
            seeds=1,
        ),
    },
    blocks=_table,
    trend=_comparable,
    minutes=25,
)
ENTRIES = (TABLE_1, TABLE_2, TABLE_4)
