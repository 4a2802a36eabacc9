from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

from fixpoint_diffusion.cli import app, main
from fixpoint_diffusion.denoisers import load_denoiser
from fixpoint_diffusion.denoisers.checksums import verify_checksums
from fixpoint_diffusion.processes.prior import PRIOR_FILE
from fixpoint_diffusion.training.checkpoints import load_record

WEIGHTS = "diffusion_pytorch_model.safetensors"
SMALL_UNET = {"block_out_channels": [8, 8], "norm_num_groups": 4, "attention_head_dim": 4}
SMALL_FPDM = {"width": 16, "heads": 2, "max_no_grad": 2, "max_grad": 2}


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def run_main(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["fixpoint-diffusion", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        main()
    return stop.value.code


@pytest.fixture
def settings(tmp_path: Path) -> Path:
    (tmp_path / "unet.json").write_text(json.dumps(SMALL_UNET))
    (tmp_path / "fpdm.json").write_text(json.dumps(SMALL_FPDM))
    return tmp_path


def train(settings: Path, out: Path, *arguments: object, kind: str = "unet") -> Result:
    options = ["--settings", settings / f"{kind}.json", "--batch-size", 4, "--out", out]
    return invoke("train", kind, *options, *arguments)


@pytest.mark.parametrize("command", [(), ("sample",), ("train",), ("info",)])
def test_help_explains_with_an_example(command: tuple[str, ...]) -> None:
    result = invoke(*command, "--help")
    assert result.exit_code == 0
    if command:
        assert f"Example: fixpoint-diffusion {command[0]}" in result.output


def test_help_does_not_import_diffusers() -> None:
    code = "import sys, fixpoint_diffusion.cli as c; from typer.testing import CliRunner as R; r = R().invoke"
    code += "(c.app, ['train', '--help']); assert r.exit_code == 0; print('diffusers' in sys.modules)"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "False"


@pytest.mark.parametrize(
    ("arguments", "suggestion"),
    [
        (("sampel",), "'sample'"),
        (("sample", "--num-image", "3"), "--num-images"),
        (("train", "--batchsize", "3"), "--batch-size"),
        (("sample", "--solver", "andersen"), "'anderson'"),
        (("train", "vnet"), "'unet'"),
    ],
)
def test_misspelled_words_fail_with_a_suggestion(arguments: tuple[str, ...], suggestion: str) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert suggestion in result.output


@pytest.mark.parametrize(
    "arguments",
    [
        ("sample", "--steps", "0"),
        ("sample", "--eta", "2"),
        ("sample", "--num-images", "x"),
        ("train", "--steps", "-1"),
        ("train", "--resume", "--steps", "3"),
    ],
)
def test_values_out_of_range_are_usage_errors(arguments: tuple[str, ...]) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert arguments[1] in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("info", "no-such"), "embedded models are ddpm-digits"),
        (("train", "--data", "no-such"), "'digits'"),
        (("train", "--learning-rate", "-1"), "learning_rate must be positive"),
        (("train", "--resume", "--out", "no-such"), "no checkpoint to resume from"),
        (("train", "--settings", "no-such.json"), "no-such.json"),
        (("sample", "--iterations", "2"), "--iterations"),
        (("sample", "--max-rows", "9"), "--max-rows is for --solver causal, not for --solver sequential"),
        (("sample", "--max-rows", "9", "--solver", "anderson"), "--max-rows is for --solver causal"),
        (("sample", "--steps", "2000"), "1000 timesteps"),
    ],
)
def test_unusable_input_ends_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_main(monkeypatch, *arguments) == 2
    error = capsys.readouterr().err
    assert message in error.splitlines()[-1]
    assert "Traceback" not in error


