"""Is it the noise? Digits that the sampler has made are inverted, and the noise that they were made of is known."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from benchmarks.inversion.cases import Setting, chain, generated
from benchmarks.inversion.cells import Cell, Cells
from benchmarks.inversion.methods import Method, attempt, peers
from benchmarks.inversion.tables import WRONG, run_table
from benchmarks.solvers.standings import Target
from fixpoint_diffusion import ParallelInverse, StepwiseInverse

HOW_TO_READ = f"""\
Digits that the embedded U-Net has made by DDIM with T steps. error: RMS of the reconstruction, as in the first table.
noise: RMS of the noise that was found, minus the noise that the digit was made of; median/worst.
wrong: share of digits whose image comes back within the tolerance (1e-3; 1e-6 in float64) from another noise, off by
more than {WRONG:g}.
"""
# Digits, and iterations of the peers; T = 1000 with the two that take the fewest rounds.
_SIZES = {10: (16, 10), 20: (16, 10), 50: (16, 5), 100: (4, 5), 1000: (1, 0)}
_TOLERANCE, _FINEST = 1e-3, 1e-6
_DOUBLE = (10, 50)
_DOUBLE_DIGITS = 2
_PEERS = ("AIDI plain", "AIDI Anderson", "ReNoise", "GNRI sign step", "forward steps")
_DEAR_FROM, _ALSO_THERE = 50, "AIDI Anderson"  # the one of them that goes on where steps are many


def measure(cells: Cells, quick: bool) -> Cell:
    """Every method at every T."""
    found: Cell = {}
    for steps, (digits, iterations) in {4: (2, 2)}.items() if quick else _SIZES.items():
        for name, method, dtype in _methods(steps, iterations):
            count = min(digits, _DOUBLE_DIGITS) if dtype == torch.float64 else digits
            full = f"T={steps}, {name}"
            found[full] = {"steps": steps, **cells(full, _attempt(method, Setting(steps), count, dtype))}
    return found


def _methods(steps: int, iterations: int) -> Iterator[tuple[str, Method, torch.dtype]]:
    single, double = torch.float32, torch.float64
    yield "ours, parallel", Method("", ParallelInverse(), ours=True), single
    if steps in _DOUBLE:
        yield "ours, parallel, float64", Method("", ParallelInverse(max_rounds=60), ours=True), double
    if iterations:
        yield "ours, stepwise", Method("", StepwiseInverse(), ours=True), single
    for method in [*peers(1), *(peers(iterations) if iterations else ())]:
        if method.name.startswith(("DDIM", _ALSO_THERE) if steps >= _DEAR_FROM else ("DDIM", *_PEERS)):
            yield method.name, method, single


def _attempt(method: Method, setting: Setting, count: int, dtype: torch.dtype) -> Any:
    def run() -> Cell:
        images, x_T = generated(setting, count, dtype)
        tolerance = _FINEST if dtype == torch.float64 else _TOLERANCE
        return attempt(method, chain(setting, images), images, tolerance=tolerance, x_T=x_T)

    return run


def text(document: Cell) -> str:
    """A block for each T."""
    lines = [HOW_TO_READ]
    for steps in sorted({cell["steps"] for cell in document.values()}):
        runs = {name.split(", ", 1)[1]: cell for name, cell in document.items() if cell["steps"] == steps}
        digits = sorted({len(cell["errors"]) for cell in runs.values()}, reverse=True)
        lines += [f"T={steps}, {' or '.join(map(str, digits))} digits", *run_table(runs), ""]
    return "\n".join(lines).rstrip()


def targets(document: Cell) -> list[Target]:
    """None is promised of the noise: at few steps it is not determined."""
    return []


def plot(document: Cell, folder: Path) -> None:
    """Every digit: error of the noise against error of the image."""
    sizes = sorted({cell["steps"] for cell in document.values()})
    figure = Figure(figsize=(3 * len(sizes) + 2, 3.6), layout="constrained")
    names = list(dict.fromkeys(name.split(", ", 1)[1] for name in document))
    for axes, steps in zip(figure.subplots(1, len(sizes), squeeze=False, sharey=True)[0], sizes, strict=True):
        for index, name in enumerate(names):
            cell = document.get(f"T={steps}, {name}", {"errors": [], "latents": []})
            points = [each for each in zip(cell["errors"], cell["latents"], strict=True) if None not in each]
            axes.plot(*(zip(*points, strict=True) if points else ([], [])), "o", ms=3, color=f"C{index}", label=name)
        axes.axhline(WRONG, color="grey", lw=0.8)
        axes.set(title=f"T={steps}", xscale="log", yscale="log", xlabel="error of the image")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("error of the noise")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=8)
    figure.savefig(folder / "inversion-latents.png", dpi=130)
