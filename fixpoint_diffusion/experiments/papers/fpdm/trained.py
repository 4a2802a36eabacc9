"""Tables 1 to 4 and Figures 7 to 12: FPDM and DiT after the same time of training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fixpoint import bench
from fixpoint_diffusion.experiments.experiment import Experiment, Verdict
from fixpoint_diffusion.experiments.papers.fpdm.training import TRAININGS
from fixpoint_diffusion.experiments.records import Config, Record
from fixpoint_diffusion.experiments.summaries import first_seed, grouped, lower, mean, mean_spread, of_which, stacked

# A DiT of twelve blocks stands for the paper's of 28; the budgets are 5, 10 and 20 of its steps, as there. Each family
# is trained with its own usual settings (learning rate, weight decay), for as long as so many steps of that DiT take:
# about ten minutes on one core of a processor, or five.
_FPDM: dict[str, Any] = {"width": 96, "heads": 4}
_DIT: dict[str, Any] = {"width": 96, "heads": 4, "depth": 12}
_BUDGETS, _PAPER_BUDGETS = [60, 120, 240], [140, 280, 560]
_LONG, _SHORT = 4400, 2200
DATA = ("digits", "crops", "textures", "shapes")
_THEIR_DATA = {"celeba-hq": "CelebA-HQ", "ffhq": "FFHQ", "church": "LSUN Church", "imagenet": "ImageNet"}


def mini(network: str, seed: int, *, data: str = "digits", dit_steps: int = _SHORT, **changed: Any) -> Config:
    """A training of one network; ``settings`` beyond the usual ones, ``match``, ``budgets``."""
    usual = {"fpdm": _FPDM, "dit": _DIT}
    other = "dit" if network == "fpdm" else "fpdm"
    config: dict[str, Any] = {
        "network": network,
        "settings": {**usual[network], **changed.pop("settings", {})},
        "data": data,
        "time": {"settings": usual["dit"], "steps": dit_steps},
        "match": changed.pop("match", None),
        "budgets": _BUDGETS,
        "iterations": 4,
        "images": 512,
        "seed": seed,
    }
    if config["match"]:
        config["settings_of_other"] = usual[other]
    return {**config, **changed}


def quick(network: str, **changed: Any) -> Config:
    """Two steps of training, eight images."""
    tiny = {"width": 16, "heads": 2, **({"depth": 2} if network == "dit" else {"max_no_grad": 2, "max_grad": 1})}
    settings = {**tiny, **changed.pop("settings", {})}
    config = mini(network, 0, settings=settings, **changed)
    return {**config, "steps": 2, "images": 8, "budgets": [12, 24], "iterations": 1}


def published(network: str, data: str = "imagenet", *, steps: int = 400_000, name: str = "", **settings: Any) -> Config:
    """As in the paper, in the time of so many steps of DiT; the plan says by what command the model is trained."""
    return {
        "network": network,
        "model": f"{network}-{data}{name}",
        "settings": settings,
        "data": data,
        "steps": steps,
        "match": None,
        "budgets": _PAPER_BUDGETS,
        "iterations": 8,
        "images": 50_000,
        "seed": 0,
    }


def distances(records: Sequence[Record], column: str) -> list[float]:
    """One figure a record."""
    return [record.measures["distances"][column] for record in records]


def table(
    title: str, *keys: str, theirs: Mapping[tuple[Any, ...], Any] | None = None
) -> Callable[..., list[bench.Block]]:
    """Distances by these entries of the configuration, or of its settings."""

    def make(records: Sequence[Record]) -> list[bench.Block]:
        samplers = list(records[0].measures["distances"])
        rows = []
        for key, group in grouped(records, *keys).items():
            size = group[0].measures
            rows.append(
                (
                    *key,
                    *(() if theirs is None else (theirs.get(key),)),
                    *(mean_spread(distances(group, column)) for column in samplers),
                    size.get("parameters"),
                    round(mean(group, "steps")) if "steps" in size else None,
                    mean_spread([r.measures["training_flops"] for r in group]) if "training_flops" in size else None,
                )
            )
        columns = (*keys, *(() if theirs is None else ("theirs",)), *samplers, "parameters", "steps", "training FLOPs")
        caption = (
            "Fréchet distance by sampler and block passes: in the classifier's features for digits, in pixels for "
            "other bundled pictures, in Inception's features else. Mean and standard deviation of the seeds."
        )
        return [bench.Table(title, columns, rows, caption)]

    return make


def _wins_at_low_budgets(records: Sequence[Record]) -> Verdict:
    """FPDM ahead at the two lower budgets with both samplers, and less so at the highest."""
    usual = {network: group for (network, match), group in grouped(records, "network", "match").items() if not match}
    parts, holds = [], True
    budgets = sorted(records[0].config["budgets"])
    for sampler in ("DDPM", "DDIM"):
        ratios = []
        for budget in budgets:
            one, other = (distances(usual[network], f"{sampler} {budget}") for network in ("fpdm", "dit"))
            holds = holds and (budget == budgets[-1] or lower(one, other))
            ratios.append(sum(other) / sum(one))
            parts.append(f"{sampler} {budget}: {mean_spread(one)} against DiT's {mean_spread(other)}")
        holds = holds and ratios[-1] <= ratios[0]
    sizes = [group[0].measures.get("parameters") for group in (usual["fpdm"], usual["dit"])]
    if None not in sizes:  # of models that were trained elsewhere nothing is recorded
        parts.append(f"{sizes[0]:,} parameters against {sizes[1]:,}")
    return Verdict(holds, "; ".join(parts))


def _middle(record: Record) -> str:
    """DDPM at the middle budget, as the column of its distances is called."""
    budgets = sorted(record.config["budgets"])
    return f"DDPM {budgets[len(budgets) // 2]}"


def _wins_everywhere(records: Sequence[Record]) -> Verdict:
    """FPDM ahead of DiT on every set, with DDPM at the middle budget."""
    parts, holds = [], True
    for (data,), group in grouped(records, "data").items():
        usual = {network: each for (network,), each in grouped(group, "network").items()}
        column = _middle(group[0])
        one, other = distances(usual["fpdm"], column), distances(usual["dit"], column)
        holds = holds and lower(one, other)
        parts.append(f"{data}: {mean_spread(one)} against DiT's {mean_spread(other)}")
    return Verdict(holds, "; ".join(parts))


def _few_are_best(records: Sequence[Record]) -> Verdict:
    """The best N is at most half of the largest, and better than that."""
    found = {n: distances(group, _middle(group[0])) for (n,), group in grouped(records, "max_no_grad").items()}
    best = min(found, key=lambda n: sum(found[n]) / len(found[n]))
    text = ", ".join(f"N={n} {mean_spread(each)}" for n, each in found.items())
    return Verdict(2 * best <= max(found) and lower(found[best], found[max(found)]), text)


def _stochastic_is_best(records: Sequence[Record]) -> Verdict:
    """At each N, one-step JFB is the worst, and S-JFB no worse than multi-step JFB."""
    parts, holds = [], True
    for (n,), group in grouped(records, "max_no_grad").items():
        rules = {rule: distances(each, _middle(each[0])) for (rule,), each in grouped(group, "backward").items()}
        holds = holds and lower(rules["multi-jfb"], rules["jfb"]) and lower(rules["sjfb"], rules["jfb"])
        holds = holds and not lower(rules["multi-jfb"], rules["sjfb"])
        parts.append(f"N={n}: " + ", ".join(f"{rule} {mean_spread(each)}" for rule, each in rules.items()))
    return Verdict(holds, "; ".join(parts))


def _some_explicit_blocks(records: Sequence[Record]) -> Verdict:
    """No explicit blocks are the worst at every budget; more of them gain as the budget grows."""
    budgets = sorted(records[0].config["budgets"])
    found = {n: group for (n,), group in grouped(records, "n_pre").items()}
    parts, holds, best = [], True, []
    for budget in budgets:
        each = {n: distances(group, f"DDPM {budget}") for n, group in found.items()}
        holds = holds and all(lower(each[n], each[0]) for n in each if n)
        best.append(min(each, key=lambda n: sum(each[n]) / len(each[n])))
        parts.append(f"{budget} passes: " + ", ".join(f"{n} {mean_spread(figure)}" for n, figure in each.items()))
    return Verdict(holds and best == sorted(best), "; ".join(parts))


_PAIR = ("fpdm", "dit")
_TABLE_1 = {("dit", None): "148/80.9/37.9, 110/35.2/16.5", ("fpdm", None): "85.8/43.3/26.1, 33.9/22.4/19.6"}
TABLE_1 = Experiment(
    name="fpdm/table-1",
    claim="After equal training time FPDM beats DiT at low sampling budgets, with 87 % fewer parameters.",
    theirs="FID at 140/280/560 passes: DDPM 85.8/43.3/26.1 against DiT's 148/80.9/37.9, DDIM 33.9/22.4/19.6 against "
    "110/35.2/16.5; memory in fpdm/memory",
    kind=TRAININGS,
    grid={
        "quick": [quick(network) for network in _PAIR],
        "mini": [
            *(mini(network, seed, dit_steps=_LONG) for network in _PAIR for seed in range(3)),
            # The controls that the paper lacks.
            *(mini("dit", seed, dit_steps=_LONG, match="flops") for seed in range(3)),
            *(mini("fpdm", seed, dit_steps=_LONG, match="steps") for seed in range(3)),
        ],
        "paper": [published(network) for network in _PAIR],
    },
    blocks=table("FPDM and DiT", "network", "match", theirs=_TABLE_1),
    trend=_wins_at_low_budgets,
    minutes=130,
)
TABLE_2 = Experiment(
    name="fpdm/table-2",
    claim="FPDM beats DiT on every data set at the middle budget.",
    theirs="FID, 280 passes: CelebA-HQ 11.1 against 65.2, FFHQ 18.2, 58.1, LSUN Church 22.7, 65.6, ImageNet 43.3, 80.9",
    kind=TRAININGS,
    grid={
        "quick": [quick(network, data=data) for data in ("digits", "shapes") for network in _PAIR],
        "mini": [mini(network, seed, data=data) for data in DATA for network in _PAIR for seed in range(3)],
        "paper": [
            published(network, data, steps=400_000 if data == "imagenet" else 100_000)
            for data in _THEIR_DATA
            for network in _PAIR
        ],
    },
    blocks=table("FPDM and DiT by data", "data", "network"),
    trend=_wins_everywhere,
    minutes=130,
)
_BOUNDS = (3, 6, 12, 24)
TABLE_3 = Experiment(
    name="fpdm/table-3",
    claim="Few iterations in training are best: N of 3 to 6.",
    theirs="FID, 280 passes: 3 43.0, 6 43.2, 12 61.5, 24 567.6",
    kind=TRAININGS,
    grid={
        "quick": [quick("fpdm", settings={"max_no_grad": n}) for n in (1, 2)],
        "mini": [
            mini("fpdm", seed, settings={"max_no_grad": n, "max_grad": 12, "backward": "sjfb"})
            for n in _BOUNDS
            for seed in range(3)
        ],
        "paper": [
            published("fpdm", steps=100_000, name=f"-n{n}", max_no_grad=n, max_grad=12, backward="sjfb")
            for n in _BOUNDS
        ],
    },
    blocks=table("Iterations in training", "max_no_grad", "max_grad"),
    trend=_few_are_best,
    minutes=65,
)
_RULES = ("jfb", "multi-jfb", "sjfb")
TABLE_4 = Experiment(
    name="fpdm/table-4",
    claim="One-step gradients fail; several steps do well, and a random number of them does best.",
    theirs="FID, JFB/multi-step/S-JFB: N=6 567.6/48.2/43.2, N=12 567.6/79.9/61.5",
    kind=TRAININGS,
    grid={
        "quick": [quick("fpdm", settings={"backward": rule}) for rule in _RULES],
        "mini": [
            mini("fpdm", seed, settings={"max_no_grad": n, "max_grad": 12, "backward": rule})
            for n in (6, 12)
            for rule in _RULES
            for seed in range(3)
        ],
        "paper": [
            published(
                "fpdm",
                steps=100_000,
                name=f"-n{n}" if rule == "sjfb" else f"-{rule}-n{n}",
                max_no_grad=n,
                max_grad=12,
                backward=rule,
            )
            for n in (6, 12)
            for rule in _RULES
        ],
    },
    blocks=table("Gradients of the layer", "max_no_grad", "backward"),
    trend=_stochastic_is_best,
    minutes=95,
)
_EXPLICIT = (0, 1, 2, 4)
FIGURE_7 = Experiment(
    name="fpdm/figure-7",
    claim="One explicit block on each side is better than none; more gain only at large budgets.",
    theirs="pre = post = 0, 1, 2, 4: 0 always worst, 1 best at small budgets, 2 or 4 at large ones",
    kind=TRAININGS,
    grid={
        "quick": [quick("fpdm", settings={"n_pre": n, "n_post": n}) for n in (0, 1)],
        "mini": [mini("fpdm", seed, settings={"n_pre": n, "n_post": n}) for n in _EXPLICIT for seed in range(3)],
        "paper": [published("fpdm", steps=100_000, name=f"-p{n}", n_pre=n, n_post=n) for n in _EXPLICIT],
    },
    blocks=table("Explicit blocks", "n_pre"),
    trend=_some_explicit_blocks,
    minutes=65,
)


def _samples(records: Sequence[Record]) -> list[bench.Block]:
    first = [of_which(record.measures["images"], record.config["data"]) for record in first_seed(records)]
    caption = (
        "One column a starting noise, by DDIM at the largest budget. The verdict is about DDPM at the middle budget, "
        "as in Table 2."
    )
    return [stacked("Samples", first, caption)]


def _sampled(number: int, theirs: str, ours: str) -> Experiment:
    """Figures 8 to 11: samples of FPDM on one data set; beside them DiT's, so that something can fail."""
    return Experiment(
        name=f"fpdm/figure-{number}",
        claim=f"Samples of {_THEIR_DATA[theirs]} (ours: {ours}) are good; their distance is below DiT's.",
        kind=TRAININGS,
        grid={
            "quick": [quick(network, data=ours) for network in _PAIR],
            "mini": [config for config in TABLE_2.grid["mini"] if config["data"] == ours],
            "paper": [config for config in TABLE_2.grid["paper"] if config["data"] == theirs],
        },
        blocks=_samples,
        trend=_wins_everywhere,
        minutes=35,
    )


FIGURE_12 = Experiment(
    name="fpdm/figure-12",
    claim="Side by side, FPDM's samples are better than DiT's on every data set.",
    kind=TRAININGS,
    grid=TABLE_2.grid,
    blocks=_samples,
    trend=_wins_everywhere,
    minutes=130,
)
ENTRIES = (
    TABLE_1,
    TABLE_2,
    TABLE_3,
    TABLE_4,
    FIGURE_7,
    _sampled(8, "celeba-hq", "shapes"),
    _sampled(9, "church", "crops"),
    _sampled(10, "ffhq", "textures"),
    _sampled(11, "imagenet", "digits"),
    FIGURE_12,
)
