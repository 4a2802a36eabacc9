from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.stats import norm
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from fixpoint_diffusion.options.training import TrainingConfig
from fixpoint_diffusion.processes import NoiseSchedule
from fixpoint_diffusion.processes.flow import FLOW_SCHEDULE, flow_levels
from fixpoint_diffusion.training.objectives import (
    VLB_WEIGHT,
    diffusion_loss,
    drop_classes,
    grey_value_log_likelihood,
    loss_weight,
    predicted_x_0,
    variational_bound,
)

SCHEDULE = NoiseSchedule.linear().alphas_cumprod
ZERO_SNR = NoiseSchedule.linear().zero_terminal_snr().alphas_cumprod


def noisy(x_0: Tensor, noise: Tensor, t: Tensor, schedule: Tensor = SCHEDULE) -> Tensor:
    a = schedule[t].view(-1, 1, 1, 1)
    return a.sqrt() * x_0 + (1 - a).sqrt() * noise


def answer(kind: str, x_0: Tensor, noise: Tensor, t: Tensor, schedule: Tensor = SCHEDULE) -> Tensor:
    a = schedule[t].view(-1, 1, 1, 1)
    return {"epsilon": noise, "v_prediction": a.sqrt() * noise - (1 - a).sqrt() * x_0, "sample": x_0}[kind]


