"""Calls of parallel pipelines that leave nothing to solve, and latents that nothing starts from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch

from fixpoint_diffusion.pipelines import ParallelPipeline
from fixpoint_diffusion.pipelines.stand_ins import OneStep
from tests.fixpoint_diffusion.test_modern_pipelines import DDIM, FLOW, IMG2IMG, SD3, UNIPC, call_of, pair
from tests.fixpoint_diffusion.tiny import tiny_pipeline

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.mark.parametrize("return_dict", [True, False])
@pytest.mark.parametrize(
    ("scheduler", "call"), [(DDIM, {"strength": 0.0}), (DDIM, {"strength": 0.1}), (UNIPC, {"num_inference_steps": 1})]
)
def test_a_call_without_steps_says_so(scheduler: Any, call: dict[str, Any], return_dict: bool) -> None:
    _, parallel = pair(IMG2IMG, scheduler)
    with pytest.raises(ValueError, match="leaves no step to take: give more num_inference_steps, or a larger strength"):
        parallel(**{**call_of("image, DDPM"), **call, "return_dict": return_dict})


@pytest.mark.parametrize("steps", [0, -1, 2.5, True])
def test_steps_are_a_whole_number(steps: Any) -> None:
    _, parallel = pair(SD3, FLOW)
    with pytest.raises(ValueError, match=f"num_inference_steps must be an integer of at least 1, got {steps!r}"):
        parallel(**call_of("SD3", num_inference_steps=steps))


@pytest.mark.parametrize(
    ("shape", "value", "message"),
    [
        ((1, 4, 4, 4), float("nan"), "latents must be finite; it is not in sample 0"),
        ((1, 4, 4, 4), float("inf"), "latents must be finite"),
        ((0, 4, 4, 4), 1.0, r"samples of the shape \(B, \*shape\) with 4 channels, not \(0, 4, 4, 4\)"),
        ((1, 3, 4, 4), 1.0, r"with 4 channels, not \(1, 3, 4, 4\)"),
        ((5,), 1.0, r"with 4 channels, not \(5,\)"),
    ],
)
def test_latents_that_nothing_starts_from_are_refused(shape: tuple[int, ...], value: float, message: str) -> None:
    _, parallel = pair(SD3, FLOW)
    with pytest.raises(ValueError, match=message):
        parallel(**call_of("SD3", latents=torch.full(shape, value)))


def test_a_loop_that_changes_the_latents_between_steps_is_refused() -> None:
    class ParallelInpainting(ParallelPipeline, diffusers.StableDiffusionInpaintPipeline):
        pass

    # With an ordinary network, the part to be kept is put back after each step.
    original = diffusers.StableDiffusionInpaintPipeline(**tiny_pipeline("StableDiffusionPipeline").components)
    parallel = ParallelInpainting.from_pipe(original)
    side = original.unet.config.sample_size * original.vae_scale_factor
    mask = torch.zeros(1, 1, side, side)
    mask[..., side // 2 :] = 1
    call = {"prompt": "a", "image": torch.rand(1, 3, side, side), "mask_image": mask, "height": side, "width": side}
    with pytest.raises(ValueError, match="changes the latents after the scheduler's step"):
        parallel(**call, num_inference_steps=3, strength=1.0)


def stepped() -> tuple[OneStep, torch.Tensor]:
    owner = OneStep(diffusers.DDIMScheduler(), lambda _: torch.ones(2, 3))
    (latents,) = owner.step(torch.ones(2, 3), 0, torch.ones(2, 3), return_dict=False)
    return owner, latents


@pytest.mark.parametrize(
    "change",
    [
        lambda x: 0.5 * x,
        lambda x: torch.where(torch.tensor(True), torch.zeros(()), x),
        lambda x: torch.cat([x, x]),
        lambda x: torch.lerp(input=torch.zeros(2, 3), end=x, weight=0.5),
        lambda x: x.mul_(2),
        lambda x: x.__setitem__(0, 1.0),
        lambda x: x.to(torch.float64).clone() + 1,
    ],
)
def test_what_is_computed_with_latents_after_their_step_is_noticed(change: Callable[[torch.Tensor], Any]) -> None:
    owner, latents = stepped()
    with pytest.raises(ValueError, match="changes the latents"):
        change(latents)
    owner.ended = True
    _, fresh = stepped()
    fresh.owner.ended = True  # type: ignore[attr-defined]
    change(fresh)


def test_latents_after_their_step_may_be_cast_copied_and_asked_for_their_shape() -> None:
    _, latents = stepped()
    kept = latents.to(torch.float64).detach().clone()
    assert (kept.shape, kept.dtype, kept.device.type) == ((2, 3), torch.float64, "cpu")


def test_errors_of_diffusers_name_the_scheduler_of_the_pipeline() -> None:
    _, parallel = pair("StableDiffusionPipeline", ("EulerAncestralDiscreteScheduler", {}))
    with pytest.raises(ValueError, match=r"EulerAncestralDiscreteScheduler.*custom timestep"):
        parallel("a", height=8, width=8, timesteps=[900, 700])