@pytest.mark.parametrize("kind", ["unet", "fpdm"])
def test_trained_folder_is_complete_and_loads(settings: Path, tmp_path: Path, kind: str) -> None:
    out = tmp_path / "out"
    result = train(settings, out, "--steps", 2, kind=kind)
    assert result.exit_code == 0, result.output
    names = {"config.json", WEIGHTS, "scheduler_config.json", "training_config.json", "training_log.csv", PRIOR_FILE}
    assert set(verify_checksums(out)) == names
    assert {tensor.dtype for tensor in load_file(out / WEIGHTS).values()} == {torch.float16}
    denoiser = load_denoiser(out)
    expected = {"unet": "epsilon", "fpdm": "v_prediction"}[kind]
    assert denoiser.prediction_type == denoiser.schedule_config["prediction_type"] == expected
    output = denoiser(torch.randn(2, 1, 8, 8), torch.tensor([3, 998]))
    assert output.shape == (2, 1, 8, 8)
    assert bool(output.isfinite().all())
    assert json.loads((out / "training_config.json").read_text())["steps"] == 2


def test_own_images_of_another_shape_can_be_trained_on(settings: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "images.npy", np.random.default_rng(0).integers(0, 256, (5, 3, 12, 8), dtype=np.uint8))
    result = train(settings, tmp_path / "out", "--steps", 1, "--data", tmp_path / "images.npy")
    assert result.exit_code == 0, result.output
    assert load_denoiser(tmp_path / "out").sample_shape == (3, 12, 8)
    info = invoke("info", tmp_path / "out")
    assert "3x12x8" in info.output


@pytest.mark.parametrize(("kind", "line"), [("unet", '{"depth": 3}'), ("fpdm", '{"depth": 3}'), ("unet", "[]")])
def test_unknown_settings_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, kind: str, line: str
) -> None:
    (tmp_path / "s.json").write_text(line)
    assert run_main(monkeypatch, "train", kind, "--settings", tmp_path / "s.json", "--out", tmp_path / "out") == 2
    assert "settings" in (error := capsys.readouterr().err) or "depth" in error
    assert "Traceback" not in error


