"""The U-Net for videos ``(C, F, H, W)`` with a prompt, diffusers' ``UNet3DConditionModel``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from fixpoint_diffusion.denoisers.diffusers_models import build_module, diffusers_family, refuse_classes, spatial_sizes
from fixpoint_diffusion.denoisers.protocol import ConditioningInput
from fixpoint_diffusion.denoisers.schedules import LINEAR_SCHEDULE

DEFAULTS = {
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock3D", "CrossAttnDownBlock3D"),
    "up_block_types": ("CrossAttnUpBlock3D", "UpBlock3D"),
    "norm_num_groups": 8,
    "cross_attention_dim": 32,
    "attention_head_dim": 8,
}


def build(sample_shape: tuple[int, ...], num_classes: int | None, settings: Mapping[str, Any]) -> nn.Module:
    """A new network; ``settings`` are the constructor's. The number of frames is not the network's business."""
    refuse_classes("unet-3d", num_classes)
    channels, _, height, width = spatial_sizes("UNet3DConditionModel", sample_shape, 3)
    size = height if height == width else (height, width)
    sizes = {"sample_size": size, "in_channels": channels}
    return build_module("UNet3DConditionModel", {**DEFAULTS, "out_channels": channels, **settings, **sizes})


def sample_shape(config: Mapping[str, Any]) -> tuple[int, ...] | None:
    """None: the config does not say how many frames a video has."""
    return None


def conditioning(config: Mapping[str, Any]) -> dict[str, ConditioningInput]:
    """The prompt's embeddings."""
    return {"encoder_hidden_states": ConditioningInput((-1, config["cross_attention_dim"]), torch.float32)}


FAMILY = diffusers_family(
    name="unet-3d",
    class_name="UNet3DConditionModel",
    build=build,
    sample_shape=sample_shape,
    conditioning=conditioning,
    schedule_config=LINEAR_SCHEDULE,
)
