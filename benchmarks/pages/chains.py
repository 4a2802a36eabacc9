"""Sampling chains in parallel: one chart and one table from the results of each question."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fixpoint.bench import Bars, Lines, Table

Results = Mapping[str, Any]


def rounds(data: Results) -> tuple[Lines, Table]:
    """The error of x_0 after every round, and the rounds to an error of 1e-3, on the embedded U-Net."""
    names = (
        "ours, full window",
        "ours, 1 probe",
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


def _first(curve: Mapping[str, Sequence[float]], what: str) -> float:
    """Rounds, rows or seconds until the error is at most 1e-3 for good; infinity if it never is."""
    above = [k for k, error in enumerate(curve["errors"]) if not error <= 1e-3]
    place = above[-1] + 1 if above else 0
    return curve[what][place] if place < len(curve["errors"]) else math.inf
