"""``fixpoint-diffusion sample``: many images in batches and files, classes, latents, and whatever can be mistyped."""

from __future__ import annotations

import json
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from typer.main import get_command
from typer.testing import CliRunner

from fixpoint_diffusion.chains import chain_from_scheduler
from fixpoint_diffusion.cli import app
from fixpoint_diffusion.denoisers import embedded, load_denoiser
from fixpoint_diffusion.denoisers.registry import family
from fixpoint_diffusion.files import locked
from fixpoint_diffusion.models.autoencoder import LatentDecoder, load_autoencoder
from fixpoint_diffusion.options.sampling import SamplingOptions, parse_classes
from fixpoint_diffusion.processes import NoiseSchedule, initial_noise, step_noise
from fixpoint_diffusion.sampling.fpdm import sample_fpdm
from fixpoint_diffusion.sampling.grids import to_pixels
from fixpoint_diffusion.sampling.job import SamplingJob
from fixpoint_diffusion.training import TrainingRun
from fixpoint_diffusion.training.logs import TrainingLog
from tests.fixpoint_diffusion.command_line import SCHEDULE, contents, invoke, run_main, sampled, saved_fpdm


def arrays(out: Path) -> np.ndarray:
    return np.concatenate([np.load(path) for path in sorted((out / "images").glob("*.npy"))])


@pytest.fixture
def conditional_unet(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = diffusers.UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        num_class_embeds=4,
    )
    return saved(model, tmp_path / "unet")


@pytest.fixture
def dit(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    return saved(tiny_dit(), tmp_path / "dit")


@pytest.fixture
def conditional_fpdm(tmp_path: Path) -> Path:
    return saved_fpdm(tmp_path / "fpdm")


@pytest.fixture
def vae(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        scaling_factor=0.5,
        shift_factor=0.1,
    )
    model.save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


def tiny_dit(out_channels: int = 4) -> diffusers.DiTTransformer2DModel:
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=out_channels,
        num_layers=1,
        sample_size=8,
        num_embeds_ada_norm=5,
    )
    for parameter in model.parameters():  # zero gates would hide the class
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def tiny_text_unet() -> diffusers.UNet2DConditionModel:
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
        cross_attention_dim=8,
    )


def saved(model: diffusers.ModelMixin, folder: Path) -> Path:
    model.save_pretrained(folder)
    (folder / "scheduler_config.json").write_text(json.dumps(SCHEDULE))
    return folder


@pytest.mark.parametrize("model", ["ddpm-digits", "fpdm-digits"])
def test_batches_change_no_image(tmp_path: Path, model: str) -> None:
    options = ("--model", model, "--num-images", 7, "--eta", 1, "--seed", 3)
    figures = sampled(tmp_path / "one", *options)
    sampled(tmp_path / "many", *options, "--batch-size", 3)
    whole = np.load(tmp_path / "one" / "images.npy")
    assert [len(np.load(p)) for p in sorted((tmp_path / "many" / "images").iterdir())] == [3, 3, 1]
    np.testing.assert_allclose(arrays(tmp_path / "many"), whole, atol=1e-4)
    assert not np.allclose(whole[0], whole[1], atol=0.1)
    assert figures["images_done"] == 7


def test_no_more_than_a_batch_is_given_to_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    denoiser = embedded("ddpm-digits")
    rows: list[int] = []
    hook = denoiser.model.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    job = SamplingJob(denoiser, SamplingOptions(num_images=9, batch_size=4, steps=2))
    assert [batch.first for batch in job.batches(progress=False)] == [0, 4, 8]
    hook.remove()
    assert max(rows) == 4


