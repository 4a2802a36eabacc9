"""The parallel solution equals the sequential sampler: every spacing, prediction type, eta, length and dtype."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fixpoint
from fixpoint_diffusion import DDIMChain, NoiseSchedule, StochasticDDIMChain, initial_noise, sample
from fixpoint_diffusion.processes.schedules import PREDICTION_TYPES, TIMESTEP_SPACINGS

LINEAR = NoiseSchedule.linear()
SCHEDULES = {
    "linear": LINEAR,
    "scaled_linear": NoiseSchedule.scaled_linear(),
    "cosine": NoiseSchedule.cosine(),
    "zero_terminal_snr": LINEAR.zero_terminal_snr(),
}
ETAS = (0.0, 0.3, 1.0)


def make_chain(denoiser, x_T: Tensor, *, schedule: NoiseSchedule = LINEAR, eta: float = 0.0, **options) -> DDIMChain:
    if eta == 0:
        return DDIMChain(denoiser, x_T, schedule, **options)
    return StochasticDDIMChain(denoiser, x_T, schedule, eta=eta, seed=5, **options)


def noise(samples: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    return initial_noise(0, range(samples), (3,), dtype=dtype)


def worst_error(found: Tensor, expected: Tensor) -> float:
    """Largest relative error of a latent, every row of the chain measured against its own size."""
    difference = (found - expected).double().flatten(2).norm(dim=2)
    return float((difference / expected.double().flatten(2).norm(dim=2)).max())


def after_picard_rounds(chain: DDIMChain, rounds: int) -> Tensor:
    z = chain.z0
    for _ in range(rounds):
        z = chain(z)
    return z


@pytest.mark.parametrize("eta", ETAS)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("spacing", TIMESTEP_SPACINGS)
@pytest.mark.parametrize("steps", [1, 2, 7, 10, 50, 100, 1000])
def test_parallel_solution_equals_sequential_in_float64(
    mixture, spacing: str, prediction_type: str, eta: float, steps: int
) -> None:
    if steps == 1000 and spacing != "leading":
        assert torch.equal(LINEAR.timesteps(steps, spacing), LINEAR.timesteps(steps, "leading"))
        return
    chain = make_chain(mixture(LINEAR, prediction_type), noise(), eta=eta, steps=steps, spacing=spacing)
    result = sample(chain, solver=fixpoint.Picard(), rtol=1e-12)
    assert bool(result.solution.converged.all())
    assert worst_error(result.trajectory, chain.sequential()) < 1e-8


@pytest.mark.parametrize("eta", ETAS)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("steps", [50, 1000])
def test_parallel_solution_equals_sequential_in_float32(mixture, prediction_type: str, eta: float, steps: int) -> None:
    chain = make_chain(mixture(LINEAR, prediction_type), noise(2, torch.float32), eta=eta, steps=steps)
    result = sample(chain, solver=fixpoint.Picard(), rtol=1e-6)
    assert worst_error(result.trajectory, chain.sequential()) < 1e-3


@pytest.mark.parametrize("eta", ETAS)
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("spacing", TIMESTEP_SPACINGS)
def test_parallel_solution_equals_sequential_for_every_schedule(mixture, spacing: str, name: str, eta: float) -> None:
    schedule = SCHEDULES[name]
    denoiser = mixture(schedule, "v_prediction")
    chain = make_chain(denoiser, noise(), schedule=schedule, eta=eta, steps=37, spacing=spacing)
    result = sample(chain, solver=fixpoint.Picard(), rtol=1e-12)
    assert worst_error(result.trajectory, chain.sequential()) < 1e-8


@pytest.mark.parametrize("eta", ETAS)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("spacing", TIMESTEP_SPACINGS)
@pytest.mark.parametrize("steps", [1, 2, 7, 30])
def test_as_many_picard_rounds_as_steps_are_exact_up_to_rounding(
    mixture, spacing: str, prediction_type: str, eta: float, steps: int
) -> None:
    chain = make_chain(mixture(LINEAR, prediction_type), noise(2), eta=eta, steps=steps, spacing=spacing)
    assert worst_error(after_picard_rounds(chain, steps), chain.sequential()) < 1e-12


def test_picard_needs_all_of_its_rounds_where_nothing_is_smooth() -> None:
    """Row k is exact after k + 1 rounds even for a denoiser that no tolerance would ever accept, and not before."""

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        return torch.sin(40 * x)

    chain = make_chain(denoiser, noise(), steps=12)
    expected = chain.sequential()
    for rounds in (1, 6, 12):
        found = after_picard_rounds(chain, rounds)
        torch.testing.assert_close(found[:, :rounds], expected[:, :rounds], rtol=1e-9, atol=1e-9)
        if rounds < 12:
            assert worst_error(found, expected) > 1e-3


def test_picard_to_the_end_is_exact_for_a_thousand_steps_of_random_network_in_float32() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(2, 3, 3, generator=generator) / 3
    chain = make_chain(lambda x, t: torch.tanh(x @ weights[0]) @ weights[1], noise(1, torch.float32), steps=1000)
    result = sample(chain, solver=fixpoint.Picard(), rtol=1e-6)
    assert worst_error(result.trajectory, chain.sequential()) < 1e-3


@pytest.mark.parametrize(
    "solver", [fixpoint.Anderson(), fixpoint.Broyden(), fixpoint.Blockwise(fixpoint.Anderson(), 10)]
)
@pytest.mark.parametrize("eta", [0.0, 0.3])
def test_accelerated_solvers_find_the_sequential_trajectory(mixture, solver: fixpoint.Solver, eta: float) -> None:
    chain = make_chain(mixture(LINEAR), noise(3), eta=eta, steps=10)
    result = sample(chain, solver=solver, rtol=1e-10, max_evals=200)
    assert worst_error(result.trajectory, chain.sequential()) < 1e-8


@pytest.mark.parametrize("eta", ETAS)
@pytest.mark.parametrize("solver", [fixpoint.Picard(), fixpoint.Anderson()])
def test_a_batch_gives_what_batches_of_one_give(mixture, eta: float, solver: fixpoint.Solver) -> None:
    x_T = noise(4)
    options = {"solver": solver, "rtol": 1e-3, "max_evals": 25}
    together = sample(make_chain(mixture(LINEAR), x_T, eta=eta, steps=25), **options, on_failure="ignore")
    for i in range(4):
        first = {} if eta == 0 else {"first_sample": i}
        alone = make_chain(mixture(LINEAR), x_T[i : i + 1], eta=eta, steps=25, **first)
        single = sample(alone, **options, on_failure="ignore")
        torch.testing.assert_close(together.trajectory[i], single.trajectory[0], rtol=1e-7, atol=1e-7)
        assert int(together.solution.evals[i]) == int(single.solution.evals[0])


def test_images_have_any_shape(mixture) -> None:
    x_T = initial_noise(0, range(2), (3, 2, 2), dtype=torch.float64)
    chain = make_chain(lambda x, t: torch.tanh(x.roll(1, dims=1)), x_T, eta=1.0, steps=8)
    result = sample(chain, solver=fixpoint.Picard(), rtol=1e-12)
    assert result.trajectory.shape == (2, 8, 3, 2, 2)
    torch.testing.assert_close(result.trajectory, chain.sequential(), rtol=1e-9, atol=1e-9)
