"""diffusers' DiTPipeline, solved in parallel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusers import DiTPipeline

from fixpoint_diffusion.pipelines.inversion import InversionMixin
from fixpoint_diffusion.pipelines.loops import Guidance


class ParallelDiTPipeline(InversionMixin, DiTPipeline):
    """``diffusers.DiTPipeline`` with all of its steps solved at once; see :class:`ParallelDDIMPipeline`.

    Source: Peebles and Xie, "Scalable Diffusion Models with Transformers" (ICCV 2023).

    Example:
        >>> import torch
        >>> from diffusers import AutoencoderKL, DDIMScheduler, DiTTransformer2DModel
        >>> transformer = DiTTransformer2DModel(2, 8, 4, 8, num_layers=1, norm_num_groups=4, sample_size=4)
        >>> vae = AutoencoderKL(latent_channels=4, norm_num_groups=4, block_out_channels=(8,), sample_size=4)
        >>> pipe = ParallelDiTPipeline(transformer, vae, DDIMScheduler(clip_sample=False))
        >>> pipe.set_progress_bar_config(disable=True)
        >>> output = pipe([3, 7], guidance_scale=4.0, generator=torch.manual_seed(0), output_type="pt")
        >>> output.images.shape, output.rounds < 50
        (torch.Size([2, 3, 4, 4]), True)
    """

    _network = "transformer"

    def _guidance(self, arguments: Mapping[str, Any], *, doubled: bool) -> Guidance | None:
        """The loop carries the latents of a guided batch twice."""
        scale = arguments["guidance_scale"]
        return Guidance(scale=scale, negative_first=False) if scale > 1 else None
