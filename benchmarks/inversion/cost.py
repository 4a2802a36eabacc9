"""Seconds and bytes of an inversion to 1e-3, one digit and a few."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from benchmarks.inversion.cases import Setting, chain, held_out
from benchmarks.inversion.cells import Cell, Cells, pair, spread
from benchmarks.inversion.methods import Method, attempt, peers
from benchmarks.solvers.standings import Target
from fixpoint.memory import LiveBytes
from fixpoint_diffusion import ParallelInverse, StepwiseInverse

HOW_TO_READ = """\
Held-out digits, embedded U-Net, DDIM with T steps. s: seconds of one processor. MiB: the most
that tensors held at once, the network's own among them, weights not; up to 256 rows go through the network at a time.
"""
_TOLERANCE = 1e-3
_STEPS, _COUNTS = (50,), (1, 8)
METHODS = (
    Method("ours, parallel", ParallelInverse(), ours=True),
    Method("ours, stepwise", StepwiseInverse(), ours=True),
    *peers(1),
    *(each for each in peers(5) if each.name.startswith("AIDI Anderson")),  # the peer that gets there soonest
)


def measure(cells: Cells, quick: bool) -> Cell:
    """Every method, T and number of digits."""
    found: Cell = {}
    for steps in (4,) if quick else _STEPS:
        for count in (1,) if quick else _COUNTS:
            for method in METHODS:
                name = f"T={steps}, {count} digits, {method.name}"
                run = partial(_cost, method, Setting(steps), count)
                found[name] = {"steps": steps, "digits": count, "method": method.name, **cells(name, run)}
    return found


def _cost(method: Method, setting: Setting, count: int) -> Cell:
    images = held_out(count)[0]
    cell = attempt(method, chain(setting, images), images, tolerance=_TOLERANCE)
    with LiveBytes() as live:
        attempt(method, chain(setting, images), images, tolerance=_TOLERANCE)
    return {**cell, "bytes": live.peak}


def text(document: Cell) -> str:
    """A block for each T and number of digits."""
    lines = [HOW_TO_READ]
    for steps, count in dict.fromkeys((cell["steps"], cell["digits"]) for cell in document.values()):
        head = f"T={steps}, {count} digit{'s' * (count > 1)}"
        lines.append(f"{head:24}{'error':>17}{'rounds':>8}{'rows':>8}{'s':>8}{'MiB':>8}")
        lines += [
            f"{cell['method']:24}{pair(spread(cell['errors'])):>17}{cell['rounds']:>8}{cell['rows']:>8}"
            f"{cell['seconds']:>8.2f}{cell['bytes'] / 2**20:>8.1f}"
            for cell in document.values()
            if (cell["steps"], cell["digits"]) == (steps, count)
        ]
        lines.append("")
    return "\n".join(lines).rstrip()


def targets(document: Cell) -> list[Target]:
    """None: on a processor rows count, and rounds on a device that few rows leave idle."""
    return []


def plot(document: Cell, folder: Path) -> None:
    """Nothing: the table says it."""
