from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

from fixpoint_diffusion.chains import chain_from_scheduler
from fixpoint_diffusion.cli import app, main
from fixpoint_diffusion.denoisers import embedded_folder, family, load_denoiser
from fixpoint_diffusion.denoisers.checksums import verify_checksums
from fixpoint_diffusion.files import locked
from fixpoint_diffusion.processes.prior import PRIOR_FILE
from fixpoint_diffusion.training import TrainingRun
from fixpoint_diffusion.training.checkpoints import load_record, load_state
from fixpoint_diffusion.training.data import EpochSampler
from fixpoint_diffusion.training.export import read_class_names
from fixpoint_diffusion.training.networks import TrainableDenoiser

WEIGHTS = "diffusion_pytorch_model.safetensors"
STATE = Path("checkpoint") / "state.safetensors"
SMALL = {
    "unet": {"block_out_channels": [8, 8], "norm_num_groups": 4, "attention_head_dim": 4},
    "fpdm": {"width": 16, "heads": 2, "max_no_grad": 2, "max_grad": 2},
    "diffusers-dit": {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1},
    "dit": {"width": 16, "heads": 2, "depth": 2},
}


def train(out: Path, *arguments: object, kind: str | None = "unet", **settings: object) -> Result:
    command: list[object] = ["train", *([] if kind is None else [kind]), "--out", out, "--batch-size", 4, *arguments]
    if kind is not None:
        file = out.parent / "settings.json"
        file.write_text(json.dumps({**SMALL[kind], **settings}))
        command += ["--settings", file]
    return CliRunner().invoke(app, [str(part) for part in command])


def done(result: Result) -> str:
    assert result.exit_code == 0, result.output + str(result.exception)
    return result.output


def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The message of a command that fails in one line."""
    monkeypatch.setattr(sys, "argv", ["fixpoint-diffusion", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert error.splitlines()[-1].startswith("Error: ")
    return error


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Two classes of grey pictures, larger than what is trained on."""
    rng = np.random.default_rng(0)
    for name in ("cats", "dogs"):
        folder = tmp_path / "pictures" / name
        folder.mkdir(parents=True)
        for k in range(4):
            Image.fromarray(rng.integers(0, 256, (12, 16), dtype=np.uint8)).save(folder / f"{k}.png")
    return tmp_path / "pictures"


@pytest.mark.parametrize("kind", ["unet", "fpdm", "dit", "diffusers-dit"])
def test_trained_folder_is_complete_and_loads(tmp_path: Path, kind: str) -> None:
    out = tmp_path / "out"
    done(train(out, "--steps", 2, kind=kind))
    names = {"config.json", WEIGHTS, "scheduler_config.json", "training_config.json", "training_log.csv", PRIOR_FILE}
    assert set(verify_checksums(out)) == names
    assert {tensor.dtype for tensor in load_file(out / WEIGHTS).values()} == {torch.float16}
    denoiser = load_denoiser(out)
    expected = "v_prediction" if kind in ("fpdm", "dit") else "epsilon"
    assert denoiser.prediction_type == denoiser.schedule_config["prediction_type"] == expected
    output = denoiser(torch.randn(2, 1, 8, 8), torch.tensor([3, 998]))
    assert output.shape == (2, 1, 8, 8)
    assert bool(output.isfinite().all())
    assert json.loads((out / "training_config.json").read_text())["steps"] == 2
    assert not list(out.glob(".export*"))
    assert (out / WEIGHTS).stat().st_mode == (out / "config.json").stat().st_mode, "others may read it as they may JSON"


