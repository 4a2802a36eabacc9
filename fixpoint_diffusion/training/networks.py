"""The network that a run trains: built for its data, or loaded from a model folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fixpoint_diffusion.denoisers import load_denoiser
from fixpoint_diffusion.denoisers.diffusers_models import try_out
from fixpoint_diffusion.denoisers.protocol import NetworkDenoiser
from fixpoint_diffusion.denoisers.registry import Family, family_of
from fixpoint_diffusion.extras import machine_memory
from fixpoint_diffusion.models.weights import at_most_tensors, describe_error
from fixpoint_diffusion.processes.flow import is_flow
from fixpoint_diffusion.processes.sampler_config import SCHEDULER_FILE
from fixpoint_diffusion.training.data import ImageDataset

# Of a network to be trained; the largest in use have a few thousand.
_MOST_TENSORS = 50_000


class TrainableDenoiser(nn.Module):
    """A network called as its family calls it: ``(x, t, class_labels=...)``, with all of its channels as output."""

    def __init__(self, network: nn.Module, family: Family, channels: int) -> None:
        super().__init__()
        self.network = network
        learned = getattr(network.config, "out_channels", channels) == 2 * channels
        self.denoiser: NetworkDenoiser = family.denoiser(network, learned_variance=learned)
        for module in network.modules():
            if type(module).__name__ == "LabelEmbedding":
                # diffusers' own class dropout would come on top of the trainer's.
                setattr(module, "dropout_prob", 0.0)  # noqa: B010 - unknown to the type checker

    def forward(self, x: Tensor, t: Tensor, **conditioning: Tensor) -> Tensor:
        return self.denoiser(x, t, **conditioning)


def build_network(
    its_family: Family,
    data: ImageDataset,
    *,
    classes: bool,
    settings: Mapping[str, Any],
    seed: int,
    weights: bool = True,
) -> nn.Module:
    """A new network for the data, tried out before any memory is asked for; without weights it stays on ``meta``."""

    def build() -> nn.Module:
        return its_family.build(data.sample_shape, data.num_classes if classes else None, settings)

    message = f"the settings describe a network of more than {_MOST_TENSORS} tensors"
    try:
        with at_most_tensors(_MOST_TENSORS, message), torch.device("meta"):
            trial = build()
    except (RuntimeError, TypeError, ArithmeticError) as error:  # sizes that no tensor can have
        raise ValueError(f"the file of settings does not describe a usable network: {describe_error(error)}") from error
    need, have = sum(p.nbytes for p in trial.parameters()), machine_memory()
    if weights and need > have:
        raise ValueError(
            f"the settings describe a network of {need / 1e9:,.1f} GB, and this machine has {have / 1e9:,.1f} GB"
        )
    for name, value in settings.items():
        used = getattr(trial.config, name, None)
        if _listed(used) != _listed(value):
            raise ValueError(f"the settings say {name}={value!r}, but for this data it is {used!r}: leave it out")
    try_out(trial, "the file of settings")
    if not weights:
        return trial.train()
    # Initial weights are a function of the seed; the global random state is left as it was.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def trained_otherwise(network: nn.Module, settings: Mapping[str, Any]) -> nn.Module:
    """A network that is trained further, with other settings of its training.

    Raises:
        ValueError: for settings of its architecture.
    """
    if not settings:
        return network
    allowed: tuple[str, ...] = getattr(network.config, "TRAINING", ())
    other = sorted(set(settings) - set(allowed))
    if other:
        raise ValueError(
            f"a model that is trained further keeps its architecture and its classes; drop {', '.join(other)}"
        )
    with torch.random.fork_rng(devices=[]):
        changed: nn.Module = type(network)(dataclasses.replace(network.config, **settings))  # type: ignore[type-var]
    changed.load_state_dict(network.state_dict())
    return changed


def load_network(folder: str | Path) -> tuple[nn.Module, Family, dict[str, Any]]:
    """The network in a model folder, ready to be trained, its family and its schedule."""
    denoiser: Any = load_denoiser(folder)
    its_family = family_of(denoiser.model)
    if its_family is None:
        raise ValueError(
            f"{folder} holds a {type(denoiser.model).__name__}, a kind of model that cannot be trained here"
        )
    if denoiser.schedule_config is None:
        raise ValueError(f"{folder} does not say on which noise schedule the model was trained: no {SCHEDULER_FILE}")
    schedule = dict(denoiser.schedule_config)
    if not is_flow(schedule):
        schedule["prediction_type"] = denoiser.prediction_type
    return denoiser.model.train().requires_grad_(True), its_family, schedule
