"""DEQ-DDIM's own experiments with inversion, at the scale of digits: Table 3 and Figures 3, 6, 16 and 17."""

from __future__ import annotations

import math
import statistics
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.inversion.cases import Setting, chain, held_out
from benchmarks.inversion.cells import Cell, Cells
from benchmarks.inversion.descents import descent
from benchmarks.inversion.methods import Method, attempt
from benchmarks.solvers.standings import Target
from fixpoint_diffusion import ParallelInverse, deq_ddim_inversion_settings

HOW_TO_READ = """\
Held-out digits, embedded U-Net, Adam, {epochs} epochs at ten times the paper's learning rate of 0.01, so that x_T may
go as far as in {reach} of its epochs. Losses are squared distances, sums over the 64 pixels. least loss: mean and
standard deviation over the digits (the paper: 100 images). No run is ended early. s: seconds of one processor for
all digits; a processor gains nothing from calls that could run side by side: rounds are what a parallel device waits
for. "baseline" is Algorithm 1, "paper" and "released code" are the presets, all from the same start but the last, which
starts from plain DDIM inversion; "ours, parallel" solves for the latents instead. Fewer digits where T is large.
"""
_RATE, _EPOCHS = 0.1, 20
_DIGITS = {10: 4, 20: 2, 50: 1}  # of chains of so many steps
_STEPS, _ETAS, _STOCHASTIC_STEPS = (10, 20, 50), (0.5, 1.0), (10,)
METHODS = ("baseline", "paper", "released code")


def measure(cells: Cells, quick: bool) -> Cell:
    """Every method at every T, and the paper's at every eta."""
    settings = [(Setting(steps), method) for steps in ((4,) if quick else _STEPS) for method in METHODS]
    settings += [
        (Setting(steps, eta=eta), "paper") for steps in ((4,) if quick else _STOCHASTIC_STEPS) for eta in _ETAS
    ]
    epochs = 3 if quick else _EPOCHS
    found: Cell = {}
    for setting, method in settings:
        digits = 1 if quick else _DIGITS[setting.steps]
        found[f"{setting.name}, {method}"] = _cell(
            cells, setting, method, partial(_descend, setting, method, digits, epochs)
        )
        if setting.eta == 0 and method == METHODS[-1]:
            found[f"{setting.name}, ours, parallel"] = _cell(
                cells, setting, "ours, parallel", partial(_solve, setting, digits)
            )
    return found


def _cell(cells: Cells, setting: Setting, method: str, compute: Any) -> Cell:
    return {"steps": setting.steps, "eta": setting.eta, **cells(f"{setting.name}, {method}", compute)}


def _descend(setting: Setting, method: str, digits: int, epochs: int) -> Cell:
    reading = "released-code" if method == "released code" else "paper"
    published = deq_ddim_inversion_settings(
        chain(setting, held_out(digits)[0]),
        reading,  # type: ignore[arg-type]
        baseline=method == "baseline",
    )
    return descent(published, setting, digits, epochs=epochs, rate=_RATE)


def _solve(setting: Setting, digits: int) -> Cell:
    images = held_out(digits)[0]
    cell = attempt(Method("", ParallelInverse(), ours=True), chain(setting, images), images, tolerance=1e-3)
    best = [math.inf if error is None else error**2 * images[0].numel() for error in cell["errors"]]
    return {**{what: cell[what] for what in ("rounds", "rows", "seconds")}, "best": best, "digits": digits}