@pytest.mark.parametrize("kind", ["unet", "dit"])
def test_a_flow_is_trained_resumed_and_sampled(tmp_path: Path, kind: str) -> None:
    out = tmp_path / "out"
    done(train(out, "--steps", 2, "--objective", "flow", kind=kind))
    done(CliRunner().invoke(app, ["train", "--resume", "--out", str(out), "--steps", "3"]))
    denoiser = load_denoiser(out)
    assert denoiser.prediction_type == "flow_prediction"
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(out)
    chain = chain_from_scheduler(denoiser, torch.randn(1, 1, 8, 8), scheduler, steps=4)
    assert chain.transitions.prediction_type == "flow_prediction"
    command = ["sample", "--model", str(out), "--num-images", "2", "--steps", "6", "--out"]
    for solver in ("sequential", "causal"):
        to = ["--rtol", "1e-5"] if solver == "causal" else []
        done(CliRunner().invoke(app, [*command, str(tmp_path / solver), "--solver", solver, *to]))
    found, expected = (np.load(tmp_path / solver / "images.npy") for solver in ("causal", "sequential"))
    assert np.abs(found - expected).max() <= 1e-2
    assert "a flow, 1000 timesteps, shift 1.0" in done(CliRunner().invoke(app, ["info", str(out)]))
    error = CliRunner().invoke(app, [*command, str(tmp_path / "noisy"), "--eta", "1"])
    assert "eta is for DDIM and DDPM schedulers" in str(error.exception) + error.output


def test_objectives_that_do_not_fit_are_refused(tmp_path: Path, monkeypatch, capsys) -> None:
    out = tmp_path / "out"
    command = ("train", "--out", out, "--steps", 1)
    assert "no objective 'flows'" in refused(monkeypatch, capsys, *command, "--objective", "flows")
    assert "an FPDM is not trained along a flow" in refused(
        monkeypatch, capsys, "train", "fpdm", *command[1:], "--objective", "flow"
    )
    done(train(tmp_path / "flow", "--steps", 1, "--objective", "flow"))
    named = ("--init", tmp_path / "flow", "--objective", "epsilon")
    assert "says what it predicts" in refused(monkeypatch, capsys, *command, *named)
    done(train(out, "--steps", 1, "--init", tmp_path / "flow", kind=None))
    assert load_denoiser(out).prediction_type == "flow_prediction"


def test_models_of_images_are_sampled_with_clipping_and_those_of_latents_are_not(tmp_path: Path) -> None:
    np.save(tmp_path / "latents.npy", np.random.default_rng(0).normal(size=(4, 1, 8, 8)))
    done(train(tmp_path / "images", "--steps", 1))
    said = done(train(tmp_path / "latents", "--steps", 1, "--data", tmp_path / "latents.npy", "--latents"))
    assert "--vae FOLDER" in said
    assert load_denoiser(tmp_path / "images").schedule_config["clip_sample"] is True
    assert load_denoiser(tmp_path / "latents").schedule_config["clip_sample"] is False


@pytest.mark.parametrize("kind", ["unet", "fpdm", "dit", "diffusers-dit"])
def test_class_folders_make_a_model_that_is_told_the_class(tmp_path: Path, pictures: Path, kind: str) -> None:
    out = tmp_path / "out"
    options = ["--data", pictures, "--size", 8, "--crop", "random", "--flip", "--classes", "--class-dropout", 0.5]
    output = done(train(out, "--steps", 6, *options, "--weight-decay", 0, kind=kind))
    assert "8 images 1x8x8 of 2 classes" in output
    assert "--class all" in output
    assert "names 0 cats, 1 dogs" in " ".join(CliRunner().invoke(app, ["info", str(out)]).output.split())
    about = json.loads((out / "training_config.json").read_text())
    assert about["class_names"] == ["cats", "dogs"]
    assert about["data"] | {"source": ""} == {
        "source": "", "channels": None, "size": 8, "crop": "random", "flip": True, "latents": False
    }  # fmt: skip
    taken = load_denoiser(out).conditioning["class_labels"]
    assert (taken.num_classes, taken.null_label) == (2, 2)
    # Without weight decay nothing but a gradient moves a row: of each class, and of "no class".
    before, after = load_file(out / "checkpoint" / "initial" / WEIGHTS), load_state(out / STATE).model
    table = next(name for name in before if "class_emb" in name and name.endswith("weight"))
    assert bool((after[f"network.{table}"] != before[table]).any(1).all())