@pytest.mark.parametrize("format", ["npy", "png"])
def test_interrupted_run_goes_on_to_the_same_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str
) -> None:
    options = ("--num-images", 6, "--batch-size", 2, "--format", format)
    sampled(tmp_path / "whole", *options)
    original, calls = SamplingJob._sample, []

    def interrupt(self, samples, **kwargs):
        calls.append(samples)
        if samples[0] == 4:
            raise KeyboardInterrupt
        return original(self, samples, **kwargs)

    monkeypatch.setattr(SamplingJob, "_sample", interrupt)
    result = invoke("--steps", 3, "--out", tmp_path / "cut", *options)
    assert result.exit_code == 130
    assert "4 of 6 images" in result.output
    monkeypatch.setattr(
        SamplingJob, "_sample", lambda self, samples, **kw: calls.append(samples) or original(self, samples, **kw)
    )
    calls.clear()
    sampled(tmp_path / "cut", *options)
    assert calls == [range(4, 6)]
    one, other = contents(tmp_path / "whole"), contents(tmp_path / "cut")
    assert one.keys() == other.keys()
    for name, content in one.items():
        if name.endswith(".json"):
            assert {**json.loads(content), "seconds": 0} == {**json.loads(other[name]), "seconds": 0}
        else:
            assert content == other[name]


def test_grown_number_adds_images_and_a_lost_file_is_made_again(tmp_path: Path) -> None:
    sampled(tmp_path / "a", "--num-images", 3)
    sampled(tmp_path / "a", "--num-images", 7, "--batch-size", 3)
    sampled(tmp_path / "b", "--num-images", 7)
    expected = np.load(tmp_path / "b" / "images.npy")
    np.testing.assert_allclose(arrays(tmp_path / "a"), expected, atol=1e-5)
    (tmp_path / "a" / "images" / "00000003.npy").unlink()
    sampled(tmp_path / "a", "--num-images", 7, "--batch-size", 2)
    np.testing.assert_allclose(arrays(tmp_path / "a"), expected, atol=1e-5)


@pytest.mark.parametrize("change", [("--seed", 4), ("--eta", 0.5), ("--model", "fpdm-digits"), ("--format", "png")])
def test_another_run_is_not_mixed_in_or_lost(tmp_path: Path, change: tuple[str, object]) -> None:
    sampled(tmp_path, "--num-images", 2)
    before = contents(tmp_path)
    code, error = run_main("sample", "--steps", 3, "--num-images", 2, "--out", tmp_path, *change)
    assert code == 2
    assert "holds another run" in error
    assert contents(tmp_path) == before
    sampled(tmp_path, "--num-images", 2, *change, "--overwrite")
    assert contents(tmp_path) != before


def test_refused_overwrite_keeps_the_old_run(tmp_path: Path) -> None:
    sampled(tmp_path, "--num-images", 4, "--batch-size", 2)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    code, error = run_main("sample", "--steps", 3, "--out", tmp_path, "--overwrite", "--num-images", 10**15)
    assert code == 2
    assert "GB left" in error
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_folder_in_which_another_process_samples_is_left_alone(tmp_path: Path) -> None:
    sampled(tmp_path, "--num-images", 4, "--batch-size", 2)
    with locked(tmp_path, work="sampling"):
        code, error = run_main("sample", "--steps", 3, "--out", tmp_path, "--num-images", 6, "--batch-size", 3)
    assert code == 2
    assert "another run is sampling in" in error
    assert len(arrays(tmp_path)) == 4


def _rewrite_record(folder: Path, **values: object) -> None:
    path = folder / "batches" / "00000002.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    "damage",
    [
        lambda out: _rewrite_record(out, seconds="long"),
        lambda out: _rewrite_record(out, counts={"rounds": None}),
        lambda out: _rewrite_record(out, counts=[]),
        lambda out: _rewrite_record(out, images=-1),
        lambda out: _rewrite_record(out, first=0),
        lambda out: _rewrite_record(out, files={"../sample.json": ""}),
        lambda out: _rewrite_record(out, more=1),
        lambda out: (out / "batches" / "00000002.json").write_text("{"),
        lambda out: (out / "sample.json").write_text("{"),
        lambda out: _rewrite_record(out, seconds=float("nan")),
        lambda out: np.save(out / "images" / "00000002.npy", np.float32(1)),
        lambda out: np.save(out / "images" / "00000002.npy", np.zeros((2, 1, 8, 8), np.float32)),
    ],
)
def test_damaged_run_is_named_and_left_as_it_is(tmp_path: Path, damage: Callable[[Path], object]) -> None:
    sampled(tmp_path, "--num-images", 4, "--batch-size", 2)
    damage(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    code, error = run_main("sample", "--steps", 3, "--out", tmp_path, "--num-images", 6, "--batch-size", 2)
    assert code == 2
    assert any(f"{name} is damaged" in error for name in ("sample.json", "00000002.json", "00000002.npy"))
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("00000001-class0.png", "both hold image 1"),
        ("000000001.png", "is of no sampling run"),
        ("1.png", "is of no sampling run"),
        ("more/00000001.png", "more is of no sampling run"),
        ("00000003.npy", "is not of this run, which writes png"),
        ("../images.npy", "both hold image 0"),
    ],
)
def test_pictures_that_are_not_of_this_run_are_named_and_nothing_is_done(
    tmp_path: Path, name: str, message: str
) -> None:
    sampled(tmp_path, "--num-images", 3, "--format", "png")
    other = tmp_path / "images" / name
    other.parent.mkdir(exist_ok=True)
    shutil.copy(tmp_path / "images" / "00000001.png", other)
    (tmp_path / "images" / ".DS_Store").touch()
    (tmp_path / "images" / "Thumbs.db").touch()
    before = contents(tmp_path)
    code, error = run_main("sample", "--steps", 3, "--out", tmp_path, "--num-images", 5, "--format", "png")
    assert code == 2
    assert message in error
    assert contents(tmp_path) == before
    other.unlink()
    if other.parent.name == "more":
        other.parent.rmdir()
    sampled(tmp_path, "--num-images", 5, "--format", "png")


