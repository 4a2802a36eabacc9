"""The U-Net for images, diffusers' ``UNet2DModel``: unconditional, or told a class."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from fixpoint_diffusion.denoisers.diffusers import image_shape
from fixpoint_diffusion.denoisers.diffusers_models import build_module, diffusers_family, spatial_sizes
from fixpoint_diffusion.denoisers.protocol import CLASS_LABELS, ConditioningInput
from fixpoint_diffusion.denoisers.schedules import LINEAR_SCHEDULE

# Those of the embedded model.
DEFAULTS = {
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 8,
    "attention_head_dim": 8,
}


def build(sample_shape: tuple[int, ...], num_classes: int | None, settings: Mapping[str, Any]) -> nn.Module:
    """A new network; ``settings`` are the constructor's, the embedded model's where not given."""
    channels, height, width = spatial_sizes("UNet2DModel", sample_shape, 2)
    chosen = {**DEFAULTS, **settings}
    factor = 2 ** (len(chosen["block_out_channels"]) - 1)
    if height % factor or width % factor:
        raise ValueError(f"this U-Net needs sides it can halve; {height} x {width} is not a multiple of {factor}")
    size = height if height == width else (height, width)
    return build_module(
        "UNet2DModel",
        {"out_channels": channels, **chosen, "sample_size": size, "in_channels": channels},
        num_classes=num_classes,
    )


def conditioning(config: Mapping[str, Any]) -> dict[str, ConditioningInput]:
    """Class labels, where the network has an embedding for them."""
    rows, null = config.get("num_class_embeds"), config.get("_null_label")
    if rows is None:
        return {}
    return {CLASS_LABELS: ConditioningInput(num_classes=rows if null is None else null, null_label=null)}


FAMILY = diffusers_family(
    name="unet",
    class_name="UNet2DModel",
    build=build,
    sample_shape=image_shape,
    conditioning=conditioning,
    schedule_config=LINEAR_SCHEDULE,
    training={"steps": 9000, "learning_rate": 1e-3, "prediction_type": "epsilon"},
)
