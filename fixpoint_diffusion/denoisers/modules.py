"""What a network computes in and where, whatever its weights are stored in and wherever they wait."""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from torch import nn


def compute_dtype(model: nn.Module, default: torch.dtype) -> torch.dtype:
    """The dtype that a network wants its floating-point inputs in.

    Layerwise casting stores weights in 8 bits and computes in another dtype, which its hook knows. Packed weights of
    quantised layers are integers and say nothing.

    Args:
        model: any module.
        default: for a network without weights of a floating-point dtype.

    Example:
        >>> compute_dtype(nn.Linear(2, 2).half(), torch.float32)
        torch.float16
    """
    for module in model.modules():
        casting = _hook(module, "layerwise_casting")
        if casting is not None:
            dtype: torch.dtype = casting.compute_dtype
            return dtype
    own = getattr(model, "dtype", None)
    if isinstance(own, torch.dtype) and _computes(own):
        return own
    tensors = chain(model.parameters(), model.buffers())
    return next((tensor.dtype for tensor in tensors if _computes(tensor.dtype)), default)


def execution_device(model: nn.Module) -> torch.device:
    """The device that a network wants its inputs on; that of its hooks where its weights are kept elsewhere.

    Example:
        >>> execution_device(nn.Linear(2, 2))
        device(type='cpu')
    """
    for module in model.modules():
        offloading = _hook(module, "group_offloading")
        if offloading is not None:
            return torch.device(offloading.config.onload_device)
        hook = getattr(module, "_hf_hook", None)
        for part in getattr(hook, "hooks", (hook,)):
            device = getattr(part, "execution_device", None)
            if device is not None:
                return torch.device(device)
    tensors = chain(model.parameters(), model.buffers())
    return next((tensor.device for tensor in tensors if tensor.device.type != "meta"), torch.device("cpu"))


def _hook(module: nn.Module, name: str) -> Any:
    """A hook that diffusers has put on a module; None if there is none of that name."""
    hooks = getattr(module, "_diffusers_hook", None)
    return None if hooks is None else hooks.get_hook(name)


def _computes(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point and dtype.itemsize > 1
