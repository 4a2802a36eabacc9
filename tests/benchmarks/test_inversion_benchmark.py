"""The benchmark of inversion: what it counts, what it says of the counts, and that every question is answered."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.chains.cases import MixtureDenoiser
from benchmarks.inversion import __main__ as cli
from benchmarks.inversion import cases, gradients, guidance, latents, reversible, rounds, stochastic
from benchmarks.inversion.cases import Setting, chain, generated, held_out
from benchmarks.inversion.cells import Cells, pair, plain, spread
from benchmarks.inversion.methods import Method, attempt, peers, rms, sampled, truthful
from benchmarks.inversion.tables import run_table, wrong_roots
from fixpoint_diffusion import NoiseSchedule, ParallelInverse, initial_noise
from fixpoint_diffusion.denoisers import Guided
from fixpoint_diffusion.training.data import load_digits

NAN, INF = math.nan, math.inf


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The exact denoiser of a mixture in place of the U-Net."""
    digits = load_digits()
    denoiser = MixtureDenoiser(digits.images, digits.labels, NoiseSchedule.linear())
    denoiser.schedule_config, denoiser.prior = {"clip_sample": False}, None  # type: ignore[attr-defined]
    for module in (cases, reversible):
        monkeypatch.setattr(module, "network", lambda dtype=torch.float32: denoiser)
    gradients._places.cache_clear()


def test_cells_are_computed_once_and_forgotten_when_the_question_is_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[int] = []

    def compute() -> dict[str, float]:
        calls.append(1)
        return {"error": NAN, "rounds": 3}

    path = tmp_path / "cells"
    assert Cells(path)("a", compute) == Cells(path)("a", compute) == {"error": None, "rounds": 3}
    assert len(calls) == 1
    assert "after the 1 cells" in capsys.readouterr().out
    monkeypatch.setattr("fixpoint.bench.provenance.commit", lambda: "another")
    Cells(path)("a", compute)
    assert len(calls) == 2
    Cells(path).finish()
    assert not path.exists()


def test_numbers_are_rounded_and_what_is_no_number_is_null() -> None:
    assert plain({"a": [1.23456, (INF, NAN)], "b": 7, "c": True}) == {"a": [1.235, [None, None]], "b": 7, "c": True}


def test_median_and_worst() -> None:
    assert spread([3.0, 1.0, 2.0]) == (2.0, 3.0)
    assert spread([1.0, None]) == (INF, INF)
    assert pair((1e-3, INF)) == "1.0e-03/-"


def test_claims_and_wrong_roots() -> None:
    cell = {
        "claimed": [True, True, False, False, False],
        "errors": [1.5e-3, 3e-3, 2e-3, 0.5e-3, None],
        "latents": [0.5, 0.5, 0.5, None, None],
        "tolerance": 1e-3,
    }
    # Right, too bold, right, too shy, right.
    assert truthful(cell, 1e-3) == 3 / 5
    assert wrong_roots(cell) == 1 / 5
    assert wrong_roots({**cell, "errors": [1e-4] * 5, "latents": [0.5, 0.05, 0.2, 0.0, None]}) == 3 / 5
    line = run_table({"a": {**cell, "rounds": 7, "rows": 50, "seconds": 1.0}})[1]
    assert line.split() == ["a", "5", "2.0e-03/-", "5.0e-01/-", "20%", "7", "10", "1.0", "60%"]


def test_rounds_to_an_error_count_from_where_it_stays_below() -> None:
    curve = {"looks": [2, 4, 6], "curve": [[1e-3, 0.5], [0.1, 0.1], [1e-4, None]], "errors": [1e-4, None], "rounds": 6}
    assert rounds.rounds_to(curve, 1e-3) == [6, INF]
    assert rounds.rounds_to(curve, 0.2) == [2, INF]
    assert rounds.rounds_to({"errors": [1e-4, 1e-2], "rounds": 20}, 1e-3) == [20, INF]


def made_up(*, reached: int, peer: float, predicted: float = 1e-4) -> dict[str, dict[str, object]]:
    """Ours reaches every error after ``reached`` rounds, a peer ends at ``peer`` after 50."""
    common = {"steps": 50, "claimed": [True], "rows": 1, "seconds": 1.0}
    return {
        "T=50, ours, parallel": {
            **common, "errors": [1e-6], "rounds": reached, "looks": [2, reached], "curve": [[1e-3], [1e-6]],
            "predicted": [[predicted], [1e-6]],
        },
        "T=50, AIDI plain, 1": {**common, "errors": [peer], "rounds": 50},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("document", "verdicts"),
    [
        (made_up(reached=25, peer=1e-6, predicted=1.0), "PPPP"),
        (made_up(reached=26, peer=1e-6, predicted=1.0), "PFFP"),
        (made_up(reached=26, peer=0.5, predicted=1.0), "PFPP"),
        (made_up(reached=25, peer=1e-6), "PPPF"),
    ],
)
def test_targets_on_made_up_counts(document: dict[str, dict[str, object]], verdicts: str) -> None:
    aims = rounds.targets(document)
    assert "".join("P" if aim.met else "F" for aim in aims) == verdicts


def test_a_chain_has_the_digits_noise_of_each_seed_and_ends_where_the_sampler_does(small: None) -> None:
    images, x_T = generated(Setting(4), 3)
    torch.testing.assert_close(x_T, initial_noise(0, range(3), (1, 8, 8)))
    torch.testing.assert_close(sampled(chain(Setting(4), images), x_T), images)
    problem = chain(Setting(4, eta=1.0), images, seed=2)
    assert problem.noise is not None
    before = problem.x_T
    sampled(problem, x_T, problem.noise + 1)
    assert problem.x_T is before


