from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from typer.testing import CliRunner

from fixpoint_diffusion.cli import app
from fixpoint_diffusion.models.autoencoder import LatentDecoder, LatentEncoder, LatentScaling, load_autoencoder
from fixpoint_diffusion.training import encode as encode_module
from fixpoint_diffusion.training.data import LabelledImages, open_dataset
from fixpoint_diffusion.training.encode import EncodeOptions, encode


def tiny_vae(**settings: Any) -> AutoencoderKL:
    torch.manual_seed(0)
    sizes = {"block_out_channels": (8, 8), "norm_num_groups": 4, "latent_channels": 2, "layers_per_block": 1}
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return AutoencoderKL(**sizes, **blocks, **settings).eval()


@pytest.fixture
def vae(tmp_path: Path) -> Path:
    model = tiny_vae(scaling_factor=0.7, shift_factor=0.3)
    model.quant_conv.bias.data[2:] -= 3  # log variances: standard deviations that are not 1
    model.save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Seven pictures 8x8 in two classes."""
    rng = np.random.default_rng(0)
    for index in range(7):
        folder = tmp_path / "pictures" / ("cats" if index < 3 else "dogs")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / f"{index}.png")
    return tmp_path / "pictures"


def all_rows(folder: Path) -> torch.Tensor:
    dataset = open_dataset(folder)
    return torch.stack([dataset[index]["images"] for index in range(len(dataset))])


def run(pictures: Path, vae: Path, out: Path, **options: Any) -> None:
    encode(open_dataset(pictures), vae, out, EncodeOptions(**{"shard_rows": 3, **options}), progress=False)


def test_latents_are_those_of_diffusers(pictures: Path, vae: Path, tmp_path: Path) -> None:
    run(pictures, vae, tmp_path / "out", batch_size=2)
    model = AutoencoderKL.from_pretrained(vae).eval()
    files = sorted(pictures.rglob("*.png"), key=lambda file: file.stem)
    images = VaeImageProcessor(vae_scale_factor=2).preprocess([Image.open(file) for file in files])
    with torch.no_grad():
        expected = (model.encode(images).latent_dist.mode() - 0.3) * 0.7
    torch.testing.assert_close(all_rows(tmp_path / "out"), expected, atol=1e-5, rtol=1e-5)
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "labels.npy",
        *(f"latents-0000{number}.npy" for number in range(3)),
        "latents.json",
    ]


def test_classes_and_the_record_are_kept(pictures: Path, vae: Path, tmp_path: Path) -> None:
    run(pictures, vae, tmp_path / "out")
    dataset = open_dataset(tmp_path / "out")
    assert (dataset.is_latent, dataset.sample_shape) == (True, (2, 4, 4))
    assert (dataset.class_names, dataset.num_classes) == (("cats", "dogs"), 2)
    assert [dataset[index]["labels"] for index in range(7)] == [0, 0, 0, 1, 1, 1, 1]
    assert open_dataset(tmp_path / "out", labels=False).labels is None
    record = json.loads((tmp_path / "out" / "latents.json").read_text())
    assert (record["scaling_factor"], record["shift_factor"], record["posterior"]) == ([0.7], [0.3], "mean")


def test_samples_follow_the_posterior_and_not_the_batch(pictures: Path, vae: Path, tmp_path: Path) -> None:
    run(pictures, vae, tmp_path / "a", sample=True, seed=5, batch_size=2)
    run(pictures, vae, tmp_path / "b", sample=True, seed=5, batch_size=7, shard_rows=7)
    run(pictures, vae, tmp_path / "c", sample=True, seed=6)
    a, b, c = (all_rows(tmp_path / name) for name in "abc")
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert (a - c).abs().max() > 0.05
    model = AutoencoderKL.from_pretrained(vae).eval()
    dataset = open_dataset(pictures)
    with torch.no_grad():
        posterior = model.encode(torch.stack([dataset[index]["images"] for index in range(7)])).latent_dist
    normal = (a / 0.7 + 0.3 - posterior.mean) / posterior.std
    assert normal.numel() == 224
    assert abs(float(normal.mean())) < 0.25
    assert 0.8 < float(normal.std()) < 1.2


def test_an_interrupted_run_makes_what_is_missing(
    pictures: Path, vae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(pictures, vae, tmp_path / "whole", batch_size=2, sample=True)
    original, encoded = encode_module._encode_rows, []

    def stop_at(begin: int | None) -> None:
        def rows_or_stop(dataset: Any, encoder: Any, rows: range, *rest: Any) -> np.ndarray:
            if rows.start == begin:
                raise KeyboardInterrupt
            encoded.append(rows)
            return original(dataset, encoder, rows, *rest)

        monkeypatch.setattr(encode_module, "_encode_rows", rows_or_stop)

    stop_at(6)
    with pytest.raises(KeyboardInterrupt):
        run(pictures, vae, tmp_path / "out", batch_size=2, sample=True)
    with pytest.raises(ValueError, match="1 of 3 shards are missing"):
        open_dataset(tmp_path / "out")
    damaged = tmp_path / "out" / "latents-00000.npy"
    damaged.write_bytes(damaged.read_bytes()[:-8])
    encoded.clear()
    stop_at(None)
    run(pictures, vae, tmp_path / "out", batch_size=2, sample=True)
    assert encoded == [range(0, 3), range(6, 7)]
    assert torch.equal(all_rows(tmp_path / "out"), all_rows(tmp_path / "whole"))


def test_a_folder_that_another_run_encodes_into_is_left_to_it(
    pictures: Path, vae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second run that ended before the first had a shard took the record and the labels of the first with it."""
    original = encode_module._encode_rows

    def stopped(*_: Any) -> np.ndarray:
        raise RuntimeError

    def with_another_run(*given: Any) -> np.ndarray:
        monkeypatch.setattr(encode_module, "_encode_rows", stopped)
        with pytest.raises(BlockingIOError, match="another run is encoding"):
            run(pictures, vae, tmp_path / "out")
        monkeypatch.setattr(encode_module, "_encode_rows", original)
        return original(*given)

    monkeypatch.setattr(encode_module, "_encode_rows", with_another_run)
    run(pictures, vae, tmp_path / "out")
    assert len(all_rows(tmp_path / "out")) == 7


