"""Table 3 and Figures 3, 6, 7, 8, 16 and 17: what a descent to the noise behind an image reaches."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from fixpoint import bench
from fixpoint_diffusion.experiments.experiment import Experiment, Verdict
from fixpoint_diffusion.experiments.papers.deq_ddim.inverting import DIRECT, INVERSIONS, LABELS
from fixpoint_diffusion.experiments.records import Config, Record
from fixpoint_diffusion.experiments.summaries import curves_by, grouped, lower, mean, mean_spread, values

# Ten times the paper's rate of 0.01 and a twentieth of its epochs, so that x_T may go half as far. The baseline
# gets 2.5 times the epochs, as on CIFAR10 with T = 100.
_RATE, _EPOCHS, _BASELINE_EPOCHS = 0.1, 20, 50
SHOWN = (1, 2, 5, 10, 20)
PAPER_SETS = (
    ("ddpm-cifar10-32", "cifar10", 100, "cifar10", 400, 1000),
    ("ddpm-cifar10-32", "cifar10", 10, "cifar10", 400, 3000),
    ("ddpm-celeba-64", "celeba", 20, "celeba", 400, 2500),
    ("ddpm-bedroom-256", "lsun-bedroom", 10, "lsun-bedroom", 500, 2000),
    ("ddpm-church-256", "lsun-church", 10, "lsun-church", 500, 2000),
)


def mini(steps: int, method: str, seed: int, *, eta: float = 0.0, rate: float = _RATE, **extra: Any) -> Config:
    """An inversion of two held-out digits; a descent shows its images as it goes."""
    config = {"model": "ddpm-digits", "data": "digits", "method": method, "steps": steps, "eta": eta}
    config |= {"images": 2, "seed": seed}
    if method not in DIRECT:
        epochs = _BASELINE_EPOCHS if method == "baseline" else _EPOCHS
        config |= {"rate": rate, "epochs": epochs, "show": list(SHOWN)}
    return {**config, **extra}


def quick(method: str, **extra: Any) -> Config:
    """One image, a few steps."""
    config = mini(4, method, 0, images=1, **extra)
    return config if method in DIRECT else {**config, "epochs": 3, "show": [1, 2]}


def published(row: tuple[str, str, int, str, int, int], method: str, seed: int = 0, **extra: Any) -> Config:
    """As in the paper, two of its images: backpropagation through a chain takes much memory."""
    model, data, steps, recipe, epochs, baseline = row
    config = {"model": model, "data": data, "method": method, "steps": steps, "eta": 0.0, "images": 2, "seed": seed}
    config |= {"recipe": recipe}
    if method not in DIRECT:
        epochs = baseline if method == "baseline" else epochs
        config |= {"rate": 0.01, "epochs": epochs, "show": [1, 50, 100, 150, 200]}
    return {**config, **extra}


_METHODS = ("baseline", "paper", "released-code", *DIRECT)
_THEIRS = {
    ("cifar10", 100): ("15.74 ± 8.7, 49.07 min", "0.76 ± 0.35, 12.99 min"),
    ("cifar10", 10): ("2.59 ± 3.67, 14.36 min", "0.68 ± 0.32, 2.54 min"),
    ("celeba", 20): ("14.13 ± 5.04, 30.09 min", "1.03 ± 0.37, 28.09 min"),
    ("lsun-bedroom", 10): ("1114.49 ± 795.86, 26.41 min", "36.37 ± 22.86, 33.7 min"),
    ("lsun-church", 10): ("1674.68 ± 1432.54, 29.7 min", "47.94 ± 24.78, 33.54 min"),
}


def _table(records: Sequence[Record]) -> bench.Table:
    rows = []
    for (data, steps, eta, rate, method), group in grouped(records, "data", "steps", "eta", "rate", "method").items():
        theirs = dict(zip(("baseline", "paper"), _THEIRS.get((data, steps), (None, None)), strict=True)).get(method)
        descent = "losses" in group[0].measures
        rows.append(
            (
                data,
                steps,
                eta,
                LABELS[method],
                rate,
                theirs,
                mean_spread(values(group, "best")),
                mean_spread(values(group, "seconds")),
                round(mean(group, "rounds")),
                group[0].config.get("epochs") if descent else None,
            )
        )
    columns = ("data", "T", "eta", "method", "rate", "theirs", "least loss", "s", "rounds", "epochs")
    caption = (
        "Least loss: squared distance of image and reconstruction, a sum over its entries, mean and standard deviation "
        "of the images of all seeds. s: of a run with all of its images. Rounds: batched calls of the network."
    )
    return bench.Table("Inversions", columns, rows, caption)


def curves(title: str, *keys: str) -> Callable[[Sequence[Record]], list[bench.Block]]:
    """The table, and the losses of every descent by these entries of its configuration."""

    def make(records: Sequence[Record]) -> list[bench.Block]:
        descents = [record for record in records if "losses" in record.measures]
        series = curves_by(descents, "losses", keys, LABELS)
        return [_table(records), bench.Lines(title, series, "epoch", "loss, mean of the images")]

    return make


def _deq_ends_lower(records: Sequence[Record]) -> Verdict:
    """In every setting the published method's least loss is below the baseline's."""
    parts, holds = [], True
    for (data, steps), group in grouped(records, "data", "steps").items():
        methods = {method: each for (method,), each in grouped(group, "method").items()}
        one, other = values(methods["paper"], "best"), values(methods["baseline"], "best")
        holds = holds and lower(one, other)
        direct = methods.get("all steps at once")
        beside = f", without descent {mean_spread(values(direct, 'best'))}" if direct else ""
        ratio = mean(methods["baseline"], "seconds") / mean(methods["paper"], "seconds")
        parts.append(
            f"{data} T={steps}: {mean_spread(one)} against the baseline's {mean_spread(other)}, "
            f"{ratio:.2g} times faster{beside}"
        )
    return Verdict(holds, "; ".join(parts))


def _length_matters_not(records: Sequence[Record]) -> Verdict:
    """The published method's losses hardly depend on T: the last ones are within a factor of two."""
    ends = {
        method: {steps: mean(each, "best") for (steps,), each in grouped(group, "steps").items()}
        for (method,), group in grouped(records, "method").items()
        if method in ("baseline", "paper")
    }
    text = "; ".join(
        f"{LABELS[method]} " + ", ".join(f"T={steps} {loss:.3g}" for steps, loss in each.items())
        for method, each in ends.items()
    )
    return Verdict(max(ends["paper"].values()) <= 2 * min(ends["paper"].values()), f"least losses: {text}")


