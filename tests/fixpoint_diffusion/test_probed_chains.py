"""Sampling with probes: slopes measured at each evaluated step, also where the others are interpolated."""

from __future__ import annotations

import json

import numpy as np
import torch
from typer.testing import CliRunner

from fixpoint import CausalQuasiNewton
from fixpoint_diffusion import DDIMChain, NoiseSchedule, StochasticDDIMChain, embedded, initial_noise, sample
from fixpoint_diffusion.cli import app

SCHEDULE = NoiseSchedule.linear()


def chain(steps=100, eta=0.0, samples=range(2)):
    x_T = initial_noise(0, samples, (1, 8, 8))
    if eta:
        first = samples.start
        return StochasticDDIMChain(
            embedded("ddpm-digits"), x_T, SCHEDULE, steps=steps, eta=eta, seed=0, first_sample=first
        )
    return DDIMChain(embedded("ddpm-digits"), x_T, SCHEDULE, steps=steps)


def test_fewer_rounds_to_the_images_of_the_sequential_sampler():
    problem, rounds = chain(eta=1.0, samples=range(3)), []  # early rounds interpolate some of the steps
    for probes in (0, 1):
        result = sample(problem, solver=CausalQuasiNewton(window=100, probes=probes), rtol=1e-3)
        assert result.solution.converged.all()
        torch.testing.assert_close(result.images, problem.sequential(trajectory=False), rtol=0, atol=5e-3)
        rounds.append(int(result.solution.evals.sum()))
    assert rounds[1] <= rounds[0] - 3  # one each, in the mean


def test_steps_that_are_interpolated_are_not_probed():
    problem = chain(steps=200, samples=range(1))
    sample(problem, solver=CausalQuasiNewton(window=200, probes=1), rtol=1e-3, max_evals=1, on_failure="ignore")
    assert problem.rounds == 1
    assert problem.evals < 2 * 100  # every fourth step, and twice as many rows


def test_a_sample_is_probed_as_if_it_were_alone():
    both = sample(chain(steps=70), solver=CausalQuasiNewton(window=70, probes=1), rtol=1e-3)
    for k in range(2):
        one = chain(steps=70, samples=range(k, k + 1))
        alone = sample(one, solver=CausalQuasiNewton(window=70, probes=1), rtol=1e-3)
        assert alone.solution.evals.item() == both.solution.evals[k]
        torch.testing.assert_close(alone.images[0], both.images[k], rtol=0, atol=1e-4)


def test_probes_are_told_the_conditioning_and_the_noise_of_their_sample():
    seen = []

    def denoiser(x, t, label):
        seen.append((x.clone(), t.clone(), label.clone()))
        return (0.5 + 0.1 * label).reshape(-1, 1) * x

    labels = torch.arange(3.0)
    problem = DDIMChain(denoiser, torch.randn(3, 4), SCHEDULE, steps=10, conditioning={"label": labels})
    result = sample(problem, solver=CausalQuasiNewton(probes=1), rtol=1e-5)
    torch.testing.assert_close(result.images, problem.sequential(trajectory=False), rtol=1e-3, atol=1e-3)
    x, t, label = next(each for each in seen if len(each[0]) == 60)  # other calls: the check of a few rows
    assert torch.equal(t[:30], t[30:])
    assert torch.equal(label[:30], label[30:])
    assert 0 < float((x[30:] - x[:30]).abs().max()) < 0.1


def test_a_budget_by_the_rule_counts_the_probes_and_the_ordinary_sampler_has_none():
    short, long = (chain(steps=steps, samples=range(1)) for steps in (40, 100))  # the rule: 128 rows
    assert sample(short, solver=CausalQuasiNewton(probes=1)).max_rows is None
    assert sample(long, solver=CausalQuasiNewton(), rtol=1e-2).max_rows is None
    assert sample(long, solver=CausalQuasiNewton(probes=1), rtol=1e-2).max_rows == 128
    many = chain(steps=4, samples=range(20))
    result = sample(many, solver=CausalQuasiNewton(probes=1))
    assert result.rounds == 4
    assert result.evals == 80


def test_a_run_of_the_command_has_the_images_of_the_sequential_sampler(tmp_path):
    for name, options in (("sequential", []), ("probed", ["--solver", "causal", "--probes", "1", "--max-rows", "60"])):
        arguments = ["sample", "--num-images", "2", "--steps", "30", "--out", str(tmp_path / name), *options]
        assert CliRunner().invoke(app, arguments).exit_code == 0
    images = [np.load(tmp_path / name / "images.npy") for name in ("sequential", "probed")]
    np.testing.assert_allclose(images[0], images[1], atol=1e-2)
    record = json.loads((tmp_path / "probed" / "sample.json").read_text())
    assert record["probes"] == 1
