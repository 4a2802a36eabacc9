"""Runs that solve a chain and keep what happened on the way."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from fixpoint import CausalQuasiNewton, Picard, Progress, bench
from fixpoint_diffusion.chains import SamplingChain
from fixpoint_diffusion.experiments.experiment import Kind
from fixpoint_diffusion.experiments.plans import call_flops
from fixpoint_diffusion.experiments.records import Config, Measures
from fixpoint_diffusion.experiments.resources import Resources
from fixpoint_diffusion.sampling import deq_ddim_settings, sample

COLUMNS = 15  # of a picture of latents: ten along the chain, then the last five


def solver_settings(chain: SamplingChain, name: str, rounds: int | None = None) -> dict[str, Any]:
    """Options of ``sample`` for ``"paper"``, ``"released-code"``, ``"picard"`` or ``"ours"``."""
    if name == "ours":
        return {"solver": CausalQuasiNewton(), "rtol": 1e-3}
    if name == "picard":
        return {"solver": Picard(), "rtol": 1e-3, "max_evals": rounds}
    settings = deq_ddim_settings(chain, name)  # type: ignore[arg-type]
    return settings if rounds is None else {**settings, "max_evals": rounds}


def relative_errors(images: Tensor, reference: Tensor) -> Tensor:
    """``(B,)`` of two ``(B, *shape)``."""
    return (images - reference).flatten(1).norm(dim=1) / reference.flatten(1).norm(dim=1)


def _solve(config: Config, resources: Resources) -> Measures:
    """``model``, ``steps``, ``eta``, ``solver``, ``rounds``, ``init``, ``samples``, ``seed``; ``show``: some rounds."""
    chain = resources.chain(config, resources.noise(config, range(config["samples"])))
    with torch.no_grad():
        reference = chain.sequential()
    shown: dict[int, Tensor] = {}

    def watch(progress: Progress) -> None:
        if progress.nfev in config["show"]:
            shown[progress.nfev] = progress.value[0].clone()

    result = sample(
        chain,
        record=True,
        on_failure="ignore",
        callback=watch,
        init=config["init"],
        **solver_settings(chain, config["solver"], config["rounds"]),
    )
    solution = result.solution
    assert solution.trace is not None
    ended = solution.nfev
    latents = {number: shown.get(number, result.trajectory[0]) for number in config["show"]}
    measures: Measures = {
        "residual": solution.trace.mean(dim=1),
        "least": solution.trace.amin(dim=1),
        "most": solution.trace.amax(dim=1),
        "relative_residual": solution.relative_residual,
        "converged": solution.converged,
        "rounds": solution.evals,
        "error": relative_errors(result.images, reference[:, -1]),
        "rows": result.evals,
    }
    if latents:
        errors = {n: float(relative_errors(z[-1:], reference[:1, -1])) for n, z in latents.items()}
        measures |= {"shown_error": errors, "latents": _strip(config, latents, ended)}
    return measures


def _strip(config: Config, latents: dict[int, Tensor], ended: int) -> dict[str, Any]:
    steps = config["steps"]
    columns = [*(k * steps // 10 for k in range(10)), *range(max(steps - 5, 0), steps)]
    rows = [
        f"T={steps}{', eta=' + format(config['eta'], 'g') if config['eta'] else ''}, {config['init']}, "
        f"round {min(number, ended)}"
        for number in latents
    ]
    grid = torch.stack([z[columns] for z in latents.values()])
    return asdict(bench.Images.of("latents", grid, row_labels=rows, low=-2, high=2))


def _flops(config: Config) -> float:
    rounds = config["rounds"] or 50
    return call_flops(config["model"]) * config["samples"] * config["steps"] * (rounds + 1)


SOLVES = Kind(name="chain-solve", run=_solve, flops=_flops)
