"""diffusers' StableDiffusion3Pipeline, solved in parallel."""

from __future__ import annotations

from diffusers import StableDiffusion3Pipeline

from fixpoint_diffusion.pipelines.parallel import ParallelPipeline


class ParallelStableDiffusion3Pipeline(ParallelPipeline, StableDiffusion3Pipeline):
    """``diffusers.StableDiffusion3Pipeline`` with all of its steps solved at once.

    Callbacks and errors are those of :class:`ParallelStableDiffusionPipeline`; ``skip_guidance_layers`` are refused,
    for they are skipped in some steps only.

    Source: Esser et al., "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis" (ICML 2024).

    Example:
        See :class:`fixpoint_diffusion.pipelines.ParallelDDIMPipeline`, which is made and called alike.
    """

    _network = "transformer"
