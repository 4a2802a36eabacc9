"""Chains at their limits: clipped predictions, steps between any levels, half precision, what breaks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fixpoint
from fixpoint_diffusion import (
    DDIMChain,
    NoiseSchedule,
    SamplingChain,
    StochasticDDIMChain,
    Transitions,
    initial_noise,
    invert,
    sample,
)
from fixpoint_diffusion.processes import Clip

LINEAR = NoiseSchedule.linear()
X_T = initial_noise(0, range(2), (3,), dtype=torch.float64)


def make_chain(denoiser, eta: float, x_T: Tensor = X_T, **options) -> DDIMChain:
    if eta == 0:
        return DDIMChain(denoiser, x_T, LINEAR, **options)
    return StochasticDDIMChain(denoiser, x_T, LINEAR, eta=eta, seed=5, **options)


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_clipped_chain_equals_its_sequential_run(mixture, prediction_type: str, eta: float) -> None:
    denoiser = mixture(LINEAR, prediction_type)
    chain = make_chain(denoiser, eta, steps=15, clip_sample=0.6)
    expected = chain.sequential()
    assert not torch.allclose(expected, make_chain(denoiser, eta, steps=15).sequential())
    result = sample(chain, solver=fixpoint.Picard(), rtol=1e-12)
    torch.testing.assert_close(result.trajectory, expected, rtol=1e-8, atol=1e-8)
    assert float(result.images.abs().max()) <= 0.6 + 1e-12  # the last step ends at its own prediction


def test_noise_is_derived_from_the_clipped_image_only_when_asked() -> None:
    alphas, arrive = torch.tensor([0.25], dtype=torch.float64), torch.tensor([0.64], dtype=torch.float64)
    x, out, t = torch.tensor([[2.0]]).double(), torch.tensor([[0.5]]).double(), torch.tensor([500])
    # x_0 = (2 - sqrt(0.75) / 2) / 0.5 is clipped to 1.
    for again, eps in ((False, 0.5), (True, (2 - 0.5) / 0.75**0.5)):
        steps = Transitions.between(t, alphas, arrive, x0_hook=Clip(1.0), noise_from_clipped=again)
        assert float(steps.step(x, out, 0)) == pytest.approx(0.8 * 1 + 0.6 * eps)


@pytest.mark.parametrize("clip_sample", [0.0, -1.0, float("nan")])
def test_clipping_to_nothing_is_refused(mixture, clip_sample: float) -> None:
    with pytest.raises(ValueError, match="clip_sample must be a positive number"):
        make_chain(mixture(LINEAR), 0.0, steps=5, clip_sample=clip_sample)


def test_steps_may_arrive_elsewhere_than_the_next_one_starts(mixture) -> None:
    """By the rule of DDIM for each step, written out; and the cumulative form knows the gaps."""
    timesteps = torch.tensor([900, 600, 250, 10])
    alphas = LINEAR.alphas_cumprod[timesteps]
    arrive = torch.tensor([0.02, 0.3, 0.9, 0.999], dtype=torch.float64)
    denoiser = mixture(LINEAR)
    chain = SamplingChain(denoiser, X_T, Transitions.between(timesteps, alphas, arrive))
    x, latents = X_T, []
    for t, a, b in zip(timesteps, alphas, arrive, strict=True):
        eps = denoiser(x, t.expand(2))
        x = b.sqrt() * (x - (1 - a).sqrt() * eps) / a.sqrt() + (1 - b).sqrt() * eps
        latents.append(x)
    torch.testing.assert_close(chain.sequential(), torch.stack(latents, dim=1), rtol=1e-10, atol=1e-10)
    result = sample(chain, solver=fixpoint.Picard(), rtol=1e-12)
    torch.testing.assert_close(result.trajectory, torch.stack(latents, dim=1), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_half_precision_denoisers_serve_single_precision_chains_exactly(mixture, eta: float) -> None:
    def half(x: Tensor, t: Tensor) -> Tensor:
        return mixture(LINEAR)(x.half(), t).to(x.dtype)

    chain = make_chain(half, eta, X_T.float(), steps=12)
    result = sample(chain, solver=fixpoint.Picard(), rtol=1e-6)
    torch.testing.assert_close(result.trajectory, chain.sequential(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_half_precision_chains_are_as_near_as_their_latents_are_fine(mixture, dtype: torch.dtype, eta: float) -> None:
    fine = make_chain(mixture(LINEAR), eta, X_T, steps=12).sequential()
    chain = make_chain(mixture(LINEAR), eta, X_T.to(dtype), steps=12)
    result = sample(chain, solver=fixpoint.Picard(), rtol=1e-3)
    assert result.images.dtype == dtype
    torch.testing.assert_close(result.images.double(), fine[:, -1], rtol=0, atol=4 * torch.finfo(dtype).eps)


def broken(mixture, where: int):
    """Not a number for the sample far away, at one of the timesteps."""

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        return torch.where((x[:, :1] > 100) & (t[:, None] <= where), torch.nan, mixture(LINEAR)(x, t))

    return denoiser


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("where", [999, 500])
def test_a_denoiser_that_breaks_on_one_sample_spoils_no_other(mixture, where: int, eta: float) -> None:
    x_T = torch.tensor([[0.5, -1.0, 0.3], [1e6, 1e6, 1e6]], dtype=torch.float64)
    result = sample(
        make_chain(broken(mixture, where), eta, x_T, steps=10), solver=fixpoint.Picard(), rtol=1e-9, on_failure="ignore"
    )
    assert result.solution.status.tolist() == [fixpoint.Status.CONVERGED, fixpoint.Status.NON_FINITE]
    expected = make_chain(mixture(LINEAR), eta, x_T[:1], steps=10).sequential()
    torch.testing.assert_close(result.trajectory[:1], expected, rtol=1e-7, atol=1e-7)


def test_one_step_chain_is_the_denoiser_once(mixture) -> None:
    chain = make_chain(mixture(LINEAR), 0.0, steps=1)
    result = sample(chain, solver=fixpoint.Picard(), rtol=1e-12)
    assert (result.rounds, result.evals) == (1, 2)
    torch.testing.assert_close(result.trajectory, chain.sequential(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: DDIMChain(torch.tanh, X_T, torch.linspace(1e-4, 0.02, 10)), "from_betas"),
        (lambda: DDIMChain(torch.tanh, X_T, LINEAR, conditioning=X_T), "must name its inputs.*got a Tensor"),
        (lambda: DDIMChain(X_T, torch.tanh, LINEAR), "x_T must be a floating-point tensor.*got a builtin_function"),
        (lambda: NoiseSchedule(torch.linspace(1e-4, 0.02, 10)), "Found 0.0001 at first and 0.02 at last.*from_betas"),
        (lambda: sample(torch.tanh), "chain must be a chain such as DDIMChain.*got a builtin_function"),
        (lambda: invert(torch.tanh, X_T), "chain must be a chain such as DDIMChain.*got a builtin_function"),
        (
            lambda: invert(DDIMChain(torch.tanh, X_T, LINEAR), X_T, method="parallel"),
            r"such as ParallelInverse\(\), got 'parallel'",
        ),
    ],
)
def test_what_is_of_another_kind_is_named(call, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        call()


def test_results_are_shown_in_one_line() -> None:
    chain = DDIMChain(lambda x, t: 0.5 * x, X_T, LINEAR, steps=6)
    result = sample(chain)
    assert repr(result).startswith(
        f"SamplingResult(2 samples 3 in 6 steps, rounds={result.rounds}, evals={result.evals}"
    )
    inverse = invert(chain, result.images)
    assert repr(inverse).startswith("Inverse(2 of 2 samples inverted, worst error ")
    assert repr(inverse).endswith(f", rounds={inverse.rounds}, evals={inverse.evals})")
