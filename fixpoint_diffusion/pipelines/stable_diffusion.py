"""diffusers' StableDiffusionPipeline, solved in parallel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from diffusers import StableDiffusionPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.pipelines.stable_diffusion import StableDiffusionPipelineOutput
from torch import Tensor

from fixpoint import Solution
from fixpoint_diffusion.pipelines.parallel import AfterRound, Guidance, ParallelPipeline


@dataclass
class ParallelStableDiffusionPipelineOutput(StableDiffusionPipelineOutput):
    """diffusers' output, and what the parallel solve cost.

    Attributes:
        images, nsfw_content_detected: as in the original.
        rounds, evals, solution: as in :class:`ParallelImagePipelineOutput`.
    """

    rounds: int
    evals: int
    solution: Solution


class ParallelStableDiffusionPipeline(ParallelPipeline, StableDiffusionPipeline):
    """``diffusers.StableDiffusionPipeline`` with all of its steps solved at once; see :class:`ParallelDDIMPipeline`.

    ``callback_on_step_end(pipe, round, timestep, tensors)`` is called after every *round*, for there are no single
    steps: ``timestep`` is the last one and ``latents`` is the estimate of x_0 so far. It may stop the run
    (``pipe._interrupt = True``: the best latents so far are decoded) but not change it.

    Raises:
        ValueError: at a call with an image for an IP adapter, with one of diffusers' own callbacks, which change the
            guidance of later steps, or with a callback that returns other tensors than it was given.

    Source: Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models" (CVPR 2022).
    """

    _output = ParallelStableDiffusionPipelineOutput

    @property
    def num_timesteps(self) -> int:
        """T; the original counts what its loop was given."""
        return len(self.scheduler.timesteps)

    def _guidance(self, arguments: Mapping[str, Any]) -> Guidance | None:
        if not self.do_classifier_free_guidance:
            return None
        return Guidance(scale=self.guidance_scale, rescale=self.guidance_rescale)

    def _after_round(self, arguments: dict[str, Any]) -> AfterRound | None:
        callback, names = arguments["callback_on_step_end"], arguments["callback_on_step_end_tensor_inputs"]
        arguments["callback_on_step_end"] = None
        if callback is None:
            return None
        if isinstance(callback, PipelineCallback | MultiPipelineCallbacks):
            raise ValueError(f"{type(callback).__name__} changes later steps, which a parallel solve has no place for")

        def after_round(inputs: Mapping[str, Any], index: int, latents: Tensor) -> bool:
            prompts = inputs["encoder_hidden_states"]
            tensors = {
                "latents": latents.to(prompts.dtype),
                "prompt_embeds": prompts,
                "negative_prompt_embeds": prompts[: len(prompts) // 2] if self.do_classifier_free_guidance else None,
            }
            given = {name: tensors[name] for name in names}
            returned = callback(self, index, self.scheduler.timesteps[-1], dict(given))
            changed = [name for name, value in (returned or {}).items() if value is not given.get(name)]
            if changed:
                raise ValueError(f"the callback returned other tensors for {changed}; a parallel solve cannot use them")
            return self.interrupt

        return after_round
