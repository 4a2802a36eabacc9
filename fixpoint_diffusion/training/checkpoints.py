"""A training run's state in one safetensors file: tensors in its body, everything else as JSON in its header.

One file, because replacing a file is atomic: whenever the power fails, a whole checkpoint is there, the old or the new.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fixpoint_diffusion.extras import needed_for
from fixpoint_diffusion.files import written_whole
from fixpoint_diffusion.models.checkpoint import in_current_names

# Where both lie in the folder of a run.
CHECKPOINT = Path("checkpoint") / "state.safetensors"
# The model as it was before the first step: what a resumed run builds its model from.
INITIAL = Path("checkpoint") / "initial"
FORMAT = "fixpoint-diffusion training state 2"
PARTS = ("model", "ema", "optimizer")


@dataclass(frozen=True, kw_only=True)
class TrainingState:
    """What training continues from: model, its average, optimiser, and a JSON-able ``record`` of the rest."""

    model: dict[str, Tensor]
    ema: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    record: dict[str, Any]


def save_state(path: Path, state: TrainingState) -> None:
    """Write ``state`` to ``path``, whole or not at all.

    Raises:
        FloatingPointError: if a number in it is not finite; what was at ``path`` stays.
        OSError: if it cannot be written; what was at ``path`` stays.
    """
    with needed_for("writing a checkpoint"):
        from safetensors.torch import save

    tensors = {
        f"{part}/{name}": tensor.detach().to("cpu", copy=True).contiguous()
        for part in PARTS
        for name, tensor in getattr(state, part).items()
    }
    require_finite(tensors, f"the training state is not written to {path}")
    header = {"format": FORMAT, "record": json.dumps(state.record), "checksum": _checksum(tensors)}
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as file:
        file.write(save(tensors, metadata=header))


def require_finite(tensors: Mapping[str, Tensor], what: str) -> None:
    """Raise ``FloatingPointError`` if a number in ``tensors`` is not finite; ``what`` says what becomes of it."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise FloatingPointError(f"{what}: {name} holds numbers that are not finite; try a lower learning rate")


def load_record(path: Path) -> dict[str, Any]:
    """The JSON part of the checkpoint at ``path`` alone."""
    _, header = _read(path)
    return json.loads(header["record"])


def load_state(path: Path) -> TrainingState:
    """Read back what ``save_state`` wrote.

    Raises:
        FileNotFoundError: if nothing is there.
        ValueError: if the file is damaged, or is no training state that training can continue from.
    """
    tensors, header = _read(path)
    parts: dict[str, dict[str, Tensor]] = {part: {} for part in PARTS}
    for key, tensor in in_current_names(tensors).items():
        part, _, name = key.partition("/")
        if part not in parts:
            raise ValueError(f"{path} holds a tensor {key!r}; expected names that begin with {', '.join(PARTS)}")
        parts[part][name] = tensor
    state = TrainingState(record=json.loads(header["record"]), **parts)
    _check(state, path)
    if header.get("checksum") != _checksum(tensors):
        raise ValueError(f"{path} is damaged: its tensors are not those that were written (checksum)")
    return state


def _check(state: TrainingState, path: Path) -> None:
    """Raise ``ValueError`` where no run can have left ``state``; the checksum cannot say what is wrong."""
    step = state.record.get("step")
    if not isinstance(step, int) or isinstance(step, bool) or step < 1:
        raise ValueError(f"{path} is of step {step!r}; expected a step of at least 1")
    if not state.optimizer:
        raise ValueError(f"{path} holds no optimiser state: training cannot continue from it")
    for part in ("model", "ema"):
        weights = [tensor for tensor in getattr(state, part).values() if tensor.is_floating_point()]
        if not any(bool(tensor.any()) for tensor in weights):
            raise ValueError(f"{path} is damaged: all weights of its {part} are zero")
    taken = [float(value) for key, value in state.optimizer.items() if key.startswith("step/")]
    wrong = sorted({f"{value:g}" for value in taken if not 1 <= value <= step})
    if not taken or wrong:
        raise ValueError(f"{path} is of step {step}, its optimiser state of {', '.join(wrong) or 'none'}")


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """An optimiser's per-parameter state under ``"<slot>/<parameter name>"``."""
    return {
        f"{slot}/{name}": value
        for name, parameter in model.named_parameters()
        for slot, value in optimizer.state[parameter].items()
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Put back what ``optimizer_tensors`` took out.

    Raises:
        ValueError: if it is not of this model's parameters.
    """
    parameters = dict(model.named_parameters())
    for key, value in tensors.items():
        slot, _, name = key.partition("/")
        target = parameters.get(name)
        if target is None or (slot != "step" and value.shape != target.shape):
            raise ValueError(f"the checkpoint is of another model: its optimiser state has {key} {tuple(value.shape)}")
        # AdamW keeps its step count on the CPU; the moments live where the parameter does.
        optimizer.state[target][slot] = value if slot == "step" else value.to(target.device)


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    total = 0
    for name in sorted(tensors):
        data = tensors[name].reshape(-1).view(torch.uint8).numpy()
        total = zlib.crc32(data.tobytes(), zlib.crc32(name.encode(), total))
    return f"{total:08x}"


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors in a checkpoint and the metadata in its header.

    It is read once: ``safe_open`` opens it twice, and another process may put a new one in its place in between.
    """
    with needed_for("reading a checkpoint"):
        from safetensors import SafetensorError
        from safetensors.torch import load

    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint to resume from: {path} does not exist")
    content = path.read_bytes()
    try:
        tensors = load(content)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from error
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length]).get("__metadata__", {})
    if header.get("format") != FORMAT:
        raise ValueError(f"{path} is not a training checkpoint: format {header.get('format')!r}, expected {FORMAT!r}")
    return tensors, header
