"""The example scripts of the documentation do what their pages say."""

from __future__ import annotations

import importlib.util
import json
import shlex
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import scipy.integrate
import torch

import fixpoint
from fixpoint_diffusion.training.data import load_digits as digits
from fixpoint_diffusion.training.data import open_dataset, split_held_out

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def digits_deq() -> ModuleType:
    return load("digits_deq")


@pytest.fixture(scope="module")
def h_equation() -> ModuleType:
    return load("h_equation")


@pytest.fixture(scope="module")
def recurrences() -> ModuleType:
    return load("recurrences")


@pytest.mark.parametrize("rule", ["IFT", "Phantom(steps=4)", "StochasticJFB(6, 6)"])
def test_digits_network_reaches_its_accuracy(digits_deq: ModuleType, rule: str) -> None:
    outcome = digits_deq.train(digits_deq.RULES[rule], seed=0)
    assert outcome.accuracy >= 0.95
    assert (outcome.adjoint_products > 0) == (rule == "IFT")


@pytest.mark.parametrize("rule", ["JFB", "Unroll"])
def test_digits_network_learns_within_two_epochs_by_the_other_rules(digits_deq: ModuleType, rule: str) -> None:
    assert digits_deq.train(digits_deq.RULES[rule], seed=0, epochs=2).accuracy > 0.8


def test_digits_table_on_the_page_has_every_rule(digits_deq: ModuleType) -> None:
    page = (EXAMPLES / "digits_deq.txt").read_text()
    assert all(rule in page for rule in digits_deq.RULES)


@pytest.mark.parametrize(
    "solver", [fixpoint.Picard(), fixpoint.Anderson(), fixpoint.Anderson(damping=0.5), fixpoint.Broyden()]
)
def test_h_equation_meets_the_closed_form_of_its_integral(h_equation: ModuleType, solver: fixpoint.Solver) -> None:
    albedo = torch.tensor(h_equation.ALBEDOS, dtype=torch.float64)
    problem = h_equation.HEquation(albedo)
    solution = fixpoint.solve(problem, solver=solver, rtol=1e-10, max_evals=1000, on_failure="raise")
    torch.testing.assert_close(problem.mean(solution.value), h_equation.exact_mean(albedo), rtol=1e-6, atol=0)


def test_h_equation_has_the_second_solution_that_the_page_speaks_of(h_equation: ModuleType) -> None:
    albedo = torch.tensor([0.999], dtype=torch.float64)
    problem = h_equation.HEquation(albedo)
    means = []
    fixpoint.solve(problem, rtol=1e-10, callback=lambda now: means.append(float(problem.mean(now.value))))
    first, second = (float(h_equation.exact_mean(albedo, sign=sign)) for sign in (-1, 1))
    assert max(means) > second, "it steps across"
    assert abs(means[-1] - first) < 1e-6, "and comes back"


@pytest.mark.parametrize("method", ["anderson", "broyden1", "krylov"])
def test_h_equation_agrees_with_scipy(h_equation: ModuleType, method: str) -> None:
    problem = h_equation.HEquation(torch.tensor([0.9], dtype=torch.float64))
    ours = fixpoint.solve(problem, rtol=1e-10).value[0]
    theirs, calls = h_equation.scipy_solution(problem, 0, method, rtol=1e-10)
    assert calls > 1
    torch.testing.assert_close(torch.from_numpy(theirs), ours, rtol=1e-7, atol=0)


def test_h_equation_slopes_match_the_closed_form(h_equation: ModuleType) -> None:
    slope, exact = h_equation.slopes(torch.tensor(h_equation.ALBEDOS, dtype=torch.float64))
    torch.testing.assert_close(slope, exact, rtol=1e-5, atol=0)


def test_all_states_of_the_gru_are_those_of_pytorchs_own_layer(recurrences: ModuleType) -> None:
    problem, cell = recurrences.gru(), recurrences.gru_cell()
    layer = torch.nn.GRU(cell.input_size, cell.hidden_size, batch_first=True)
    layer.load_state_dict({f"{name}_l0": value for name, value in cell.state_dict().items()})
    with torch.no_grad():
        expected, _ = layer(*problem.inputs)
        states = fixpoint.solve(problem, solver=fixpoint.CausalQuasiNewton(), rtol=1e-5, backward=None).value
    error = (states - expected).norm(dim=2) / expected.norm(dim=2)
    assert states.shape == (1, 1000, 32)
    assert float(error.max()) < 2e-5


def test_all_states_of_the_pendulum_are_scipys(recurrences: ModuleType) -> None:
    solution = fixpoint.solve(recurrences.pendulum(), solver=fixpoint.CausalQuasiNewton(), rtol=1e-5, backward=None)
    exact = scipy.integrate.solve_ivp(
        lambda _, x: [x[1], -np.sin(x[0]) - x[1] / 10],
        (0, 20),
        [2.0, 0.0],
        t_eval=np.linspace(0, 20, 1001)[1:],
        rtol=1e-10,
        atol=1e-10,
    ).y.T
    error = np.linalg.norm(solution.value[0].numpy() - exact, axis=1) / np.linalg.norm(exact, axis=1)
    assert error.shape == (1000,)
    assert error.max() < 2e-5