def test_other_data_or_settings_are_not_mixed_in(pictures: Path, vae: Path, tmp_path: Path) -> None:
    run(pictures, vae, tmp_path / "out")
    with pytest.raises(FileExistsError, match="posterior"):
        run(pictures, vae, tmp_path / "out", sample=True)
    torch.manual_seed(1)
    other = tiny_vae(scaling_factor=0.7, shift_factor=0.3)
    other.encoder.conv_in.bias.data += 1
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(FileExistsError, match="vae_sha256"):
        run(pictures, tmp_path / "other", tmp_path / "out")
    (pictures / "cats" / "0.png").rename(pictures / "dogs" / "0.png")
    with pytest.raises(FileExistsError, match="source_fingerprint"):
        run(pictures, vae, tmp_path / "out")


def test_a_failure_to_write_leaves_no_part_of_a_file(
    pictures: Path, vae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(stream: Any, arr: np.ndarray) -> None:
        stream.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(encode_module.np, "save", full_disk)
    with pytest.raises(OSError, match="No space left"):
        run(pictures, vae, tmp_path / "out")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["latents.json"]


def test_unusable_images_folders_and_autoencoders_are_refused(pictures: Path, vae: Path, tmp_path: Path) -> None:
    grey = open_dataset(LabelledImages(images=torch.zeros(2, 1, 8, 8)))
    with pytest.raises(ValueError, match=r"images are 1x8x8; the autoencoder takes 3 channels"):
        encode(grey, vae, tmp_path / "out")
    with pytest.raises(ValueError, match=r"3x7x7.*multiples of 2"):
        encode(open_dataset(pictures, size=7), vae, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(FileExistsError, match="choose an empty folder"):
        run(pictures, vae, pictures)
    with pytest.raises(NotADirectoryError, match="is a file"):
        run(pictures, vae, vae / "config.json")
    with pytest.raises(ValueError, match="seed"):
        EncodeOptions(seed=2**64)
    with pytest.raises(FileNotFoundError, match="no autoencoder folder"):
        run(pictures, tmp_path / "nothing", tmp_path / "out")
    run(pictures, vae, tmp_path / "out")
    with pytest.raises(ValueError, match="latents already"):
        encode(open_dataset(tmp_path / "out"), vae, tmp_path / "again")
    config = json.loads((vae / "config.json").read_text())
    (vae / "config.json").write_text(json.dumps({**config, "_class_name": "UNet2DModel"}))
    with pytest.raises(ValueError, match="expected 'AutoencoderKL'"):
        load_autoencoder(vae)
    (vae / "config.json").write_text(json.dumps({**config, "layers_per_block": 2}))
    with pytest.raises(ValueError, match="do not fit"):
        load_autoencoder(vae)


def test_values_that_are_not_finite_are_refused_by_image(pictures: Path, tmp_path: Path) -> None:
    model = tiny_vae()
    model.encoder.conv_out.bias.data[0] = float("nan")
    model.save_pretrained(tmp_path / "vae")
    with pytest.raises(ValueError, match="not finite for image 0"):
        run(pictures, tmp_path / "vae", tmp_path / "new" / "out")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_picture_is_named_in_one_line(pictures: Path, vae: Path, tmp_path: Path, workers: int) -> None:
    picture = pictures / "dogs" / "5.png"
    picture.write_bytes(picture.read_bytes()[:-60])
    with pytest.raises(ValueError, match=r"^\S*5\.png cannot be decoded[^\n]*$"):
        run(pictures, vae, tmp_path / "out", workers=workers)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_picture_that_has_gone_is_named_in_one_line(
    pictures: Path, vae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    original = encode_module._encode_rows

    def without_one(*given: Any) -> np.ndarray:
        (pictures / "dogs" / "5.png").unlink(missing_ok=True)
        return original(*given)

    monkeypatch.setattr(encode_module, "_encode_rows", without_one)
    with pytest.raises(FileNotFoundError, match=r"^\[Errno 2\][^\n]*5\.png'$") as caught:
        run(pictures, vae, tmp_path / "out", workers=workers)
    if not workers:  # whose error is the original one
        assert str(caught.value.filename).endswith("5.png")


def test_damaged_folders_of_latents_are_refused(pictures: Path, vae: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(pictures, vae, out)
    shard, record = out / "latents-00001.npy", out / "latents.json"
    np.save(shard, np.zeros((2, 2, 4, 4), dtype=np.float32))
    with pytest.raises(ValueError, match=r"latents-00001\.npy holds \(2, 2, 4, 4\)"):
        open_dataset(out)
    content = json.loads(record.read_text())
    for text, message in (
        ("[" * 100_000, "not valid JSON"),
        ("{}", "does not describe latents"),
        (json.dumps({**content, "rows": -1}), "positive integers"),
    ):
        record.write_text(text)
        with pytest.raises(ValueError, match=message):
            open_dataset(out)


def test_scaling_of_one_number_and_of_channels() -> None:
    z = torch.randn(2, 2, 3, 3)
    one = LatentScaling.of({"scaling_factor": 0.5, "shift_factor": 0.25})
    torch.testing.assert_close(one.scale(z), (z - 0.25) * 0.5)
    mean, std = torch.tensor([1.0, -2.0])[:, None, None], torch.tensor([0.5, 4.0])[:, None, None]
    several = LatentScaling.of({"scaling_factor": 0.5, "latents_mean": [1, -2], "latents_std": [0.5, 4]})
    torch.testing.assert_close(several.scale(z), (z - mean) * 0.5 / std)
    for scaling in (one, several):
        torch.testing.assert_close(scaling.unscale(scaling.scale(z)), z)
    for wrong in ({"latents_mean": [1, 2]}, {"latents_mean": [1], "latents_std": [1], "shift_factor": 1}):
        with pytest.raises(ValueError, match="together"):
            LatentScaling.of(wrong)
    with pytest.raises(ValueError, match="finite"):
        LatentScaling.of({"scaling_factor": 0.0})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scaling_of_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    """The factor of Stable Diffusion in bfloat16 is 0.3 % off, and so were all latents."""
    scaling = LatentScaling.of({"scaling_factor": 0.18215, "shift_factor": 0.1159})
    z = torch.randn(64, 4, 2, 2, generator=torch.Generator().manual_seed(0)).to(dtype)
    once = {"rtol": 0.51 * torch.finfo(dtype).eps, "atol": 1e-6}
    torch.testing.assert_close(scaling.scale(z).double(), (z.double() - 0.1159) * 0.18215, **once)
    torch.testing.assert_close(scaling.unscale(z).double(), z.double() / 0.18215 + 0.1159, **once)


def test_decoder_takes_back_what_the_encoder_scales() -> None:
    model = tiny_vae(scaling_factor=0.7, shift_factor=0.3)
    images = torch.rand(3, 3, 8, 8) * 2 - 1
    with torch.no_grad():
        expected = model.decode(model.encode(images).latent_dist.mode()).sample
    decoded = LatentDecoder(model)(LatentEncoder(model)(images))
    torch.testing.assert_close(decoded, expected, atol=1e-5, rtol=1e-5)


def test_command_encodes_a_folder(pictures: Path, vae: Path, tmp_path: Path) -> None:
    command = ["encode", str(pictures), "--vae", str(vae), "--out", str(tmp_path / "out"), "--size", "4"]
    result = CliRunner().invoke(app, [*command, "--crop", "patch", "--channels", "RGB", "--batch-size", "9" * 20])
    assert result.exit_code == 0, result.output
    assert "7 latents 2x2x2, 2 classes" in result.output
    assert open_dataset(tmp_path / "out").sample_shape == (2, 2, 2)