@pytest.mark.parametrize("module", ["diffusers", "sklearn", "PIL"])
def test_missing_library_names_the_extra_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, module: str
) -> None:
    for name in [name for name in sys.modules if name == module or name.startswith(f"{module}.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    command = {"diffusers": ("info", "ddpm-digits"), "sklearn": ("train",), "PIL": ("sample", "--steps", 1)}[module]
    monkeypatch.chdir(tmp_path)
    assert run_main(monkeypatch, *command) == 2
    assert "pip install 'fixpoint[diffusion]'" in capsys.readouterr().err.splitlines()[-1]


def test_second_run_into_the_same_folder_is_refused(settings: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    assert train(settings, tmp_path / "out", "--steps", 1).exit_code == 0
    assert run_main(monkeypatch, "train", "--steps", 1, "--out", tmp_path / "out") == 2
    assert "already holds a training run" in capsys.readouterr().err


def test_ctrl_c_leaves_a_checkpoint_that_resumes_to_the_same_weights(settings: Path, tmp_path: Path) -> None:
    assert train(settings, tmp_path / "whole", "--steps", 60).exit_code == 0
    command = [sys.executable, "-m", "fixpoint_diffusion.cli", "train", "unet", "--settings", settings / "unet.json"]
    command += ["--batch-size", "4", "--steps", "60", "--out", tmp_path / "cut", "--checkpoint-every", "5"]
    # Sums depend on the number of threads in their last bit: the process gets as many as the tests run with.
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, stderr=subprocess.DEVNULL, env=environment)
    while not (tmp_path / "cut" / "checkpoint" / "state.safetensors").exists():
        assert process.poll() is None
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"fixpoint-diffusion train --resume --out {tmp_path / 'cut'}" in output
    assert not (tmp_path / "cut" / WEIGHTS).exists()
    record = load_record(tmp_path / "cut" / "checkpoint" / "state.safetensors")
    assert 0 < record["step"] < 60
    result = invoke("train", "--resume", "--out", tmp_path / "cut")
    assert result.exit_code == 0, result.output
    assert f"from step {record['step']}" in result.output
    assert re.findall(r"(\d+)/60", result.output)[0] == str(record["step"])  # where the bar begins
    assert (tmp_path / "cut" / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()


def test_info_lists_the_embedded_models() -> None:
    output = invoke("info").output
    assert "ddpm-digits" in output
    assert "fpdm-digits" in output


def test_info_describes_one_model() -> None:
    output = invoke("info", "ddpm-digits").output
    for fact in ("UNet2DModel", "701,345", "1x8x8", "epsilon", "linear 0.0001..0.02, 1000 timesteps", "files match"):
        assert fact in output


def test_info_notices_damaged_files(settings: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    train(settings, tmp_path / "out", "--steps", 1)
    (tmp_path / "out" / "training_log.csv").write_text("changed")
    assert run_main(monkeypatch, "info", tmp_path / "out") == 2
    assert "training_log.csv differs" in capsys.readouterr().err


def sampled(tmp_path: Path, name: str, *arguments: object) -> tuple[np.ndarray, dict]:
    out = tmp_path / name
    result = invoke("sample", "--num-images", 3, "--steps", 6, "--out", out, *arguments)
    assert result.exit_code == 0, result.output
    with Image.open(out / "grid.png") as grid:
        assert min(grid.size) > 200
    return np.load(out / "images.npy"), json.loads((out / "sample.json").read_text())


@pytest.mark.parametrize("eta", [0, 1])
@pytest.mark.parametrize("solver", ["causal", "picard", "anderson", "broyden"])
def test_parallel_samples_equal_the_sequential_ones(tmp_path: Path, solver: str, eta: float) -> None:
    expected, _ = sampled(tmp_path, "one", "--eta", eta)
    images, figures = sampled(tmp_path, "other", "--eta", eta, "--solver", solver, "--rtol", 1e-5, "--max-rounds", 60)
    np.testing.assert_allclose(images, expected, atol=1e-4)
    assert figures["converged"] == 3


def test_sequential_sampling_costs_one_round_per_step(tmp_path: Path) -> None:
    images, figures = sampled(tmp_path, "one")
    assert images.shape == (3, 1, 8, 8)
    assert (figures["rounds"], figures["evals"]) == (6, 18)


def test_budget_of_rows_bounds_every_round_and_changes_no_image(tmp_path: Path) -> None:
    expected, _ = sampled(tmp_path, "one")
    images, figures = sampled(tmp_path, "other", "--solver", "causal", "--max-rows", 4, "--rtol", 1e-5)
    np.testing.assert_allclose(images, expected, atol=1e-4)
    assert figures["converged"] == 3
    assert figures["evals"] <= 4 * figures["rounds"]


def test_bar_ends_with_all_latents_and_shows_rounds_samples_and_rows(tmp_path: Path) -> None:
    result = invoke("sample", "--num-images", 3, "--steps", 6, "--solver", "causal", "--out", tmp_path)
    figures = json.loads((tmp_path / "sample.json").read_text())
    last = re.findall(r"sampling:.*", result.output.replace("\r", "\n"))[-1]
    assert "| 18/18 [" in last
    for shown in ("done=3/3", f"rounds={figures['rounds']}", f"rows={figures['evals']}"):
        assert shown in last


def test_seed_decides_the_images(tmp_path: Path) -> None:
    first, again, other = (sampled(tmp_path, f"{k}", "--seed", seed)[0] for k, seed in enumerate((5, 5, 6)))
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other)


def test_fpdm_samples_with_chosen_iterations_and_reuse(tmp_path: Path) -> None:
    images, figures = sampled(tmp_path, "a", "--model", "fpdm-digits", "--iterations", 2)
    assert figures["iterations"] == 2
    assert figures["reuse"] is True
    fresh, figures = sampled(tmp_path, "b", "--model", "fpdm-digits", "--iterations", 2, "--no-reuse")
    assert figures["reuse"] is False
    assert not np.allclose(images, fresh)
