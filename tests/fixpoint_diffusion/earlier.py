"""What earlier versions stored."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

# Of an FPDM's config.json, when positions had one order.
EARLIER_FIELDS = (
    "sample_size",
    "patch_size",
    "in_channels",
    "width",
    "heads",
    "n_pre",
    "n_post",
    "mlp_ratio",
    "num_classes",
    "learn_sigma",
    "prediction_type",
    "max_no_grad",
    "max_grad",
)


def as_stored_earlier(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of an FPDM whose implicit block has W1 as one matrix, and one block after it."""
    joined: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith("w1_z.weight"):
            other = tensors[name.replace("w1_z", "w1_u")]
            joined[name.replace("w1_z", "w1")] = torch.cat([tensor, other], dim=1) if tensor.ndim else tensor
        elif not name.endswith("w1_u.weight"):
            joined[name.replace("w1_u.bias", "w1.bias")] = tensor
    return {name.replace("implicit.f.blocks.0.", "implicit.f.block."): tensor for name, tensor in joined.items()}
