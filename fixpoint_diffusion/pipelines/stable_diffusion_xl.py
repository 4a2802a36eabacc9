"""diffusers' StableDiffusionXLPipeline, solved in parallel."""

from __future__ import annotations

from diffusers import StableDiffusionXLPipeline

from fixpoint_diffusion.pipelines.parallel import ParallelPipeline


class ParallelStableDiffusionXLPipeline(ParallelPipeline, StableDiffusionXLPipeline):
    """``diffusers.StableDiffusionXLPipeline`` with all of its steps solved at once.

    With ``denoising_end``, the steps up to there. Callbacks and errors are those of
    :class:`ParallelStableDiffusionPipeline`.

    Source: Podell et al., "SDXL: Improving Latent Diffusion Models for High-Resolution Image Synthesis" (2023).

    Example:
        See :class:`fixpoint_diffusion.pipelines.ParallelDDIMPipeline`, which is made and called alike.
    """