def test_overwrite_deletes_images_of_any_run_and_nothing_else(tmp_path: Path) -> None:
    sampled(tmp_path, "--num-images", 3, "--format", "png")
    shutil.copy(tmp_path / "images" / "00000001.png", tmp_path / "images" / "00000001-class0.png")
    sampled(tmp_path, "--num-images", 2, "--overwrite", "--batch-size", 1)
    assert sorted(path.name for path in (tmp_path / "images").iterdir()) == ["00000000.npy", "00000001.npy"]
    (tmp_path / "images" / "mine.txt").touch()
    code, error = run_main("sample", "--steps", 3, "--num-images", 2, "--out", tmp_path, "--overwrite", "--seed", 1)
    assert code == 2
    assert "mine.txt is of no sampling run" in error


def test_empty_picture_is_not_counted(tmp_path: Path) -> None:
    sampled(tmp_path, "--num-images", 3, "--format", "png")
    (tmp_path / "images" / "00000001.png").write_bytes(b"")
    code, error = run_main("sample", "--steps", 3, "--out", tmp_path, "--num-images", 4, "--format", "png")
    assert code == 2
    assert "00000001.png is damaged" in error


def test_retrained_model_in_the_same_folder_is_another_run(tmp_path: Path, conditional_unet: Path) -> None:
    options = ("--model", conditional_unet, "--class", 0, "--num-images", 1)
    sampled(tmp_path / "out", *options)
    torch.manual_seed(1)
    model = diffusers.UNet2DModel.from_pretrained(conditional_unet)
    torch.nn.init.normal_(model.conv_in.weight)
    model.save_pretrained(conditional_unet)
    code, error = run_main("sample", "--steps", 3, "--out", tmp_path / "out", *options)
    assert code == 2
    assert "weights_sha256" in error


def test_what_lies_beside_a_model_is_no_other_model(tmp_path: Path, conditional_unet: Path) -> None:
    options = ("--model", conditional_unet, "--class", 0)
    sampled(tmp_path / "out", *options, "--num-images", 1)
    (conditional_unet / "checkpoint").mkdir()
    for other in ("checkpoint/state.safetensors", "samples.safetensors", "training_config.json"):
        (conditional_unet / other).write_text('{"another": "file"}')
    sampled(tmp_path / "out", *options, "--num-images", 2)
    schedule = conditional_unet / "scheduler_config.json"
    schedule.write_text(json.dumps({**json.loads(schedule.read_text()), "beta_end": 0.019}))
    code, error = run_main("sample", "--steps", 3, "--out", tmp_path / "out", *options, "--num-images", 3)
    assert code == 2
    assert "weights_sha256" in error


