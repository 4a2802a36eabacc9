"""A training run's state in one safetensors file: tensors in its body, everything else as JSON in its header.

One file, because replacing a file is atomic: whenever the power fails, a whole checkpoint is there, the old or the new.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

FORMAT = "fixpoint-diffusion training state 1"


@dataclass(frozen=True, kw_only=True)
class TrainingState:
    """What training continues from: model, its average, optimiser, and a JSON-able ``record`` of the rest."""

    model: dict[str, Tensor]
    ema: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    record: dict[str, Any]


def save_state(path: Path, state: TrainingState) -> None:
    """Write ``state`` to ``path``, whole or not at all."""
    tensors = {
        f"{part}/{name}": tensor.detach().contiguous().clone()
        for part in ("model", "ema", "optimizer")
        for name, tensor in getattr(state, part).items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".unfinished")
    save_file(tensors, unfinished, metadata={"format": FORMAT, "record": json.dumps(state.record)})
    with unfinished.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(unfinished, path)


def load_record(path: Path) -> dict[str, Any]:
    """The JSON part of the checkpoint at ``path`` alone."""
    return _open(path)[1]


def load_state(path: Path) -> TrainingState:
    """Read back what ``save_state`` wrote.

    Raises:
        FileNotFoundError: if nothing is there.
        ValueError: if the file is damaged, or is no training state.
    """
    tensors, record = _open(path)
    parts: dict[str, dict[str, Tensor]] = {"model": {}, "ema": {}, "optimizer": {}}
    for key, tensor in tensors.items():
        part, name = key.split("/", 1)
        parts[part][name] = tensor
    return TrainingState(record=record, **parts)


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """An optimiser's per-parameter state under ``"<slot>/<parameter name>"``."""
    return {
        f"{slot}/{name}": value
        for name, parameter in model.named_parameters()
        for slot, value in optimizer.state[parameter].items()
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Put back what ``optimizer_tensors`` took out."""
    parameters = dict(model.named_parameters())
    for key, value in tensors.items():
        slot, name = key.split("/", 1)
        target = parameters[name]
        # AdamW keeps its step count on the CPU; the moments live where the parameter does.
        optimizer.state[target][slot] = value if slot == "step" else value.to(target.device)


def _open(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint to resume from: {path} does not exist")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (not a mapping)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from error
    if header.get("format") != FORMAT:
        raise ValueError(f"{path} is not a training checkpoint: format {header.get('format')!r}, expected {FORMAT!r}")
    return tensors, json.loads(header["record"])
