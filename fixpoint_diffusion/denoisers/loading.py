"""Loading any denoiser from a local folder."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fixpoint_diffusion.denoisers.diffusers import DiffusersDenoiser
from fixpoint_diffusion.denoisers.diffusers_models import WEIGHTS, listing, load_module
from fixpoint_diffusion.denoisers.protocol import Description, NetworkDenoiser
from fixpoint_diffusion.denoisers.registry import LoadOptions, family_of_class
from fixpoint_diffusion.files import read_json
from fixpoint_diffusion.processes import GaussianPrior
from fixpoint_diffusion.processes.flow import is_flow
from fixpoint_diffusion.processes.predictions import DENOISER_PREDICTIONS
from fixpoint_diffusion.processes.prior import PRIOR_FILE
from fixpoint_diffusion.processes.sampler_config import find_scheduler_file

# Where a pipeline folder may keep its denoiser.
MODEL_FOLDERS = ("unet", "transformer")


def load_denoiser(
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    device_map: str | Mapping[str, Any] | None = None,
    learned_variance: bool = False,
    allow_pickle: bool = False,
) -> NetworkDenoiser:
    """Load a denoiser from a local folder; the network is never used.

    Three layouts are understood: a model folder (``config.json`` and ``diffusion_pytorch_model.safetensors``), the same
    with ``scheduler_config.json`` beside them (as in ``google/ddpm-cifar10-32``, and as ``fixpoint-diffusion train``
    writes), and a pipeline folder with ``unet/`` or ``transformer/`` and ``scheduler/`` in it. The model's class is the
    ``_class_name`` of its config: that of a known family (:func:`fixpoint_diffusion.denoisers.families`), or any model
    of diffusers that is called as ``model(x, t, **inputs)``. A ``prior.safetensors`` beside the weights
    (``GaussianPrior.of(images).save(folder)``) makes parallel sampling need fewer rounds.

    The model comes in evaluation mode and with frozen parameters; gradients with respect to x still flow.

    Args:
        folder: a folder on this machine. Not the name of a repository: fetch that first.
        dtype: of the weights; None: float32, whatever they are stored in.
        device: where to put them; None: the CPU.
        device_map: where to put which part, as for ``from_pretrained`` of diffusers, by accelerate; instead of
            ``device``.
        learned_variance: whether the output keeps what the model says of the variance, which the steps of DDPM with
            a learned ``variance_type`` need.
        allow_pickle: also read ``diffusion_pytorch_model.bin``, through ``torch.load(weights_only=True)``. Pickles are
            refused otherwise.

    Returns:
        A :class:`~fixpoint_diffusion.denoisers.Denoiser`, made by the model's family: a ``DiffusersDenoiser``, or for
        a config of class FPDM an ``FPDMDenoiser``.

    Raises:
        FileNotFoundError: if the folder or a part of it is missing; the message lists what was found.
        ValueError: if a file is damaged, the config is unusable, the weights do not fit it, are packed integers or are
            not finite, only a pickle is there, or the model is told the timestep elsewhere than after x.
        ImportError: if the class needs diffusers and that is not installed.

    Example:
        >>> from fixpoint_diffusion import load_denoiser
        >>> from fixpoint_diffusion.denoisers import embedded_folder
        >>> load_denoiser(embedded_folder("ddpm-digits")).sample_shape
        (1, 8, 8)
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {str(folder)!r} (models are loaded from local folders, never downloaded)")
    if device is not None and device_map is not None:
        raise ValueError("pass either device or device_map")
    options = LoadOptions(
        dtype=dtype or torch.float32, device=device or "cpu", device_map=device_map, allow_pickle=allow_pickle
    )
    model_folder = _find_model_folder(folder)
    config = read_json(model_folder / "config.json")
    family = family_of_class(config.get("_class_name"))
    # Small files first: what is wrong with them is known before the weights are read.
    about = _about(folder, model_folder)
    model = (family.load if family else load_module)(model_folder, config, options)
    model.eval().requires_grad_(False)
    denoiser: NetworkDenoiser = (family.denoiser if family else DiffusersDenoiser)(
        model, **about, learned_variance=learned_variance
    )
    prior: GaussianPrior | None = about["prior"]
    shape, sizes = denoiser.sample_shape, {len(prior.mean), len(prior.variances)} - {1} if prior else set()
    if shape is not None and sizes and sizes != {math.prod(shape)}:
        raise ValueError(f"the prior in {model_folder} is for {max(sizes)} entries, but a sample has shape {shape}")
    return denoiser


def _about(folder: Path, model_folder: Path) -> dict[str, Any]:
    """What the files beside the weights say of a denoiser: its schedule, its prior, and what its output means."""
    file = find_scheduler_file(folder)
    schedule = None if file is None else read_json(file)
    about: dict[str, Any] = {"schedule_config": schedule, "prior": GaussianPrior.load(model_folder)}
    if is_flow(schedule):
        about["prediction_type"] = "flow_prediction"
    elif schedule is not None and "prediction_type" in schedule:
        about["prediction_type"] = schedule["prediction_type"]
        if about["prediction_type"] not in DENOISER_PREDICTIONS:
            raise ValueError(
                f"the scheduler config in {folder} has prediction_type {about['prediction_type']!r}; expected one of "
                f"{', '.join(DENOISER_PREDICTIONS)}"
            )
    return about


def describe_files(folder: Path) -> Description | None:
    """What :func:`describe` says of the denoiser in a folder, read without its network, which takes seconds to import.

    None for a network that is no known one of diffusers.
    """
    model_folder = _find_model_folder(folder)
    config = read_json(model_folder / "config.json")
    family = family_of_class(config.get("_class_name"))
    if family is None or family.denoiser is not DiffusersDenoiser:
        return None
    about = {"prediction_type": "epsilon", **_about(folder, model_folder)}
    return Description(sample_shape=family.sample_shape(config), conditioning=family.conditioning(config), **about)


def model_files(folder: Path) -> list[Path]:
    """What :func:`load_denoiser` reads in a folder: its model's configuration first, weights, prior, and schedule.

    Raises:
        FileNotFoundError: if it holds no model.
    """
    model_folder = _find_model_folder(folder)
    schedule, prior = find_scheduler_file(folder), model_folder / PRIOR_FILE
    files = [model_folder / "config.json", *model_folder.glob(f"{WEIGHTS}*"), prior]
    return [file for file in (*files, schedule) if file is not None and file.is_file()]


def _find_model_folder(folder: Path) -> Path:
    for candidate in (folder, *(folder / name for name in MODEL_FOLDERS)):
        if (candidate / "config.json").is_file():
            return candidate
    raise FileNotFoundError(
        f"{folder} is not a model folder: expected config.json in it or in {' or '.join(MODEL_FOLDERS)}/, "
        f"found {listing(folder)}"
    )
