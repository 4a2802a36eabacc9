"""Solvers, gradients and trainings: one chart and one table from the results of each."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from fixpoint.bench import Lines, Table

Results = Mapping[str, Any]


def solvers(data: Results) -> tuple[Lines, Table]:
    """Evaluations on the solver suite: ours, torchdeq's default, and the best solver of every other library."""
    shares, ours = data["profile"]["shares"], ("Anderson", "Anderson m=50", "Broyden", "Picard")
    peers = {"torchdeq Anderson m=5"}
    for library in ("torchdeq", "SciPy", "jaxopt"):
        peers.add(max((name for name in shares if name.startswith(library)), key=lambda name: sum(shares[name])))
    names = [*ours, *(name for name in shares if name in peers)]
    cases = [case["evaluations"] for case in data["cases"] if case["solvable"]]

    def row(name: str) -> tuple[str, int, float]:
        both = [case[name] / case["Anderson"] for case in cases if case[name] and case["Anderson"]]
        return name, sum(case[name] is not None for case in cases), _geometric_mean(both)

    lines = Lines(
        "Share of the cases that a solver solves",
        {name: (data["profile"]["factors"], shares[name]) for name in names},
        "evaluations granted, as a multiple of the fewest of all",
        "share of the cases",
        log_y=False,
        log_x=True,
    )
    columns = ("solver", f"cases solved, of {len(cases)}", "evaluations, divided by Anderson's")
    return lines, Table("", columns, [row(name) for name in names])


def overhead(data: Results) -> tuple[Lines, Table]:
    """The time of a solver beside f, by the size of the state."""
    sizes = sorted(data["sizes"], key=lambda size: size["size"]["rows"] * size["size"]["dim"])
    numbers, names = [size["size"]["rows"] * size["size"]["dim"] for size in sizes], list(sizes[0]["contestants"])
    times = {name: [1e3 * size["contestants"][name]["seconds"] for size in sizes] for name in names}
    lines = Lines(
        "Time of a solver beside f",
        {name: (numbers, times[name]) for name in names},
        "numbers in the state",
        "milliseconds for each evaluation",
        log_x=True,
    )
    states = [f"{size['size']['rows']} x {size['size']['dim']}" for size in sizes]
    rows = [(state, *(times[name][k] for name in names)) for k, state in enumerate(states)]
    return lines, Table("", ("state", *(f"{name}, ms" for name in names)), rows)


_RULES = ("IFT()", "SHINE(refine=5)", "Phantom(steps=5)", "JFB()", "Unroll()", "torchdeq ift")


def _cell(data: Results, name: str) -> list[Results]:
    """What was measured on one cell, by its spectral radius."""
    return [setting for setting in data["settings"] if setting["cell"] == name]


def gradients(data: Results) -> tuple[Lines, Table]:
    """Error and time of backward rules on one cell, from a map that contracts well to one that hardly does."""
    settings, names = _cell(data, "tanh"), (*_RULES, "torchdeq phantom, grad=5")

    def cost(setting: Results, name: str) -> float:
        return sum(setting["rules"][name]["seconds"]) / sum(setting["once"]["seconds"])

    errors = {name: [setting["rules"][name]["error"] for setting in settings] for name in names}
    costs = {name: [cost(setting, name) for setting in settings] for name in names}
    radii = [f"{setting['radius']:.2f}" for setting in settings]
    lines = Lines(
        "Error and time of gradients of the tanh cell",
        {name: (costs[name], errors[name]) for name in names},
        "time of both passes, in applications of f with its gradient",
        "relative error of the gradient",
        log_x=True,
    )
    kept = {name: settings[1]["rules"][name]["saved"] / settings[1]["once"]["saved"] for name in names}
    columns = ("rule", *(f"error at {radius}" for radius in radii), f"time at {radii[1]}", f"states kept at {radii[1]}")
    return lines, Table(
        "", columns, [(name, *(f"{e:.0e}" for e in errors[name]), costs[name][1], kept[name]) for name in names]
    )


def evaluations(data: Results) -> tuple[None, Table]:
    """Evaluations on the problems that ``fixpoint bench`` runs, beside torchdeq."""
    problems = data["evaluations"]
    names = list(next(iter(problems.values())))

    def median(counts: Sequence[float | None]) -> int | None:
        return None if None in counts else int(sorted(counts)[len(counts) // 2])  # type: ignore[type-var]

    return None, Table(
        "", ("problem", *names), [(p, *(median(found[name]) for name in names)) for p, found in problems.items()]
    )


def radius(data: Results) -> tuple[Lines, None]:
    """The error of backward rules on one cell, by its spectral radius."""
    settings, names = _cell(data, "transformer"), (*_RULES, "Reversible(steps=25)")
    errors = {name: [setting["rules"][name]["error"] for setting in settings] for name in names}
    radii = [setting["radius"] for setting in settings]
    title = "Error of gradients of the transformer block"
    return Lines(title, {n: (radii, e) for n, e in errors.items()}, "spectral radius", "relative error"), None


def tolerance(data: Results) -> tuple[Lines, None]:
    """The error of gradients against the tolerance of the forward solve."""
    found = data["error_by_forward_rtol"]
    curves = {name: (found["rtols"], errors) for name, errors in found["errors"]["tanh 0.90"].items()}
    title = "Error of gradients of the tanh cell"
    return Lines(title, curves, "rtol of the forward solve", "relative error", log_x=True), None


def accuracy(task: str, title: str) -> Callable[[Results], tuple[Lines, None]]:
    """What chart shows the test accuracy of a task against seconds of training, mean of the seeds."""

    def curves(data: Results) -> tuple[Lines, None]:
        rules = {name: rule["curves"] for name, rule in data["tasks"][task]["rules"].items()}
        del rules["Neumann(terms=3)"]  # the series of Phantom(steps=3) once more
        series = {
            name: tuple(zip(*map(_mean_point, zip(*seeds, strict=False)), strict=True)) for name, seeds in rules.items()
        }
        return Lines(title, series, "seconds of training", "test accuracy, mean", log_y=False), None

    return curves


def _mean_point(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    seconds, accuracies = zip(*points, strict=True)
    return sum(seconds) / len(points), sum(accuracies) / len(points)


def _geometric_mean(values: Iterable[float]) -> float:
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs))