def test_guidance_is_classifier_free_guidance(small: None) -> None:
    """Of the mixture, told the class or told nothing."""
    images, labels = held_out(4)
    mixture = cases._mixture()

    def either(x: torch.Tensor, t: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        told, untold = mixture.both(x, t, label.clamp(min=0))
        return torch.where((label >= 0).reshape(-1, 1, 1, 1), told, untold)

    t = torch.full((4,), 500)
    expected = Guided(either, 7.5)(images, t, label=labels, negative_label=torch.full_like(labels, -1))
    found = cases.Toward(Setting(4, guidance=7.5, model="mixture"), torch.float32)(images, t, labels)
    torch.testing.assert_close(found, expected)


def test_an_attempt_is_measured_from_outside(small: None) -> None:
    images, x_T = generated(Setting(5), 2)
    problem = chain(Setting(5), images)
    cell = attempt(Method("", ParallelInverse(), ours=True), problem, images, tolerance=1e-3, x_T=x_T)
    assert cell["claimed"] == [True, True]
    assert max(cell["errors"]) <= 1e-3
    cell = attempt(peers(2)[0], problem, images, tolerance=10.0, x_T=x_T)
    assert (cell["rounds"], cell["rows"], cell["claimed"]) == (10, 20, [True, True])
    found = peers(2)[0].method.run(
        problem, images, tolerance=torch.full((2,), 10.0), progress=False, callback=None
    )  # fmt: skip
    expected = rms(sampled(problem, found.x_T) - images)
    torch.testing.assert_close(torch.tensor(cell["errors"], dtype=torch.float64), expected)
    torch.testing.assert_close(torch.tensor(cell["latents"], dtype=torch.float64), rms(found.x_T - x_T))


def test_sizes_cover_what_is_promised() -> None:
    assert {size.steps for size in rounds.FULL} == {10, 20, 50, 100, 200, 1000}
    assert set(rounds._ROUNDS) <= {size.steps for size in rounds.FULL}
    assert set(latents._SIZES) == set(guidance._MIXTURE) == {10, 20, 50, 100, 1000}
    assert {steps for _, steps in stochastic._SIZES} == set(latents._SIZES)
    assert (guidance._SCALES, stochastic._ETAS) == ((1.0, 3.0, 7.5), (0.5, 1.0))


def test_the_gradient_of_the_exact_rule_is_backpropagations(small: None) -> None:
    cell = gradients._compare("exact, IFT(rtol=1e-6)", 4, 2)
    for place in ("noise", "near"):
        assert cell[place]["cosine"] == pytest.approx(1, abs=1e-4)
        assert cell[place]["length"] == pytest.approx(1, abs=1e-3)
    assert cell["costs"]["products"] > 0


@pytest.mark.filterwarnings("ignore")
def test_every_question_is_answered(
    small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    assert cli.main(["--quick", "--jobs", "1", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    for name in cli.QUESTIONS:
        assert (tmp_path / f"inversion-{name}.txt").read_text().strip() in printed
        document = json.loads((tmp_path / f"inversion-{name}.json").read_text())
        assert set(document) == {"machine", "versions", "commit", "targets", "cells"}
        assert document["cells"]
    pictures = {path.name for path in tmp_path.glob("*.png")}
    assert pictures == {f"inversion-{name}.png" for name in ("rounds", "latents", "guidance", "gradients", "descent")}
    assert not list(tmp_path.glob("*.partial"))
    assert "PASS  ours: every claim is true" in printed
    # A later run takes over what is not ours.
    path = tmp_path / "inversion-reversible.json"
    document = json.loads(path.read_text())
    for cell in document["cells"].values():
        cell["calls"] = 99
    path.write_text(json.dumps(document))
    assert cli.main(["--quick", "--ours-again", "--only", "reversible", "--out", str(tmp_path)]) == 0
    again = json.loads(path.read_text())
    assert {name: cell["calls"] for name, cell in again["cells"].items()} == {
        "T=4, EDICT": 99, "T=4, BDIA": 99, "T=4, O-BELM (ours)": 4, "T=4, Rex": 99
    }  # fmt: skip
    assert again["others"]["commit"] == document["commit"]
    path.unlink()
    with pytest.raises(SystemExit, match="2"):
        cli.main(["--quick", "--ours-again", "--only", "reversible", "--out", str(tmp_path)])
    assert "no such file" in capsys.readouterr().err


def test_each_question_has_a_process_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answered = []
    monkeypatch.setattr(cli, "answer", lambda *place, **how: answered.append((place, how)))

    def run(words: list[str], **options: Any) -> Any:
        assert words[1:3] == ["-m", "benchmarks.inversion"]
        assert cli.main(words[3:]) == 0
        return SimpleNamespace(stdout="answered\n")

    monkeypatch.setattr(cli.subprocess, "run", run)
    assert cli.main(["--quick", "--only", "cost", "--only", "latents", "--out", str(tmp_path)]) == 0
    asked = [((name, tmp_path), {"quick": True, "ours_again": False}) for name in ("cost", "latents")]
    assert sorted(answered, key=str) == asked
    assert capsys.readouterr().out.count("answered") == 2
