"""The example scripts of the documentation do what their pages say."""

from __future__ import annotations

import importlib.util
import json
import runpy
import shlex
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import scipy.integrate
import torch
from PIL import Image
from typer.testing import CliRunner

import fixpoint
from fixpoint_diffusion import embedded, initial_noise, load_denoiser
from fixpoint_diffusion.cli import app
from fixpoint_diffusion.denoisers import NetworkDenoiser, describe
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
def recurrences() -> dict[str, Any]:
    return runpy.run_path(str(EXAMPLES.parent / "gallery" / "recurrences.py"))


def test_fpdm_of_ones_own_images_runs_as_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On 8 pictures of 40x36 pixels, with fewer steps and images."""
    page = (EXAMPLES.parent / "fpdm.md").read_text()
    (block,) = [part for part in page.split("```bash\n")[1:] if part.startswith("fixpoint-diffusion train fpdm --data")]
    for name in ("cats", "dogs"):
        (tmp_path / "photographs" / name).mkdir(parents=True)
        for number in range(4):
            pixels = np.random.default_rng(number).integers(0, 256, (40, 36, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photographs" / name / f"{number}.png")
    monkeypatch.chdir(tmp_path)
    for line in block.split("```")[0].splitlines():
        words = shlex.split(line.replace("20000", "2 --batch-size 4").replace("-images 64", "-images 2"), comments=True)
        result = CliRunner().invoke(app, words[1:])
        assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "runs" / "photo-samples" / "sample.json").read_text())
    assert (record["images_done"], record["block_passes"]) == (2, 240)
    assert load_denoiser(tmp_path / "runs" / "photo-dit").sample_shape == (3, 32, 32)


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
    fixpoint.solve(
        problem, rtol=1e-10, max_evals=1000, callback=lambda now: means.append(float(problem.mean(now.value)))
    )
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


def test_all_states_of_the_gru_are_those_of_pytorchs_own_layer(recurrences: dict[str, Any]) -> None:
    problem, cell = recurrences["gru"], recurrences["cell"]
    layer = torch.nn.GRU(cell.input_size, cell.hidden_size, batch_first=True)
    layer.load_state_dict({f"{name}_l0": value for name, value in cell.state_dict().items()})
    with torch.no_grad():
        expected, _ = layer(*problem.inputs)
    states = recurrences["found"]["GRU"]
    error = (states - expected).norm(dim=2) / expected.norm(dim=2)
    assert states.shape == (1, 1000, 32)
    assert float(error.max()) < 2e-5


def test_all_states_of_the_pendulum_are_scipys(recurrences: dict[str, Any]) -> None:
    states = recurrences["found"]["pendulum"][0].numpy()
    exact = scipy.integrate.solve_ivp(
        lambda _, x: [x[1], -np.sin(x[0]) - x[1] / 10],
        (0, 20),
        [2.0, 0.0],
        t_eval=np.linspace(0, 20, 1001)[1:],
        rtol=1e-10,
        atol=1e-10,
    ).y.T
    error = np.linalg.norm(states - exact, axis=1) / np.linalg.norm(exact, axis=1)
    assert error.shape == (1000,)
    assert error.max() < 2e-5


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


@pytest.fixture(scope="module")
def editing() -> ModuleType:
    return load("editing")


def test_model_for_editing_starts_as_the_embedded_one_and_is_told_classes(editing: ModuleType, tmp_path: Path) -> None:
    denoiser = editing.train(tmp_path, steps=1)
    assert describe(denoiser).class_labels.null_label == editing.NO_CLASS
    first = load_denoiser(tmp_path / "start").model.state_dict()
    expected = embedded("ddpm-digits").model.state_dict()
    assert set(first) - set(expected) == {"class_embedding.weight"}
    assert all(torch.equal(first[name], value) for name, value in expected.items())
    x, t = torch.randn(4, 1, 8, 8), torch.tensor([10, 300, 600, 900])
    with torch.no_grad():
        told = [denoiser(x, t, class_labels=torch.full((4,), label)) for label in (0, 1, editing.NO_CLASS)]
    assert not torch.allclose(told[0], told[1], atol=1e-2)


def test_digits_are_edited_by_inversion_and_by_noise(editing: ModuleType) -> None:
    editor = editing.Editor(Told(embedded("ddpm-digits")), steps=10)
    images, labels = editing.one_of_each_class()[:2], torch.tensor([3, 4])
    assert not (images == split_held_out(digits())[0].images[:, None]).flatten(2).all(dim=2).any()
    x_T = torch.randn(2, 1, 8, 8)
    made = editor.sample(x_T, labels)
    torch.testing.assert_close(editor.sample(editor.invert(made, labels).x_T, labels), made, rtol=0, atol=2e-2)
    weak, strong = (editor.sdedit(images, labels, strength=strength) for strength in (0.1, 1.0))
    assert float((weak - images).norm()) < float((strong - images).norm()) / 2
    noise = initial_noise(0, range(2), (1, 8, 8))
    level = editor.schedule.alphas_cumprod[editor.timesteps[0]].float()
    start = level.sqrt() * images + (1 - level).sqrt() * noise
    torch.testing.assert_close(strong, editor.sample(start, labels))


class Told:
    """The embedded model as one that is told classes, and does not listen."""

    def __init__(self, denoiser: NetworkDenoiser) -> None:
        self.denoiser, self.schedule_config = denoiser, denoiser.schedule_config

    def __call__(self, x: torch.Tensor, t: torch.Tensor, class_labels: torch.Tensor) -> torch.Tensor:
        return self.denoiser(x, t)


def test_interpolation_keeps_to_the_sphere(editing: ModuleType) -> None:
    a, b = torch.randn(2, 1, 8, 8)
    b = b * a.norm() / b.norm()
    torch.testing.assert_close(editing.spherical(a, b, 0.0), a)
    torch.testing.assert_close(editing.spherical(a, b, 1.0), b)
    for share in (0.2, 0.5):
        between = editing.spherical(a, b, share)
        torch.testing.assert_close(between.norm(), a.norm())
        angle = torch.acos((a * between).sum() / a.norm() ** 2) / torch.acos((a * b).sum() / a.norm() ** 2)
        assert float(angle) == pytest.approx(share, rel=1e-3)


def test_table_of_edits_counts_those_that_changed(editing: ModuleType) -> None:
    originals = editing.one_of_each_class()
    images, labels = editing.every_pair(originals)
    _, moved = editing.figures(images, images, labels).split()
    assert float(moved) == 0
    pairs = [(int(image), int(label)) for image, label in zip(torch.arange(10).repeat(10), labels, strict=True)]
    assert len(set(pairs)) == 100
    asked, _ = editing.figures(originals[labels], images, labels).split()
    assert float(asked) >= 0.9  # the classifier reads the digits of each class
