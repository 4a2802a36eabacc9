"""Networks of diffusers, as small as they come, with random weights."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

diffusers = pytest.importorskip("diffusers")


def tiny_unet(**options: Any) -> nn.Module:
    """For images ``(1, 8, 8)``."""
    defaults: dict[str, Any] = {
        "sample_size": 8,
        "in_channels": 1,
        "out_channels": 1,
        "layers_per_block": 1,
        "block_out_channels": (8, 8),
        "norm_num_groups": 4,
        "down_block_types": ("DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D"),
    }
    return diffusers.UNet2DModel(**(defaults | options)).eval()


def tiny_conditional_unet() -> nn.Module:
    """For latents ``(4, 4, 4)`` and embeddings ``(L, 8)``."""
    return diffusers.UNet2DConditionModel(
        sample_size=4,
        layers_per_block=1,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=4,
    ).eval()
