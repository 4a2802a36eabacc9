"""FPDM and DiT on disk: safetensors and JSON."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from fixpoint_diffusion.extras import needed_for
from fixpoint_diffusion.files import read_json, write_json
from fixpoint_diffusion.models.dit import DiT
from fixpoint_diffusion.models.dit.config import DiTConfig
from fixpoint_diffusion.models.fpdm import FPDM
from fixpoint_diffusion.models.fpdm.config import FPDMConfig
from fixpoint_diffusion.models.weights import StoredTensor, build_on_meta, check_fit, check_values, read_headers

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"

Stored = TypeVar("Stored", Tensor, StoredTensor)
Model = TypeVar("Model", FPDM, DiT)


def save_fpdm(model: FPDM, folder: str | Path, *, dtype: torch.dtype | None = None) -> Path:
    """Write a model's ``config.json`` and weights, in diffusers' folder layout.

    Args:
        model: The model.
        folder: Where to; made if absent.
        dtype: Precision of the stored weights, such as ``torch.float16``; None: the model's own.

    Returns:
        The folder.

    Example:
        >>> import tempfile
        >>> from fixpoint_diffusion.models import FPDM, FPDMConfig, load_fpdm, save_fpdm
        >>> model = FPDM(FPDMConfig(width=16, heads=2))
        >>> load_fpdm(save_fpdm(model, tempfile.mkdtemp())).config == model.config
        True
    """
    return _save(model, folder, dtype)


def save_dit(model: DiT, folder: str | Path, *, dtype: torch.dtype | None = None) -> Path:
    """As :func:`save_fpdm`, for a :class:`DiT`; ``model.to_diffusers().save_pretrained`` writes it for diffusers.

    Example:
        See :func:`fixpoint_diffusion.models.save_fpdm`.
    """
    return _save(model, folder, dtype)


def load_fpdm(
    folder: str | Path, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> FPDM:
    """Read a model that :func:`save_fpdm` wrote, in this version or an earlier one.

    Args:
        folder: A folder on this machine.
        dtype: Of the weights; None: float32, whatever they are stored in.
        device: Where to put them; None: the CPU.

    Returns:
        The model, in evaluation mode.

    Raises:
        FileNotFoundError: If the folder, its configuration or its weights are absent.
        ValueError: If the configuration is of another class or has unknown keys, or the weights do not fit it, are of
            a dtype that is no floating-point one, or are not finite.

    Example:
        See :func:`fixpoint_diffusion.models.save_fpdm`.
    """

    def config(values: dict[str, Any]) -> FPDMConfig:
        # Before there was a choice, positions were in the other order.
        return FPDMConfig.from_dict({"positions": "row-column", **values})

    return _load(folder, FPDM, config, dtype, device)


def load_dit(folder: str | Path, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> DiT:
    """As :func:`load_fpdm`, for what :func:`save_dit` wrote; :meth:`DiT.from_diffusers` reads diffusers' own.

    Example:
        See :func:`fixpoint_diffusion.models.save_fpdm`, which goes with ``load_fpdm`` as ``save_dit`` with this.
    """
    return _load(folder, DiT, DiTConfig.from_dict, dtype, device)


def _save(model: FPDM | DiT, folder: str | Path, dtype: torch.dtype | None) -> Path:
    with needed_for("saving a model"):
        from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / CONFIG_FILE, {"_class_name": type(model).__name__, **model.config.to_dict()})
    weights = {name: tensor.detach().cpu().to(dtype).contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, folder / WEIGHTS_FILE)
    return folder


def _load(
    folder: str | Path,
    cls: type[Model],
    config_of: Callable[[dict[str, Any]], Any],
    dtype: torch.dtype | None,
    device: torch.device | str | None,
) -> Model:
    with needed_for("loading a model"):
        from safetensors.torch import load_file

    folder = Path(folder)
    values = read_json(folder / CONFIG_FILE)
    name = values.pop("_class_name", None)
    if name != cls.__name__:
        raise ValueError(f"{folder / CONFIG_FILE} describes a {name!r}, expected {cls.__name__!r}")
    config = config_of({key: value for key, value in values.items() if not key.startswith("_")})
    path, dtype = folder / WEIGHTS_FILE, dtype or torch.float32
    stored = in_current_names(read_headers([path]))
    expected = build_on_meta(lambda: cls(config), len(stored), folder / CONFIG_FILE)
    check_fit(expected, stored, folder, dtype=dtype)
    # Building the model draws initial weights that the stored ones replace: keep that out of the caller's random state.
    with torch.random.fork_rng(devices=[]):
        model = cls(config).to(dtype)
    model.load_state_dict(in_current_names(load_file(path)))
    check_values(model.named_parameters(), folder)
    return model.to(device or "cpu").eval()


def in_current_names(stored: Mapping[str, Stored]) -> dict[str, Stored]:
    """What is stored of a network, or for each of its parameters, under today's names.

    In earlier versions W1 of an FPDM's implicit block was one matrix, ``[Wz, Wu]``, and there was one block after it.

    Args:
        stored: Tensors or their descriptions, by names that end as those of the model's parameters do. Matrices are
            halved; numbers, such as an optimiser's count of steps, go to both halves.
    """
    found: dict[str, Stored] = {}
    for old, value in stored.items():
        name = old.replace("implicit.f.block.", "implicit.f.blocks.0.")
        stem, whole, kind = name.rpartition("implicit.f.w1.")
        if whole and kind == "weight":
            found[f"{stem}implicit.f.w1_z.weight"], found[f"{stem}implicit.f.w1_u.weight"] = _halves(value)
        elif whole and kind == "bias":
            found[f"{stem}implicit.f.w1_u.bias"] = value
        else:
            found[name] = value
    return found


def _halves(value: Stored) -> tuple[Stored, Stored]:
    if len(value.shape) != 2:
        return value, value
    rows, columns = value.shape
    half = columns // 2
    if isinstance(value, Tensor):
        return value[:, :half].clone(), value[:, half:].clone()
    return replace(value, shape=(rows, half)), replace(value, shape=(rows, columns - half))
