"""Schedulers of diffusers where they end: no steps, steps without noise, scalar samples, empty batches, parts."""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

import fixpoint
import fixpoint_diffusion
from fixpoint_diffusion.chains import chain_from_scheduler
from fixpoint_diffusion.processes import SERVED, solver_transitions

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

X_T = torch.randn(2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def denoiser(x: Tensor, t: Tensor) -> Tensor:
    return torch.sin(2 * x) * (0.5 + t.to(x) / 2000).reshape(-1, *[1] * (x.ndim - 1))


@pytest.mark.parametrize("name", [*SERVED, "DDIMScheduler", "DDPMScheduler"])
@pytest.mark.parametrize("steps", [0, -1, True, 2.5, "3"])
def test_steps_that_are_no_number_of_steps_are_refused(name: str, steps: Any) -> None:
    with pytest.raises(ValueError, match=f"steps must be an integer of at least 1, got {steps!r}"):
        chain_from_scheduler(denoiser, X_T, {"_class_name": name}, steps=steps)


def test_a_number_of_steps_may_be_numpys() -> None:
    assert chain_from_scheduler(denoiser, X_T, {"_class_name": "UniPCMultistepScheduler"}, steps=np.int64(4)).steps == 4


@pytest.mark.parametrize("name", ["FlowMatchEulerDiscreteScheduler", "EulerAncestralDiscreteScheduler"])
@pytest.mark.parametrize("x_T", [[[1.0, 2.0]], np.ones((2, 3)), torch.tensor(1.0), torch.ones(2, dtype=torch.int64)])
def test_what_is_no_batch_of_latents_is_refused(name: str, x_T: Any) -> None:
    with pytest.raises(ValueError, match="x_T must be a floating-point tensor"):
        chain_from_scheduler(denoiser, x_T, {"_class_name": name}, steps=4)


@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerAncestralDiscreteScheduler", "UniPCMultistepScheduler"])
@pytest.mark.parametrize("shape", [(5,), (0, 3), (0, 2, 2)])
@pytest.mark.parametrize("solver", [None, fixpoint.Picard()])
def test_samples_may_be_numbers_and_batches_empty(name: str, shape: tuple[int, ...], solver: Any) -> None:
    x_T = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    chain = chain_from_scheduler(denoiser, x_T, {"_class_name": name}, steps=6)
    options = {} if solver is None else {"solver": solver}
    images = fixpoint_diffusion.sample(chain, rtol=1e-8, **options).images
    torch.testing.assert_close(images, chain.sequential(trajectory=False), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("solver", [None, fixpoint.Picard()])
def test_a_flow_may_come_to_the_image_before_its_last_step(solver: Any) -> None:
    """As with ``sigmas=np.linspace(1, 0, n)``: diffusers adds another 0, and the last step changes nothing."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=[0.9, 0.5, 0.0])
    chain = chain_from_scheduler(denoiser, X_T, scheduler, steps=None)
    x = X_T.clone()
    for t in scheduler.timesteps:
        x = scheduler.step(denoiser(x, t.expand(2)), t, x).prev_sample
    torch.testing.assert_close(chain.sequential(trajectory=False), x, rtol=1e-5, atol=1e-5)
    options = {} if solver is None else {"solver": solver}
    result = fixpoint_diffusion.sample(chain, rtol=1e-8, **options)
    assert bool(result.solution.converged.all())
    torch.testing.assert_close(result.images, x, rtol=1e-5, atol=1e-5)


def test_steps_that_stay_where_there_is_no_signal_are_refused() -> None:
    """A shift so large that the first sigmas are all 1 in float32."""
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 1e9}
    with pytest.raises(ValueError, match="FlowMatchEulerDiscreteScheduler makes coefficients that are not finite"):
        chain_from_scheduler(denoiser, X_T, config, steps=6)


def test_an_order_that_the_last_step_does_not_allow_is_refused() -> None:
    """Where diffusers' own step ends in a singular system."""
    config = {"_class_name": "UniPCMultistepScheduler", "solver_order": 3, "lower_order_final": False}
    with pytest.raises(ValueError, match="UniPCMultistepScheduler makes coefficients that are not finite"):
        chain_from_scheduler(denoiser, X_T, config, steps=10)


@pytest.mark.parametrize("part", [slice(None, None, 2), slice(None, None, -1), slice(3, 3), slice(9, None)])
def test_a_part_is_of_steps_one_after_another(part: slice) -> None:
    chain = chain_from_scheduler(denoiser, X_T, {"_class_name": "DDIMScheduler"}, steps=6)
    with pytest.raises(ValueError, match="expected a slice of at least one of 6 steps, without gaps"):
        chain.transitions.part(part)


def test_no_part_looks_back_at_what_is_not_in_it() -> None:
    scheduler = diffusers.UniPCMultistepScheduler(solver_order=3)
    scheduler.set_timesteps(8)
    whole = solver_transitions(scheduler)
    with pytest.raises(ValueError, match="steps from 2 on look back at predictions before them"):
        whole.part(slice(2, None))
    assert whole.part(slice(0, 5)).steps == 5
    assert solver_transitions(scheduler, part=slice(2, None)).part(slice(0, 4)).steps == 4
    with pytest.raises(ValueError, match="no steps are left of the 8 timesteps"):
        solver_transitions(scheduler, part=slice(8, None))


def test_samples_that_are_numbers_are_inverted() -> None:
    x_0 = torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64)
    config = {"_class_name": "EulerDiscreteScheduler"}
    chain = chain_from_scheduler(lambda x, t: 0.5 * x, torch.zeros_like(x_0), config, steps=8)
    inverse = fixpoint_diffusion.invert(chain, x_0, rtol=1e-6)
    assert bool(inverse.converged.all())
    torch.testing.assert_close(chain.sequential(x_T=inverse.x_T, trajectory=False), x_0, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["rtol", "atol"])
@pytest.mark.parametrize("value", [-1.0, float("nan")])
def test_tolerances_of_an_inverse_are_checked_before_any_round(name: str, value: float) -> None:
    chain = chain_from_scheduler(denoiser, X_T, {"_class_name": "DDIMScheduler", "clip_sample": False}, steps=8)
    with pytest.raises(ValueError, match=f"{name} must be at least 0, got {value}"):
        fixpoint_diffusion.invert(chain, X_T, **{name: value})
    assert chain.rounds == 0


def test_deterministic_steps_may_go_back_to_more_noise() -> None:
    """As sigmas do that rounding has put in another order, or a caller."""
    scheduler = diffusers.EulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=[1.0, 3.0, 10.0])
    chain = chain_from_scheduler(denoiser, X_T, scheduler, steps=None)
    assert bool((chain.transitions.sigma == 0).all())
    x = X_T * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        x = scheduler.step(denoiser(scheduler.scale_model_input(x, t), t.expand(2)), t, x).prev_sample
    found = chain.transitions.scales[-1] * chain.sequential(trajectory=False)
    torch.testing.assert_close(found, x, rtol=1e-5, atol=1e-5)
