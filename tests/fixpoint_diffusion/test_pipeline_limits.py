"""Calls of parallel pipelines that leave nothing to solve, and latents that nothing starts from."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.fixpoint_diffusion.test_modern_pipelines import DDIM, FLOW, IMG2IMG, SD3, UNIPC, call_of, pair

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
