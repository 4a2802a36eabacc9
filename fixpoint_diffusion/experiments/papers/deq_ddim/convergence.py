"""Figures 1, 9 and 11: residuals over solver steps, by the chain's length, its start, and its noise."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

from fixpoint import bench
from fixpoint_diffusion.experiments.experiment import Experiment, Verdict
from fixpoint_diffusion.experiments.papers.deq_ddim.solving import SOLVES
from fixpoint_diffusion.experiments.records import Config, Record
from fixpoint_diffusion.experiments.summaries import curves_by, grouped, lower, mean_spread, values

_FALLS = 0.1  # what must be left of the first residual, on average


def _grid(
    model: str,
    lengths: Sequence[int],
    *,
    samples: int,
    seeds: int,
    etas: Sequence[float] = (0.0,),
    solvers: Sequence[str] = ("paper",),
    starts: Sequence[str] = ("x_T",),
    rounds: int | None = None,
    spacing: str | None = None,
) -> list[Config]:
    return [
        {
            "model": model,
            "steps": steps,
            "eta": eta,
            "solver": solver,
            "rounds": rounds,
            "init": start,
            "samples": samples,
            "seed": seed,
            "show": [],
            **({} if spacing is None else {"spacing": spacing}),
        }
        for steps in lengths
        for eta in etas
        for solver in solvers
        for start in starts
        for seed in range(seeds)
    ]


def _curves(title: str, *keys: str) -> Callable[[Sequence[Record]], bench.Lines]:
    def make(records: Sequence[Record]) -> bench.Lines:
        return bench.Lines(
            title,
            curves_by(records, "residual", keys),
            "solver steps (rounds)",
            "||h(z) - z||, mean of the samples",
            caption="A curve ends where the last sample had converged to 1e-3, or at the limit of rounds.",
        )

    return make


def _table(records: Sequence[Record], *keys: str) -> bench.Table:
    rows = []
    for key, group in grouped(records, *keys).items():
        done = values(group, "converged")
        rows.append(
            (
                *key,
                mean_spread(values(group, "rounds")),
                mean_spread([r.measures["residual"][-1] / r.measures["residual"][0] for r in group]),
                mean_spread(values(group, "error")),
                f"{sum(done):.0f} of {len(done)}",
            )
        )
    columns = (*keys, "rounds", "last residual, of the first", "error of x_0", "within 1e-3")
    return bench.Table("Solves", columns, rows, "Mean and standard deviation; the error is against the sequential run.")


def _falls(records: Sequence[Record]) -> Verdict:
    """The mean residual falls to a tenth in every setting of the paper's solver."""
    lefts = {
        key: statistics.fmean(r.measures["residual"][-1] / r.measures["residual"][0] for r in group)
        for key, group in grouped([r for r in records if r.config["solver"] == "paper"], "steps", "eta").items()
    }
    done = values([r for r in records if r.config["solver"] == "paper"], "converged")
    parts = ", ".join(f"T={steps}{f' eta={eta:g}' if eta else ''}: {left:.2g}" for (steps, eta), left in lefts.items())
    found = f"left of the first residual: {parts}; {sum(done):.0f} of {len(done)} samples met 1e-3"
    return Verdict(all(left <= _FALLS for left in lefts.values()), found)


def _more_noise_more_rounds(records: Sequence[Record]) -> Verdict:
    """It falls, and of two noise levels at one length the larger takes more rounds to 1e-3."""
    falls, parts, holds = _falls(records), [], True
    for (steps,), group in grouped([r for r in records if r.config["solver"] == "paper"], "steps").items():
        rounds = {eta: values(each, "rounds") for (eta,), each in grouped(group, "eta").items()}
        least, most = min(rounds), max(rounds)
        holds = holds and lower(rounds[least], rounds[most])
        parts.append(f"T={steps}: {', '.join(f'eta={eta:g} {mean_spread(rounds[eta])}' for eta in sorted(rounds))}")
    return Verdict(bool(falls.passed) and holds, f"rounds: {'; '.join(parts)}; {falls.found}")


def _x_t_is_faster(records: Sequence[Record]) -> Verdict:
    rounds = {start: values(group, "rounds") for (start,), group in grouped(records, "init").items()}
    ratio = statistics.fmean(rounds["zeros"]) / statistics.fmean(rounds["x_T"])
    found = (
        f"{mean_spread(rounds['x_T'])} rounds from x_T, {mean_spread(rounds['zeros'])} from zeros: {ratio:.2g} times"
    )
    return Verdict(lower(rounds["x_T"], rounds["zeros"]), found)


FIGURE_1 = Experiment(
    name="deq-ddim/figure-1",
    claim="Anderson acceleration brings the whole chain to a fixed point, whatever its length T.",
    theirs="residuals fall for every T within the 15 steps allowed (CIFAR10, CelebA; 25 runs)",
    kind=SOLVES,
    grid={
        "quick": _grid("ddpm-digits", (5,), samples=2, seeds=1),
        "mini": _grid("ddpm-digits", (25, 50, 100, 500), samples=4, seeds=3)
        + _grid("ddpm-digits", (25, 50, 100), samples=4, seeds=3, solvers=("released-code",)),
        "paper": _grid("ddpm-cifar10-32", (50, 100, 500, 1000), samples=25, seeds=1, spacing="quadratic")
        + _grid("ddpm-celeba-64", (50, 100, 500), samples=25, seeds=1),
    },
    blocks=lambda records: [
        _table(records, "model", "solver", "steps"),
        _curves("Residual by length of the chain", "solver", "steps")(records),
    ],
    trend=_falls,
    minutes=4,
)
FIGURE_11 = Experiment(
    name="deq-ddim/figure-11",
    claim="The stochastic chain converges too, and takes more solver steps with more noise.",
    theirs="residuals fall within 50 steps; more steps for higher eta (CelebA, LSUN Bedroom; 10 runs)",
    kind=SOLVES,
    grid={
        "quick": _grid("ddpm-digits", (5,), samples=2, seeds=2, etas=(0.2, 1.0)),
        "mini": _grid("ddpm-digits", (20, 50), samples=4, seeds=3, etas=(0.2, 0.5, 1.0)),
        "paper": _grid("ddpm-celeba-64", (20, 50), samples=10, seeds=1, etas=(0.2, 0.5, 1.0))
        + _grid("ddpm-bedroom-256", (25,), samples=10, seeds=1, etas=(0.2, 0.5, 1.0)),
    },
    blocks=lambda records: [
        _table(records, "model", "steps", "eta"),
        _curves("Residual by noise", "steps", "eta")(records),
    ],
    trend=_more_noise_more_rounds,
    minutes=3,
)
FIGURE_9 = Experiment(
    name="deq-ddim/figure-9",
    claim="Starting every latent at x_T converges faster than starting at zero.",
    theirs="up to 3 times faster (CIFAR10, T=50, 5 runs)",
    kind=SOLVES,
    grid={
        "quick": _grid("ddpm-digits", (5,), samples=2, seeds=2, starts=("x_T", "zeros"), rounds=8),
        "mini": _grid("ddpm-digits", (50,), samples=4, seeds=3, starts=("x_T", "zeros"), rounds=50),
        "paper": _grid(
            "ddpm-cifar10-32", (50,), samples=5, seeds=1, starts=("x_T", "zeros"), rounds=50, spacing="quadratic"
        ),
    },
    blocks=lambda records: [
        _table(records, "model", "init", "steps"),
        _curves("Residual by start", "init")(records),
    ],
    trend=_x_t_is_faster,
    minutes=1,
)
ENTRIES = (FIGURE_1, FIGURE_9, FIGURE_11)
