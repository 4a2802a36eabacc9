"""Tables, targets and JSON of what was measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib import metadata

from benchmarks.gradients.experiments import DEPTHS, FORWARD_RTOLS, Outcome
from benchmarks.gradients.measuring import Figures
from benchmarks.gradients.methods import LEVELS, SOLVERS
from benchmarks.solvers.standings import Target, geometric_mean
from fixpoint.bench import provenance

FLAT = ("IFT", "Phantom", "JFB", "MultiStepJFB", "StochasticJFB")  # the rules whose memory must not grow
ERROR_TARGET = 1e-5
CONTESTS: Mapping[str, str | None] = {"fastest": None, **{solver: solver for solver in SOLVERS}}

Tolerances = Mapping[str, Mapping[str, Sequence[float]]]  # setting, rule: errors at FORWARD_RTOLS


def grid(title: str, columns: Sequence[str], rows: Mapping[str, Sequence[str]], width: int = 12) -> str:
    """A table with a title, right-aligned cells and wrapped column heads of two words."""
    first = max(map(len, rows), default=0)
    heads = [name.rpartition(" ") for name in columns]
    lines = [title, ""]
    if any(head for head, _, _ in heads):
        lines.append(" " * first + "".join(f"{head[: width - 1]:>{width}}" for head, _, _ in heads))
    lines.append(" " * first + "".join(f"{last:>{width}}" for _, _, last in heads))
    lines += [name.ljust(first) + "".join(f"{cell:>{width}}" for cell in cells) for name, cells in rows.items()]
    return "\n".join(lines)


def rule_tables(outcomes: Sequence[Outcome]) -> str:
    """A table for each figure: a line for each rule, a column for each setting."""

    def table(title: str, cell: Callable[[Figures, Figures], str]) -> str:
        names = outcomes[0].rules
        rows = {name: [cell(outcome.rules[name], outcome.once) for outcome in outcomes] for name in names}
        return grid(title, [outcome.name for outcome in outcomes], rows)

    def times(figures: Figures, once: Figures) -> str:
        return "+".join(f"{each / sum(once.seconds):.1f}" for each in figures.seconds)

    return "\n\n".join(
        (
            table("Relative error of the gradient", lambda figures, _: f"{figures.error:.0e}"),
            table(
                "Evaluations of f + vector-Jacobian products",
                lambda figures, _: f"{figures.evaluations:.0f}+{figures.products:.0f}",
            ),
            table("Seconds forward + backward, in applications of f with its gradient", times),
            table(
                "Bytes kept for backward, in applications of f",
                lambda figures, once: f"{figures.saved / once.saved:.1f}",
            ),
            table(
                "Bytes at the peak, in applications of f",
                lambda figures, once: f"{figures.peak / once.peak:.1f}",
            ),
        )
    )


def matching_table(outcomes: Sequence[Outcome]) -> str:
    """Our seconds by torchdeq's at the same error."""
    rows = {
        f"{label}, error {level:.0e}": [f"{outcome.matches[place].ratio(solver):.2f}" for outcome in outcomes]
        for place, level in enumerate(LEVELS)
        for label, solver in CONTESTS.items()
    }
    title = (
        "Seconds of an exact gradient by torchdeq's at the same error: 0 where only ours gets there, nan where neither"
    )
    return grid(title, [outcome.name for outcome in outcomes], rows)


def depth_table(saved: Mapping[str, Sequence[int]]) -> str:
    """Bytes kept for backward against the evaluations of the forward solve."""
    rows = {name: [f"{each:,}" for each in sizes] for name, sizes in saved.items()}
    return grid("Bytes kept for backward after n evaluations", [f"n={depth}" for depth in DEPTHS], rows, 14)


def tolerance_table(tolerances: Tolerances) -> str:
    """Gradient errors against the forward tolerance."""
    rows = {
        f"{setting}  {rule}": [f"{error:.0e}" for error in errors]
        for setting, rules in tolerances.items()
        for rule, errors in rules.items()
    }
    title = "Relative error of the gradient against rtol of the forward solve (float64, adjoint exact)"
    return grid(title, [f"{rtol:.0e}" for rtol in FORWARD_RTOLS], rows, 9)


def targets(outcomes: Sequence[Outcome], saved: Mapping[str, Sequence[int]], recorded: tuple[int, int]) -> list[Target]:
    """The aims, on one run."""
    inexact = tuple(f"{each.name}: {each.tight:.1e}" for each in outcomes if not each.tight <= ERROR_TARGET)
    peers = [figures.error for each in outcomes for name, figures in each.rules.items() if name == "torchdeq ift"]
    aims = [
        Target(
            f"IFT at rtol=1e-7 in float32: error at most {ERROR_TARGET:.0e}",
            not inexact,
            f"{max(each.tight for each in outcomes):.1e} at most; torchdeq's ift at 1e-6 {max(peers):.1e}",
            inexact,
        )
    ]
    for label, solver in CONTESTS.items():
        found = {
            f"{each.name}, error {match.level:.0e}": match.ratio(solver) for each in outcomes for match in each.matches
        }
        ratios = {name: ratio for name, ratio in found.items() if not math.isnan(ratio)}
        against = tuple(f"{name}: {ratio:.2f}" for name, ratio in ratios.items() if ratio > 1)
        mean = geometric_mean(ratio for ratio in ratios.values() if 0 < ratio < math.inf)
        shown = f"{mean:.2f} in geometric mean, {min(ratios.values()):.2f} to {max(ratios.values()):.2f}"
        aims.append(
            Target(f"seconds by torchdeq's at the same error, {label}: at most 1.0", not against, shown, against)
        )
    flat = {name: sizes for name, sizes in saved.items() if name.startswith(FLAT)}
    grown = tuple(f"{name}: {list(sizes)}" for name, sizes in flat.items() if len(set(sizes)) > 1)
    kept = f"{len(flat)} rules, {len(grown)} grow"
    aims.append(
        Target(f"bytes kept do not depend on the evaluations, {DEPTHS[0]} to {DEPTHS[-1]}", not grown, kept, grown)
    )
    with_steps, without = recorded
    aims.append(
        Target(
            "the steps of S-JFB without gradient keep nothing", with_steps == without, f"{with_steps - without} bytes"
        )
    )
    return aims


def as_json(
    outcomes: Sequence[Outcome],
    saved: Mapping[str, Sequence[int]],
    tolerances: Tolerances,
    aims: Sequence[Target],
    quick: bool,
) -> dict[str, object]:
    """Everything that was measured, with machine, versions and commit."""
    return {
        "machine": provenance.machine(),
        "versions": {**provenance.versions(), "torchdeq": metadata.version("torchdeq")},
        "commit": provenance.commit(),
        "quick": quick,
        "targets": [asdict(aim) for aim in aims],
        "settings": [asdict(outcome) for outcome in outcomes],
        "saved_by_depth": {"depths": DEPTHS, "bytes": saved},
        "error_by_forward_rtol": {"rtols": FORWARD_RTOLS, "errors": tolerances},
    }
