"""``fixpoint-diffusion invert``."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner, Result

from fixpoint_diffusion import DDIMChain, NoiseSchedule, embedded, load_denoiser
from fixpoint_diffusion.chains import chain_from_scheduler
from fixpoint_diffusion.cli import app, main
from fixpoint_diffusion.denoisers import Guided, describe, embedded_folder
from fixpoint_diffusion.denoisers.registry import family
from fixpoint_diffusion.files import sha256_of
from fixpoint_diffusion.processes import Clip
from fixpoint_diffusion.training.data import load_digits, open_dataset
from fixpoint_diffusion.training.encode import EncodeOptions, encode
from tests.fixpoint_diffusion.command_line import run_main, saved_fpdm
from tests.fixpoint_diffusion.tiny import tiny_unet, tiny_vae


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["invert", *map(str, arguments)])


def test_what_is_written_leads_back_to_the_images(tmp_path: Path) -> None:
    options = ("--steps", 5, "--num-images", 2, "--rtol", 0.1, "--out", tmp_path / "out")
    result = invoke("digits", *options)
    assert result.exit_code == 0, result.output
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {"x_T.npy", "grid.png", "errors.png", "invert.json"}
    record = json.loads((tmp_path / "out" / "invert.json").read_text())
    x_T = torch.from_numpy(np.load(tmp_path / "out" / "x_T.npy"))
    denoiser, x_0 = embedded("ddpm-digits"), load_digits().images[:2]
    chain = DDIMChain(denoiser, x_T, NoiseSchedule.from_diffusers(denoiser.schedule_config), steps=5)
    with torch.no_grad():
        error = (chain.sequential()[:, -1] - x_0).square().mean(dim=(1, 2, 3)).sqrt()
    found = [row["error"] for row in record["results"]]
    assert found == pytest.approx(error.tolist(), rel=1e-3)
    assert [row["status"] for row in record["results"]] == ["CONVERGED", "CONVERGED"]
    again = invoke("digits", *options)
    assert isinstance(again.exception, FileExistsError)
    assert "--overwrite" in str(again.exception)
    assert invoke("digits", *options, "--overwrite").exit_code == 0


@pytest.mark.parametrize("name", ["grid.png", "x_T.npy", "errors.png"])
def test_files_of_another_command_are_not_replaced(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("of a sample run")
    result = invoke("digits", "--steps", 2, "--num-images", 1, "--out", tmp_path)
    assert f"holds {name} of another run; pass --overwrite to replace it" in str(result.exception)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "of a sample run"


@pytest.fixture
def clipping_model(tmp_path: Path) -> Path:
    """As ``fixpoint-diffusion train`` leaves its models of images: to be sampled with clipping."""
    folder = tmp_path / "model"
    shutil.copytree(embedded_folder("ddpm-digits"), folder, ignore=shutil.ignore_patterns("SHA256SUMS"))
    config = json.loads((folder / "scheduler_config.json").read_text())
    (folder / "scheduler_config.json").write_text(json.dumps(config | {"clip_sample": True}))
    return folder


@pytest.fixture
def conditional_model(tmp_path: Path) -> Path:
    """The embedded model with an embedding of classes that it has not been trained on."""
    folder, unet = tmp_path / "model", family("unet")
    network = unet.build((1, 8, 8), 10, {})
    network.load_state_dict(embedded("ddpm-digits").model.state_dict(), strict=False)
    folder.mkdir()
    unet.save(network, folder, None)
    shutil.copy(embedded_folder("ddpm-digits") / "scheduler_config.json", folder)
    return folder


def sampled_as_advised(result: Result, out: Path, *further: object) -> torch.Tensor:
    """What the command that ``invert`` ends with samples."""
    words = shlex.split(result.output.strip().splitlines()[-1])
    assert words[:2] == ["fixpoint-diffusion", "sample"]
    again = CliRunner().invoke(app, [*words[1:], "--out", str(out), *map(str, further)])
    assert again.exit_code == 0, again.output
    return torch.from_numpy(np.load(out / "images.npy"))


def test_noise_that_was_found_is_sampled_from_the_shell(tmp_path: Path, conditional_model: Path) -> None:
    """To the images again, or with another class to edited ones, as the chain of the Python calls gives them."""
    options = ("--model", conditional_model, "--steps", 5, "--class", 1, "--guidance", 1.5, "--out", tmp_path / "out")
    result = invoke("digits", *options, "--num-images", 2, "--rtol", 0.02)
    assert result.exit_code == 0, result.output
    x_T = torch.from_numpy(np.load(tmp_path / "out" / "x_T.npy"))
    for name, further, label in (("again", (), 1), ("edited", ("--class", 2), 2)):
        images = sampled_as_advised(result, tmp_path / name, *further)
        denoiser = load_denoiser(conditional_model)
        chain = chain_from_scheduler(
            Guided(denoiser, 1.5), x_T, denoiser.schedule_config, steps=5, eta=0.0,
            conditioning={"class_labels": torch.full((2,), label)},
        )  # fmt: skip
        with torch.no_grad():
            torch.testing.assert_close(images, chain.sequential()[:, -1], rtol=1e-4, atol=1e-4)
    whole = sampled_as_advised(result, tmp_path / "whole")
    parts = shlex.split(result.output.strip().splitlines()[-1])[1:]
    again = CliRunner().invoke(app, [*parts, "--batch-size", "1", "--out", str(tmp_path / "parts")])
    assert again.exit_code == 0, again.output
    files = sorted((tmp_path / "parts" / "images").iterdir())
    np.testing.assert_allclose(np.concatenate([np.load(file) for file in files]), whole, atol=1e-4)
    record = json.loads((tmp_path / "parts" / "sample.json").read_text())
    assert record["images_done"] == 2
    assert record["x_T_sha256"] == sha256_of(tmp_path / "out" / "x_T.npy")


def test_an_fpdm_is_inverted_like_any_model(tmp_path: Path) -> None:
    folder = saved_fpdm(tmp_path / "fpdm", num_classes=None)
    result = invoke("digits", "--model", folder, "--steps", 5, "--num-images", 2, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "2 of 2 inverted" in result.output
    images = sampled_as_advised(result, tmp_path / "again")
    x_0 = load_digits().images[:2]
    assert float((images - x_0).square().mean().sqrt()) < 5e-3


def test_a_model_of_a_flow_is_inverted_by_the_steps_that_sample_takes(tmp_path: Path) -> None:
    result = invoke(
        "digits", "--model", "flow-digits", "--steps", 5, "--num-images", 2, "--rtol", 0.02, "--out", tmp_path / "out"
    )
    assert result.exit_code == 0, result.output
    assert "2 of 2 inverted" in result.output
    images = sampled_as_advised(result, tmp_path / "again")
    assert float((images - load_digits().images[:2]).square().mean().sqrt()) < 0.02


@pytest.mark.parametrize(
    ("array", "options", "message"),
    [
        (None, (), "no file"),
        (np.zeros((2, 3, 8, 8), np.float32), (), "holds float32 (2, 3, 8, 8), expected floats (N, 1, 8, 8)"),
        (np.zeros((2, 1, 8, 8), np.int64), (), "holds int64"),
        (np.zeros((0, 1, 8, 8), np.float32), (), "holds float32 (0, 1, 8, 8)"),
        (np.full((2, 1, 8, 8), np.nan), (), "not finite"),
        (np.zeros((2, 1, 8, 8), np.float32), ("--num-images", "3"), "--num-images 3 are more than the 2"),
    ],
)
def test_noise_that_cannot_be_sampled_from_is_refused(
    tmp_path: Path, array: np.ndarray | None, options: tuple[str, ...], message: str
) -> None:
    if array is not None:
        np.save(tmp_path / "noise.npy", array)
    code, error = run_main("sample", "--x-T", tmp_path / "noise.npy", "--out", tmp_path / "out", *options)
    assert code == 2
    assert message in error
    assert "\n" not in error
    assert not (tmp_path / "out").exists()


def test_what_ends_before_anything_is_found_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fixpoint_diffusion.inversion.invert", interrupted)
    code, _ = run_main("invert", "digits", "--num-images", 1, "--out", tmp_path / "deep" / "out")
    assert code == 130
    assert not (tmp_path / "deep").exists()
    (tmp_path / "mine").mkdir()
    run_main("invert", "digits", "--num-images", 1, "--out", tmp_path / "mine")
    assert list((tmp_path / "mine").iterdir()) == []


def test_a_model_that_clips_is_inverted_without_and_that_is_said(tmp_path: Path, clipping_model: Path) -> None:
    options = ("--model", clipping_model, "--steps", 5, "--num-images", 2, "--rtol", 0.1, "--out", tmp_path / "out")
    result = invoke("digits", *options)
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "out" / "invert.json").read_text())["clipping_left_out"] is True
    images = sampled_as_advised(result, tmp_path / "again")
    x_0 = load_digits().images[:2]
    assert float((images - x_0).square().mean().sqrt()) < 0.1
    denoiser, x_T = load_denoiser(clipping_model), torch.from_numpy(np.load(tmp_path / "out" / "x_T.npy"))
    chain = chain_from_scheduler(denoiser, x_T, denoiser.schedule_config, steps=5, x0_hook=Clip(float("inf")))
    with torch.no_grad():
        torch.testing.assert_close(images, chain.sequential()[:, -1], rtol=1e-4, atol=1e-4)


def test_classes_and_guidance_are_those_of_the_sampler(tmp_path: Path, conditional_model: Path) -> None:
    found = []
    for number, options in enumerate([(), ("--class", 1), ("--class", 1, "--guidance", 2)]):
        out = tmp_path / str(number)
        result = invoke("digits", *options, "--model", conditional_model, "--steps", 2, "--num-images", 1, "--out", out)
        assert result.exit_code == 0, result.output
        record = json.loads((out / "invert.json").read_text())
        assert [record["class"], record["guidance"]] == ["1" if options else None, 2.0 if len(options) > 2 else 1.0]
        found.append(np.load(out / "x_T.npy"))
        denoiser = load_denoiser(conditional_model)
        label = describe(denoiser).class_labels.null_label if not options else 1
        chain = chain_from_scheduler(
            Guided(denoiser, 2.0) if len(options) > 2 else denoiser,
            torch.from_numpy(found[-1]),
            denoiser.schedule_config,
            steps=2,
            x0_hook=Clip(float("inf")),
            conditioning={"class_labels": torch.tensor([label])},
        )
        with torch.no_grad():
            error = (chain.sequential()[:, -1] - load_digits().images[:1]).square().mean().sqrt()
        assert record["results"][0]["error"] == pytest.approx(float(error), rel=1e-3, abs=1e-6)
    assert not np.allclose(found[0], found[1], atol=1e-3)
    assert not np.allclose(found[1], found[2], atol=1e-3)


@pytest.mark.parametrize(
    ("options", "message"), [((), "must be told one"), (("--class", 1, "--guidance", 2), "trained without labels")]
)
def test_a_model_without_a_label_for_no_class_is_told_one_and_not_guided(
    tmp_path: Path, conditional_model: Path, options: tuple[object, ...], message: str
) -> None:
    config = json.loads((conditional_model / "config.json").read_text())
    del config["_null_label"]
    (conditional_model / "config.json").write_text(json.dumps(config))
    result = invoke("digits", "--model", conditional_model, "--num-images", 1, "--out", tmp_path / "out", *options)
    assert message in str(result.exception)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere",), "nowhere"),
        (("digits", "--model", "nothing"), "no model folder"),
        (("digits", "--class", "3"), "this model has none"),
        (("digits", "--guidance", "2"), "--guidance needs --class"),
        (("digits", "--guidance", "inf"), "--guidance must be finite"),
        (("digits", "--steps", "5000"), "5000"),
        (("digits", "--rtol", "nan"), "rtol"),
    ],
)
def test_what_cannot_be_is_one_line(
    arguments: tuple[str, ...],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["fixpoint-diffusion", "invert", *arguments, "--out", str(out)])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error
    assert not out.exists()


def test_images_of_other_channels_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "images.npy", np.zeros((2, 3, 8, 8), dtype=np.float32))
    result = invoke(tmp_path / "images.npy", "--out", tmp_path / "out")
    assert "the model takes samples (1, 8, 8)" in str(result.exception)
    assert "(3, 8, 8)" in str(result.exception)


def test_pictures_of_any_size_are_cut_to_the_models(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    digits = load_digits().images[:2, 0].add(1).mul(127.5).round().byte()
    for number, size in enumerate([(16, 24), (40, 20)]):
        Image.fromarray(digits[number].numpy()).resize(size).convert("LA").save(folder / f"{number}.png")
    options = (folder, "--steps", 5, "--rtol", 0.1, "--out", tmp_path / "out")
    assert "--channels" in str(invoke(*options).exception)
    result = invoke(*options, "--channels", "L")
    assert result.exit_code == 0, result.output
    cut = open_dataset(folder, size=8, channels="L")
    x_0 = torch.stack([cut[number]["images"] for number in range(2)])
    denoiser, x_T = embedded("ddpm-digits"), torch.from_numpy(np.load(tmp_path / "out" / "x_T.npy"))
    chain = DDIMChain(denoiser, x_T, NoiseSchedule.from_diffusers(denoiser.schedule_config), steps=5)
    with torch.no_grad():
        error = (chain.sequential()[:, -1] - x_0).square().mean(dim=(1, 2, 3)).sqrt()
    record = json.loads((tmp_path / "out" / "invert.json").read_text())
    assert [row["error"] for row in record["results"]] == pytest.approx(error.tolist(), rel=1e-3)


def test_images_that_are_not_inverted_are_counted_with_what_to_do(tmp_path: Path) -> None:
    # Float32 cannot come so near.
    options = ("--steps", 2, "--num-images", 2, "--max-rounds", 1, "--rtol", 1e-12, "--out", tmp_path / "out")
    result = invoke("digits", *options)
    assert result.exit_code == 0, result.output
    assert "Warning: 2 of 2 images were not inverted" in result.stderr
    assert (tmp_path / "out" / "x_T.npy").exists()


def test_latents_that_encode_wrote_are_taken_as_they_are(tmp_path: Path) -> None:
    tiny_vae().save_pretrained(tmp_path / "vae")
    pictures, latents = tmp_path / "pictures", tmp_path / "latents"
    pictures.mkdir()
    Image.new("RGB", (16, 16), (200, 30, 90)).save(pictures / "0.png")
    encode(open_dataset(pictures), tmp_path / "vae", latents, EncodeOptions(), progress=False)
    expected = open_dataset(latents)[0]["images"]
    model = tmp_path / "model"
    tiny_unet(sample_size=expected.shape[-1], in_channels=4, out_channels=4).save_pretrained(model)
    shutil.copy(embedded_folder("ddpm-digits") / "scheduler_config.json", model)
    options = ("--model", model, "--steps", 2, "--rtol", 0.5, "--out", tmp_path / "out")
    assert "encode" in str(invoke(pictures, *options).exception)
    result = invoke(latents, *options)
    assert result.exit_code == 0, result.output
    assert np.load(tmp_path / "out" / "x_T.npy").shape == (1, *expected.shape)


@pytest.mark.parametrize(("rank", "said"), [("0", "invert works in one process, and here are 2"), ("1", "")])
def test_several_processes_are_refused_by_the_first(
    rank: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("fixpoint_diffusion.cli._SECONDS_TO_REPORT", 0)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(sys, "argv", ["fixpoint-diffusion", "invert", "digits", "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert said in error
    assert bool(error) == bool(said)
    assert not (tmp_path / "out").exists()
