"""Part 3: chains solved in parallel beside the ordinary sampler, which is compiled and in a CUDA graph.

Random networks cost what trained ones cost, but how many rounds a chain needs depends on what was learnt. So one
network is trained on the spot, and the bundled digits model takes part.
"""

from __future__ import annotations

import copy
import time
import warnings
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.device.common import DTYPES, Part
from benchmarks.device.graphs import Sequential, backend, capture
from benchmarks.device.networks import TRAINING_SECONDS, as_denoiser, trained, transformer, unet
from fixpoint import CausalQuasiNewton
from fixpoint_diffusion import (
    DDIMChain,
    NoiseSchedule,
    SamplingChain,
    StochasticDDIMChain,
    embedded,
    initial_noise,
    sample,
)
from fixpoint_diffusion.denoisers import NetworkDenoiser

RTOL = 1e-3
BUDGETS = (64, 256)  # rows a round, tried beside the default on the long chain
_COMPILING = 60.0  # seconds that must be left before a network is compiled
_LONGEST = 0.25  # share of what is left that one sampler may take
_WARM = 20  # steps by which a step is timed


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One network in one precision on chains of one length, some samples at a time."""

    network: str
    dtype: str
    steps: int
    batch: int
    eta: float
    max_rows: int | None = None
    probes: int = 0

    def __str__(self) -> str:
        options = "".join(f", {name}={getattr(self, name)}" for name in ("max_rows", "probes") if getattr(self, name))
        return f"{self.network} {self.dtype} T={self.steps} batch={self.batch} eta={self.eta:g}{options}"


NETWORKS = ("trained", "transformer", "digits", "unet")


def cells(rehearse: bool) -> list[Cell]:
    """In order of worth: one sample before eight, bfloat16 before float32, long before short; variants come last."""
    if rehearse:
        some = [Cell(network=name, dtype="float32", steps=6, batch=1, eta=0.0) for name in NETWORKS]
        some += [Cell(network="transformer", dtype=d, steps=6, batch=2, eta=e) for d, e in product(DTYPES, (0.0, 1.0))]
        some.append(Cell(network="transformer", dtype="float32", steps=6, batch=1, eta=0.0, probes=1))
        return [cell for cell in some if cell.dtype in ("bfloat16", "float32")]
    found = [
        Cell(network=network, dtype=dtype, steps=steps, batch=batch, eta=eta, max_rows=rows, probes=probes)
        for batch, dtype, eta in product((1, 8), ("bfloat16", "float32"), (0.0, 1.0))
        for steps in (1000, 100, 25)
        for network in NETWORKS
        for rows, probes in [
            (None, 0),
            *([(None, 1)] if (batch, eta) == (1, 0.0) else []),
            *([(rows, 0) for rows in BUDGETS] if (steps, batch, eta) == (1000, 1, 0.0) else []),
        ]
    ]
    return sorted(found, key=lambda cell: cell.max_rows is not None or cell.probes > 0)


class Networks:
    """Denoisers by name and precision, made when they are first asked for; None for what cannot be had."""

    def __init__(self, part: Part) -> None:
        self._part = part
        self._made: dict[str, nn.Module] = {}
        self._denoisers: dict[tuple[str, str], NetworkDenoiser | None] = {}
        self._compiled: dict[tuple[str, str], Any] = {}
        self._diffusers = part.has("diffusers")

    def denoiser(self, name: str, dtype: str) -> NetworkDenoiser | None:
        """None where it cannot be had, which has been said."""
        if (name, dtype) not in self._denoisers:
            self._denoisers[name, dtype] = None  # what fails is not tried again
            self._denoisers[name, dtype] = self._denoiser(name, dtype)
        return self._denoisers[name, dtype]

    def _denoiser(self, name: str, dtype: str) -> NetworkDenoiser | None:
        if name in ("digits", "unet") and not self._diffusers:
            return None
        if name == "digits":
            return embedded("ddpm-digits", dtype=DTYPES[dtype], device=self._part.device)
        if name not in self._made:
            self._made[name] = self._make(name)
        return as_denoiser(self._part, copy.deepcopy(self._made[name]), DTYPES[dtype])

    def _make(self, name: str) -> nn.Module:
        tiny = self._part.rehearse
        if name == "trained":
            network = unet(tiny) if self._diffusers else transformer(tiny, size="S/2")
            with torch.enable_grad():
                network, figures = trained(self._part, network, min(TRAINING_SECONDS, 0.35 * self._part.left))
            self._part.add("training", network=type(network).__name__, **figures)
            return network
        return unet(tiny) if name == "unet" else transformer(tiny)

    def compiled(self, cell: Cell, denoiser: NetworkDenoiser) -> NetworkDenoiser:
        """The same weights, compiled: a transformer's blocks once for all of them, another network whole."""
        key = (cell.network, cell.dtype)
        if key not in self._compiled:
            weights = {id(parameter): parameter for parameter in denoiser.model.parameters()}
            model = copy.deepcopy(denoiser.model, weights)
            for module in getattr(model, "blocks", [model]):
                module.compile(backend=backend(self._part), dynamic=False)
            self._compiled[key] = copy.copy(denoiser)
            self._compiled[key].model = model
        return self._compiled[key]


