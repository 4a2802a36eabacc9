"""The diffusion transformer with class labels, diffusers' ``DiTTransformer2DModel``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from fixpoint_diffusion.denoisers.diffusers import image_shape
from fixpoint_diffusion.denoisers.diffusers_models import build_module, diffusers_family, spatial_sizes
from fixpoint_diffusion.denoisers.protocol import CLASS_LABELS, ConditioningInput
from fixpoint_diffusion.denoisers.schedules import LINEAR_SCHEDULE

DEFAULTS = {"num_attention_heads": 4, "attention_head_dim": 24, "num_layers": 4, "patch_size": 2}


def build(sample_shape: tuple[int, ...], num_classes: int | None, settings: Mapping[str, Any]) -> nn.Module:
    """A new network; ``settings`` are the constructor's. Without classes it has one, which nobody need name."""
    channels, height, width = spatial_sizes("DiTTransformer2DModel", sample_shape, 2)
    chosen = {**DEFAULTS, **settings}
    if height != width or height % chosen["patch_size"]:
        raise ValueError(
            f"a DiT takes square images whose side is a multiple of its patch of {chosen['patch_size']}, "
            f"got {height} x {width}"
        )
    chosen = {"out_channels": channels, **chosen, "sample_size": height, "in_channels": channels}
    return build_module("DiTTransformer2DModel", {**chosen, "num_embeds_ada_norm": num_classes or 1})


def conditioning(config: Mapping[str, Any]) -> dict[str, ConditioningInput]:
    """Class labels; the row after the last class stands for "no class"."""
    classes = config["num_embeds_ada_norm"]
    return {CLASS_LABELS: ConditioningInput(num_classes=classes, null_label=classes)}


FAMILY = diffusers_family(
    name="diffusers-dit",
    class_name="DiTTransformer2DModel",
    build=build,
    sample_shape=image_shape,
    conditioning=conditioning,
    schedule_config=LINEAR_SCHEDULE,
)
