"""What no parallel pipeline can serve, by name: arguments, networks that keep a state, other loops."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from fixpoint_diffusion.inversion.problem import check_finite
from fixpoint_diffusion.processes.schedules import positive

_IP_ADAPTER = "IP adapters are not served"
_ARGUMENTS = {
    "ip_adapter_image": _IP_ADAPTER,
    "ip_adapter_image_embeds": _IP_ADAPTER,
    "negative_ip_adapter_image": _IP_ADAPTER,
    "negative_ip_adapter_image_embeds": _IP_ADAPTER,
    "skip_guidance_layers": "its guidance changes from step to step, and all steps are solved at once",
}
# By a part of the name of a pipeline's class.
_LOOPS = {
    "PAG": "its guidance asks the network again with other attention",
    "ControlNet": "its loop asks a second network in every step",
    "Adapter": "its adapter is no part of the pipelines that are served",
}


def check_arguments(arguments: Mapping[str, Any]) -> None:
    """Raise a ``ValueError`` that names an argument of a call which is not served."""
    for name, reason in _ARGUMENTS.items():
        if arguments.get(name) is not None:
            raise ValueError(f"{name} cannot be solved in parallel: {reason}")
    if arguments.get("num_inference_steps") is not None:
        positive("num_inference_steps", arguments["num_inference_steps"])


def check_latents(latents: Any, network: nn.Module) -> None:
    """Raise a ``ValueError`` for latents that no call starts from."""
    if not isinstance(latents, Tensor):
        raise ValueError(f"latents must be a tensor (B, *shape), got {type(latents).__name__}")
    # Images have their channels first, and tokens last.
    place, channels = 1 if latents.ndim > 3 else -1, getattr(network, "config", {}).get("in_channels")
    if not latents.numel() or latents.ndim < 3 or channels not in (None, latents.shape[place]):
        known = "" if channels is None else f" with {channels} channels"
        raise ValueError(f"this call is about samples of the shape (B, *shape){known}, not {tuple(latents.shape)}")
    check_finite("latents", latents, item="sample")


def check_pipeline(pipeline: Any, network: nn.Module) -> None:
    """Raise a ``ValueError`` for a network that keeps something from one step to the next, or a second network."""
    if getattr(network, "is_cache_enabled", False):
        raise ValueError(
            "the network keeps a cache from one step to the next, and all steps are solved at once: "
            "call its disable_cache()"
        )
    if getattr(pipeline, "transformer_2", None) is not None:
        raise ValueError(
            "a pipeline whose later steps ask another network (transformer_2) cannot be solved in parallel"
        )


def check_source(pipeline: Any) -> None:
    """Raise a ``ValueError`` for a pipeline of which only a part would be taken over."""
    name = type(pipeline).__name__
    for part, reason in _LOOPS.items():
        if part in name:
            raise ValueError(f"{name} cannot be solved in parallel: {reason}")