def test_pictures_are_the_rounded_images_named_by_number_and_class(tmp_path: Path, conditional_unet: Path) -> None:
    options = ("--model", conditional_unet, "--num-images", 3, "--class", "2,0")
    figures = sampled(tmp_path / "png", *options, "--format", "png")
    sampled(tmp_path / "npy", *options)
    names = ["00000000-class2.png", "00000001-class0.png", "00000002-class2.png"]
    assert sorted(p.name for p in (tmp_path / "png" / "images").iterdir()) == names
    assert figures["classes"] == [2, 0]
    expected = to_pixels(torch.from_numpy(np.load(tmp_path / "npy" / "images.npy")))
    for name, pixels in zip(names, expected, strict=True):
        with Image.open(tmp_path / "png" / "images" / name) as picture:
            np.testing.assert_array_equal(np.asarray(picture), pixels[0].numpy())


def named(folder: Path, names: object) -> Path:
    (folder / "training_config.json").write_text(json.dumps({"class_names": names}))
    return folder


def test_classes_are_taken_by_name_or_number_and_are_the_same_run(tmp_path: Path, conditional_unet: Path) -> None:
    model = named(conditional_unet, ["ant", "bee", "cat, small", "dog é"])
    options = ("--model", model, "--num-images", 2)
    assert sampled(tmp_path / "out", *options, "--class", "dog é,1")["classes"] == [3, 1]
    assert sampled(tmp_path / "out", *options, "--class", "3, bee")["classes"] == [3, 1]
    assert sampled(tmp_path / "one", *options, "--class", "cat, small")["classes"] == [2]
    assert "names      0 ant, 1 bee, 2 cat, small, 3 dog é" in CliRunner().invoke(app, ["info", str(model)]).output


def test_whoever_names_no_class_of_a_model_with_classes_is_told_so(tmp_path: Path) -> None:
    model = saved_fpdm(tmp_path / "fpdm", num_classes=10)
    for name, options, told in (("none", (), 1), ("all", ("--class", "all"), 0)):
        result = invoke("--model", model, "--num-images", 1, "--steps", 2, "--out", tmp_path / name, *options)
        assert result.output.count("Note: without --class these are images of no class") == told, result.output


def test_unknown_class_is_answered_with_at_most_ten_names() -> None:
    names = [f"breed{number}" for number in range(30)]
    with pytest.raises(ValueError, match=r"no class 'bred7' .* Did you mean 'breed7'\? Legal: breed7, ") as caught:
        parse_classes("bred7", 30, names)
    assert str(caught.value).partition("Legal")[2].count("breed") == 10
    assert str(caught.value).endswith(", ... (30 in all).")
    with pytest.raises(ValueError, match=r"no class 'x' in this model. Legal: cats, dogs.$"):
        parse_classes("cats,x", 2, ["cats", "dogs"])


def test_names_that_are_numbers_of_other_classes_stand_for_themselves() -> None:
    assert parse_classes("1,3", 3, ["1", "2", "3"]) == (0, 2)
    assert parse_classes("1,2", 3, ["0", "1", "2"]) == (1, 2)
    with pytest.raises(ValueError, match=r"no class '0' .* Numbers are not taken, since they are names here"):
        parse_classes("0", 3, ["1", "2", "3"])


@pytest.mark.parametrize("names", ["ant", [1, 2], {"a": 1}])
def test_damaged_names_of_classes_are_refused(tmp_path: Path, conditional_unet: Path, names: object) -> None:
    model = named(conditional_unet, names)
    code, error = run_main("sample", "--model", model, "--class", "ant", "--out", tmp_path / "out")
    assert code == 2
    assert "training_config.json: class_names must be a list of names" in error


def oracle(model, x_T: torch.Tensor, labels: torch.Tensor, guidance: float, null: int, scheduler=None) -> torch.Tensor:
    """Guided DDIM by diffusers' own scheduler."""
    scheduler = scheduler or diffusers.DDIMScheduler.from_config(SCHEDULE)
    scheduler.set_timesteps(3)
    latent = x_T
    with torch.no_grad():
        for t in scheduler.timesteps:
            out = model(latent, t.expand(len(latent)), class_labels=labels).sample
            if guidance != 1:
                without = model(latent, t.expand(len(latent)), class_labels=torch.full_like(labels, null)).sample
                out = without + guidance * (out - without)
            latent = scheduler.step(out, t, latent).prev_sample
    return latent


