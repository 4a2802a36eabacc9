"""Chains that add noise: given noise, which must be inverted with, and free noise, which may be solved for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from benchmarks.chains.cases import SHAPE
from benchmarks.inversion.cases import Setting, chain, held_out
from benchmarks.inversion.cells import Cell, Cells
from benchmarks.inversion.methods import Method, attempt, peers, truthful
from benchmarks.inversion.tables import run_table
from benchmarks.solvers.standings import Target
from fixpoint_diffusion import DrawnInverse, ParallelInverse, StepwiseInverse, step_noise

HOW_TO_READ = """\
Held-out real digits, DDIM chains that add noise, each digit with the noise of three seeds; embedded U-Net, and for
T=1000 the exact denoiser of a mixture of ten Gaussians, told the digit's class. All but one method are given the noise;
"ours, drawn" draws a trajectory and solves for its noise.
"""
_TOLERANCE = 1e-3
_ETAS, _SEEDS = (0.5, 1.0), (0, 1, 2)
_SIZES = {("unet", 10): 4, ("unet", 20): 2, ("unet", 50): 1, ("unet", 100): 1, ("mixture", 1000): 2}
METHODS = (
    Method("ours, parallel", ParallelInverse(), ours=True),
    Method("ours, stepwise", StepwiseInverse(), ours=True),
    Method("ours, drawn", DrawnInverse(), ours=True),
    *peers(1),
    *(each for each in peers(5) if each.name.startswith(("AIDI plain", "AIDI Anderson"))),
)


def measure(cells: Cells, quick: bool) -> Cell:
    """Every method, eta and T."""
    found: Cell = {}
    for (model, steps), digits in {("unet", 4): 1}.items() if quick else _SIZES.items():
        for eta in _ETAS:
            setting = Setting(steps, eta=eta, model=model)
            for method in METHODS:
                name = f"{setting.name}, {method.name}"
                found[name] = {"setting": setting.name, **cells(name, _attempt(method, setting, digits))}
    return found


def _attempt(method: Method, setting: Setting, count: int) -> Any:
    def run() -> Cell:
        images, labels = (each.repeat(len(_SEEDS), *[1] * (each.ndim - 1)) for each in held_out(count))
        noise = torch.cat([step_noise(seed, range(count), range(setting.steps), SHAPE) for seed in _SEEDS])
        return attempt(method, chain(setting, images, labels, noise=noise), images, tolerance=_TOLERANCE)

    return run


def text(document: Cell) -> str:
    """A block for each chain."""
    lines = [HOW_TO_READ]
    for setting in dict.fromkeys(cell["setting"] for cell in document.values()):
        runs = {name.removeprefix(f"{setting}, "): c for name, c in document.items() if c["setting"] == setting}
        samples = len(next(iter(runs.values()))["errors"])
        lines += [f"{setting}, {samples // len(_SEEDS)} digits, {len(_SEEDS)} seeds each", *run_table(runs), ""]
    return "\n".join(lines).rstrip()


def targets(document: Cell) -> list[Target]:
    """Ours says the truth, and what is exact by construction is exact."""
    ours = [cell for name, cell in document.items() if ", ours" in name]
    true = sum(truthful(cell, _TOLERANCE) == 1 for cell in ours)
    drawn = [each for name, cell in document.items() if name.endswith("ours, drawn") for each in cell["errors"]]
    reached = sum(error is not None and error <= _TOLERANCE for error in drawn)
    return [
        Target("ours: every claim is true", true == len(ours), f"{true} of {len(ours)}"),
        Target("drawn: every digit within 1e-3", reached == len(drawn), f"{reached} of {len(drawn)}"),
    ]


def plot(document: Cell, folder: Path) -> None:
    """Nothing: the table says it."""
