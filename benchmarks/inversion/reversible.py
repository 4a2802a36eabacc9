"""Samplers that are made to be inverted: they are not DDIM, so they stand apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.inversion.cases import Setting, chain, held_out, network
from benchmarks.inversion.cells import Cell, Cells, pair, spread
from benchmarks.inversion.methods import rms, sampled
from benchmarks.peers import BDIA, EDICT, CoupledSampler, Rex
from benchmarks.solvers.standings import Target
from fixpoint_diffusion import DDIMChain, initial_noise
from fixpoint_diffusion.chains import ReversibleChain

HOW_TO_READ = """\
Samplers that can be run backwards exactly, embedded U-Net, the same timesteps; a pair of latents, kept in float32,
stands for an image. calls: one after another, to find the pair.
image: RMS of what comes back of a held-out real digit. noise: RMS of the noise that is found for a digit of the
sampler's own, of which only the image is kept. spread: RMS of the noise found for real digits, which should be near 1.
from DDIM: RMS between its digits and DDIM's, from the same noise. Medians and worst.
"""
_STEPS, _DIGITS = (10, 20, 50, 100), 8
SAMPLERS: dict[str, CoupledSampler | None] = {"EDICT": EDICT(), "BDIA": BDIA(), "O-BELM (ours)": None, "Rex": Rex()}


def measure(cells: Cells, quick: bool) -> Cell:
    """Every sampler at every T."""
    found: Cell = {}
    for steps in (4,) if quick else _STEPS:
        for name, sampler in SAMPLERS.items():
            full = f"T={steps}, {name}"
            found[full] = {"steps": steps, **cells(full, _attempt(sampler, steps, 2 if quick else _DIGITS))}
    return found


def _attempt(sampler: CoupledSampler | None, steps: int, count: int) -> Any:
    @torch.no_grad()
    def run() -> Cell:
        images, x_T = held_out(count)[0], initial_noise(0, range(count), held_out(1)[0].shape[1:])
        ddim = chain(Setting(steps), images)
        whole = _BELM(ddim) if sampler is None else _Coupled(ddim, sampler)
        there = whole.backward(images)
        calls = whole.calls
        made = whole.forward(whole.start(x_T))
        return {
            "images": rms(whole.forward(there) - images).tolist(),
            "spread": rms(there[:, 0]).tolist(),
            "latents": rms(whole.backward(made)[:, 0] - x_T).tolist(),
            "from_ddim": rms(made - sampled(ddim, x_T)).tolist(),
            "calls": calls,
        }

    return run


class _Coupled:
    """A sampler of pairs ``(B, 2, *shape)`` in float32, the first of them at the noise end being x_T."""

    def __init__(self, chain: DDIMChain, sampler: CoupledSampler) -> None:
        self._chain, self._sampler = chain, sampler

    @property
    def calls(self) -> int:
        return self._chain.rounds

    def start(self, x_T: Tensor) -> Tensor:
        pair = self._sampler.start(self._chain, x_T)
        return self._kept(tuple(reversed(pair)) if isinstance(self._sampler, BDIA) else pair)

    def forward(self, kept: Tensor) -> Tensor:
        pair = kept.double().unbind(1)
        # BDIA goes on from the later of its two latents.
        pair = (pair[1], pair[0]) if isinstance(self._sampler, BDIA) else (pair[0], pair[1])
        return self._sampler.forward(self._chain, pair)[0].to(kept.dtype)

    def backward(self, images: Tensor) -> Tensor:
        return self._kept(self._sampler.backward(self._chain, self._sampler.end(self._chain, images)))

    def _kept(self, pair: tuple[Tensor, ...]) -> Tensor:
        return torch.stack(pair, dim=1).to(self._chain.x_T.dtype)


class _BELM:
    """The same for the package's reversible chain."""

    def __init__(self, ddim: DDIMChain) -> None:
        self._options: dict[str, Any] = {"schedule": ddim.schedule, "timesteps": ddim.timesteps}
        self.calls = 0

    def start(self, x_T: Tensor) -> Tensor:
        return ReversibleChain(network(), x_T, **self._options).start

    def forward(self, kept: Tensor) -> Tensor:
        return ReversibleChain(network(), kept, pair=True, **self._options).sequential()[:, -1, 1]

    def backward(self, images: Tensor) -> Tensor:
        chain = ReversibleChain(network(), images, **self._options)
        found = chain.invert(images)
        self.calls = chain.ddim.rounds
        return found


def text(document: Cell) -> str:
    """A line for each sampler and T."""
    lines = [HOW_TO_READ, f"{'':24}{'calls':>8}{'image':>17}{'noise':>17}{'spread':>17}{'from DDIM':>17}"]
    for name, cell in document.items():
        figures = [f"{pair(spread(cell[what])):>17}" for what in ("images", "latents", "spread", "from_ddim")]
        lines.append(f"{name:24}{cell['calls']:>8}" + "".join(figures))
    return "\n".join(lines)


def targets(document: Cell) -> list[Target]:
    """The package's own comes back to rounding."""
    errors = [each for name, cell in document.items() if name.endswith("(ours)") for each in cell["images"]]
    median, worst = spread(errors)
    return [Target("O-BELM: images come back to 1e-4", worst <= 1e-4, f"median {median:.0e}, worst {worst:.0e}")]


def plot(document: Cell, folder: Path) -> None:
    """Nothing: the table says it."""
