"""What earlier versions stored."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def with_whole_w1(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of an FPDM whose implicit block has W1 as one matrix."""
    joined: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith("w1_z.weight"):
            other = tensors[name.replace("w1_z", "w1_u")]
            joined[name.replace("w1_z", "w1")] = torch.cat([tensor, other], dim=1) if tensor.ndim else tensor
        elif not name.endswith("w1_u.weight"):
            joined[name.replace("w1_u.bias", "w1.bias")] = tensor
    return joined
