"""Plain DDIM inversion, against diffusers' own scheduler for it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from fixpoint import Status
from fixpoint_diffusion import ExplicitInverse, ParallelInverse, invert
from fixpoint_diffusion.chains import SamplingChain, chain_from_scheduler

PLAIN = {"clip_sample": False}


def denoiser(x: Tensor, t: Tensor) -> Tensor:
    """Bends, mixes entries, and knows the timestep."""
    return 0.5 * x + 0.2 * torch.sin(x.roll(1, 1) + t.reshape(-1, 1) / 300)


def images() -> Tensor:
    return torch.rand(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 1.6 - 0.8


def chain_of(scheduler: DDIMScheduler, x_0: Tensor, steps: int) -> SamplingChain:
    return chain_from_scheduler(denoiser, torch.zeros_like(x_0), scheduler, steps=steps)


@pytest.mark.parametrize("steps", [1, 7, 20])
@pytest.mark.parametrize(
    "config",
    [
        PLAIN,
        {**PLAIN, "set_alpha_to_one": False, "steps_offset": 1, "beta_schedule": "scaled_linear"},
        {**PLAIN, "timestep_spacing": "trailing", "prediction_type": "v_prediction"},
        {**PLAIN, "prediction_type": "v_prediction"},
        # 1 - alpha is 1e-4 with the usual betas, of which float32 in diffusers keeps three digits.
        {**PLAIN, "prediction_type": "sample", "set_alpha_to_one": False, "beta_start": 0.02},
        {"clip_sample": True, "clip_sample_range": 0.3},
    ],
)
def test_it_is_what_diffusers_inverse_scheduler_does(config: dict[str, Any], steps: int) -> None:
    scheduler, x_0 = DDIMScheduler(**config), images()
    theirs = DDIMInverseScheduler.from_config(scheduler.config)
    theirs.set_timesteps(steps)
    x = x_0
    for t in theirs.timesteps:
        x = theirs.step(denoiser(x, t.expand(len(x))), int(t), x).prev_sample
    chain = chain_of(scheduler, x_0, steps)
    inverse = invert(chain, x_0, method=ExplicitInverse(), on_failure="ignore")
    torch.testing.assert_close(inverse.x_T, x, rtol=1e-5, atol=1e-5)
    assert (inverse.rounds, inverse.evals) == (steps, 3 * steps)
    again = SamplingChain(denoiser, inverse.x_T, chain.transitions).sequential()[:, -1]
    torch.testing.assert_close(inverse.error, (again - x_0).square().mean(dim=1).sqrt())


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_along_a_flow_it_is_eulers_method_backwards(shift: float) -> None:
    scheduler, x = FlowMatchEulerDiscreteScheduler(shift=shift), images()
    scheduler.set_timesteps(6)
    for k in reversed(range(6)):
        x = x + (scheduler.sigmas[k] - scheduler.sigmas[k + 1]) * denoiser(x, scheduler.timesteps[k].expand(len(x)))
    chain = chain_from_scheduler(denoiser, torch.zeros_like(x), scheduler, steps=6)
    inverse = invert(chain, images(), method=ExplicitInverse(), on_failure="ignore")
    torch.testing.assert_close(inverse.x_T, x, rtol=1e-5, atol=1e-5)


def test_an_image_that_is_predicted_says_nothing_of_the_noise_at_its_own_level() -> None:
    """There, diffusers divides by zero."""
    x_0, scheduler = images(), DDIMScheduler(**PLAIN, prediction_type="sample")
    inverse = invert(chain_of(scheduler, x_0, 20), x_0, method=ExplicitInverse(), on_failure="ignore")
    assert torch.isfinite(inverse.x_T).all()


def test_the_exact_inverse_is_better() -> None:
    x_0, scheduler = images(), DDIMScheduler(**PLAIN)
    plain = invert(chain_of(scheduler, x_0, 20), x_0, method=ExplicitInverse(), on_failure="ignore")
    exact = invert(chain_of(scheduler, x_0, 20), x_0, method=ParallelInverse(), rtol=1e-4)
    assert not plain.converged.any()
    assert (exact.error < plain.error / 50).all()
    assert exact.rounds < plain.rounds


def test_one_sample_that_is_lost_is_lost_alone() -> None:
    def broken(x: Tensor, t: Tensor) -> Tensor:
        return torch.where(x[:, :1] > 5, torch.nan, denoiser(x, t))

    x_0 = images()
    x_0[1] = 6
    chain = chain_from_scheduler(broken, torch.zeros_like(x_0), DDIMScheduler(**PLAIN), steps=10)
    inverse = invert(chain, x_0, method=ExplicitInverse(), on_failure="ignore")
    assert inverse.status.tolist() == [Status.MAX_EVALS, Status.NON_FINITE, Status.MAX_EVALS]
    assert torch.isfinite(inverse.error).tolist() == [True, False, True]