def test_recurrences_are_counted_as_they_are_called(recurrences: ModuleType) -> None:
    problem = recurrences.gru(steps=60)
    outcomes = recurrences.compare(problem)
    assert list(outcomes) == ["one after another", *recurrences.SOLVERS]
    assert (outcomes["one after another"].rounds, outcomes["one after another"].rows) == (60, 60)
    assert outcomes["Picard"].rows == 60 * outcomes["Picard"].rounds
    causal = outcomes["causal"]
    assert causal.rounds < outcomes["Picard"].rounds
    assert causal.rows < 60 * causal.rounds
    assert 0 < causal.error < 2 * recurrences.RTOL


def test_recurrences_table_on_the_page_has_every_problem_and_method(recurrences: ModuleType) -> None:
    page = (EXAMPLES / "recurrences.txt").read_text().splitlines()[1:]
    found = [(line[:10].strip(), line[10:34].strip()) for line in page]
    assert found == [(p, m) for p in recurrences.PROBLEMS for m in ("one after another", *recurrences.SOLVERS)]


def test_digits_are_restored_within_a_third_of_the_steps() -> None:
    example = load("restoration")
    images = split_held_out(digits())[1].images[:2]
    outcome = example.compare(example.degradations()["blur"], images, steps=25, eta=0.85)
    assert outcome.needed is not None
    assert outcome.needed <= outcome.rounds <= 9
    assert outcome.off < 1e-3
    assert abs(outcome.parallel - outcome.sequential) < 0.02
    assert outcome.sequential > outcome.pinv + 3


def test_noise_is_optimised_through_the_solution() -> None:
    example = load("restoration")
    images = split_held_out(digits())[1].images[:2]
    losses = example.optimise_noise(example.degradations()["super-resolution x4"], images, epochs=4)
    assert losses[-1] < 0.9 * losses[0]


def test_restoration_table_on_the_page_has_every_measurement() -> None:
    page = (EXAMPLES / "restoration.txt").read_text()
    assert all(page.count(f"\n{name:21}") == 4 for name in load("restoration").degradations())


def test_descent_goes_down_by_every_gradient() -> None:
    example = load("descent")
    images = split_held_out(digits())[1].images[:2]
    for gradient in ("sequential", "JFB", "LinearTerm"):
        history = example.descend(example.GRADIENTS[gradient], images, learning_rate=0.1, epochs=8).history
        assert float(history[-1].loss.sum()) < 0.8 * float(history[0].loss.sum())


def test_descent_table_on_the_page_has_every_gradient() -> None:
    page = (EXAMPLES / "descent.txt").read_text()
    assert all(page.count(f"\n{name:18}") == 2 for name in load("descent").GRADIENTS)


def test_photographs_become_a_folder_of_classes(tmp_path: Path) -> None:
    names = load("photographs").write_crops(tmp_path, per_class=3, size=32)
    dataset = open_dataset(tmp_path)
    assert dataset.class_names == tuple(sorted(names))
    assert {"china", "flower"} <= set(names)
    assert dataset.sample_shape == (3, 32, 32)
    assert len(dataset) == 3 * len(names)
    assert dataset[0]["images"].std() > 0.01


def test_own_data_commands_run_from_training_to_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own_data = load("own_data")
    monkeypatch.chdir(tmp_path)
    answers = {shlex.join(words): own_data.run(words) for words in own_data.commands(short=True)}
    runs = tmp_path / "runs"
    assert np.load(runs / "digits-samples" / "images.npy").shape == (12, 1, 8, 8)
    assert np.load(runs / "latent-samples" / "images.npy").shape == (12, 3, 16, 16), "decoded"
    assert len(list((runs / "photos-samples" / "images").glob("*-class1.png"))) == 6
    assert "frechet" in json.loads((runs / "digits-report.json").read_text())["figures"]
    assert all((runs / name / "grid.png").is_file() for name in own_data.PICTURES)
    by_model = {command.split()[-1]: text for command, text in answers.items() if " info " in command}
    assert all("0 china, 1 flower" in " ".join(by_model[f"runs/{name}"].split()) for name in ("photos", "latent-unet"))


def test_own_data_page_shows_every_command_and_its_answer() -> None:
    own_data = load("own_data")
    shown = (EXAMPLES / "own_data.txt").read_text().splitlines()
    assert [line for line in shown if line.startswith("$ ")] == [f"$ {shlex.join(c)}" for c in own_data.commands()]
    assert sum(line.startswith("recall ") for line in shown) == 3