def test_clipping_of_the_schedulers_configuration_is_honoured(tmp_path: Path, conditional_unet: Path) -> None:
    config = {"_class_name": "DDPMScheduler", "clip_sample": True, "clip_sample_range": 0.5}
    (conditional_unet / "scheduler_config.json").write_text(json.dumps(config))
    sampled(tmp_path / "out", "--model", conditional_unet, "--num-images", 2, "--class", 3)
    scheduler = diffusers.DDIMScheduler(clip_sample=True, clip_sample_range=0.5)
    model, x_T = load_denoiser(conditional_unet).model, initial_noise(0, range(2), (1, 8, 8))
    expected = oracle(model, x_T, torch.tensor([3, 3]), 1.0, null=0, scheduler=scheduler)
    np.testing.assert_allclose(np.load(tmp_path / "out" / "images.npy"), expected, atol=1e-4)
    assert expected.abs().max() == pytest.approx(0.5)


@pytest.mark.parametrize("solver", ["sequential", "causal"])
@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_classes_and_guidance_give_what_diffusers_gives(
    tmp_path: Path, dit: Path, guidance: float, solver: str
) -> None:
    options = ("--class", "all", "--guidance", guidance, "--solver", solver)
    options += ("--rtol", 1e-6) if solver == "causal" else ()
    sampled(tmp_path / "out", "--model", dit, "--num-images", 6, *options)
    labels = torch.tensor([0, 1, 2, 3, 4, 0])
    x_T = initial_noise(0, range(6), (4, 8, 8))
    expected = oracle(load_denoiser(dit).model, x_T, labels, guidance, null=5)
    np.testing.assert_allclose(np.load(tmp_path / "out" / "images.npy"), expected, atol=1e-3)


def test_guided_fpdm_mixes_predictions_with_and_without_class(conditional_fpdm: Path) -> None:
    model = load_denoiser(conditional_fpdm).model
    schedule, x_T = NoiseSchedule.linear(), torch.randn(2, 1, 8, 8)
    y = torch.tensor([0, 2])
    (step,) = [sample_fpdm(model, x_T, schedule, steps=1, y=y, guidance=g).images for g in (3.0,)]
    with torch.no_grad():
        t = int(schedule.timesteps(1, "trailing")[0])
        without, out = (model(x_T, torch.tensor(t), labels, depth=4) for labels in (torch.full_like(y, 3), y))
    v = without + 3 * (out - without)
    a = schedule.alphas_cumprod[t].float()
    torch.testing.assert_close(step, a.sqrt() * x_T - (1 - a).sqrt() * v, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="guidance needs the classes"):
        sample_fpdm(model, x_T, schedule, steps=1, guidance=3.0)


def test_fpdm_of_classes_draws_other_images_for_each(tmp_path: Path, conditional_fpdm: Path) -> None:
    images = []
    for name, options in {"none": (), "one": ("--class", 1), "more": ("--class", 1, "--guidance", 3)}.items():
        sampled(tmp_path / name, "--model", conditional_fpdm, "--num-images", 2, *options)
        images.append(np.load(tmp_path / name / "images.npy"))
    assert np.abs(images[1] - images[0]).max() > 1e-3
    assert np.abs(images[2] - images[1]).max() > 1e-3


@pytest.mark.parametrize(
    ("scheduler", "eta"),
    [
        ({"timestep_spacing": "linspace"}, 0.0),
        ({"_class_name": "DDPMScheduler", "variance_type": "fixed_large", "clip_sample": True}, 1.0),
        ({"_class_name": "DDPMScheduler", "variance_type": "learned_range"}, 1.0),
    ],
)
def test_fpdm_takes_the_same_steps_in_sequence_as_in_parallel(
    tmp_path: Path, scheduler: dict[str, object], eta: float
) -> None:
    folder = saved_fpdm(tmp_path / "fpdm", learn_sigma=scheduler.get("variance_type") == "learned_range")
    config = {**SCHEDULE, "prediction_type": "v_prediction", **scheduler}
    (folder / "scheduler_config.json").write_text(json.dumps(config))
    options = ("--model", folder, "--num-images", 2, "--steps", 7, "--eta", eta, "--class", 1, "--guidance", 2)
    sampled(tmp_path / "in-turn", *options, "--no-reuse")
    sampled(tmp_path / "at-once", *options, "--solver", "picard", "--rtol", 1e-7)
    one, other = (np.load(tmp_path / name / "images.npy") for name in ("in-turn", "at-once"))
    np.testing.assert_allclose(one, other, atol=1e-4)