def test_class_dropout_without_classes_is_refused(tmp_path: Path, pictures: Path, monkeypatch, capsys) -> None:
    command = ("train", "dit", "--data", pictures, "--size", 8, "--class-dropout", 0.5, "--steps", 1)
    error = refused(monkeypatch, capsys, *command, "--out", tmp_path / "out")
    assert "(--class-dropout) has nothing to do: the model is told no classes" in error
    assert not (tmp_path / "out").exists()


def test_labels_are_dropped_by_the_trainer_alone() -> None:
    network = family("diffusers-dit").build((1, 8, 8), 2, SMALL["diffusers-dit"])
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model = TrainableDenoiser(network, family("diffusers-dit"), 1).train()
    x, t, labels = torch.randn(1, 1, 8, 8).expand(64, -1, -1, -1), torch.full((64,), 5), torch.zeros(64, dtype=int)
    output = model(x, t, class_labels=labels)
    torch.testing.assert_close(output, output[:1].expand_as(output))


def test_without_classes_a_model_is_told_none(tmp_path: Path, pictures: Path) -> None:
    done(train(tmp_path / "out", "--steps", 1, "--data", pictures, "--size", 8))
    assert load_denoiser(tmp_path / "out").conditioning == {}


def test_settings_that_ask_for_classes_use_the_labels_too(tmp_path: Path) -> None:
    assert "of 10 classes" in done(train(tmp_path / "out", "--steps", 1, kind="fpdm", num_classes=10))


