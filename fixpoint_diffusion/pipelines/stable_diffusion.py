"""diffusers' StableDiffusionPipeline, from noise and from an image, solved in parallel."""

from __future__ import annotations

from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline

from fixpoint_diffusion.pipelines.inversion import InversionMixin
from fixpoint_diffusion.pipelines.parallel import ParallelPipeline


class ParallelStableDiffusionPipeline(InversionMixin, StableDiffusionPipeline):
    """``diffusers.StableDiffusionPipeline`` with all of its steps solved at once; see :class:`ParallelDDIMPipeline`.

    ``callback_on_step_end(pipe, round, timestep, tensors)`` is called after every *round*, for there are no single
    steps: ``timestep`` is the last one and ``latents`` is the estimate of x_0 so far. It may stop the run
    (``pipe._interrupt = True``: the best latents so far are decoded) but not change it. It is given the copy of the
    pipeline that this call works on: ``_interrupt`` there stops this call alone, on the pipeline itself the calls of
    all threads.

    Raises:
        ValueError: at a call with an image for an IP adapter, with one of diffusers' own callbacks, which change the
            guidance of later steps, or with a callback that sets ``pipe._guidance_scale``, another setting of the run
            or a component, that changes in place a tensor it was given, the ``cross_attention_kwargs``, the
            scheduler or the network's weights, or that returns another tensor.

    Source: Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models" (CVPR 2022).

    Example:
        See :class:`fixpoint_diffusion.pipelines.ParallelDDIMPipeline`, which is made and called alike.
    """


class ParallelStableDiffusionImg2ImgPipeline(ParallelPipeline, StableDiffusionImg2ImgPipeline):
    """``diffusers.StableDiffusionImg2ImgPipeline``, whose steps are those that ``strength`` leaves.

    Callbacks and errors are those of :class:`ParallelStableDiffusionPipeline`; there are no ``latents`` to give.

    Source: Meng et al., "SDEdit: Guided Image Synthesis and Editing with Stochastic Differential Equations"
    (ICLR 2022).

    Example:
        See :class:`fixpoint_diffusion.pipelines.ParallelDDIMPipeline`, which is made and called alike.
    """