def test_latents_are_decoded_by_the_autoencoder(tmp_path: Path, dit: Path, vae: Path) -> None:
    options = ("--model", dit, "--num-images", 2, "--class", 1)
    sampled(tmp_path / "latents", *options)
    sampled(tmp_path / "images", *options, "--vae", vae, "--format", "png")
    latents = torch.from_numpy(np.load(tmp_path / "latents" / "images.npy"))
    model = diffusers.AutoencoderKL.from_pretrained(vae).eval()
    with torch.no_grad():
        expected = to_pixels(model.decode(latents / 0.5 + 0.1).sample)
    assert expected.shape == (2, 3, 16, 16)
    for path, pixels in zip(sorted((tmp_path / "images" / "images").iterdir()), expected, strict=True):
        with Image.open(path) as picture:
            found = np.asarray(picture).astype(int).transpose(2, 0, 1)
        assert np.abs(found - pixels.numpy().astype(int)).max() <= 1


def test_autoencoder_in_a_pipeline_folder_is_found(vae: Path, tmp_path: Path) -> None:
    (tmp_path / "pipe").mkdir()
    vae.rename(tmp_path / "pipe" / "vae")
    assert LatentDecoder(load_autoencoder(tmp_path / "pipe")).image_shape((4, 4, 6)) == (3, 8, 12)


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("unet", (), "has 4 classes and must be told one"),
        ("unet", ("--class", "4"), "the model's classes are 0 to 3"),
        ("unet", ("--class", "x"), "--class takes"),
        ("unet", ("--class", ""), "--class takes"),
        ("unet", ("--class", "-1"), "--class takes"),
        ("unet", ("--class", "1", "--guidance", "2"), "trained without labels"),
        ("unet", ("--guidance", "2"), "--guidance needs --class"),
        ("flow", (), "FlowMatchLCMScheduler describes"),
        ("text", (), "takes encoder_hidden_states"),
        ("ddpm-digits", ("--class", "1"), "this model has none"),
        ("ddpm-digits", ("--vae", "vae"), "the autoencoder decodes 4xHxW"),
        ("ddpm-digits", ("--vae", "no-such"), "no autoencoder folder"),
        ("ddpm-digits", ("--vae", "unet"), "_class_name is 'UNet2DModel'; expected 'AutoencoderKL'"),
        ("dit", ("--format", "png", "--class", "0"), "PNG holds images of 1 or 3 channels"),
        ("", (), "no model folder"),
        ("ddpm-digts", (), "no model folder 'ddpm-digts'. Did you mean 'ddpm-digits'? The embedded models are ddpm"),
        ("unet/config.json", (), "no model folder"),
        ("ddpm-digits", ("--num-images", "99999999999999999999"), "--num-images"),
        ("ddpm-digits", ("--num-images", "9999999999999999"), "GB left"),
        ("ddpm-digits", ("--num-images", "9999999999999999", "--format", "png"), "GB left"),
        ("ddpm-digits", ("--eta", "nan"), "--eta"),
        ("ddpm-digits", ("--rtol", "inf"), "--rtol"),
        ("ddpm-digits", ("--guidance", "inf"), "--guidance must be at least 0.0 and finite"),
        ("ddpm-digits", ("--guidance", "nan"), "--guidance"),
        ("ddpm-digits", ("--seed", "-1"), "--seed"),
        ("ddpm-digits", ("--steps", "2000"), "timesteps"),
        ("flow-digits", ("--steps", "99999999999999999999"), "--steps"),
        ("fpdm-digits", ("--iterations", "99999999999999999999"), "--iterations"),
        ("fpdm-digits", ("--reuse", "--solver", "picard"), "--reuse needs steps that follow each other"),
        ("ddpm-digits", ("--device", "tpu"), "no device 'tpu'"),
        ("ddpm-digits", ("--device", "meta"), "no device 'meta'"),
        ("ddpm-digits", ("--device", ""), "no device ''"),
        ("ddpm-digits", ("--out", ""), "no file or folder can have the name"),
        ("ddpm-digits", ("--out", "unet/config.json"), "is a file"),
        ("ddpm-digits", ("--out", "unet/config.json/deeper"), "cannot write"),
        ("ddpm-digits", ("--out", "x" * 300), "File name too long"),
        ("ddpm-digits", ("--out", "/proc/no"), "cannot write"),
        (
            "ddpm-digits",
            ("--out", "taken"),
            "holds images.npy, which this command has not written: choose another --out",
        ),
        ("ddpm-digits", ("--out", "damaged"), "is damaged"),
    ],
)
def test_what_does_not_fit_ends_in_one_line_and_writes_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    conditional_unet: Path,
    dit: Path,
    vae: Path,
    model: str,
    options: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(conditional_unet, "flow")
    Path("flow/scheduler_config.json").write_text('{"_class_name": "FlowMatchLCMScheduler"}')
    saved(tiny_text_unet(), tmp_path / "text")
    Path("taken").mkdir()
    Path("taken/images.npy").write_text("mine")
    Path("damaged").mkdir()
    Path("damaged/sample.json").write_text("{")
    before = contents(tmp_path), sorted(tmp_path.rglob("*"))
    code, error = run_main("sample", "--model", model, *options)
    assert code == 2
    assert message in error
    assert "\n" not in error
    assert (contents(tmp_path), sorted(tmp_path.rglob("*"))) == before


