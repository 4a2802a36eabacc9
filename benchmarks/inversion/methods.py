"""What is compared, and one attempt of it, measured from outside."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.inversion.cells import Cell
from benchmarks.peers import AIDI, GNRI, ForwardStep, ReNoise
from fixpoint import Status
from fixpoint_diffusion import DDIMChain, invert
from fixpoint_diffusion.inversion import InverseMethod


@dataclass(frozen=True)
class Method:
    """A way to invert a chain. What ours claims is what ``invert`` says; a peer's claim is its own."""

    name: str
    method: InverseMethod
    ours: bool = False


def peers(iterations: int) -> list[Method]:
    """The peers with so many iterations of each step."""
    found = [
        Method(f"AIDI plain, {iterations}", AIDI(iterations=iterations)),
        Method(f"AIDI Anderson, {iterations}", AIDI(iterations=iterations, acceleration="anderson")),
        Method(f"AIDI mean of two, {iterations}", AIDI(iterations=iterations, acceleration="mean")),
        Method(f"ReNoise, {iterations}", ReNoise(iterations=iterations)),
        Method(f"GNRI, {iterations}", GNRI(iterations=iterations)),
        Method(f"GNRI sign step, {iterations}", GNRI(iterations=iterations, exact=False)),
        Method(f"forward steps, {iterations}", ForwardStep(iterations=iterations)),
    ]
    return found if iterations > 1 else [Method("DDIM inversion", AIDI(iterations=1))]


@torch.no_grad()
def attempt(
    method: Method,
    chain: DDIMChain,
    images: Tensor,
    *,
    tolerance: float,
    x_T: Tensor | None = None,
    callback: Callable[[Any], object] | None = None,
) -> Cell:
    """Invert, then run the ordinary sampler from what was found.

    Returns:
        ``errors`` (RMS of the reconstruction), ``claimed`` (whether the method says that it is within ``tolerance``),
        ``rounds``, ``rows``, ``seconds`` of the processor, and ``latents`` (RMS of the noise's error), if the true
        ``x_T`` is given.
    """
    chain.reset_counters()
    start = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if method.ours:
            inverse = invert(
                chain, images, method=method.method, rtol=0.0, atol=tolerance, on_failure="ignore", callback=callback
            )
            found, noise, claimed = inverse, inverse.noise, inverse.status == Status.CONVERGED
        else:
            limits = torch.full((len(images),), tolerance, dtype=torch.float64)
            found = method.method.run(chain, images, tolerance=limits, progress=False, callback=None)
            noise, claimed = found.noise, found.status == Status.CONVERGED
    seconds = time.process_time() - start
    cell: Cell = {
        "errors": rms(sampled(chain, found.x_T, noise) - images).tolist(),
        "claimed": claimed.tolist(),
        "rounds": found.rounds,
        "rows": found.evals,
        "seconds": seconds,
        "tolerance": tolerance,
    }
    if x_T is not None:
        cell["latents"] = rms(found.x_T - x_T).tolist()
    return cell


@torch.no_grad()
def sampled(chain: DDIMChain, x_T: Tensor, noise: Tensor | None = None) -> Tensor:
    """What the ordinary sampler makes of x_T ``(B, *shape)``."""
    kept = chain.x_T, chain.noise
    chain.x_T, chain.noise = x_T, kept[1] if noise is None else noise
    images = chain.sequential(trajectory=False)
    chain.x_T, chain.noise = kept
    return images


def rms(x: Tensor) -> Tensor:
    """``(B,)`` of ``(B, ...)``; infinity where x is no number."""
    return x.double().flatten(1).square().mean(dim=1).sqrt().nan_to_num(nan=torch.inf)


def truthful(cell: Cell, tolerance: float) -> float:
    """Share of samples whose claim is true: those said to have converged are within twice the tolerance, and those
    said not to have are not within it."""
    pairs = [(said, torch.inf if error is None else error) for said, error in zip(*map(cell.get, FIELDS), strict=True)]
    return sum(error <= 2 * tolerance if said else error > tolerance for said, error in pairs) / len(pairs)


FIELDS = ("claimed", "errors")
