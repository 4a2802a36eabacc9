"""diffusers' DDIMPipeline, solved in parallel."""

from __future__ import annotations

from diffusers import DDIMPipeline

from fixpoint_diffusion.pipelines.inversion import InversionMixin


class ParallelDDIMPipeline(InversionMixin, DDIMPipeline):
    """``diffusers.DDIMPipeline`` with all of its steps solved at once.

    Made like the original, by its constructor, ``from_pretrained`` on a folder or ``from_pipe`` on a loaded pipeline,
    and called like it, with ``solver``, ``rtol`` and ``max_rows`` besides. An ``eta`` above 1 is legal up to the
    largest that leaves no step a negative variance.

    Source: Song, Meng, Ermon, "Denoising Diffusion Implicit Models" (ICLR 2021), Eq. 12 and 16.

    Example:
        >>> import fixpoint, torch
        >>> from diffusers import DDIMScheduler
        >>> from fixpoint_diffusion import embedded
        >>> pipe = ParallelDDIMPipeline(embedded("ddpm-digits").model, DDIMScheduler(clip_sample=False))
        >>> pipe.set_progress_bar_config(disable=True)
        >>> output = pipe(generator=torch.manual_seed(0), output_type="pt", solver=fixpoint.Anderson(), rtol=1e-4)
        >>> output.images.shape, output.rounds < 50
        (torch.Size([1, 1, 8, 8]), True)
    """
