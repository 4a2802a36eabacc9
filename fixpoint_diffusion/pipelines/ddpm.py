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
        >>> import torch
        >>> from diffusers import DDPMScheduler, UNet2DModel
        >>> unet = UNet2DModel(8, 1, 1, layers_per_block=1, block_out_channels=(8, 8), norm_num_groups=4,
        ...     down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)
        >>> pipe = ParallelDDPMPipeline(unet, DDPMScheduler())
        >>> pipe.set_progress_bar_config(disable=True)
        >>> output = pipe(generator=torch.manual_seed(0), num_inference_steps=20)
        >>> output.images[0].size, output.rounds <= 20
        ((8, 8), True)
    """
