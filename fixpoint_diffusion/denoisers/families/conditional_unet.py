"""The U-Net of latent diffusion, diffusers' ``UNet2DConditionModel``: told a prompt, a class, or both."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from fixpoint_diffusion.denoisers.diffusers import image_shape
from fixpoint_diffusion.denoisers.diffusers_models import build_module, diffusers_family, spatial_sizes
from fixpoint_diffusion.denoisers.families import unet
from fixpoint_diffusion.denoisers.protocol import ConditioningInput
from fixpoint_diffusion.denoisers.schedules import LINEAR_SCHEDULE

# Without blocks that attend to a prompt, which a folder of images with classes does not have.
DEFAULTS = {
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "DownBlock2D"),
    "mid_block_type": "UNetMidBlock2D",
    "up_block_types": ("UpBlock2D", "UpBlock2D"),
    "norm_num_groups": 8,
    "attention_head_dim": 8,
}


def build(sample_shape: tuple[int, ...], num_classes: int | None, settings: Mapping[str, Any]) -> nn.Module:
    """A new network; ``settings`` are the constructor's. Name blocks with cross-attention for one with a prompt."""
    channels, height, width = spatial_sizes("UNet2DConditionModel", sample_shape, 2)
    size = height if height == width else (height, width)
    chosen = {**DEFAULTS, "out_channels": channels, **settings, "sample_size": size, "in_channels": channels}
    return build_module("UNet2DConditionModel", chosen, num_classes=num_classes)


def conditioning(config: Mapping[str, Any]) -> dict[str, ConditioningInput]:
    """The prompt's embeddings, where a block attends to them; class labels, where the network embeds them."""
    inputs = unet.conditioning(config)
    blocks = (*config["down_block_types"], config.get("mid_block_type"), *config["up_block_types"])
    if any("CrossAttn" in str(block) for block in blocks):
        width = config["cross_attention_dim"]
        width = width if isinstance(width, int) else width[0]
        inputs["encoder_hidden_states"] = ConditioningInput((-1, width), torch.float32)
    return inputs


FAMILY = diffusers_family(
    name="conditional-unet",
    class_name="UNet2DConditionModel",
    build=build,
    sample_shape=image_shape,
    conditioning=conditioning,
    schedule_config=LINEAR_SCHEDULE,
)