def _more_steps_no_nearer(records: Sequence[Record]) -> Verdict:
    short, long = values(records, "loss"), values(records, "loss_resampled")
    found = (
        f"loss {mean_spread(short)} with the T of the descent, {mean_spread(long)} with {records[0].config['resample']}"
    )
    return Verdict(not lower(long, short), found)


def _exact_is_unstable(records: Sequence[Record]) -> Verdict:
    """Exact gradients end above their least loss at the largest rate, and inexact ones end below exact ones there."""
    parts, ends = [], {}
    for (method, rate), group in grouped(records, "method", "rate").items():
        last = [record.measures["losses"][-1] for record in group]
        ends[method, rate] = last
        rose = statistics.fmean(record.measures["losses"][-1] / min(record.measures["losses"]) for record in group)
        parts.append(f"{LABELS[method]}, rate {rate:g}: last loss {mean_spread(last)}, {rose:.2g} times the least")
    top = max(rate for _, rate in ends)
    exact = [record for record in records if record.config["method"] == "exact" and record.config["rate"] == top]
    unstable = statistics.fmean(r.measures["losses"][-1] / min(r.measures["losses"]) for r in exact) > 2
    return Verdict(unstable and lower(ends["paper", top], ends["exact", top]), "; ".join(parts))


def _noise_makes_it_harder(records: Sequence[Record]) -> Verdict:
    """Every noise level is inverted to less than a quarter of its first loss; more noise ends higher."""
    parts, holds = [], True
    for (steps,), group in grouped(records, "steps").items():
        best = {eta: values(each, "best") for (eta,), each in grouped(group, "eta").items()}
        left = {
            eta: statistics.fmean(r.measures["losses"][-1] / r.measures["losses"][0] for r in each)
            for (eta,), each in grouped(group, "eta").items()
        }
        holds = holds and max(left.values()) < 0.25 and lower(best[min(best)], best[max(best)])
        parts += [f"T={steps} eta={eta:g}: {mean_spread(best[eta])}, {left[eta]:.2g} of the first" for eta in best]
    return Verdict(holds, f"least losses {'; '.join(parts)}")


