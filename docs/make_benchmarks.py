"""Draw the charts and write the tables of the pages on benchmarks: ``python docs/make_benchmarks.py``.

Nothing is measured here: each question has a chart and a table from one JSON file of ``benchmarks/results``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fixpoint.bench import Bars, Lines, Table
from fixpoint.bench.pictures import draw_bars, draw_lines
from fixpoint.bench.results import shown

DOCS = Path(__file__).parent
RESULTS = DOCS.parent / "benchmarks" / "results"
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
    sizes, names = data["sizes"], list(data["sizes"][0]["contestants"])
    numbers = [size["size"]["rows"] * size["size"]["dim"] for size in sizes]
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


def gradients(data: Results) -> tuple[Lines, Table]:
    """Error and time of backward rules on one cell, from a map that contracts well to one that hardly does."""
    settings = [setting for setting in data["settings"] if setting["cell"] == "tanh"]
    names = (
        "IFT()",
        "SHINE(refine=5)",
        "Phantom(steps=5)",
        "JFB()",
        "Unroll()",
        "torchdeq ift",
        "torchdeq phantom, grad=5",
    )

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


def rounds(data: Results) -> tuple[Lines, Table]:
    """The error of x_0 after every round, and the rounds to an error of 1e-3, on the embedded U-Net."""
    names = (
        "ours, full window",
        "ours, window 100",
        "Picard",
        "Anderson, per sample",
        "ParaTAA k=T m=5",
        "ParaDiGMS",
        "quasi-DEER, 1 probe",
        "SRDS",
    )
    found = {(o["steps"], o["eta"], o["method"]): o["curves"] for o in data["outcomes"] if o["denoiser"] == "unet"}
    # Methods that report late show their start as round 0, which an axis of powers has no place for.
    curves = {
        name: tuple(zip(*((k, e) for k, e in zip(curve["rounds"], curve["errors"], strict=True) if k), strict=True))
        for name in names
        for curve in found[1000, 0.0, name][:1]
    }
    lines = Lines(
        "Error of x_0, T = 1000, first sample",
        curves,
        "rounds",
        "relative error of x_0",
        log_x=True,
        marks={"one step after another": 1000},
    )

    def median(name: str, steps: int, eta: float, what: str) -> float | None:
        curves = found.get((steps, eta, name), [])
        figures = sorted(_first(curve, what) for curve in curves)
        middle = figures[len(figures) // 2] if figures else math.inf
        return middle if math.isfinite(middle) else None

    chains = ((25, 0.0), (100, 0.0), (1000, 0.0), (1000, 1.0))
    rows = []
    for name in names:
        counts = [median(name, *chain, "rounds") for chain in chains]
        spent = median(name, 1000, 0.0, "rows")
        rows.append(
            (
                name,
                *(count and int(count) for count in counts),
                spent and spent / 1000,
                median(name, 1000, 0.0, "seconds"),
            )
        )
    heads = [f"T={steps}" + (f", eta={eta:g}" if eta else "") for steps, eta in chains]
    return lines, Table("", ("method", *heads, "rows / T, T=1000", "seconds, T=1000"), rows)


def speed(data: Results) -> tuple[Bars, Table]:
    """Seconds and memory of a thousand steps."""
    labels = {
        "sequential": "one step after another",
        "ours": "ours",
        "ours, window 100": "ours, window 100",
        "ours, full window": "ours, full window",
    }
    bars = Bars(
        f"One sample of {data['steps']} steps",
        {label: data["seconds"]["1"][name] for name, label in labels.items()},
        "seconds",
        reference="one step after another",
    )
    rows = [
        (label, data["seconds"]["1"][name], data["seconds"]["16"][name], data["peak_mib"].get(name))
        for name, label in labels.items()
    ]
    rows += [(name, None, None, mib) for name, mib in data["peak_mib"].items() if name not in labels]
    return bars, Table("", ("method", "seconds, one sample", "seconds, 16 samples", "peak memory, MiB"), rows)


def quality(data: Results) -> tuple[Lines, Table]:
    """Time for an image against its quality."""
    samplers = {s["name"]: s for s in data["samplers"]}
    series: dict[str, tuple[list[float], list[float]]] = {}
    for name, sampler in samplers.items():
        family = "DDIM, ours" if name.endswith("ours") else name.partition(" T=")[0].split()[0]
        # The image is the same, however its chain is solved.
        distance = sampler["distance"] or samplers[name.removesuffix(", ours")]["distance"]
        x, y = series.setdefault(family, ([], []))
        x.append(sampler["alone"])
        y.append(distance)
    lines = Lines("Quality against time", series, "seconds for one image", "Fréchet distance", log_y=False, log_x=True)
    chosen = (
        "DDIM T=100",
        "DDIM T=100, ours",
        "DDIM T=1000",
        "DDIM T=1000, ours",
        "DPM-Solver++ 20 steps",
        "UniPC 20 steps",
    )
    rows = [
        (
            name,
            samplers[name]["distance"],
            *(s and 1e3 * s for s in (samplers[name]["alone"], samplers[name]["batched"])),
        )
        for name in chosen
    ]
    return lines, Table("", ("sampler", "distance", "ms for one image", "ms for one of a batch"), rows)


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
    settings = [setting for setting in data["settings"] if setting["cell"] == "transformer"]
    names = (
        "IFT()",
        "SHINE(refine=5)",
        "Phantom(steps=5)",
        "JFB()",
        "Reversible(steps=25)",
        "Unroll()",
        "torchdeq ift",
    )
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


def _first(curve: Mapping[str, Sequence[float]], what: str) -> float:
    """Rounds, rows or seconds until the error is at most 1e-3 for good; infinity if it never is."""
    above = [k for k, error in enumerate(curve["errors"]) if not error <= 1e-3]
    place = above[-1] + 1 if above else 0
    return curve[what][place] if place < len(curve["errors"]) else math.inf


def _geometric_mean(values: Iterable[float]) -> float:
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs))


Made = tuple[Lines | Bars | None, Table | None]
# By the name of the picture and the table: what makes them, and the results that they are made from.
PAGES: dict[str, tuple[Callable[[Results], Made], str]] = {
    "solvers": (solvers, "solvers.json"),
    "evaluations": (evaluations, "evaluations.json"),
    "overhead": (overhead, "overhead.json"),
    "gradients": (gradients, "gradients.json"),
    "chain-rounds": (rounds, "chains-rounds.json"),
    "chain-speed": (speed, "chains-speed.json"),
    "chain-quality": (quality, "chains-quality.json"),
    "gradient-radius": (radius, "gradients.json"),
    "gradient-tolerance": (tolerance, "gradients.json"),
    "training-digits": (accuracy("digits", "Handwritten digits"), "training.json"),
    "training-sums": (accuracy("sums", "Sums of two numbers of six digits"), "training.json"),
}


def markdown(table: Table) -> str:
    """A table as these pages write it; numbers to the right."""
    rule = ["---:" if numeric else "---" for numeric in table.numeric]
    lines = [table.columns, rule, *([shown(cell) for cell in row] for row in table.rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def make(name: str) -> tuple[Lines | Bars | None, str]:
    """The chart of that name, if there is one, and the table, empty if there is none."""
    build, source = PAGES[name]
    chart, table = build(json.loads((RESULTS / source).read_text(encoding="utf-8")))
    return chart, "" if table is None else markdown(table)


def main() -> None:
    (DOCS / "tables").mkdir(exist_ok=True)
    for name in PAGES:
        chart, table = make(name)
        if table:
            (DOCS / "tables" / f"{name}.md").write_text(table, encoding="utf-8")
        path = DOCS / "images" / f"benchmark-{name}.png"
        if isinstance(chart, Lines):
            draw_lines(chart, path)
        elif isinstance(chart, Bars):
            draw_bars(chart, path)


if __name__ == "__main__":
    main()
