"""diffusers' StableDiffusionPipeline, solved in parallel."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass
from functools import partial
from typing import Any

from diffusers import StableDiffusionPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.pipelines.stable_diffusion import StableDiffusionPipelineOutput
from torch import Tensor

from fixpoint import Solution
from fixpoint_diffusion.pipelines.callbacks import CANNOT_CHANGE, check_returned, check_unchanged, read_only, state_of
from fixpoint_diffusion.pipelines.inversion import InversionMixin
from fixpoint_diffusion.pipelines.parallel import AfterRound, Guidance


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

    def _after_round(self, arguments: dict[str, Any], shared: StableDiffusionPipeline) -> AfterRound:
        callback, names = arguments["callback_on_step_end"], arguments["callback_on_step_end_tensor_inputs"]
        arguments["callback_on_step_end"] = None
        if isinstance(callback, PipelineCallback | MultiPipelineCallbacks):
            raise ValueError(f"{type(callback).__name__} changes later steps; {CANNOT_CHANGE}")
        if arguments["kwargs"].get("callback"):
            arguments["kwargs"]["callback"] = partial(self._look, shared, arguments["kwargs"]["callback"])
        shared._interrupt = False

        def after_round(inputs: Mapping[str, Any], index: int, latents: Tensor) -> bool:
            if callback is not None:
                tensors = self._tensors(inputs["encoder_hidden_states"], latents)
                given = {name: None if tensors[name] is None else tensors[name].clone() for name in names}
                settings = {name: copy(value) for name, value in inputs.items() if not isinstance(value, Tensor)}
                before = state_of(self.scheduler, self.unet)
                with read_only(self, shared):
                    returned = callback(self, index, self.scheduler.timesteps[-1], dict(given))
                after = {**given, **inputs, **state_of(self.scheduler, self.unet)}
                check_unchanged(tensors | settings | before, after, how="changed in place")
                check_returned(tensors, returned)
            return bool(self.interrupt or shared.interrupt)

        return after_round

    def _tensors(self, prompts: Tensor, latents: Tensor) -> dict[str, Any]:
        """All that a callback may ask for, as the original's loop holds it."""
        negative = prompts[: len(prompts) // 2] if self.do_classifier_free_guidance else None
        return {"latents": latents.to(prompts.dtype), "prompt_embeds": prompts, "negative_prompt_embeds": negative}

    def _look(self, shared: Any, callback: Callable[..., Any], index: int, timestep: Tensor, latents: Tensor) -> None:
        """Call the deprecated ``callback``, which comes once, at the end, and returns nothing."""
        given = latents.clone()
        with read_only(self, shared):
            callback(index, timestep, given)
        check_unchanged({"latents": latents}, {"latents": given}, how="changed in place")