_LENGTHS = (5, 10, 20)
TABLE_3 = Experiment(
    name="deq-ddim/table-3",
    claim="Inversion through the fixed point reaches a far lower loss than backpropagation through the sampler.",
    theirs="least loss, baseline then DEQ: CIFAR10 T=100 15.74, 0.76; T=10 2.59, 0.68; CelebA 14.13, 1.03; "
    "Bedroom 1114, 36.4; Church 1675, 47.9; and in less time on CIFAR10",
    kind=INVERSIONS,
    grid={
        "quick": [quick(method) for method in ("baseline", "paper", "all steps at once")],
        "mini": [mini(steps, method, seed) for steps in (10, 20) for method in _METHODS for seed in range(3)],
        "paper": [published(row, m, seed) for row in PAPER_SETS for m in _METHODS for seed in range(50)],
    },
    blocks=curves("Loss over epochs", "steps", "method"),
    trend=_deq_ends_lower,
    minutes=8,
)
FIGURE_3 = Experiment(
    name="deq-ddim/figure-3",
    claim="Inversion through the fixed point takes fewer epochs and ends at a lower loss.",
    kind=INVERSIONS,
    theirs="loss over epochs, CelebA T=20 and LSUN Bedroom T=10",
    grid={
        "quick": TABLE_3.grid["quick"][:2],
        "mini": [mini(steps, m, seed) for steps in (10, 20) for m in ("baseline", "paper") for seed in range(3)],
        "paper": [
            published(row, m, seed) for row in PAPER_SETS[2:4] for m in ("baseline", "paper") for seed in range(50)
        ],
    },
    blocks=curves("Loss over epochs", "steps", "method"),
    trend=_deq_ends_lower,
    minutes=5,
)
FIGURE_6 = Experiment(
    name="deq-ddim/figure-6",
    claim="The chain's length hardly changes the descent through the fixed point; a short one helps the baseline.",
    theirs="curves for T = 10, 20, 100: nearly the same with DEQ",
    kind=INVERSIONS,
    grid={
        "quick": TABLE_3.grid["quick"][:2],
        "mini": [mini(steps, m, seed) for steps in _LENGTHS for m in ("baseline", "paper") for seed in range(3)],
        "paper": [
            published(row, m, seed) for row in PAPER_SETS[:3] for m in ("baseline", "paper") for seed in range(50)
        ],
    },
    blocks=curves("Loss over epochs by length", "method", "steps"),
    trend=_length_matters_not,
    minutes=6,
)
FIGURE_7 = Experiment(
    name="deq-ddim/figure-7",
    claim="Sampling the baseline's noise with more steps than it was found with brings no image nearer.",
    theirs="triplets of LSUN Bedroom: image, T = 10, T = 1000",
    kind=INVERSIONS,
    grid={
        "quick": [quick("baseline", resample=8)],
        "mini": [mini(10, "baseline", seed, resample=1000) for seed in range(3)],
        "paper": [published(PAPER_SETS[3], "baseline", seed, resample=1000) for seed in range(3)],
    },
    blocks=lambda records: [bench.Images(**records[0].measures["back"])],
    trend=_more_steps_no_nearer,
    minutes=1,
)
_RATES = (0.01, 0.1, 1.0)
FIGURE_8 = Experiment(
    name="deq-ddim/figure-8",
    claim="Exact gradients become unstable at large learning rates; inexact ones converge faster there.",
    theirs="CelebA, T = 20: exact at 0.005 unstable, at 0.001 not; inexact at 0.01 ahead of exact",
    kind=INVERSIONS,
    grid={
        "quick": [quick(method) for method in ("exact", "paper")],
        "mini": [
            mini(10, method, seed, rate=rate) for method in ("exact", "paper") for rate in _RATES for seed in range(3)
        ],
        "paper": [
            published(PAPER_SETS[2], method, seed, rate=rate)
            for method, rates in (("exact", (0.001, 0.005, 0.01)), ("paper", (0.01,)))
            for rate in rates
            for seed in range(5)
        ],
    },
    blocks=curves("Loss over epochs by gradient", "method", "rate"),
    trend=_exact_is_unstable,
    minutes=6,
)
_ETAS = (0.0, 0.5, 1.0)


def _noisy(figure: str, claim: str, theirs: str) -> Experiment:
    return Experiment(
        name=f"deq-ddim/{figure}",
        claim=claim,
        theirs=theirs,
        kind=INVERSIONS,
        grid={
            "quick": [quick("paper", eta=eta) for eta in (0.0, 1.0)],
            "mini": [mini(10, "paper", seed, eta=eta) for eta in _ETAS for seed in range(3)],
            "paper": [
                published(row, "paper", seed, eta=eta, epochs=epochs)
                for row, lengths in ((PAPER_SETS[1], (400, 600, 1000)), (PAPER_SETS[2], (1500, 1500, 1500)))
                for eta, epochs in zip(_ETAS, lengths, strict=True)
                for seed in range(13)
            ],
        },
        blocks=curves("Loss over epochs by noise", "steps", "eta"),
        trend=_noise_makes_it_harder,
        minutes=3,
    )


FIGURE_16 = _noisy(
    "figure-16",
    "The stochastic chain is inverted too, in more epochs where there is more noise.",
    "curves on CIFAR10, 25 runs",
)
FIGURE_17 = _noisy(
    "figure-17",
    "Even at eta = 1 the least loss is low.",
    "CIFAR10 T=10, eta 0/.5/1: 0.76/0.49/6.64; CelebA T=20: 0.41/1.57/5.03",
)
ENTRIES = (TABLE_3, FIGURE_3, FIGURE_6, FIGURE_7, FIGURE_8, FIGURE_16, FIGURE_17)
