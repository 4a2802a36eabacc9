"""The U-Net for signals ``(C, L)``, diffusers' ``UNet1DModel``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from fixpoint_diffusion.denoisers.diffusers_models import build_module, diffusers_family, refuse_classes, spatial_sizes
from fixpoint_diffusion.denoisers.protocol import ConditioningInput
from fixpoint_diffusion.denoisers.schedules import LINEAR_SCHEDULE

DEFAULTS = {
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock1DNoSkip", "AttnDownBlock1D"),
    "up_block_types": ("AttnUpBlock1D", "UpBlock1DNoSkip"),
    "time_embedding_type": "positional",
}


def build(sample_shape: tuple[int, ...], num_classes: int | None, settings: Mapping[str, Any]) -> nn.Module:
    """A new network; ``settings`` are the constructor's."""
    refuse_classes("unet-1d", num_classes)
    channels, length = spatial_sizes("UNet1DModel", sample_shape, 1)
    sizes = {"sample_size": length, "in_channels": channels}
    chosen = {**DEFAULTS, "out_channels": channels, **settings}
    # The first block is given the embedding of the timestep as further channels.
    chosen.setdefault("extra_in_channels", chosen["block_out_channels"][0])
    return build_module("UNet1DModel", {**chosen, **sizes})


def sample_shape(config: Mapping[str, Any]) -> tuple[int, ...] | None:
    """``(C, L)``."""
    channels, length = config.get("in_channels"), config.get("sample_size")
    return None if channels is None or length is None else (channels, length)


def conditioning(config: Mapping[str, Any]) -> dict[str, ConditioningInput]:
    """Nothing: the network takes x and t alone."""
    return {}


FAMILY = diffusers_family(
    name="unet-1d",
    class_name="UNet1DModel",
    build=build,
    sample_shape=sample_shape,
    conditioning=conditioning,
    schedule_config=LINEAR_SCHEDULE,
)
