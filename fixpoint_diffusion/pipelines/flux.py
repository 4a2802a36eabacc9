"""diffusers' FluxPipeline, solved in parallel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusers import FluxPipeline
from torch import Tensor

from fixpoint_diffusion.pipelines.loops import Guidance
from fixpoint_diffusion.pipelines.parallel import ParallelPipeline


class ParallelFluxPipeline(ParallelPipeline, FluxPipeline):
    """``diffusers.FluxPipeline`` with all of its steps solved at once.

    Guidance is the network's own (``guidance_scale`` of a distilled one) and, with a negative prompt, true guidance
    (``true_cfg_scale``). ``latents`` are packed, ``(B, L, C)``. Callbacks and errors are those of
    :class:`ParallelStableDiffusionPipeline`.

    Source: Black Forest Labs, FLUX.1 (2024).

    Example:
        See :class:`fixpoint_diffusion.pipelines.ParallelDDIMPipeline`, which is made and called alike.
    """

    _network = "transformer"
    _shared = ("txt_ids", "img_ids")

    def _told(self, timestep: Tensor) -> Tensor:
        return timestep.to(self.transformer.dtype) / 1000

    def _guidance(self, arguments: Mapping[str, Any], *, doubled: bool) -> Guidance | None:
        return Guidance(scale=arguments["true_cfg_scale"]) if doubled else None
