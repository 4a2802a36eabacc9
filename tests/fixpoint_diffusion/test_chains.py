"""The chains' forms against literal formulas, closed forms and diffusers; counters, gradients and refusals."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

import fixpoint
from fixpoint_diffusion import DDIMChain, NoiseSchedule, StochasticDDIMChain, initial_noise, step_noise

LINEAR = NoiseSchedule.linear()
X_T = initial_noise(0, range(2), (3,), dtype=torch.float64)


def make_chain(
    denoiser: Callable[[Tensor, Tensor], Tensor], eta: float = 0.0, x_T: Tensor = X_T, **options
) -> DDIMChain:
    schedule = options.pop("schedule", LINEAR)
    if eta == 0:
        return DDIMChain(denoiser, x_T, schedule, **options)
    return StochasticDDIMChain(denoiser, x_T, schedule, eta=eta, **options)


def test_cumulative_form_is_the_double_sum_of_the_paper(mixture) -> None:
    """Eq. 10 and, with noise, Eq. 22, written out term by term in the paper's indices."""
    chain = make_chain(mixture(LINEAR), eta=0.5, steps=6, seed=3)
    z = torch.randn(2, 6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = torch.cat([X_T[:, None], z], dim=1)  # x[:, T - t] is the paper's x_t
    taus = chain.timesteps.tolist()
    alpha = [1.0, *(float(LINEAR.alphas_cumprod[tau]) for tau in reversed(taus))]  # alpha[t], t = 0 .. T
    T = 6

    def sigma(t: int) -> float:
        return 0.5 * math.sqrt((1 - alpha[t] / alpha[t - 1]) * (1 - alpha[t - 1]) / (1 - alpha[t]))

    def c1(t: int) -> float:
        kept = math.sqrt(1 - alpha[t - 1] - sigma(t) ** 2)
        return kept - math.sqrt(alpha[t - 1] * (1 - alpha[t]) / alpha[t])

    rows = []
    for k in range(1, T + 1):
        value = math.sqrt(alpha[T - k] / alpha[T]) * X_T
        for t in range(T - k, T):
            eps = chain.denoiser(x[:, T - t - 1], torch.full((2,), taus[T - t - 1]))
            term = c1(t + 1) * eps + sigma(t + 1) * chain.noise[:, T - t - 1]
            value = value + math.sqrt(alpha[T - k] / alpha[t]) * term
        rows.append(value)
    torch.testing.assert_close(chain(z), torch.stack(rows, dim=1), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize(("spacing", "steps"), [("leading", 1), ("leading", 7), ("leading", 50), ("trailing", 50)])
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("set_alpha_to_one", [True, False])
def test_sequential_is_the_sampler_of_diffusers(
    mixture, prediction_type: str, spacing: str, steps: int, eta: float, set_alpha_to_one: bool
) -> None:
    scheduler = DDIMScheduler(
        clip_sample=False,
        prediction_type=prediction_type,
        timestep_spacing=spacing,
        set_alpha_to_one=set_alpha_to_one,
        steps_offset=0 if set_alpha_to_one else 1,
    )
    assert_sequential_is_diffusers(mixture, scheduler, steps, eta)


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_sequential_is_the_sampler_of_diffusers_from_pure_noise(mixture, prediction_type: str, eta: float) -> None:
    scheduler = DDIMScheduler(
        clip_sample=False, prediction_type=prediction_type, timestep_spacing="trailing", rescale_betas_zero_snr=True
    )
    assert_sequential_is_diffusers(mixture, scheduler, 20, eta)


def assert_sequential_is_diffusers(mixture, scheduler: DDIMScheduler, steps: int, eta: float) -> None:
    schedule = NoiseSchedule.from_diffusers(scheduler)
    scheduler.alphas_cumprod = schedule.alphas_cumprod  # its own are rounded to float32
    scheduler.final_alpha_cumprod = torch.tensor(schedule.final_alpha, dtype=torch.float64)
    scheduler.set_timesteps(steps)
    denoiser = mixture(schedule, schedule.prediction_type)
    chain = make_chain(denoiser, eta, schedule=schedule, steps=steps)
    noise = step_noise(0, range(2), range(steps), (3,), dtype=torch.float64)
    x, latents = X_T, []
    for k, t in enumerate(scheduler.timesteps):
        out = denoiser(x, t.expand(2))
        x = scheduler.step(out, int(t), x, eta=eta, variance_noise=noise[:, k]).prev_sample
        latents.append(x)
    torch.testing.assert_close(chain.sequential(), torch.stack(latents, dim=1), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("steps", [1, 5, 1000])
def test_gaussian_data_follow_the_closed_form(gaussian, steps: int) -> None:
    """For data N(m, v) each step scales the distance to the mean by a known factor."""
    chain = make_chain(gaussian(LINEAR), steps=steps)
    a, b = chain.transitions.alphas, chain.transitions.alphas_prev
    factors = (0.3 * (a * b).sqrt() + ((1 - a) * (1 - b)).sqrt()) / (0.3 * a + 1 - a)
    mean = torch.tensor([0.7, -0.4, 1.1], dtype=torch.float64)
    expected = mean + factors.prod() * (X_T - a[0].sqrt() * mean)
    torch.testing.assert_close(chain.sequential()[:, -1], expected, rtol=1e-9, atol=1e-9)
    z = chain.z0
    for _ in range(min(steps, 100)):
        z = chain(z)
    torch.testing.assert_close(z[:, -1], expected, rtol=1e-9, atol=1e-9)


def test_a_long_chain_turns_noise_into_the_data_distribution(gaussian) -> None:
    draws = torch.randn(4000, 201, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    images = make_chain(gaussian(LINEAR), 1.0, draws[:, 0], steps=200, noise=draws[:, 1:]).sequential()[:, -1]
    torch.testing.assert_close(images.mean(0), torch.tensor([0.7, -0.4, 1.1], dtype=torch.float64), rtol=0, atol=0.05)
    torch.testing.assert_close(images.var(0), torch.full((3,), 0.3, dtype=torch.float64), rtol=0.1, atol=0)


@pytest.mark.parametrize("form", ["__call__", "one_step"])
def test_sequential_trajectory_is_a_fixed_point_of_both_forms(mixture, form: str) -> None:
    chain = make_chain(mixture(LINEAR), eta=1.0, steps=13)
    trajectory = chain.sequential()
    torch.testing.assert_close(getattr(chain, form)(trajectory), trajectory, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("form", ["__call__", "one_step"])
def test_rows_depend_on_earlier_rows_alone(mixture, form: str) -> None:
    chain = make_chain(mixture(LINEAR), steps=5)
    jacobian = torch.autograd.functional.jacobian(lambda z: getattr(chain, form)(z)[0], chain.z0)[:, :, 0]
    for row, column in itertools.product(range(5), range(5)):
        depends = bool(jacobian[row, :, column].abs().max() > 0)
        assert depends == (column == row - 1 if form == "one_step" else column < row)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_transition_takes_any_rows_in_any_order_as_the_sequential_run_does(mixture, eta: float) -> None:
    chain = make_chain(mixture(LINEAR), eta=eta, steps=7)
    latents = chain.sequential()
    sample, step = torch.tensor([1, 0, 1, 1]), torch.tensor([6, 0, 2, 0])
    before = torch.stack([latents[1, 5], X_T[0], latents[1, 1], X_T[1]])
    chain.reset_counters()
    after = chain.transition(before, sample, step)
    torch.testing.assert_close(after, latents[sample, step], rtol=1e-12, atol=1e-12)
    assert (chain.rounds, chain.evals) == (1, 4)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_transition_of_every_row_is_one_step_of_the_whole_state(mixture, eta: float) -> None:
    """For images too, and rounded to the dtype of the latents."""
    x_T = initial_noise(0, range(2), (1, 3, 1))
    chain = make_chain(mixture(LINEAR), eta=eta, x_T=x_T, steps=4)
    z = torch.randn(2, 4, 1, 3, 1, generator=torch.Generator().manual_seed(0))
    x = chain.inputs(z)
    rows = [chain.transition(x[:, k], torch.arange(2), torch.full((2,), k)) for k in range(4)]
    assert rows[0].dtype == torch.float32
    torch.testing.assert_close(torch.stack(rows, dim=1), chain.one_step(z), rtol=1e-6, atol=1e-6)


def test_eta_zero_of_the_stochastic_chain_is_the_deterministic_one(mixture) -> None:
    stochastic = StochasticDDIMChain(mixture(LINEAR), X_T, LINEAR, steps=9, eta=0.0)
    assert torch.equal(stochastic.sequential(), make_chain(mixture(LINEAR), steps=9).sequential())


def test_noise_given_and_noise_of_a_seed_are_the_same_chain(mixture) -> None:
    noise = step_noise(4, range(10, 12), range(9), (3,), dtype=torch.float64)
    given = StochasticDDIMChain(mixture(LINEAR), X_T, LINEAR, steps=9, noise=noise)
    seeded = StochasticDDIMChain(mixture(LINEAR), X_T, LINEAR, steps=9, seed=4, first_sample=10)
    assert torch.equal(given.sequential(), seeded.sequential())


def test_state_starts_at_the_noise_in_every_row(mixture) -> None:
    chain = make_chain(mixture(LINEAR), steps=4)
    assert torch.equal(chain.z0, X_T[:, None].expand(2, 4, 3))
    assert chain.batch_dims == 1


def test_rounds_and_rows_are_counted_and_a_split_call_is_one_round(mixture) -> None:
    seen: list[int] = []

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        seen.append(len(x))
        return mixture(LINEAR)(x, t)

    chain = make_chain(denoiser, steps=6, max_rows=5)
    split = chain(chain.z0)
    assert (chain.rounds, chain.evals, seen) == (1, 12, [5, chain.check_evals, 5, 2])
    assert chain.check_evals == 3
    chain.sequential()
    assert (chain.rounds, chain.evals) == (7, 24)
    chain.reset_counters()
    assert (chain.rounds, chain.evals) == (0, 0)
    torch.testing.assert_close(split, make_chain(mixture(LINEAR), steps=6)(chain.z0))


def test_denoiser_is_told_the_timestep_of_each_row() -> None:
    seen: list[Tensor] = []

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        seen.append(t)
        return x

    chain = make_chain(denoiser, timesteps=torch.tensor([900, 30, 2]))
    chain(chain.z0)
    assert seen[0].tolist() == [900, 30, 2, 900, 30, 2]
    assert seen[0].dtype == torch.int64


def test_prediction_type_comes_from_the_option_then_the_denoiser_then_the_schedule(mixture) -> None:
    by_schedule = NoiseSchedule(LINEAR.alphas_cumprod, prediction_type="sample")
    v = mixture(LINEAR, "v_prediction")
    assert make_chain(lambda x, t: x, schedule=by_schedule).transitions.prediction_type == "sample"
    assert make_chain(v, schedule=by_schedule).transitions.prediction_type == "v_prediction"
    assert make_chain(v, prediction_type="epsilon").transitions.prediction_type == "epsilon"


def test_gradients_reach_the_noise_and_the_parameters_and_match_the_sequential_run() -> None:
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)).double()
    x_T = X_T.clone().requires_grad_()
    chain = make_chain(lambda x, t: network(x), eta=0.5, x_T=x_T, steps=6)
    wanted = [x_T, *network.parameters()]
    expected = torch.autograd.grad(chain.sequential()[:, -1].square().sum(), wanted)
    solution = fixpoint.solve(chain, solver=fixpoint.Picard(), backward=fixpoint.IFT(rtol=1e-12), rtol=1e-12)
    found = torch.autograd.grad(solution.value[:, -1].square().sum(), wanted)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_a_chain_that_was_run_in_inference_mode_has_gradients_afterwards(prediction_type: str) -> None:
    weight = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)

    def gradient(chain: DDIMChain) -> Tensor:
        return torch.autograd.grad(chain(chain.z0).sum(), weight)[0]

    fresh, used = (
        make_chain(lambda x, t: weight * torch.tanh(x), steps=5, prediction_type=prediction_type) for _ in range(2)
    )
    with torch.inference_mode():
        used.sequential()
    assert torch.equal(gradient(used), gradient(fresh))


def test_eta_above_one_is_legal_up_to_the_largest_that_the_error_names(mixture) -> None:
    with pytest.raises(ValueError, match="largest legal eta for these timesteps is") as caught:
        make_chain(mixture(LINEAR), eta=30.0, steps=50)
    largest = float(str(caught.value).rsplit(maxsplit=1)[1])
    assert largest > 1
    trajectory = make_chain(mixture(LINEAR), eta=largest * (1 - 1e-5), steps=50).sequential()
    assert bool(trajectory.isfinite().all())
    with pytest.raises(ValueError, match="largest legal eta"):
        make_chain(mixture(LINEAR), eta=largest * (1 + 1e-5), steps=50)


def test_exactly_the_largest_eta_gives_finite_latents_in_chains_of_every_length(mixture) -> None:
    """All of the old noise is gone after one of the steps: rounding must not make the rest a root of -1e-17."""
    for steps in range(2, 60):
        transitions = make_chain(mixture(LINEAR), steps=steps).transitions
        a, b = transitions.alphas[:-1], transitions.alphas_prev[:-1]
        largest = float(((1 - a) / (1 - a / b)).sqrt().min())
        assert bool(make_chain(mixture(LINEAR), eta=largest, steps=steps).sequential().isfinite().all())


def test_pure_noise_start_needs_a_prediction_of_v_or_the_sample(mixture) -> None:
    schedule = LINEAR.zero_terminal_snr()
    with pytest.raises(ValueError, match="timestep 999 holds no signal"):
        make_chain(mixture(LINEAR), schedule=schedule, steps=10, spacing="trailing")
    make_chain(mixture(LINEAR), schedule=schedule, steps=10, spacing="leading")  # starts at 900, where there is signal


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"eta": -0.1}, ValueError, "eta must be a number of at least 0"),
        ({"eta": float("nan")}, ValueError, "eta must be a number of at least 0"),
        ({"prediction_type": "x0"}, ValueError, "prediction_type must be one of"),
        ({"steps": 3, "timesteps": torch.tensor([3, 1])}, ValueError, "either timesteps, or steps"),
        ({"timesteps": torch.tensor([1, 3])}, ValueError, "descend strictly within 0 .. 999"),
        ({"timesteps": torch.tensor([3, 3])}, ValueError, "descend strictly"),
        ({"timesteps": torch.tensor([1000, 3])}, ValueError, "descend strictly"),
        ({"timesteps": torch.tensor([3, -1])}, ValueError, "descend strictly"),
        ({"timesteps": torch.tensor([], dtype=torch.int64)}, ValueError, "shape"),
        ({"timesteps": torch.tensor([3.0, 1.5])}, ValueError, "whole numbers.*entry 1 is 1.5: round them"),
        ({"timesteps": torch.tensor([float("nan")])}, ValueError, "whole numbers.*entry 0 is nan"),
        ({"timesteps": torch.tensor([3.0, 1.0]).bfloat16()}, TypeError, "tensor of integers.*got torch.bfloat16"),
        ({"timesteps": [3, 1]}, TypeError, "tensor of integers.*got list"),
        ({"clip_sample": 1.0, "x0_hook": lambda x_0, step, sample: x_0}, ValueError, "either clip_sample or x0_hook"),
        ({"max_rows": 0}, ValueError, "max_rows must be a whole number of at least 1, got 0"),
        ({"max_rows": "auto"}, ValueError, "max_rows must be a whole number of at least 1, got 'auto'"),
        ({"x_T": torch.ones(2, 3, dtype=torch.int64)}, ValueError, "floating-point"),
        ({"eta": 1.0, "noise": torch.zeros(2, 9, 3)}, ValueError, "shape is .*, expected .*50"),
        ({"eta": 1.0, "noise": torch.zeros(2, 50, 3)}, ValueError, "dtype is torch.float32, expected torch.float64"),
    ],
)
def test_options_that_make_no_sense_are_refused(mixture, options, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make_chain(mixture(LINEAR), **options)


@pytest.mark.parametrize(
    ("denoiser", "message"),
    [
        (lambda x, t: x[:, :2], "return the shape of its input"),
        (lambda x, t: x.float(), "return the dtype of its input, torch.float64; it returned torch.float32"),
        (lambda x, t: x.to("meta"), "return the device of its input"),
        (lambda x, t: (x,), "must return a tensor, got tuple"),
    ],
)
def test_denoisers_that_return_something_else_are_told_so(denoiser, message: str) -> None:
    chain = make_chain(denoiser, steps=3)
    with pytest.raises(ValueError, match=message):
        chain(chain.z0)


def test_states_of_another_shape_are_refused(mixture) -> None:
    chain = make_chain(mixture(LINEAR), steps=3)
    with pytest.raises(ValueError, match=r"\(2, 3, 3\), got \(2, 4, 3\)"):
        chain(torch.zeros(2, 4, 3, dtype=torch.float64))