def main(part: Part) -> None:
    """Every cell that time allows."""
    torch._dynamo.config.recompile_limit = 64
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        networks = Networks(part)
        for cell in cells(part.rehearse):
            if part.left < 5:
                part.leave_out(str(cell), "no time left")
                continue
            with part.attempt(str(cell)):
                denoiser = networks.denoiser(cell.network, cell.dtype)
                if denoiser is not None:
                    measure(part, cell, denoiser, networks)


def chain_of(cell: Cell, denoiser: NetworkDenoiser, device: str) -> SamplingChain:
    """Latents are float32: only the network runs in its own precision."""
    assert denoiser.sample_shape is not None
    x_T = initial_noise(0, range(cell.batch), denoiser.sample_shape, device=device)
    config = denoiser.schedule_config
    schedule = NoiseSchedule.from_diffusers(config) if config else NoiseSchedule.linear()
    if cell.eta:
        return StochasticDDIMChain(denoiser, x_T, schedule, steps=cell.steps, eta=cell.eta)
    return DDIMChain(denoiser, x_T, schedule, steps=cell.steps)


def measure(part: Part, cell: Cell, denoiser: NetworkDenoiser, networks: Networks) -> None:
    """Seconds of both samplers, and what ours needed for them."""
    chain = chain_of(cell, denoiser, part.device)
    timed = ordinary(part, Sequential(chain, denoiser, capture(part)))
    if timed is None:
        part.leave_out(str(cell), "the ordinary sampler alone would take too long")
        return
    reference, graphed = timed
    compiled, rounding, compiling = None, None, None
    if part.left > _COMPILING if not part.rehearse else (cell.network, cell.batch) == ("transformer", 1):
        with part.attempt(f"compiling {cell}"):
            start = time.monotonic()
            fast = Sequential(chain, networks.compiled(cell, denoiser), capture(part))
            compiling = time.monotonic() - start
            if (again := ordinary(part, fast)) is not None:
                compiled, rounding = again[1], _error(again[0], reference)
    baseline = min(graphed, compiled or graphed)
    solver = CausalQuasiNewton(max_rows=cell.max_rows, probes=cell.probes)
    end = time.monotonic() + _LONGEST * max(part.left, 1)

    def sweep(**options: Any) -> Any:
        return sample(chain, solver=solver, rtol=RTOL, on_failure="ignore", **options)

    found: list[Any] = []
    start = time.monotonic()
    peak = part.peak(lambda: found.append(sweep(callback=lambda progress: time.monotonic() > end)))
    seconds, stopped = time.monotonic() - start, time.monotonic() > end
    (result,) = found
    if not stopped and 4 * seconds < part.left:  # again: the first run has filled caches, and was watched
        seconds = part.time(sweep, repeats=1 if part.rehearse or seconds > 5 else 2, warm_up=False)
    part.add(
        "cells",
        **asdict(cell),
        sequential_graph=graphed,
        sequential_compiled=compiled,
        compiling=compiling,
        ours=seconds,
        times=baseline / seconds,
        rounds=result.rounds,
        rows_per_step=result.evals / (cell.steps * cell.batch),
        peak_bytes=peak,
        error=_error(result.images, reference),
        rounding=rounding,
        converged=bool(result.solution.converged.all()),
        stopped=stopped,
    )


def ordinary(part: Part, sampler: Sequential) -> tuple[Tensor, float] | None:
    """The images and least seconds of the ordinary sampler; None where it would take too long."""
    few = min(_WARM, sampler.steps)
    expected = part.time(lambda: sampler(few), repeats=1) / few * sampler.steps
    if expected > _LONGEST * part.left and not part.rehearse:
        return None
    seconds = part.time(sampler, repeats=2 if expected < 5 else 1, warm_up=False)
    return sampler.latent.clone(), seconds


def _error(found: Tensor, expected: Tensor) -> float:
    """Largest relative distance of an image."""
    return float(((found - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)).max())