def text(document: Cell) -> str:
    """Table 3, the lengths of chains (Figures 3 and 6), and the stochastic chains (Figures 16 and 17)."""
    epochs = next(len(cell["losses"]) for cell in document.values() if "losses" in cell)
    lines = [HOW_TO_READ.format(epochs=epochs, reach=10 * epochs)]
    for title, eta in (("Table 3, Figures 3 and 6", False), ("Figures 16 and 17", True)):
        lines.append(
            f"{title:32}{'digits':>8}"
            f"{'least loss':>18}{'rounds':>8}{'rows/digit':>12}{'products':>10}{'s':>8}  loss at epoch"
        )
        for name, cell in document.items():
            if (cell["eta"] > 0) != eta and not (eta and name.endswith("paper") and cell["steps"] in _STOCHASTIC_STEPS):
                continue
            losses = cell.get("losses", [])
            marks = sorted({0, len(losses) // 3, 2 * len(losses) // 3, len(losses) - 1}) if losses else []
            course = ", ".join(f"{mark}: {losses[mark]:.3g}" for mark in marks)
            lines.append(
                f"{name:32}{cell['digits']:>8}"
                f"{_mean(cell['best']):>18}{cell['rounds']:>8}{cell['rows'] / cell['digits']:>12.0f}"
                f"{cell.get('products', 0):>10}{cell['seconds']:>8.1f}  {course}"
            )
        lines.append("")
    return "\n".join(lines).rstrip()


def _mean(losses: list[float | None]) -> str:
    known = [math.inf if loss is None else loss for loss in losses]
    if not all(map(math.isfinite, known)):
        return "-"
    return f"{statistics.fmean(known):.2g} +- {statistics.pstdev(known):.1g}"


def targets(document: Cell) -> list[Target]:
    """The paper's finding, and ours beside it."""
    aims = []
    for steps in sorted({cell["steps"] for cell in document.values() if cell["eta"] == 0}):
        best = {m: document[f"T={steps}, {m}"] for m in (*METHODS, "ours, parallel")}
        mean = {m: statistics.fmean(math.inf if b is None else b for b in cell["best"]) for m, cell in best.items()}
        ours, rounds = best["ours, parallel"], best["paper"]["rounds"]
        aims.append(
            Target(
                f"T={steps}: the paper's preset ends below its baseline, as in Table 3",
                mean["paper"] < mean["baseline"],
                f"{mean['paper']:.2g} against {mean['baseline']:.2g}",
            )
        )
        aims.append(
            Target(
                f"T={steps}: ours, parallel, ends below all of them, in a tenth of the preset's rounds",
                mean["ours, parallel"] < min(mean[m] for m in METHODS) and ours["rounds"] <= rounds / 10,
                f"{mean['ours, parallel']:.1g}, {ours['rounds']} against {rounds} rounds",
            )
        )
    return aims


def plot(document: Cell, folder: Path) -> None:
    """Loss against epochs: the methods for each T (Figures 3 and 6), and the stochastic chains (Figure 16)."""
    sizes = sorted({cell["steps"] for cell in document.values() if cell["eta"] == 0})
    stochastic = sorted({cell["steps"] for cell in document.values() if cell["eta"] > 0})
    panels = [(f"T={steps}", [f"T={steps}, {method}" for method in METHODS]) for steps in sizes]
    for steps in stochastic:
        names = [f"{Setting(steps, eta=eta).name}, paper" for eta in (0.0, *_ETAS)]
        panels.append((f"T={steps}, stochastic", names))
    figure = Figure(figsize=(3.2 * len(panels), 3.6), layout="constrained")
    for axes, (title, names) in zip(
        figure.subplots(1, len(panels), squeeze=False, sharey=True)[0], panels, strict=True
    ):
        for index, name in enumerate(names):
            cell = document[name]
            label = name.split(", ", 1)[1] if "stochastic" not in title else f"eta={cell['eta']:g}"
            axes.plot(cell["losses"], color=f"C{index}", label=label)
            axes.fill_between(
                range(len(cell["losses"])), cell["least"], cell["most"], color=f"C{index}", alpha=0.12, lw=0
            )
        axes.set(title=title, yscale="log", xlabel="epoch")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=8)
    figure.axes[0].set_ylabel("loss: mean, and range of the digits")
    figure.savefig(folder / "inversion-descent.png", dpi=130)