def test_images_that_are_not_finite_are_not_written(tmp_path: Path, conditional_unet: Path) -> None:
    model = diffusers.UNet2DModel.from_pretrained(conditional_unet)
    torch.nn.init.constant_(model.conv_out.bias, float("nan"))
    model.save_pretrained(conditional_unet)
    options = ("--model", conditional_unet, "--class", 1, "--out", tmp_path / "out", "--steps", 2)
    code, error = run_main("sample", *options)
    assert code == 2
    assert "not finite" in error or "NaN" in error
    assert not (tmp_path / "out").exists()


def test_learned_variance_gives_what_diffusers_gives(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = tiny_dit(out_channels=8)
    folder = saved(model, tmp_path / "dit")
    config = {"_class_name": "DDPMScheduler", "variance_type": "learned_range", "clip_sample": False}
    (folder / "scheduler_config.json").write_text(json.dumps(config))
    sampled(tmp_path / "out", "--model", folder, "--num-images", 2, "--class", 1, "--eta", 1, "--seed", 5)
    scheduler = diffusers.DDPMScheduler.from_config(config)
    scheduler.set_timesteps(3)
    latent, labels = initial_noise(5, range(2), (4, 8, 8)), torch.tensor([1, 1])
    noises = step_noise(5, range(2), range(3), (4, 8, 8))
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        for k, t in enumerate(scheduler.timesteps):
            patch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, k=k, **__: noises[:, k])
            out = model.eval()(latent, t.expand(2), class_labels=labels).sample
            latent = scheduler.step(out, t, latent).prev_sample
    np.testing.assert_allclose(np.load(tmp_path / "out" / "images.npy"), latent, atol=1e-4)


def test_full_disk_keeps_what_is_there_and_says_so(tmp_path: Path) -> None:
    # A limit on the size of a file fails as a full disk does, on any machine: the second, larger batch does not fit.
    code = "import sys; sys.argv[0] = 'fixpoint-diffusion'; from fixpoint_diffusion.cli import main; main()"
    sampled(tmp_path / "out", "--num-images", 2)
    command = [sys.executable, "-c", code, "sample", "--steps", "3", "--out", str(tmp_path / "out")]
    before = np.load(tmp_path / "out" / "images.npy")
    limited = subprocess.run(
        [*command, "--num-images", "40", "--batch-size", "30"],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)),
    )
    assert limited.returncode == 2
    last = limited.stderr.strip().splitlines()[-1]
    assert last.startswith(f"Error: cannot write to {tmp_path / 'out'}")
    assert "Traceback" not in limited.stderr
    np.testing.assert_array_equal(arrays(tmp_path / "out"), before)
    assert not list(tmp_path.rglob("*.part"))
    sampled(tmp_path / "out", "--num-images", 40, "--batch-size", 30)
    assert len(arrays(tmp_path / "out")) == 40


