"""Guidance: steps fold the more, the stronger it is. Who still gets back, and who knows when not?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.inversion.cases import Setting, chain, held_out
from benchmarks.inversion.cells import Cell, Cells, spread
from benchmarks.inversion.methods import Method, attempt, peers, truthful
from benchmarks.inversion.tables import run_table
from benchmarks.solvers.standings import Target
from fixpoint_diffusion import ParallelInverse, StepwiseInverse

HOW_TO_READ = """\
Held-out real digits, DDIM with T steps, guided towards the digit's class by a scale; 1 is no guidance. The package has
no conditional network, so the direction towards a class is that of a mixture of ten Gaussians, one a digit. "mixture":
it is the denoiser too; otherwise the embedded U-Net is.
error: RMS of the reconstruction with the same guidance. claims: share of digits for which the method's own claim to be
within 1e-3 is true. Ours, parallel, undoes the steps of what it has not inverted one by one: rounds count both.
"""
_TOLERANCE = 1e-3
_SCALES = (1.0, 3.0, 7.5)
_MIXTURE, _UNET = (10, 20, 50, 100, 1000), (10, 20)
_DIGITS = {"mixture": 64, "unet": 4}
_DEAR = ("ReNoise", "AIDI plain", "forward steps")  # left out where the denoiser is the U-Net, or T is 1000
_MANY_STEPS, _FEW_DIGITS = 1000, 8
METHODS = (
    Method("ours, parallel", ParallelInverse(), ours=True),
    Method("ours, stepwise", StepwiseInverse(), ours=True),
    *peers(1),
    *(each for each in peers(10) if each.name.startswith(("AIDI plain", "AIDI Anderson", "ReNoise"))),
    *(each for each in peers(20) if each.name.startswith("forward")),
)


def measure(cells: Cells, quick: bool) -> Cell:
    """Every method, scale, T and denoiser."""
    sizes = {"mixture": (4,)} if quick else {"mixture": _MIXTURE, "unet": _UNET}
    settings = [
        Setting(steps, guidance=scale, model=model)
        for model, chosen in sizes.items()
        for steps in chosen
        for scale in _SCALES
    ]
    found: Cell = {}
    for setting in settings:
        for method in METHODS:
            if (setting.model == "unet" or setting.steps >= _MANY_STEPS) and method.name.startswith(_DEAR):
                continue
            name = f"{setting.name}, {method.name}"
            about = {"setting": setting.name, "steps": setting.steps, "guidance": setting.guidance}
            count = 2 if quick else _FEW_DIGITS if setting.steps >= _MANY_STEPS else _DIGITS[setting.model]
            found[name] = {**about, "model": setting.model, **cells(name, _attempt(method, setting, count))}
    return found


def _attempt(method: Method, setting: Setting, count: int) -> Any:
    def run() -> Cell:
        images, labels = held_out(count)
        return attempt(method, chain(setting, images, labels), images, tolerance=_TOLERANCE)

    return run


def text(document: Cell) -> str:
    """A block for each chain."""
    lines = [HOW_TO_READ]
    for setting in dict.fromkeys(cell["setting"] for cell in document.values()):
        runs = {name.removeprefix(f"{setting}, "): c for name, c in document.items() if c["setting"] == setting}
        digits = len(next(iter(runs.values()))["errors"])
        lines += [f"{setting}, {digits} digits", *run_table(runs), ""]
    return "\n".join(lines).rstrip()


def targets(document: Cell) -> list[Target]:
    """Ours says the truth everywhere, and is nowhere worse than the best peer."""
    ours = {name: cell for name, cell in document.items() if ", ours" in name}
    shares = [truthful(cell, _TOLERANCE) for cell in ours.values()]
    aims = [
        Target("ours: every claim is true", min(shares) == 1, f"{sum(share == 1 for share in shares)} of {len(shares)}")
    ]
    behind, chains = [], dict.fromkeys(cell["setting"] for cell in document.values())
    for setting in chains:
        worst = {n: spread(c["errors"])[1] for n, c in document.items() if c["setting"] == setting}
        mine = worst.pop(f"{setting}, ours, parallel")
        best = min((error, name) for name, error in worst.items() if ", ours" not in name)
        if mine > max(_TOLERANCE, best[0]):
            behind.append(f"{setting}: worst error {mine:.0e} against {best[0]:.0e} ({best[1].split(', ', 1)[1]})")
    aims.append(
        Target(
            "ours, parallel: the worst digit is within 1e-3, or no peer's is better",
            not behind,
            f"{len(chains) - len(behind)} of {len(chains)} chains",
            tuple(behind),
        )
    )
    return aims


def plot(document: Cell, folder: Path) -> None:
    """Share of digits that came back to within 1e-3, against T; a panel for each scale, for the mixture."""
    chosen = {name: cell for name, cell in document.items() if cell["model"] == "mixture"}
    scales = sorted({cell["guidance"] for cell in chosen.values()})
    figure = Figure(figsize=(3.4 * len(scales) + 2, 3.4), layout="constrained")
    for axes, scale in zip(figure.subplots(1, len(scales), squeeze=False, sharey=True)[0], scales, strict=True):
        for index, method in enumerate(METHODS):
            cells = [c for n, c in chosen.items() if c["guidance"] == scale and n.endswith(f", {method.name}")]
            shares = [sum(e is not None and e <= _TOLERANCE for e in c["errors"]) / len(c["errors"]) for c in cells]
            style = "-" if method.ours else "--"
            axes.plot([c["steps"] for c in cells], shares, f"{style}o", ms=3, color=f"C{index}", label=method.name)
        axes.set(title=f"guidance {scale:g}", xscale="log", xlabel="T", ylim=(-0.03, 1.03))
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("digits back within 1e-3")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=8)
    figure.savefig(folder / "inversion-guidance.png", dpi=130)
