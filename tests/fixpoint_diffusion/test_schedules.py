"""Noise schedules and timesteps: closed forms, diffusers as oracle, and what they refuse."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr
from hypothesis import given, settings
from hypothesis import strategies as st

from fixpoint_diffusion import NoiseSchedule
from fixpoint_diffusion.processes.schedules import TIMESTEP_SPACINGS

LINEAR = NoiseSchedule.linear()
ODD_LENGTHS = [1, 2, 3, 7, 10, 25, 33, 50, 61, 100, 333, 500, 999, 1000]  # at 61, diffusers returns 62 trailing ones


def test_linear_schedule_is_the_product_of_one_minus_beta() -> None:
    logs = [math.log1p(-(1e-4 + (0.02 - 1e-4) * i / 999)) for i in range(1000)]
    expected = [math.exp(math.fsum(logs[: t + 1])) for t in (0, 1, 500, 999)]
    found = LINEAR.alphas_cumprod[[0, 1, 500, 999]]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-13, atol=0)


def test_cosine_schedule_telescopes_to_its_closed_form_until_beta_is_capped() -> None:
    def signal(t: float) -> float:
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    expected = [signal((t + 1) / 1000) / signal(0) for t in range(999)]
    found = NoiseSchedule.cosine().alphas_cumprod
    torch.testing.assert_close(found[:999], torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=0)
    assert float(found[999] / found[998]) == pytest.approx(1e-3)


def test_one_minus_alpha_keeps_digits_that_float32_loses() -> None:
    assert float(1 - LINEAR.alphas_cumprod[0]) == pytest.approx(1e-4, rel=1e-11)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "set_alpha_to_one": False},
        {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 400},
        {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"},
        {"trained_betas": [0.1, 0.2, 0.4], "num_train_timesteps": 3},
    ],
)
def test_from_diffusers_agrees_with_the_scheduler(options: dict[str, object]) -> None:
    scheduler = DDIMScheduler(**options)
    schedule = NoiseSchedule.from_diffusers(scheduler)
    torch.testing.assert_close(schedule.alphas_cumprod.float(), scheduler.alphas_cumprod, rtol=1e-4, atol=1e-6)
    assert schedule.final_alpha == pytest.approx(float(scheduler.final_alpha_cumprod), rel=1e-4)
    assert schedule.prediction_type == scheduler.config.prediction_type
    assert schedule.timestep_spacing == scheduler.config.timestep_spacing


def test_from_diffusers_reads_schedulers_configs_files_and_folders_alike(tmp_path: Path) -> None:
    scheduler = DDPMScheduler(beta_schedule="scaled_linear", num_train_timesteps=50, steps_offset=1)
    scheduler.save_pretrained(tmp_path / "scheduler")
    file = tmp_path / "scheduler" / "scheduler_config.json"
    sources = [scheduler, scheduler.config, json.loads(file.read_text()), tmp_path, str(tmp_path / "scheduler"), file]
    found = [NoiseSchedule.from_diffusers(source) for source in sources]
    assert all(torch.equal(schedule.alphas_cumprod, found[0].alphas_cumprod) for schedule in found)
    assert {schedule.steps_offset for schedule in found} == {1}


def test_from_diffusers_says_what_it_cannot_read(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="DDIMScheduler with beta_schedule='sigmoid' cannot be honoured; expected one of 'linear'"
    ):
        NoiseSchedule.from_diffusers({"beta_schedule": "sigmoid"})
    with pytest.raises(FileNotFoundError, match="no scheduler_config"):
        NoiseSchedule.from_diffusers(tmp_path)
    with pytest.raises(TypeError, match="got int"):
        NoiseSchedule.from_diffusers(3)


def test_zero_terminal_snr_is_algorithm_1_of_lin_et_al() -> None:
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    expected = (1 - rescale_zero_terminal_snr(betas)).cumprod(0)
    found = LINEAR.zero_terminal_snr().alphas_cumprod
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-16)
    assert float(found[-1]) == 0.0
    assert float(found[0]) == float(LINEAR.alphas_cumprod[0])


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("steps", ODD_LENGTHS)
def test_timesteps_are_those_of_diffusers(spacing: str, steps: int) -> None:
    scheduler = DDIMScheduler(timestep_spacing=spacing)
    scheduler.set_timesteps(steps)
    assert torch.equal(LINEAR.timesteps(steps, spacing), scheduler.timesteps[:steps])


def test_offset_moves_leading_timesteps_as_in_diffusers() -> None:
    scheduler = DDIMScheduler(steps_offset=1)
    scheduler.set_timesteps(7)
    assert torch.equal(NoiseSchedule.from_diffusers(scheduler).timesteps(7), scheduler.timesteps)
    with pytest.raises(ValueError, match="steps_offset=1 moves the first of 1000 timesteps to 1000"):
        NoiseSchedule.from_diffusers(scheduler).timesteps(1000)


@settings(max_examples=60)
@given(st.data(), st.integers(1, 400), st.sampled_from(TIMESTEP_SPACINGS))
def test_timesteps_are_distinct_descending_and_within_the_schedule(data: st.DataObject, n: int, spacing: str) -> None:
    steps = data.draw(st.integers(1, n))
    timesteps = NoiseSchedule.linear(n, 1e-4, 0.02).timesteps(steps, spacing)
    assert timesteps.shape == (steps,)
    assert timesteps.dtype == torch.int64
    assert bool((timesteps.diff() < 0).all())
    assert int(timesteps[-1]) >= 0
    assert int(timesteps[0]) < n


@pytest.mark.parametrize("steps", [2, 10, 20, 31])
def test_quadratic_timesteps_are_floored_squares_where_those_are_distinct(steps: int) -> None:
    c = 999 / (steps - 1) ** 2
    squares = [math.floor(c * i**2 + 1e-9) for i in range(steps)]
    assert LINEAR.timesteps(steps, "quadratic").tolist() == squares[::-1]


def test_every_spacing_of_full_length_is_every_timestep() -> None:
    everything = list(range(999, -1, -1))
    assert all(LINEAR.timesteps(1000, spacing).tolist() == everything for spacing in TIMESTEP_SPACINGS)


@pytest.mark.parametrize(
    ("alphas", "options", "message"),
    [
        ([], {}, "shape"),
        ([[0.5]], {}, "shape"),
        ([0.5, 0.5], {}, "decrease strictly"),
        ([0.5, 0.6], {}, "decrease strictly"),
        ([1.0, 0.5], {}, "decrease strictly"),
        ([0.5, -0.1], {}, "decrease strictly"),
        ([0.5, float("nan")], {}, "decrease strictly"),
        ([0.9, 0.5], {"final_alpha": 0.8}, "final_alpha must lie between"),
        ([0.9, 0.5], {"final_alpha": 1.1}, "final_alpha must lie between"),
        ([0.9, 0.5], {"prediction_type": "x"}, "prediction_type must be one of 'epsilon'"),
        ([0.9, 0.5], {"timestep_spacing": "x"}, "timestep_spacing must be one of"),
        ([0.9, 0.5], {"steps_offset": -1}, "steps_offset must not be negative"),
    ],
)
def test_schedules_that_make_no_sense_are_refused(
    alphas: list[float], options: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        NoiseSchedule(torch.tensor(alphas), **options)


def test_timesteps_that_cannot_be_given_are_refused() -> None:
    with pytest.raises(ValueError, match="1001 sampling steps were asked of a schedule that has 1000"):
        LINEAR.timesteps(1001)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        LINEAR.timesteps(0)
    with pytest.raises(ValueError, match="'quadratic'; got 'cubic'"):
        LINEAR.timesteps(5, "cubic")
    with pytest.raises(ValueError, match="at least 2"):
        NoiseSchedule.linear(1).zero_terminal_snr()


def test_shifting_the_signal_to_noise_ratio_keeps_everything_else() -> None:
    config = {"set_alpha_to_one": False, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}
    schedule = NoiseSchedule.from_diffusers(config)
    shifted = schedule.shift_snr(3.0)
    assert (shifted.prediction_type, shifted.timestep_spacing, shifted.x0_hook) == (
        "v_prediction",
        "trailing",
        schedule.x0_hook,
    )
    ratio, before = (a.alphas_cumprod / (1 - a.alphas_cumprod) for a in (shifted, schedule))
    torch.testing.assert_close(3 * ratio, before)
    assert shifted.final_alpha == float(shifted.alphas_cumprod[0])
