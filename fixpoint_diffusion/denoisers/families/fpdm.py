"""The fixed point diffusion model of this package, ``FPDM``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fixpoint_diffusion.denoisers.diffusers_models import spatial_sizes
from fixpoint_diffusion.denoisers.fpdm import FPDMDenoiser, class_inputs
from fixpoint_diffusion.denoisers.modules import spread
from fixpoint_diffusion.denoisers.protocol import ConditioningInput
from fixpoint_diffusion.denoisers.registry import Family, LoadOptions
from fixpoint_diffusion.denoisers.schedules import ZERO_SNR_SCHEDULE
from fixpoint_diffusion.models import FPDM, FPDMConfig, load_fpdm, save_fpdm


def build(sample_shape: tuple[int, ...], num_classes: int | None, settings: Mapping[str, Any]) -> nn.Module:
    """A new ``FPDM``; ``settings`` are its config's."""
    channels, height, width = spatial_sizes("FPDM", sample_shape, 2)
    if height != width:
        raise ValueError(f"an FPDM takes square images, got {height} x {width}")
    sizes = {"sample_size": height, "in_channels": channels}
    # A setting may ask for classes where the data has none.
    classes = {} if num_classes is None else {"num_classes": num_classes}
    return FPDM(FPDMConfig.from_dict({**settings, **sizes, **classes}))


def load(folder: Path, config: Mapping[str, Any], options: LoadOptions) -> nn.Module:
    """Read an ``FPDM`` from a folder; it has no pickled weights, whatever the options allow."""
    if options.device_map is None:
        return load_fpdm(folder, dtype=options.dtype, device=options.device)
    return spread(load_fpdm(folder, dtype=options.dtype), options.device_map, whole=("DiTBlock", "FixedPointLayer"))


def save(model: nn.Module, folder: Path, dtype: torch.dtype | None) -> None:
    """Write ``config.json`` and the weights."""
    assert isinstance(model, FPDM)
    save_fpdm(model, folder, dtype=dtype)


def denoiser(model: nn.Module, /, *, prediction_type: str | None = None, **about: Any) -> FPDMDenoiser:
    """An ``FPDMDenoiser``; the prediction type is that of the model, and a schedule's must be the same."""
    assert isinstance(model, FPDM)
    if prediction_type not in (None, model.config.prediction_type):
        raise ValueError(
            f"this FPDM predicts {model.config.prediction_type!r}, but its schedule is for {prediction_type!r}"
        )
    return FPDMDenoiser(model, **about)


def sample_shape(config: Mapping[str, Any]) -> tuple[int, ...] | None:
    """``(C, H, W)``."""
    return FPDMConfig.from_dict(config).sample_shape


def conditioning(config: Mapping[str, Any]) -> dict[str, ConditioningInput]:
    """Class labels of a conditional model."""
    return class_inputs(FPDMConfig.from_dict(config))


FAMILY = Family(
    name="fpdm",
    class_name="FPDM",
    build=build,
    denoiser=denoiser,
    load=load,
    save=save,
    sample_shape=sample_shape,
    conditioning=conditioning,
    schedule_config=ZERO_SNR_SCHEDULE,
    # Weight decay keeps the layer a contraction: with 0.01 plain iteration does not converge for some images.
    training={"steps": 8000, "learning_rate": 2e-3, "weight_decay": 0.2, "prediction_type": "v_prediction"},
)
