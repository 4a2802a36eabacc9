"""What a network computes in and where, whatever its weights are stored in and wherever they wait."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import nn

from fixpoint_diffusion.extras import needed_for
from fixpoint_diffusion.models.weights import describe_error


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
    # Models of diffusers look for their hooks themselves, and a call should not wait for that twice.
    own = getattr(model, "dtype", None)
    if isinstance(own, torch.dtype) and _computes(own):
        return own
    for module in model.modules():
        for hook in (_hook(module, "layerwise_casting"), *_hooks_of_accelerate(module)):
            dtype = getattr(hook, "compute_dtype", None)
            if isinstance(dtype, torch.dtype):
                return dtype
    tensors = chain(model.parameters(), model.buffers())
    return next((tensor.dtype for tensor in tensors if _computes(tensor.dtype)), default)


def uncompiled(model: nn.Module) -> nn.Module:
    """The network that ``torch.compile`` was given, whose class says what it is; any other network as it is.

    Example:
        >>> type(uncompiled(torch.compile(nn.Linear(2, 2)))).__name__
        'Linear'
    """
    original = getattr(model, "_orig_mod", None)
    return original if isinstance(original, nn.Module) else model


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
        for hook in _hooks_of_accelerate(module):
            device = getattr(hook, "execution_device", None)
            if device is not None:
                return torch.device(device)
    tensors = chain(model.parameters(), model.buffers())
    return next((tensor.device for tensor in tensors if tensor.device.type != "meta"), torch.device("cpu"))


def spread(model: nn.Module, device_map: str | Mapping[str, Any], *, whole: Sequence[str]) -> nn.Module:
    """Put the parts of a network where a device map says, by accelerate, as diffusers does for its own networks.

    Args:
        model: a network on the CPU.
        device_map: from names of parts to devices; a device for all of them; or one of accelerate's rules, "auto",
            "balanced", "balanced_low_0" and "sequential".
        whole: names of classes whose modules these rules never divide.

    Raises:
        ImportError: if accelerate is not installed.
        ValueError: if the map leaves out a part, or names something that is no device of this machine.

    Example:
        >>> spread(nn.Linear(2, 2), "cpu", whole=()).hf_device_map
        {'': device(type='cpu')}
    """
    with needed_for("device_map"):
        from accelerate import dispatch_model, infer_auto_device_map
        from accelerate.utils import get_balanced_memory

    try:
        if device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
            memory = None
            if device_map != "sequential":
                least_on_first = device_map == "balanced_low_0"
                memory = get_balanced_memory(model, no_split_module_classes=list(whole), low_zero=least_on_first)
            places = infer_auto_device_map(model, max_memory=memory, no_split_module_classes=list(whole))
        else:
            places = {"": torch.device(device_map)} if isinstance(device_map, str) else dict(device_map)
        dispatched: nn.Module = dispatch_model(model, places)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"device_map={device_map!r} does not fit this network: {describe_error(error)}") from error
    return dispatched


def _hooks_of_accelerate(module: nn.Module) -> Sequence[Any]:
    """The hooks that accelerate has put on a module."""
    hook = module.__dict__.get("_hf_hook")
    return () if hook is None else getattr(hook, "hooks", (hook,))


def _hook(module: nn.Module, name: str) -> Any:
    """A hook that diffusers has put on a module; None if there is none of that name."""
    hooks = module.__dict__.get("_diffusers_hook")  # a module's getattr is slow where there is none
    return None if hooks is None else hooks.get_hook(name)


def _computes(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point and dtype.itemsize > 1
