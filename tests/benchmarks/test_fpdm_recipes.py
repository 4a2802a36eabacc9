"""The benchmarks of FPDM's training: recipes, and a DiT beside it at equal block passes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fixpoint
from benchmarks import fpdm_budget, fpdm_measures, fpdm_recipes
from fixpoint_diffusion.models import FPDM, DiT, DiTConfig, FPDMConfig, fpdm_layer_problem, save_dit, save_fpdm
from fixpoint_diffusion.processes import NoiseSchedule, initial_noise
from fixpoint_diffusion.sampling import fpdm_steps

diffusers = pytest.importorskip("diffusers")

SCHEDULE = NoiseSchedule.linear().zero_terminal_snr()
SHAPE: dict[str, Any] = {"width": 16, "heads": 2, "num_classes": 10}


def lively(model: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def test_recipes_are_trained_once_each_and_kept(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(fpdm_recipes, "IMAGES", 20)
    monkeypatch.setattr(fpdm_recipes, "LAYER_IMAGES", 2)
    monkeypatch.setattr(fpdm_recipes, "STEPS", 2)
    monkeypatch.setitem(fpdm_recipes.SETTINGS, "width", 16)
    monkeypatch.setitem(fpdm_recipes.TRAINING, "batch_size", 4)
    names = ["none", "self-distilled"]
    out = tmp_path / "recipes.json"
    call = ["--folder", str(tmp_path / "runs"), "--out", str(out), "--steps", "2", "--only", *names, "--seeds"]
    fpdm_recipes.main([*call, "1"])
    first = json.loads(out.read_text())["runs"]
    assert [run["name"] for run in first] == names
    assert first[1]["training"]["state_loss"] == "self-distilled"
    assert first[0]["reuse_4"]["block_passes"] == 2 * (1 + 4 + 1)
    assert first[0]["beyond"]["4"]["block_passes"] == 2 * (1 + 32 + 1)
    # A second call trains what is missing, and nothing again.
    monkeypatch.setitem(fpdm_recipes.RECIPES, "none", ({"width": "no number"}, {}))
    fpdm_recipes.main([*call, "1"])
    assert json.loads(out.read_text())["runs"] == first
    monkeypatch.setitem(fpdm_recipes.RECIPES, "none", ({}, {}))
    capsys.readouterr()
    fpdm_recipes.main([*call, "2"])
    runs = json.loads(out.read_text())["runs"]
    assert runs[:2] == first
    assert [(run["name"], run["seed"]) for run in runs[2:]] == [(name, 2) for name in names]
    low, high = sorted(run["reuse_4"]["frechet"] for run in runs if run["name"] == "none")
    assert f"({low:.2f}..{high:.2f})" in capsys.readouterr().out


def test_layer_is_measured_at_the_latents_of_a_sampling_run() -> None:
    model, y = lively(FPDM(FPDMConfig(**SHAPE))), torch.tensor([0, 1, 2])
    model.implicit_block.w1_z.weight.data.mul_(0.1)
    found = fpdm_measures.layer_figures(model, SCHEDULE, depth=3, images=3, steps=2, seed=5)
    residuals = []
    for step in fpdm_steps(model, initial_noise(5, range(3), (1, 8, 8)), SCHEDULE, steps=2, iterations=3, y=y):
        problem = fpdm_layer_problem(model, step.latent, torch.tensor(step.timestep), y=y)
        z = fixpoint.solve(problem, solver=fixpoint.Picard(), depth=3, backward=None).value
        residuals.append((problem(z) - z).flatten(1).norm(dim=1) / problem(z).flatten(1).norm(dim=1))
    assert found["residual"] == pytest.approx(float(torch.cat(residuals).double().median()), rel=1e-4)
    # It contracts; a map that does not leads elsewhere from another start.
    assert found["lowest_cosine"] > 0.999
    assert found["unsettled"] == 0
    model.implicit_block.w1_z.weight.data.mul_(100)
    wild = fpdm_measures.layer_figures(model, SCHEDULE, depth=3, images=3, steps=2, seed=5)
    assert wild["lowest_cosine"] < 0.99
    assert wild["unsettled"] == 1


def test_dit_takes_the_steps_of_diffusers(monkeypatch: Any) -> None:
    images: list[Tensor] = []
    monkeypatch.setattr(fpdm_measures, "quality", lambda x, classes: images.append(x) or {})
    model, y = lively(DiT(DiTConfig(**SHAPE, depth=2))), torch.arange(3)
    assert fpdm_measures.dit_quality(model, SCHEDULE, images=3, steps=4, seed=1)["block_passes"] == 8
    scheduler = diffusers.DDIMScheduler(
        prediction_type="v_prediction", timestep_spacing="trailing", rescale_betas_zero_snr=True, clip_sample=False
    )
    scheduler.set_timesteps(4)
    x = initial_noise(1, range(3), (1, 8, 8))
    for t in scheduler.timesteps:
        with torch.no_grad():
            x = scheduler.step(model(x, t, y), t, x).prev_sample
    torch.testing.assert_close(images[0], x, rtol=1e-3, atol=1e-3)


def test_every_way_keeps_within_the_budget(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    save_fpdm(lively(FPDM(FPDMConfig(**SHAPE))), tmp_path / "fpdm")
    save_dit(lively(DiT(DiTConfig(**SHAPE, depth=4))), tmp_path / "dit")
    scheduler = diffusers.DDIMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    for folder in ("fpdm", "dit"):
        scheduler.save_pretrained(tmp_path / folder)
    out = tmp_path / "budget.json"
    call = ["--images", "20", "--seeds", "1", "--budgets", "40", "--out", str(out)]
    call += ["--pair", str(tmp_path / "fpdm"), str(tmp_path / "dit")]
    fpdm_budget.main(call)
    found = json.loads(out.read_text())
    runs = {run["way"]: run for run in found["runs"]}
    assert runs["DiT"]["block_passes"] == 40
    printed = capsys.readouterr().out
    for name, run in runs.items():
        assert 0.85 * 40 < run["block_passes"] <= (1.1 if "adaptive" in name else 1) * 40
        assert f"{run['frechet']:.2f} ({run['frechet']:.2f}.." in printed
    compared = printed.partition("Ahead of the DiT")[2].splitlines()
    for name in runs.keys() - {"DiT"}:
        (line,) = [each for each in compared if each.startswith(f"FPDM {name} ")]
        assert line.endswith(f"{int(runs[name]['frechet'] < runs['DiT']['frechet'])} of 1")
    confidence, distance = found["targets"][0]["targets"]
    assert f"{confidence['found']:.3f} (at least 0.970)" in printed
    assert distance["at most"] == pytest.approx(1.25 * distance["U-Net"])
    # As many iterations cost as much, whatever they start from; what is beside the blocks comes on top.
    assert runs["2, extrapolate"]["flops"] == runs["2, reuse"]["flops"] > runs["DiT"]["flops"]
    # What is known is kept, and another training is one more pair.
    monkeypatch.setattr(fpdm_measures, "quality", lambda x, classes: {"frechet": -1.0, "confidence": 0.0})
    fpdm_budget.main([*call, "--only", "DiT"])
    assert json.loads(out.read_text())["runs"] == found["runs"]
    save_dit(lively(DiT(DiTConfig(**SHAPE, depth=2))), tmp_path / "other")
    scheduler.save_pretrained(tmp_path / "other")
    fpdm_budget.main([*call, "--pair", str(tmp_path / "fpdm"), str(tmp_path / "other"), "--only", "DiT"])
    *earlier, added = json.loads(out.read_text())["runs"]
    assert earlier == found["runs"]
    assert (added["way"], added["frechet"], added["steps"]) == ("DiT", -1, 20)
    first = runs["DiT"]["frechet"]
    assert f"{(first - 1) / 2:.2f} (-1.00..{first:.2f})" in capsys.readouterr().out