class Fixed(nn.Module):
    """Says the same whatever it is asked."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = nn.Parameter(output)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.output


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("weighting", ["plain", "min-snr"])
def test_loss_of_a_perfect_prediction_is_zero(prediction_type: str, weighting: str) -> None:
    x_0, noise = torch.randn(2, 3, 1, 4, 4, dtype=torch.float64)
    t = torch.tensor([0, 400, 999])

    class Perfect(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            torch.testing.assert_close(x, noisy(x_0, noise, t))
            return answer(prediction_type, x_0, noise, t)

    config = TrainingConfig(prediction_type=prediction_type, weighting=weighting)
    assert float(diffusion_loss(Perfect(), x_0, t, noise, SCHEDULE, config)) == pytest.approx(0, abs=1e-25)


@pytest.mark.parametrize("count", [0, -1, 2.5, True, "many", None, 10**30])
def test_a_flow_has_a_number_of_timesteps(count: object) -> None:
    with pytest.raises(ValueError, match=r"num_train_timesteps of a flow must be a whole number from 1"):
        flow_levels(FLOW_SCHEDULE | {"num_train_timesteps": count})


def test_a_flow_is_asked_between_image_and_noise_for_the_way_from_one_to_the_other() -> None:
    x_0, noise = torch.randn(2, 4, 1, 4, 4, dtype=torch.float64)
    t = torch.tensor([0, 399, 998, 999])

    class Perfect(nn.Module):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            sigma = t.double().view(-1, 1, 1, 1) / 1000
            torch.testing.assert_close(x, (1 - sigma) * x_0 + sigma * noise)
            return noise - x_0

    config = TrainingConfig(prediction_type="flow_prediction")
    levels = flow_levels(FLOW_SCHEDULE)
    assert float(diffusion_loss(Perfect(), x_0, t, noise, levels, config)) == pytest.approx(0, abs=1e-25)
    wrong = diffusion_loss(Fixed(noise - x_0 + 2), x_0, t, noise, levels, config)
    assert float(wrong.detach()) == pytest.approx(4)  # all timesteps weigh the same
    with pytest.raises(ValueError, match="a flow has no variance to learn"):
        diffusion_loss(Fixed(torch.cat([noise, noise], dim=1)), x_0, t, noise, levels, config)
    with pytest.raises(ValueError, match="a flow is trained with weighting 'plain', got 'min-snr'"):
        TrainingConfig(prediction_type="flow_prediction", weighting="min-snr")


@settings(max_examples=50)
@given(a=st.floats(1e-6, 1 - 1e-6), gamma=st.floats(0.1, 50), error=st.floats(-2, 2))
def test_min_snr_weighs_the_same_error_of_x0_alike_in_every_prediction_type(
    a: float, gamma: float, error: float
) -> None:
    """With x_t given, an error e of x_0 is an error -sqrt(a/(1-a)) e of the noise and -e/sqrt(1-a) of v."""
    alpha = torch.tensor([a], dtype=torch.float64)
    errors = {"sample": error, "epsilon": -math.sqrt(a / (1 - a)) * error, "v_prediction": -error / math.sqrt(1 - a)}
    snr = a / (1 - a)
    for kind, value in errors.items():
        config = TrainingConfig(prediction_type=kind, weighting="min-snr", min_snr_gamma=gamma)
        weighted = float(loss_weight(alpha, config)) * value**2
        assert weighted == pytest.approx(min(snr, gamma) * error**2, rel=1e-9)


def test_weight_of_fpdms_code_is_zero_where_there_is_no_signal_or_no_noise() -> None:
    a = torch.tensor([0.0, 0.25, 0.64, 1.0], dtype=torch.float64)
    found = loss_weight(a, TrainingConfig(prediction_type="v_prediction", weighting="fpdm"))
    assert found.tolist() == pytest.approx([0, 0.25 * math.sqrt(0.75), 0.64 * 0.6, 0])


@pytest.mark.parametrize("schedule", [SCHEDULE, ZERO_SNR], ids=["linear", "zero-snr"])
def test_bound_is_the_divergence_of_the_true_step_back_from_the_models(schedule: Tensor) -> None:
    x_0, noise, predicted, variance = torch.randn(4, 4, 2, 3, 3, dtype=torch.float64)
    t = torch.tensor([1, 2, 500, 999])
    x_t = noisy(x_0, noise, t, schedule)
    for row, time in enumerate(t.tolist()):
        a, before = float(schedule[time]), float(schedule[time - 1])
        # Bayes: q(x' | x_t, x_0) from q(x' | x_0) and q(x_t | x'), by precision.
        kept = a / before
        spread = 1 / (1 / (1 - before) + kept / (1 - kept))

        def mean(x: Tensor, row: int = row, kept: float = kept, before: float = before, s: float = spread) -> Tensor:
            return s * (math.sqrt(before) * x / (1 - before) + math.sqrt(kept) * x_t[row] / (1 - kept))

        share = (variance[row] + 1) / 2
        scale = torch.exp((share * math.log(1 - kept) + (1 - share) * math.log(spread)) / 2)
        expected = kl_divergence(Normal(mean(x_0[row]), math.sqrt(spread)), Normal(mean(predicted[row]), scale))
        one = slice(row, row + 1)
        found = variational_bound(x_0[one], x_t[one], t[one], predicted[one], variance[one], schedule)
        assert float(found) == pytest.approx(float(expected.mean()) / math.log(2), rel=1e-9)


@pytest.mark.parametrize("grey", [0, 1, 100, 128, 254, 255])
@pytest.mark.parametrize(("mean", "scale"), [(-1.0, 0.01), (0.004, 0.02), (0.3, 0.5), (1.2, 0.1)])
def test_likelihood_of_a_grey_value_is_the_integral_over_its_interval(grey: int, mean: float, scale: float) -> None:
    x = 2 * grey / 255 - 1
    low = -np.inf if grey == 0 else x - 1 / 255
    high = np.inf if grey == 255 else x + 1 / 255
    if np.isinf(low):
        expected = norm.logcdf(high, mean, scale)
    elif np.isinf(high):
        expected = norm.logsf(low, mean, scale)
    else:
        # Relative to the value at the middle, which may be as small as exp(-20000).
        middle = norm.logpdf(x, mean, scale)
        integral, _ = quad(lambda y: np.exp(norm.logpdf(y, mean, scale) - middle), low, high, epsabs=0, epsrel=1e-10)
        expected = middle + np.log(integral)
    values = (torch.tensor(value, dtype=torch.float64) for value in (x, mean, 2 * math.log(scale)))
    assert float(grey_value_log_likelihood(*values)) == pytest.approx(expected, rel=1e-8)


def test_grey_values_share_all_probability() -> None:
    x = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    total = grey_value_log_likelihood(x, torch.full_like(x, 0.13), torch.full_like(x, -5)).exp().sum()
    assert float(total) == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize("discretised", [True, False])
def test_bound_at_the_first_timestep_is_the_likelihood(discretised: bool) -> None:
    x_0 = torch.full((1, 1, 1, 1), 3 / 255, dtype=torch.float64)
    predicted, variance = x_0 + 0.01, torch.zeros_like(x_0)
    first, second = float(SCHEDULE[0]), float(SCHEDULE[1])
    forward = 1 - first
    backward = (1 - first) / (1 - second) * (1 - second / first)  # of t = 1: that of t = 0 is zero
    scale = math.sqrt(math.sqrt(forward * backward))
    t = torch.tensor([0])
    found = variational_bound(x_0, x_0, t, predicted, variance, SCHEDULE, discretised=discretised)
    if discretised:
        edges = norm.cdf([2 / 255, 4 / 255], 3 / 255 + 0.01, scale)
        expected = -math.log2(edges[1] - edges[0])
    else:
        expected = -norm.logpdf(0.01, 0, scale) / math.log(2)
    assert float(found) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_learned_variance_adds_a_thousandth_of_the_bound_and_moves_no_mean(kind: str) -> None:
    x_0, noise, wrong, variance = torch.randn(4, 2, 1, 2, 2, dtype=torch.float64).clamp(-1, 1)
    t = torch.tensor([0, 700])
    config = TrainingConfig(prediction_type=kind)
    plain, both = Fixed(wrong.clone()), Fixed(torch.cat([wrong, variance], 1))
    simple = diffusion_loss(plain, x_0, t, noise, SCHEDULE, config)
    hybrid = diffusion_loss(both, x_0, t, noise, SCHEDULE, config)
    x_t = noisy(x_0, noise, t)
    bound = variational_bound(x_0, x_t, t, predicted_x_0(x_t, wrong, SCHEDULE[t], kind), variance, SCHEDULE)
    assert float(hybrid.detach()) == pytest.approx(
        float(simple.detach()) + VLB_WEIGHT * 1000 * float(bound.mean()), rel=1e-12
    )
    simple.backward()
    hybrid.backward()
    torch.testing.assert_close(both.output.grad[:, :1], plain.output.grad)
    assert bool((both.output.grad[:, 1:] != 0).all())


def test_best_variance_for_a_perfect_mean_is_that_of_the_true_step_back() -> None:
    x_0, noise = torch.randn(2, 1, 1, 2, 2, dtype=torch.float64)
    t = torch.tensor([300])
    x_t = noisy(x_0, noise, t)
    bounds = [
        float(variational_bound(x_0, x_t, t, x_0, torch.full_like(x_0, v), SCHEDULE)) for v in (-1.2, -1, -0.8, 1)
    ]
    assert bounds[1] == pytest.approx(0, abs=1e-12)
    assert min(bounds) == bounds[1]


def test_predicted_x_0_of_a_perfect_prediction_is_x_0() -> None:
    x_0, noise = torch.randn(2, 3, 1, 2, 2, dtype=torch.float64)
    t = torch.tensor([0, 500, 999])
    for kind in ("epsilon", "v_prediction", "sample"):
        found = predicted_x_0(noisy(x_0, noise, t), answer(kind, x_0, noise, t), SCHEDULE[t], kind)
        torch.testing.assert_close(found, x_0)


def test_odd_numbers_of_channels_are_refused() -> None:
    x_0 = torch.zeros(1, 1, 2, 2)
    with pytest.raises(ValueError, match="3 channels for images of 1"):
        diffusion_loss(Fixed(torch.zeros(1, 3, 2, 2)), x_0, torch.tensor([4]), x_0, SCHEDULE, TrainingConfig())


def test_a_model_without_a_null_class_keeps_its_labels() -> None:
    labels, dropped = torch.tensor([3, 1]), torch.tensor([True, True])
    assert drop_classes(labels, dropped, None).tolist() == [3, 1]
    assert drop_classes(labels, dropped, 4).tolist() == [4, 4]
