"""Presets, the plan that a dry run prints, and the backward rule as an option of the command."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from benchmarks.fpdm_memory import peak_of
from fixpoint_diffusion.cli import app, main
from fixpoint_diffusion.commands.train import BackwardName, PresetName
from fixpoint_diffusion.models import FPDM, DiTConfig, FPDMConfig
from fixpoint_diffusion.models.fpdm.config import Backpropagation
from fixpoint_diffusion.options.training import learning_rate_at
from fixpoint_diffusion.training import TrainingConfig, TrainingRun
from fixpoint_diffusion.training.presets import PRESETS
from tests.fixpoint_diffusion.test_cost import bytes_kept

WEIGHTS = "diffusion_pytorch_model.safetensors"
SMALL = {
    "fpdm": {"width": 16, "heads": 2, "max_no_grad": 3, "max_grad": 2, "backward": "multi-jfb"},
    "dit": {"width": 16, "heads": 2, "depth": 2},
    "unet": {"block_out_channels": [8, 8], "norm_num_groups": 4, "attention_head_dim": 4},
}


def command(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["train", *map(str, arguments)])


def done(*arguments: object) -> str:
    result = command(*arguments)
    assert result.exit_code == 0, result.output + str(result.exception)
    return result.output


@pytest.mark.parametrize("kind", sorted(SMALL))
def test_planned_operations_are_those_of_a_step_as_torch_counts_them(kind: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"kind": kind, "settings": SMALL[kind], "training": {"batch_size": 3}}
    plan = TrainingRun.start(tmp_path / "run", dry=True, **options).plan()
    model = TrainingRun.start(tmp_path / "run", **options).model.train()
    x = torch.randn(3, 1, 8, 8, requires_grad=True)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(x, torch.tensor([3, 500, 999])).square().sum().backward()
    assert plan.flops_per_image * 3 == pytest.approx(counter.get_total_flops(), rel=0.02)
    assert plan.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert plan.flops == pytest.approx(plan.flops_per_image * 3 * plan.config.steps)
    assert plan.gpu_hours == pytest.approx(plan.flops / (0.4 * 312e12 * 3600))


def test_plan_of_stochastic_depths_is_the_mean_over_them(tmp_path: Path) -> None:
    def flops(**options: Any) -> float:
        settings = {"width": 16, "heads": 2, **options}
        return TrainingRun.start(tmp_path, kind="fpdm", settings=settings, dry=True).plan().flops_per_image

    depths = [(n, m) for n in range(4) for m in (1, 2)]
    each = [flops(backward="multi-jfb", max_no_grad=n, max_grad=m) for n, m in depths]
    assert flops(backward="sjfb", max_no_grad=3, max_grad=2) == pytest.approx(sum(each) / len(each))


@pytest.mark.parametrize("kind", sorted(SMALL))
def test_planned_memory_is_that_of_one_image(kind: str, tmp_path: Path) -> None:
    # Hooks that watch what is saved also see the first iteration of those that record nothing, so there is none here.
    settings = {**SMALL[kind], **({"max_no_grad": 0} if kind == "fpdm" else {})}
    model = TrainingRun.start(tmp_path, kind=kind, settings=settings).model.train()
    plan = TrainingRun.start(tmp_path, kind=kind, settings=settings, dry=True).plan()
    # DiT and FPDM are counted with the kernel for attention that the CPU takes.
    with sdpa_kernel(SDPBackend.MATH) if kind == "unet" else nullcontext():
        found = bytes_kept(model, lambda: model(torch.randn(1, 1, 8, 8), torch.tensor([3])))
    assert plan.activation_bytes == pytest.approx(found, rel=0.1 if kind == "unet" else 1e-3)


@pytest.mark.parametrize("kind", ["fpdm", "dit"])
def test_planned_memory_is_what_a_step_holds_at_its_most(kind: str, tmp_path: Path) -> None:
    """Against the tensors that exist, gradients too: these come as activations go."""
    settings = {"width": 64, "heads": 2, **({"depth": 8} if kind == "dit" else {"backward": "multi-jfb"})}
    model = TrainingRun.start(tmp_path, kind=kind, settings=settings).model.train()
    plan = TrainingRun.start(tmp_path, kind=kind, settings=settings, dry=True).plan()
    x, t = torch.randn(16, 1, 8, 8), torch.randint(0, 1000, (16,))
    held = peak_of(model, lambda: model(x, t).square().mean().backward())
    assert plan.activation_bytes * 16 == pytest.approx(held, rel=0.1)


def test_full_scale_operations_of_both_models_are_those_that_torch_counts(tmp_path: Path) -> None:
    x, t = torch.empty(1, 4, 32, 32, device="meta"), torch.empty(1, dtype=torch.int64, device="meta")

    def counted(call: Any) -> tuple[int, Any]:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            out = call()
        return counter.get_total_flops(), out

    dit: Any = TrainingRun.start(tmp_path, kind="dit", preset="paper", dry=True)
    plan = dit.plan()
    assert plan.parameters == 675_129_632 - 256 * 1152  # the published checkpoint, which holds the positions too
    assert plan.flops_per_image == pytest.approx(3 * counted(lambda: dit.model.network(x, t))[0], rel=1e-3)
    fpdm: Any = TrainingRun.start(tmp_path, kind="fpdm", preset="paper", dry=True)
    network = fpdm.model.network
    before, (z, inputs, condition) = counted(lambda: network._before_layer(x, t, None))
    iteration, z = counted(lambda: network.implicit_block(z, *inputs))
    after, _ = counted(lambda: network.head(network.post[0](z, condition), condition))
    # n is 6 on average, m is 6.5; what is recorded is passed three times, forward and backward.
    expected = 3 * (before + after) + (6 + 3 * 6.5) * iteration
    assert fpdm.plan().flops_per_image == pytest.approx(expected, rel=1e-3)


def test_papers_baseline_has_the_same_training(tmp_path: Path) -> None:
    runs = [TrainingRun.start(tmp_path, kind=kind, preset="paper", dry=True) for kind in ("fpdm", "dit")]
    assert runs[0].config == runs[1].config
    assert runs[0].schedule_config == runs[1].schedule_config
    fpdm, dit = (run.model.network.config for run in runs)  # type: ignore[union-attr]
    assert (dit.width, dit.heads, dit.depth, dit.learn_sigma) == (fpdm.width, fpdm.heads, 28, fpdm.learn_sigma)
    output = done("dit", "--preset", "paper", "--dry-run")
    assert "DiT with 674,834,720 parameters" in output
    assert "the number of steps" not in output  # which the paper says of its DiT


def test_dry_run_says_the_full_scale_plan_and_writes_nothing(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    output = " ".join(done("--kind", "fpdm", "--preset", "paper", "--dry-run", "--device", "cuda").split())
    with torch.device("meta"):
        model = FPDM(FPDMConfig.preset("XL/2"))
    assert f"{sum(parameter.numel() for parameter in model.parameters()):,}" in output
    assert "400,000 steps, 204,800,000 images, 160 epochs" in output
    assert "GPU-hours on an A100 at 40%" in output
    assert "not known the number of steps" in output
    assert not list(tmp_path.iterdir())


def test_dry_run_of_a_resumed_run_leaves_it_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "settings.json").write_text(json.dumps(SMALL["fpdm"]))
    out = tmp_path / "out"
    done("fpdm", "--settings", tmp_path / "settings.json", "--batch-size", 4, "--steps", 2, "--out", out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    output = done("--resume", "--out", out, "--steps", 30, "--dry-run")
    assert "30 steps, 120 images" in output
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_presets_are_the_recipes_that_they_name(tmp_path: Path) -> None:
    for name, weighting, gelu, attached in (("paper", "plain", "exact", True), ("released", "fpdm", "tanh", False)):
        run = TrainingRun.start(tmp_path, kind="fpdm", preset=name, dry=True)
        assert {learning_rate_at(step, run.config) for step in (0, 100, 399_999)} == {1e-4}
        found = dataclasses.asdict(run.config)
        expected = {
            "batch_size": 512,
            "weight_decay": 0.0,
            "ema_decay": 0.9999,
            "prediction_type": "v_prediction",
            "class_dropout": 0.1,
            "max_grad_norm": None,
            "weighting": weighting,
        }
        assert {key: found[key] for key in expected} == expected
        c: Any = run.model.network.config
        assert (c.backward, c.max_no_grad, c.max_grad, c.injection_gelu, c.attach_start) == (
            "sjfb", 12, 12, gelu, attached,
        )  # fmt: skip
        assert c.learn_sigma
        assert run.schedule_config["rescale_betas_zero_snr"]
        assert run.schedule_config["variance_type"] == "learned_range"
    assert TrainingRun.start(tmp_path, kind="fpdm", preset="ours").config == TrainingRun.start(
        tmp_path, kind="fpdm"
    ).config  # fmt: skip


def test_preset_takes_other_data_and_what_is_given_wins(tmp_path: Path) -> None:
    options = ("--data", "digits", "--settings", tmp_path / "settings.json", "--batch-size", 4, "--steps", 1)
    (tmp_path / "settings.json").write_text(json.dumps(SMALL["fpdm"]))
    done("fpdm", "--preset", "released", "--out", tmp_path / "out", "--backward", "jfb", *options)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["width"], config["backward"], config["injection_gelu"]) == (16, "jfb", "tanh")
    training = json.loads((tmp_path / "out" / "training_config.json").read_text())
    assert (training["steps"], training["learning_rate"], training["max_grad_norm"]) == (1, 1e-4, None)


def test_backward_rule_is_that_of_the_run_and_of_its_continuation(tmp_path: Path) -> None:
    (tmp_path / "settings.json").write_text(json.dumps({**SMALL["fpdm"], "backward": "sjfb"}))
    options = ("fpdm", "--settings", tmp_path / "settings.json", "--batch-size", 4)
    for name, rule, steps in (("whole", "ift", 3), ("cut", "ift", 2), ("other", "sjfb", 3)):
        done(*options, "--out", tmp_path / name, "--steps", steps, "--backward", rule, "--learning-rate", 1e-2)
    done("--resume", "--out", tmp_path / "cut", "--steps", 3)
    assert json.loads((tmp_path / "cut" / "config.json").read_text())["backward"] == "ift"
    whole, cut, other = (load_file(tmp_path / name / WEIGHTS) for name in ("whole", "cut", "other"))
    near = [torch.allclose(cut[key].float(), whole[key].float(), rtol=1e-2, atol=1e-2) for key in whole]
    assert all(near)
    assert not all(torch.equal(other[key], whole[key]) for key in whole)
    # A model that is trained further may be trained by another rule.
    done("--init", tmp_path / "whole", "--out", tmp_path / "tuned", "--backward", "phantom", "--steps", 1,
         "--batch-size", 4)  # fmt: skip
    assert json.loads((tmp_path / "tuned" / "config.json").read_text())["backward"] == "phantom"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("fpdm", "--preset", "nope"), "'nope' is not one of 'paper', 'released', 'ours'"),
        (("fpdm", "--preset", "paper"), "say which data to train on"),
        (("unet", "--preset", "paper", "--dry-run"), "preset 'paper' is for fpdm and dit, got unet"),
        (("dit", "--preset", "released", "--dry-run"), "preset 'released' is for fpdm, got dit"),
        (("dit", "--backward", "ift"), "only an fpdm has an implicit layer, got dit"),
        (("fpdm", "--backward", "bptt"), "'bptt' is not one of 'sjfb', 'multi-jfb',"),
        (("fpdm", "--kind", "dit"), "named twice, fpdm and dit"),
    ],
)
def test_unusable_options_write_nothing(
    arguments: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["fixpoint-diffusion", "train", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.startswith("Error: ")
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_the_command_offers_every_preset_and_backward_rule() -> None:
    assert list(PresetName) == list(PRESETS)
    assert list(BackwardName) == list(get_args(Backpropagation))


def test_every_preset_can_be_built() -> None:
    for preset in (preset for presets in PRESETS.values() for preset in presets):
        {"fpdm": FPDMConfig, "dit": DiTConfig}[preset.kind](**preset.settings)
        assert math.isfinite(TrainingConfig(**preset.training).learning_rate)
