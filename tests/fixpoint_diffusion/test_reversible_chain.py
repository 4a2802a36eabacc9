"""The sampler that can be run backwards: exact round trips, second order, equal in parallel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import fixpoint
from fixpoint_diffusion import DDIMChain, NoiseSchedule, embedded, initial_noise
from fixpoint_diffusion.chains import ReversibleChain
from fixpoint_diffusion.processes import Clip
from fixpoint_diffusion.training.data import load_digits, split_held_out

SCHEDULE = NoiseSchedule.linear()
X_T = initial_noise(0, range(2), (3,), dtype=torch.float64)


def test_digits_come_back_to_rounding() -> None:
    denoiser, images = embedded("ddpm-digits"), split_held_out(load_digits())[1].images[:2].double()
    options: dict[str, Any] = {"schedule": NoiseSchedule.from_diffusers(denoiser.schedule_config), "steps": 10}
    with torch.no_grad():
        first = ReversibleChain(denoiser, images, **options)
        pair = first.invert(images)
        assert first.ddim.rounds == 10
        chain = ReversibleChain(denoiser, pair, pair=True, **options)
        found = chain.sequential()[:, -1, 1]
    torch.testing.assert_close(found, images, rtol=0, atol=1e-4)
    assert float((DDIMChain(denoiser, pair[:, 0], **options).sequential()[:, -1] - images).abs().max()) > 1e-2


def test_a_sampled_image_has_the_pair_it_was_sampled_from(mixture: Callable[..., Any]) -> None:
    """Where the latent before the image is the sampler's own."""
    chain = ReversibleChain(mixture(SCHEDULE), X_T, SCHEDULE, steps=12)
    pairs = chain.sequential()
    found = chain.invert(pairs[:, -1, 1])
    again = ReversibleChain(mixture(SCHEDULE), found, SCHEDULE, pair=True, steps=12).sequential()
    torch.testing.assert_close(again[:, -1, 1], pairs[:, -1, 1])


def test_it_is_of_second_order(gaussian: Callable[..., Any]) -> None:
    """Steps of equal size in s, on the exact flow of a Gaussian: half the step, a quarter of the error."""
    a_0 = float(SCHEDULE.alphas_cumprod[600])
    s_0, mean, variance = ((1 - a_0) / a_0) ** 0.5, 0.7, 0.3
    errors = []
    for steps in (20, 40, 80):
        s = torch.linspace(s_0, 0, steps + 1, dtype=torch.float64)
        levels = 1 / (1 + s**2)

        def denoiser(x: torch.Tensor, t: torch.Tensor, levels: torch.Tensor = levels) -> torch.Tensor:
            a = levels[t][:, None]
            return (1 - a).sqrt() * (x - a.sqrt() * mean) / (a * variance + 1 - a)

        schedule = NoiseSchedule(alphas_cumprod=levels.flip(0)[1:], final_alpha=1.0)
        chain = ReversibleChain(
            lambda x, t, steps=steps, f=denoiser: f(x, steps - 1 - t),
            X_T,
            schedule,
            timesteps=torch.arange(steps).flip(0),
        )
        found = chain.sequential()[:, -1, 1]
        # y - mean shrinks with the standard deviation of y = x / sqrt(a).
        exact = mean + (X_T / a_0**0.5 - mean) * (variance / (variance + s_0**2)) ** 0.5
        errors.append(float((found - exact).abs().max()))
    assert errors[0] / errors[1] > 3
    assert errors[1] / errors[2] > 3


def test_all_pairs_at_once_are_those_one_after_another(mixture: Callable[..., Any]) -> None:
    chain = ReversibleChain(mixture(SCHEDULE), X_T, SCHEDULE, steps=30)
    expected = chain.sequential()
    solved = fixpoint.solve(chain, solver=fixpoint.CausalQuasiNewton(), rtol=1e-8, max_evals=31, backward=None)
    torch.testing.assert_close(solved.value, expected, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(chain(expected), expected)


def test_what_cannot_be_reversed_is_refused() -> None:
    with pytest.raises(ValueError, match="at least two steps"):
        ReversibleChain(lambda x, t: x, X_T, SCHEDULE, steps=1)
    clipped = NoiseSchedule(alphas_cumprod=SCHEDULE.alphas_cumprod, final_alpha=1.0, x0_hook=Clip(1.0))
    with pytest.raises(ValueError, match="cannot be reversed"):
        ReversibleChain(lambda x, t: x, X_T, clipped, steps=4)
    zero = SCHEDULE.zero_terminal_snr()
    with pytest.raises(ValueError, match="without"):
        ReversibleChain(lambda x, t: x, X_T, zero, steps=4, spacing="trailing", prediction_type="v_prediction")
