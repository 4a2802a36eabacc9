"""Runs that look for the noise behind images, by descent as in the paper, or by other ways."""

from __future__ import annotations

import time
import warnings
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fixpoint import IFT, bench
from fixpoint_diffusion.chains import DDIMChain
from fixpoint_diffusion.experiments.experiment import Kind
from fixpoint_diffusion.experiments.plans import call_flops
from fixpoint_diffusion.experiments.records import Config, Measures
from fixpoint_diffusion.experiments.resources import Resources
from fixpoint_diffusion.inversion import (
    ExplicitInverse,
    InverseMethod,
    ParallelInverse,
    StepwiseInverse,
    deq_ddim_inversion_settings,
    invert,
)
from fixpoint_diffusion.inversion.descent.optimised import Descent

# Beside the paper's two, and the descent with exact gradients: what needs no descent.
DIRECT: dict[str, InverseMethod] = {
    "plain DDIM": ExplicitInverse(),
    "step by step": StepwiseInverse(),
    "all steps at once": ParallelInverse(),
}
LABELS = {
    "baseline": "baseline (Algorithm 1)",
    "paper": "DEQ, as published",
    "released-code": "DEQ, as released",
    "exact": "DEQ, exact gradients",
    "plain DDIM": "plain DDIM inversion",
    "step by step": "implicit inversion, step by step",
    "all steps at once": "implicit inversion, all steps at once",
}


def _invert(config: Config, resources: Resources) -> Measures:
    """``model``, ``data``, ``method``, ``steps``, ``eta``, ``images``, ``seed``; of a descent ``rate``, ``epochs``,
    ``show`` (epochs whose images are kept); ``resample``: also sample with so many steps."""
    count = config["images"]
    images = resources.images(config["data"], config["seed"] * count, count)
    chain = resources.chain(config, torch.zeros_like(images))
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if config["method"] in DIRECT:
            measures, x_T = _directly(config, chain, images)
        else:
            measures, x_T = _by_descent(config, chain, images)
    measures["seconds"] = time.perf_counter() - start
    back = _sampled(chain, x_T)
    measures["loss"] = _loss(back, images)
    measures["back"] = _pictures(torch.stack([images, back]), ["image", LABELS[config["method"]]])
    if "resample" in config:
        longer = resources.chain(config, x_T, steps=config["resample"])
        measures["loss_resampled"] = _loss(_sampled(longer, x_T), images)
        shown = torch.stack([images, back, _sampled(longer, x_T)])
        measures["back"] = _pictures(shown, ["image", f"T={config['steps']}", f"T={config['resample']}"])
    return measures


def _directly(config: Config, chain: DDIMChain, images: Tensor) -> tuple[Measures, Tensor]:
    found = invert(chain, images, method=DIRECT[config["method"]], on_failure="ignore")
    return {"rounds": found.rounds, "rows": found.evals, "best": _loss(found.reconstruction, images)}, found.x_T


def _by_descent(config: Config, chain: DDIMChain, images: Tensor) -> tuple[Measures, Tensor]:
    reading = "released-code" if config["method"] == "released-code" else "paper"
    method = deq_ddim_inversion_settings(
        chain,
        reading,  # type: ignore[arg-type]
        dataset=config.get("recipe", "cifar10"),
        baseline=config["method"] == "baseline",
    )
    adam = partial(torch.optim.Adam, lr=config["rate"])
    method = replace(method, optimiser=adam, epochs=config["epochs"], seed=config["seed"])
    if config["method"] == "exact":
        method = replace(method, gradient=IFT(rtol=1e-3, on_failure="best"))
    if "recipe" not in config:  # no run ends early, so that curves are as long as each other
        method = replace(method, stop=0.0)
    shown: dict[int, Tensor] = {}

    def watch(now: Descent) -> None:
        if len(now.history) in config["show"]:
            shown[len(now.history)] = _sampled(chain, now.x_T)

    found = method.descend(chain, images, callback=watch if config["show"] else None)
    history = found.history
    measures: Measures = {
        "losses": [float(epoch.loss.mean()) for epoch in history],
        "least": [float(epoch.loss.min()) for epoch in history],
        "most": [float(epoch.loss.max()) for epoch in history],
        "best": found.best_loss,
        "rounds": sum(epoch.rounds for epoch in history),
        "rows": sum(epoch.evals for epoch in history),
        "products": sum(epoch.products for epoch in history),
    }
    if shown:
        label = LABELS[config["method"]]
        steps = [images[:1], *(each[:1] for each in shown.values())]
        grid = torch.stack(steps, dim=1)
        columns = ["image", *(f"{epoch} updates" for epoch in shown)]
        measures["epochs"] = asdict(bench.Images.of("epochs", grid, row_labels=[label], column_labels=columns))
    return measures, found.best_x_T


@torch.no_grad()
def _sampled(chain: DDIMChain, x_T: Tensor) -> Tensor:
    kept, chain.x_T = chain.x_T, x_T
    images = chain.sequential(trajectory=False)
    chain.x_T = kept
    return images


def _loss(images: Tensor, targets: Tensor) -> list[float]:
    """Squared distance of each image, a sum over its entries."""
    return (images - targets).double().flatten(1).square().sum(dim=1).tolist()


def _pictures(grid: Tensor, labels: list[str]) -> dict[str, Any]:
    return asdict(bench.Images.of("images", grid, row_labels=labels))


def _flops(config: Config) -> float:
    if config["method"] in DIRECT:
        epochs, calls = 1, config["steps"] * 10
    else:
        rounds = 50 if config["eta"] else 15
        sequential = config["method"] == "baseline"
        # Backpropagation costs twice what it goes through; the phantom gradient goes through one round.
        calls = config["steps"] * (3 if sequential else rounds + 3)
        epochs = config["epochs"]
    return call_flops(config["model"]) * config["images"] * epochs * calls


INVERSIONS = Kind(name="inversion", run=_invert, flops=_flops)
