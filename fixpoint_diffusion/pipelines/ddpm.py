"""diffusers' DDPMPipeline, solved in parallel."""

from __future__ import annotations

from diffusers import DDPMPipeline

from fixpoint_diffusion.pipelines.parallel import ParallelPipeline


class ParallelDDPMPipeline(ParallelPipeline, DDPMPipeline):
    """``diffusers.DDPMPipeline`` with all of its steps solved at once; see :class:`ParallelDDIMPipeline`.

    Its noise is drawn before the solve, in the order in which the original draws it: the same ``generator`` gives the
    same images.

    Source: Ho, Jain, Abbeel, "Denoising Diffusion Probabilistic Models" (NeurIPS 2020), Eq. 6 and 7.

    Example:
        >>> import fixpoint, torch
        >>> from diffusers import DDPMScheduler
        >>> from fixpoint_diffusion import embedded
        >>> pipe = ParallelDDPMPipeline(embedded("ddpm-digits").model, DDPMScheduler(clip_sample=False))
        >>> pipe.set_progress_bar_config(disable=True)
        >>> generator = torch.manual_seed(0)
        >>> output = pipe(generator=generator, num_inference_steps=50, solver=fixpoint.Picard())
        >>> output.images[0].size, output.rounds < 50
        ((8, 8), True)
    """
