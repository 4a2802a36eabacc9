"""Where a run starts from that does not start from random weights: a model, or a run that has not come to its end."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from fixpoint_diffusion.denoisers.registry import Family
from fixpoint_diffusion.training.checkpoints import CHECKPOINT, INITIAL, load_state
from fixpoint_diffusion.training.export import TRAINING_FILE, read_class_names
from fixpoint_diffusion.training.networks import load_network


def load_start(folder: Path) -> tuple[nn.Module, Family, dict[str, Any], Sequence[str]]:
    """Network, family, schedule and names of classes to start from: a model's, or those of a run without its end."""
    if (folder / TRAINING_FILE).exists() or not (folder / CHECKPOINT).exists():
        return *load_network(folder), read_class_names(folder)
    network, its_family, schedule_config = load_network(folder / INITIAL)
    state = load_state(folder / CHECKPOINT)
    own = "module.network."
    try:
        network.load_state_dict({k.removeprefix(own): v for k, v in state.ema.items() if k.startswith(own)})
    except RuntimeError as error:
        raise ValueError(f"the checkpoint in {folder} is of another model: {error}") from error
    return network, its_family, schedule_config, state.record["origin"].get("class_names") or ()


def names_of_all(names: Sequence[str], known: Sequence[str]) -> tuple[str, ...] | None:
    """The names of a model's classes: of the first ones as the data have them, of those beyond as they were known.

    Raises:
        ValueError: for a class that the model knows by another number.
    """
    for number, name in enumerate(names):
        if name in known and known.index(name) != number:
            raise ValueError(
                f"class {name!r} is number {number} in the data and number {known.index(name)} in the model to start "
                f"from: give the data folders for all of the model's classes, {', '.join(known)}"
            )
    return (*names, *known[len(names) :]) or None
