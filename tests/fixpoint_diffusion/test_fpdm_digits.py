"""The shipped model keeps what the documentation says of it."""

from __future__ import annotations

import pytest
import torch

import fixpoint
from fixpoint_diffusion import NoiseSchedule, initial_noise
from fixpoint_diffusion.denoisers import embedded, embedded_folder
from fixpoint_diffusion.evaluation import digit_confidence, digit_probabilities
from fixpoint_diffusion.experiments.fpdm import classes_of
from fixpoint_diffusion.models import FPDM, fpdm_layer_problem
from fixpoint_diffusion.processes import SamplerConfig
from fixpoint_diffusion.sampling import fpdm_steps, sample_fpdm
from fixpoint_diffusion.training.data import load_digits, split_held_out


@pytest.fixture(scope="module")
def model() -> FPDM:
    return embedded("fpdm-digits").model


@pytest.fixture(scope="module")
def schedule() -> NoiseSchedule:
    return NoiseSchedule.from_diffusers(embedded("fpdm-digits").schedule_config)


def test_shipped_model_is_small(model: FPDM) -> None:
    assert sum(parameter.numel() for parameter in model.parameters()) <= 1_500_000
    assert sum(file.stat().st_size for file in embedded_folder("fpdm-digits").glob("*.safetensors")) <= 3_000_000


def test_shipped_schedule_has_zero_terminal_snr_and_steps_that_meet(schedule: NoiseSchedule) -> None:
    """diffusers' steps, which the command takes, start at pure noise and each arrives where the next one starts."""
    assert schedule.prediction_type == "v_prediction"
    assert float(schedule.alphas_cumprod[-1]) == 0
    steps = SamplerConfig.from_diffusers(embedded("fpdm-digits").schedule_config).transitions(5)
    assert steps.timesteps[0] == 999
    assert torch.equal(steps.alphas_prev[:-1], steps.alphas[1:])
    assert steps.alphas_prev[-1] == 1


def test_samples_look_like_digits(model: FPDM, schedule: NoiseSchedule) -> None:
    """By the classifier's confidence, most of the way from noise to real digits; and they are the digits asked for."""
    noise = initial_noise(0, range(256), (1, 8, 8))
    _, real = split_held_out(load_digits())
    low, high = digit_confidence(noise), digit_confidence(real.images)
    for iterations in (4, 8):
        classes = classes_of(64)
        images = sample_fpdm(model, noise[:64], schedule, iterations=iterations, y=classes).images
        assert (digit_confidence(images) - low) / (high - low) > 0.9
        assert float((digit_probabilities(images).argmax(1) == classes).double().mean()) > 0.9


def test_layer_contracts_at_every_noise_level(model: FPDM, schedule: NoiseSchedule) -> None:
    x_T, y = initial_noise(0, range(16), (1, 8, 8)), classes_of(16)
    solvers = (fixpoint.Picard(), fixpoint.Anderson(), fixpoint.Broyden())
    evals = {solver: 0 for solver in solvers}
    for step in fpdm_steps(model, x_T, schedule, steps=9, iterations=8, y=y):
        problem = fpdm_layer_problem(model, step.latent, torch.tensor(step.timestep), y=y)
        assert int(fixpoint.solve(problem, solver=fixpoint.Picard(), rtol=1e-3).evals.max()) <= 15
        for solver in solvers:
            solution = fixpoint.solve(problem, solver=solver, rtol=1e-5)
            assert bool(solution.converged.all())
            evals[solver] += int(solution.evals.sum())
    plain, *faster = evals.values()
    assert max(faster) < plain


def test_reuse_brings_the_start_nearer_at_low_noise(model: FPDM, schedule: NoiseSchedule) -> None:
    """Fig. 6 of the paper: in the later half of sampling the last solution is the better start."""
    x_T, y = initial_noise(0, range(16), (1, 8, 8)), classes_of(16)
    for step in list(fpdm_steps(model, x_T, schedule, steps=50, iterations=8, y=y))[25:]:
        problem = fpdm_layer_problem(model, step.latent, torch.tensor(step.timestep), y=y)
        anew = (problem(problem.z0) - problem.z0).norm()
        reused = (problem(step.z0) - step.z0).norm()
        assert float(reused) < float(anew)