def test_sequences_are_sampled_and_have_no_grid(tmp_path: Path) -> None:
    torch.manual_seed(0)
    folder = saved(family("unet-1d").build((2, 16), None, {}), tmp_path / "model")
    sampled(tmp_path / "out", "--model", folder, "--num-images", 3, "--batch-size", 2)
    assert arrays(tmp_path / "out").shape == (3, 2, 16)
    assert not (tmp_path / "out" / "grid.png").exists()


def test_info_says_what_a_model_takes(conditional_unet: Path, dit: Path) -> None:
    config = {**SCHEDULE, "clip_sample": True, "clip_sample_range": 2.0, "timestep_spacing": "trailing"}
    (dit / "scheduler_config.json").write_text(json.dumps(config))
    facts = CliRunner().invoke(app, ["info", str(dit)]).output
    for fact in ("4x8x8", "5, --class 0 to 4; can do without", "to 2.0", "trailing", "epsilon", "x, t, class_labels"):
        assert fact in facts
    facts = CliRunner().invoke(app, ["info", str(conditional_unet)]).output
    assert re.search(r"classes +4, --class 0 to 3\n", facts)
    assert re.search(r"clipping +none", facts)


ODD = [
    "digits",
    "ddpm-digits",
    "",
    " ",
    "nan",
    "inf",
    "-inf",
    "-1",
    "0",
    "1",
    "1e999",
    "9" * 20,
    "0x1",
    "é",
    "a\nb",
    "--",
    "-",
    ".",
]
COMMANDS = ("sample", "sample", "train", "encode", "evaluate", "invert", "info", "no-such")
FLAGS = [*sorted({name for c in get_command(app).commands.values() for p in c.params for name in p.opts}), "--no-such"]


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    command=st.sampled_from(COMMANDS),
    words=st.lists(st.one_of(st.sampled_from(FLAGS), st.sampled_from(ODD), st.text(max_size=4)), max_size=6),
)
def test_no_command_line_ends_in_a_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, words: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    # The work itself is left out: this is about what is typed.
    monkeypatch.setattr(SamplingJob, "batches", lambda self, parts, **_: iter(()))
    monkeypatch.setattr(TrainingRun, "run", lambda self: TrainingLog())
    monkeypatch.setattr("fixpoint_diffusion.commands.sample._judge", lambda *_: {})
    monkeypatch.setattr("fixpoint_diffusion.commands.sample._save_grid", lambda *_: None)
    monkeypatch.setattr("fixpoint_diffusion.inversion.invert", lambda *_, **__: sys.exit(0))
    code, error = run_main(command, *words)
    assert code in (0, 2)
    if code == 2:
        assert error.count("\n") == 0


def test_a_loaded_model_keeps_its_learned_variance_on_request(tmp_path: Path) -> None:
    folder = saved_fpdm(tmp_path / "fpdm", learn_sigma=True)
    scheduler = {"_class_name": "DDPMScheduler", "variance_type": "learned_range", "clip_sample": False}
    x_T = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    chain = chain_from_scheduler(load_denoiser(folder), x_T, scheduler, steps=3, seed=0)
    with pytest.raises(ValueError, match=r"\[2, 2, 8, 8\]\); .* unless told learned_variance=True"):
        chain.sequential()
    kept = load_denoiser(folder, learned_variance=True)
    assert chain_from_scheduler(kept, x_T, scheduler, steps=3, seed=0).sequential().isfinite().all()
    plain = torch.nn.Conv2d(1, 2, 1).requires_grad_(False)
    chain = chain_from_scheduler(lambda x, t: plain(x), x_T, {**scheduler, "variance_type": "fixed_small"}, steps=3)
    with pytest.raises(ValueError, match=r"the denoiser must return the shape .* attribute learned_variance = True"):
        chain.sequential()


def test_noise_in_a_file_of_another_kind_is_no_array(tmp_path: Path) -> None:
    (tmp_path / "x_T.npy").write_text("{}")
    result = invoke("--x-T", tmp_path / "x_T.npy", "--out", tmp_path / "out")
    assert str(result.exception).endswith("x_T.npy is no .npy file")