def test_learned_variance_is_trained_and_said(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done(train(out, "--steps", 2, "--learning-rate", 0.01, kind="fpdm", learn_sigma=True))
    assert json.loads((out / "scheduler_config.json").read_text())["variance_type"] == "learned_range"
    before, after = (
        load_file(folder / WEIGHTS)["head.linear.bias"].float().view(4, 2)  # pixels of a patch, then channels
        for folder in (out / "checkpoint" / "initial", out)
    )
    assert bool(((after - before).abs() > 1e-4).all())


def test_latents_of_any_range_can_be_trained_on(tmp_path: Path) -> None:
    np.save(tmp_path / "latents.npy", np.random.default_rng(0).normal(0, 3, (6, 4, 8, 8)).astype(np.float32))
    output = done(train(tmp_path / "out", "--steps", 1, "--data", tmp_path / "latents.npy", "--latents", kind="dit"))
    assert "6 latents 4x8x8" in output
    assert load_denoiser(tmp_path / "out").sample_shape == (4, 8, 8)


def test_sizes_of_images_need_not_be_square(tmp_path: Path, pictures: Path) -> None:
    done(train(tmp_path / "out", "--steps", 1, "--data", pictures, "--size", "8x12", "--channels", "RGB"))
    assert load_denoiser(tmp_path / "out").sample_shape == (3, 8, 12)


def test_pieces_and_precision_reach_the_training(tmp_path: Path) -> None:
    done(train(tmp_path / "out", "--steps", 1, "--accumulate", 2, "--precision", "bf16", "--weighting", "min-snr"))
    config = load_record(tmp_path / "out" / STATE)["config"]
    assert (config["accumulate"], config["precision"], config["weighting"]) == (2, "bf16", "min-snr")


def test_init_starts_from_a_models_weights_and_needs_the_folder_no_more_afterwards(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    done(train(first, "--steps", 2, "--classes", kind="fpdm"))
    given = load_file(first / WEIGHTS)
    output = done(train(second, "--steps", 1, "--learning-rate", 1e-6, "--init", first, kind=None))
    assert "of 10 classes" in output
    for name, value in load_file(second / WEIGHTS).items():
        torch.testing.assert_close(value, given[name], rtol=1e-2, atol=1e-3)
    assert (second / "config.json").read_text() == (first / "config.json").read_text()
    assert (second / "scheduler_config.json").read_text() == (first / "scheduler_config.json").read_text()
    shutil.rmtree(first)
    output = done(CliRunner().invoke(app, ["train", "--resume", "--steps", "3", "--out", str(second)]))
    assert "3 steps of 4, from step 1" in output
    assert load_record(second / STATE)["step"] == 3


def test_folders_with_spaces_and_umlauts_are_read_written_and_quoted(tmp_path: Path, pictures: Path) -> None:
    data, out = pictures.rename(tmp_path / "schöne Bilder"), tmp_path / "mein Mödell"
    output = done(train(out, "--steps", 1, "--data", data, "--size", 8, "--classes"))
    assert output.strip().endswith(f"sample --model '{out}' --class all")
    command = shlex.split(output.strip().splitlines()[-1])[1:]
    done(
        CliRunner().invoke(app, [*command, "--steps", "2", "--num-images", "1", "--out", str(tmp_path / "neue Bilder")])
    )


def test_init_refuses_what_does_not_fit(tmp_path: Path, monkeypatch, capsys) -> None:
    done(train(tmp_path / "first", "--steps", 1))
    np.save(tmp_path / "images.npy", np.zeros((5, 3, 12, 8), dtype=np.uint8))
    command = ("train", "--init", tmp_path / "first", "--out", tmp_path / "out")
    error = refused(monkeypatch, capsys, *command, "--data", tmp_path / "images.npy")
    assert "the model is for samples of shape (1, 8, 8), the data has (3, 12, 8)" in error
    assert "drop unet" in refused(monkeypatch, capsys, "train", "unet", *command[1:])
    assert "keeps its architecture and its classes; drop classes" in refused(monkeypatch, capsys, *command, "--classes")
    assert not (tmp_path / "out").exists()


def folder_of(root: Path, *classes: str) -> Path:
    """Four grey pictures for each class."""
    for number, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for k in range(4):
            Image.new("L", (8, 8), 60 * number + k).save(root / name / f"{k}.png")
    return root


def test_init_refuses_classes_that_the_model_knows_by_other_numbers(tmp_path: Path, monkeypatch, capsys) -> None:
    animals = folder_of(tmp_path / "animals", "cats", "dogs", "horses")
    done(train(tmp_path / "first", "--steps", 1, "--data", animals, "--classes", kind="dit"))
    command = ("train", "--init", tmp_path / "first", "--out", tmp_path / "out", "--steps", 1, "--batch-size", 4)
    error = refused(monkeypatch, capsys, *command, "--data", folder_of(tmp_path / "two", "dogs", "horses"))
    assert "class 'dogs' is number 0 in the data and number 1 in the model" in error
    assert "cats, dogs, horses" in error
    assert not (tmp_path / "out").exists()
    for data in (animals, folder_of(tmp_path / "others", "birds", "fish")):
        done(train(tmp_path / data.name / "out", "--steps", 1, "--init", tmp_path / "first", "--data", data, kind=None))


def test_classes_beyond_those_of_the_data_keep_their_names(tmp_path: Path) -> None:
    first, second, third = tmp_path / "first", tmp_path / "second", tmp_path / "third"
    animals = folder_of(tmp_path / "animals", "cats", "dogs", "horses")
    done(train(first, "--steps", 1, "--data", animals, "--classes", kind="dit"))
    fewer = folder_of(tmp_path / "fewer", "cats", "donkeys")
    done(train(second, "--steps", 1, "--init", first, "--data", fewer, kind=None))
    done(CliRunner().invoke(app, ["train", "--resume", "--steps", "2", "--out", str(second)]))
    np.save(tmp_path / "images.npy", np.zeros((8, 1, 8, 8), dtype=np.uint8))
    (tmp_path / "numbers").mkdir()
    (tmp_path / "images.npy").rename(tmp_path / "numbers" / "images.npy")
    np.save(tmp_path / "numbers" / "labels.npy", np.arange(8) % 2)
    done(train(third, "--steps", 1, "--init", second, "--data", tmp_path / "numbers", kind=None))
    for folder in (second, third):
        assert read_class_names(folder) == ("cats", "donkeys", "horses")
    command = ["sample", "--model", str(second), "--class", "horses", "--steps", "2", "--num-images", "1"]
    done(CliRunner().invoke(app, [*command, "--out", str(tmp_path / "samples")]))


def test_a_model_that_is_told_no_classes_takes_any(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    done(train(first, "--steps", 1, "--data", folder_of(tmp_path / "one", "cats", "dogs")))
    done(train(second, "--steps", 1, "--init", first, "--data", folder_of(tmp_path / "two", "dogs"), kind=None))
    assert read_class_names(first) == read_class_names(second) == ()


def test_init_refuses_another_prediction_in_python_too(tmp_path: Path) -> None:
    done(train(tmp_path / "first", "--steps", 1, "--objective", "v_prediction"))
    for other in ("epsilon", "sample", "flow_prediction"):
        with pytest.raises(ValueError, match=f"was trained to give v_prediction, not {other}"):
            TrainingRun.start(tmp_path / "out", init=tmp_path / "first", training={"prediction_type": other})


@pytest.mark.parametrize("kind", ["unet", "diffusers-dit"])
def test_a_network_with_twice_the_channels_learns_the_variance(tmp_path: Path, kind: str) -> None:
    done(train(tmp_path / "out", "--steps", 1, kind=kind, out_channels=2))
    assert load_denoiser(tmp_path / "out", learned_variance=True).learned_variance


def test_networks_that_need_what_no_data_has_are_refused(tmp_path: Path, monkeypatch, capsys) -> None:
    np.save(tmp_path / "videos.npy", np.zeros((4, 2, 4, 8, 8), dtype=np.float32))
    command = ("train", "unet-3d", "--data", tmp_path / "videos.npy", "--latents", "--steps", 1, "--batch-size", 2)
    error = refused(monkeypatch, capsys, *command, "--out", tmp_path / "out")
    assert "takes encoder_hidden_states, which no data set here has" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_picture_that_is_cut_short_is_named_in_one_line(tmp_path: Path, monkeypatch, capsys, workers: int) -> None:
    data = tmp_path / "pictures"
    data.mkdir()
    for k in range(4):
        pixels = np.random.default_rng(k).integers(0, 255, (64, 64), dtype=np.uint8)
        Image.fromarray(pixels).save(data / f"{k}.png")
    whole = (data / "3.png").read_bytes()
    (data / "3.png").write_bytes(whole[: len(whole) // 2])
    command = ("train", "unet", "--data", data, "--size", 8, "--steps", 1, "--batch-size", 4, "--workers", workers)
    error = refused(monkeypatch, capsys, *command, "--out", tmp_path / "out")
    assert error.splitlines()[-1].endswith("3.png cannot be decoded: image file is truncated")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_picture_that_cannot_be_read_costs_no_step(tmp_path: Path, monkeypatch, capsys, workers: int) -> None:
    data, out = folder_of(tmp_path / "pictures", "cats", "dogs"), tmp_path / "out"
    (tmp_path / "settings.json").write_text(json.dumps(SMALL["dit"]))
    order = [index for index, _ in islice(EpochSampler(8, seed=0), 8)]
    bad = data / ("cats", "dogs")[order[7] // 4] / f"{order[7] % 4}.png"
    good = bad.read_bytes()
    head = good[: good.index(b"IDAT") + 4]
    bad.write_bytes(head + bytes(len(good) - len(head)))
    options = ("--settings", tmp_path / "settings.json", "--data", data, "--batch-size", 2, "--classes")
    command = ("train", "dit", *options, "--steps", 4, "--workers", workers, "--out", out)
    monkeypatch.setattr(sys, "argv", ["fixpoint-diffusion", *map(str, command)])
    with pytest.raises(SystemExit):
        main()
    said = capsys.readouterr()
    assert said.err.splitlines()[-1].startswith("Error: ")
    assert str(bad) in said.err.splitlines()[-1]
    assert f"train --resume --out {out}\n  fixpoint-diffusion train --init {out} --data" in said.out
    state = load_state(out / STATE)
    assert state.record["step"] == 3

    # With other files, a new run starts from the average of these steps, and knows the classes.
    tuned = tmp_path / "tuned"
    done(train(tuned, "--init", out, "--data", folder_of(tmp_path / "more", "cats"), "--steps", 1, kind=None))
    initial = load_file(tuned / "checkpoint" / "initial" / WEIGHTS)
    assert all(torch.equal(state.ema[f"module.network.{name}"], value) for name, value in initial.items())
    assert read_class_names(tuned) == ("cats", "dogs")

    bad.write_bytes(good)
    done(CliRunner().invoke(app, ["train", "--resume", "--out", str(out)]))
    done(CliRunner().invoke(app, [*map(str, command[:-1]), str(tmp_path / "whole")]))
    assert (out / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--learning-rate", "inf", "--steps", 1), "learning_rate must be positive and finite"),
        (("--learning-rate", "nan"), "learning_rate must be positive and finite"),
        (("--device", "gpu"), "no device 'gpu'"),
        (("--precision", "fp16"), "needs a GPU"),
        (("--accumulate", 3, "--batch-size", 4), "not a multiple of accumulate 3"),
        (("--size", "8x"), "HEIGHTxWIDTH"),
        (("--size", 10**8), "the first image is 8x8; scaled to size 100000000x100000000 (--size), each channel"),
        (("--size", f"1x{10**8}", "--crop", "random"), "scaled to size 1x100000000 (--size)"),
        (("--size", 1000, "--batch-size", 10**6), "1000000 samples of 1x1000x1000 at once would take 4,000 GB"),
        (("--init", "no-such"), "no folder 'no-such'"),
        (("--size", 8, "--crop", "patch", "--latents"), "no latents"),
        (("nothing-like-it",), "Legal: conditional-unet, diffusers-dit, dit"),
    ],
)
def test_unusable_options_write_nothing(tmp_path: Path, monkeypatch, capsys, arguments, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    if message == "no latents":
        np.save(tmp_path / "images.npy", np.zeros((5, 1, 8, 8), dtype=np.float32))
        arguments, message = ("--data", "images.npy", *arguments), "latents are taken as they are"
    error = refused(monkeypatch, capsys, "train", "--out", "out", *arguments)
    assert message in error
    assert not (tmp_path / "out").exists()


def test_weights_that_are_not_finite_are_not_exported(tmp_path: Path, monkeypatch, capsys) -> None:
    settings = tmp_path / "settings.json"
    settings.write_text(json.dumps(SMALL["unet"]))
    command = ("train", "--settings", settings, "--batch-size", 4, "--out", tmp_path / "out", "--steps", 1)
    error = refused(monkeypatch, capsys, *command, "--learning-rate", 1000, "--weight-decay", 1e36)
    assert "not finite" in error
    assert not (tmp_path / "out" / WEIGHTS).exists()
    assert not (tmp_path / "out" / STATE).exists()


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("fpdm", {"width": 10**9, "heads": 1}, "the file of settings does not describe a usable network"),
        ("fpdm", {"width": 10**6, "heads": 1}, "GB, and this machine has"),
        ("unet", {"layers_per_block": 10**8}, "more than 50000 tensors"),
        ("unet", {"in_channels": 7}, "in_channels=7, but for this data it is 1"),
        ("diffusers-dit", {"num_attention_heads": 0}, "the file of settings does not describe a usable network"),
        ("diffusers-dit", {"num_layers": 0}, "the file of settings does not describe a usable network"),
    ],
)
def test_settings_that_make_no_usable_network_are_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch, capsys, kind: str, settings: dict, message: str
) -> None:
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    out = tmp_path / "out"
    error = refused(monkeypatch, capsys, "train", kind, "--settings", tmp_path / "settings.json", "--out", out)
    assert message in error
    assert not out.exists()


def test_run_that_fails_before_its_first_checkpoint_leaves_nothing(tmp_path: Path, monkeypatch, capsys) -> None:
    np.save(tmp_path / "latents.npy", np.full((8, 1, 8, 8), 1e38, np.float32))
    out = tmp_path / "new" / "out"
    options = ("--data", tmp_path / "latents.npy", "--latents", "--batch-size", 4, "--out", out)
    assert "not finite" in refused(monkeypatch, capsys, "train", *options)
    assert not out.parent.exists()


def test_second_run_into_the_same_folder_is_refused(tmp_path: Path, monkeypatch, capsys) -> None:
    out = tmp_path / "out"
    done(train(out, "--steps", 1))
    before = (out / WEIGHTS).read_bytes()
    assert "already holds a training run" in refused(monkeypatch, capsys, "train", "--steps", 1, "--out", out)
    with locked(out / "checkpoint", work="training"):
        error = refused(monkeypatch, capsys, "train", "--resume", "--steps", 3, "--out", out)
    assert "another run is training in" in error
    assert (out / WEIGHTS).read_bytes() == before


def test_a_model_that_is_there_is_not_replaced(tmp_path: Path, monkeypatch, capsys) -> None:
    model = tmp_path / "model"
    shutil.copytree(embedded_folder("dit-digits"), model)
    before = {path.name: path.read_bytes() for path in model.iterdir()}
    for start in (("--init", model), ("dit",)):
        error = refused(monkeypatch, capsys, "train", *start, "--steps", 1, "--out", model)
        assert f"{model} holds config.json of another model: choose another folder" in error
    assert {path.name: path.read_bytes() for path in model.iterdir()} == before


def test_resume_refuses_fewer_steps_than_were_taken(tmp_path: Path, monkeypatch, capsys) -> None:
    done(train(tmp_path / "out", "--steps", 3))
    error = refused(monkeypatch, capsys, "train", "--resume", "--steps", 2, "--out", tmp_path / "out")
    assert "has taken 3 steps already" in error


def test_resume_refuses_data_that_has_changed(tmp_path: Path, pictures: Path, monkeypatch, capsys) -> None:
    done(train(tmp_path / "out", "--steps", 1, "--data", pictures, "--size", 8))
    (pictures / "cats" / "3.png").unlink()
    error = refused(monkeypatch, capsys, "train", "--resume", "--steps", 2, "--out", tmp_path / "out")
    assert "is not what the run" in error


def test_failed_export_leaves_nothing_half_written_and_can_be_repeated(tmp_path: Path, monkeypatch, capsys) -> None:
    out = tmp_path / "out"

    def full(*_: object) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr("fixpoint_diffusion.training.export.write_checksums", full)
        (tmp_path / "settings.json").write_text(json.dumps(SMALL["unet"]))
        command = ("train", "--settings", tmp_path / "settings.json", "--batch-size", 4, "--steps", 1, "--out", out)
        assert "no space left" in refused(patch, capsys, *command)
    assert [path.name for path in out.iterdir()] == ["checkpoint"]
    done(CliRunner().invoke(app, ["train", "--resume", "--out", str(out)]))
    assert (out / WEIGHTS).is_file()


def test_what_is_left_of_a_killed_export_is_deleted(tmp_path: Path) -> None:
    """It has the size of the model."""
    out = tmp_path / "out"
    done(train(out, "--steps", 1))
    (out / ".export-killed").mkdir()
    (out / ".export-killed" / WEIGHTS).write_bytes(b"half")
    done(CliRunner().invoke(app, ["train", "--resume", "--out", str(out)]))
    assert not list(out.glob(".*"))


def test_ctrl_c_leaves_a_checkpoint_that_resumes_to_the_same_weights(tmp_path: Path) -> None:
    done(train(tmp_path / "whole", "--steps", 60))
    command = [
        sys.executable,
        "-m",
        "fixpoint_diffusion.cli",
        "train",
        "unet",
        "--settings",
        tmp_path / "settings.json",
    ]
    command += ["--batch-size", "4", "--steps", "60", "--out", tmp_path / "cut", "--checkpoint-every", "5"]
    # Sums depend on the number of threads in their last bit: the process gets as many as the tests run with.
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, stderr=subprocess.DEVNULL, env=environment)
    while not (tmp_path / "cut" / STATE).exists():
        assert process.poll() is None
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"fixpoint-diffusion train --resume --out {tmp_path / 'cut'}" in output
    assert not (tmp_path / "cut" / WEIGHTS).exists()
    record = load_record(tmp_path / "cut" / STATE)
    assert 0 < record["step"] < 60
    output = done(CliRunner().invoke(app, ["train", "--resume", "--out", str(tmp_path / "cut")]))
    assert f"from step {record['step']}" in output
    assert re.findall(r"(\d+)/60", output)[0] == str(record["step"])  # where the bar begins
    assert (tmp_path / "cut" / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()
