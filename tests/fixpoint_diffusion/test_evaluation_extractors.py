"""Feature extractors: what they compute, what they say of themselves, and which files they refuse."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from fixpoint_diffusion.evaluation import (
    DigitFeatures,
    DINOv2Features,
    FeatureExtractor,
    InceptionFeatures,
    ModuleFeatures,
)
from fixpoint_diffusion.evaluation.extractors import state_hash
from fixpoint_diffusion.evaluation.images import to_uint8
from fixpoint_diffusion.evaluation.inception import InceptionV3
from fixpoint_diffusion.training.data import load_digits

# The 94 convolutions of the usual PyTorch port and their shapes.
CONVOLUTIONS = {
    name: tuple(map(int, shape.split("x")))
    for name, shape in map(str.split, (Path(__file__).parent / "inception_names.txt").read_text().splitlines())
}


def scrambled(count: int) -> Tensor:
    """Numbers in [0, 1] without a pattern and without a generator, the same everywhere."""
    bits = ((torch.arange(count) * 40503 + 1) * 2246822519) & 0xFFFFFFFF
    bits = ((bits ^ (bits >> 15)) * 40503) & 0xFFFFFFFF
    return ((bits ^ (bits >> 13)) & 0xFFFF).double() / 0xFFFF


@pytest.fixture(scope="module")
def inception_state() -> dict[str, Tensor]:
    numbers = scrambled(2**21)

    def between(low: float, high: float, shape: tuple[int, ...], number: int) -> Tensor:
        some = numbers[997 * number : 997 * number + int(np.prod(shape))]
        return (low + (high - low) * some).reshape(shape).float()

    state = {"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}
    for number, (name, shape) in enumerate(CONVOLUTIONS.items()):
        width = (6 / np.prod(shape[1:])) ** 0.5
        state[f"{name}.conv.weight"] = between(-width, width, shape, number)
        limits = {"weight": (0.5, 1.5), "bias": (-0.5, 0.5), "running_mean": (-0.5, 0.5), "running_var": (0.5, 1.5)}
        for kind, (low, high) in limits.items():
            state[f"{name}.bn.{kind}"] = between(low, high, shape[:1], number)
    return state


@pytest.fixture(scope="module")
def inception_file(inception_state: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(inception_state, path)
    return path


def test_inception_has_the_names_and_shapes_of_the_usual_port(inception_state: dict[str, Tensor]) -> None:
    with torch.device("meta"):
        state = InceptionV3().state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items() if "num_batches" not in name}
    assert shapes == {name: tuple(tensor.shape) for name, tensor in inception_state.items()}
    assert sum(int(np.prod(shape)) for name, shape in shapes.items() if "running" not in name) == 23_850_960


def test_inception_computes_what_the_usual_port_computes(inception_file: Path) -> None:
    """The figures are those of torch-fidelity 0.4.0's network with these weights and images."""
    n = torch.arange(2 * 3 * 299 * 299)
    pixels = ((n * 7919) % 256).to(torch.uint8).reshape(2, 3, 299, 299)
    pixels[1] = (torch.arange(299) % 256).to(torch.uint8)
    extractor = InceptionFeatures(inception_file, resize="clean")
    with torch.no_grad():
        features = extractor(pixels.float() / 127.5 - 1)
    assert features.shape == (2, 2048)
    assert features.dtype == torch.float32
    expected = torch.tensor([[0.0, 0.371424, 0.025137, 0.009567, 0.012573], [0.0, 0.091776, 0.0, 0.0138, 0.000739]])
    torch.testing.assert_close(features[:, 500:2000:300], expected, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(features.mean(1), torch.tensor([0.4045458, 0.0787854]), rtol=1e-4, atol=0)


def test_inception_reads_safetensors_and_reports_the_hash_of_the_file(
    inception_state: dict[str, Tensor], inception_file: Path, tmp_path: Path
) -> None:
    save_file(inception_state, tmp_path / "x.safetensors")
    one, other = InceptionFeatures(inception_file), InceptionFeatures(tmp_path / "x.safetensors")
    assert one.weights_hash == hashlib.sha256(inception_file.read_bytes()).hexdigest()
    assert state_hash(one.network.state_dict()) == state_hash(other.network.state_dict())
    assert not one.network.training
    assert one.label != InceptionFeatures(inception_file, resize="clean").label


class Seen(nn.Module):
    """Stands in for a network, and hands back what it is given."""

    def forward(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize("size", [32, 400])
@pytest.mark.parametrize("channels", [1, 3])
def test_inception_prepares_images_as_the_standard_tools_do(inception_file: Path, size: int, channels: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (1, channels, size, size), dtype=np.uint8)
    images = torch.from_numpy(pixels).float() / 127.5 - 1
    images = images + 0.3 / 127.5  # rounding to 8 bits undoes it
    rgb = np.broadcast_to(pixels, (1, 3, size, size))

    clean = InceptionFeatures(inception_file, resize="clean")
    clean.network = Seen()
    by_pillow = [
        np.asarray(Image.fromarray(each.astype(np.float32)).resize((299, 299), Image.Resampling.BICUBIC))
        for each in rgb[0]
    ]
    expected = (np.stack(by_pillow).clip(0, 255) - 128) / 128
    np.testing.assert_allclose(clean(images)[0], expected, atol=1e-4)

    bilinear = InceptionFeatures(inception_file)
    bilinear.network = Seen()
    unit = torch.from_numpy(rgb.copy()).float() / 255
    expected_bilinear = 2 * nn.functional.interpolate(unit, (299, 299), mode="bilinear", align_corners=False) - 1
    torch.testing.assert_close(bilinear(images), expected_bilinear, rtol=0, atol=1e-5)
    assert (bilinear(images) - clean(images)).abs().max() > 0.1


def without(name: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda state: {key: value for key, value in state.items() if key != name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("Mixed_7c.branch_pool.bn.bias"), "lacks 1 of Inception's tensors, the first Mixed_7c.branch_pool.bn"),
        (lambda state: state | {"AuxLogits.fc.bias": torch.zeros(2)}, "unknown 1 .* AuxLogits.fc.bias"),
        (lambda state: state | {"fc.bias": torch.zeros(1000)}, "other shapes 1 .* fc.bias"),
        (lambda state: state | {"fc.bias": torch.full((1008,), torch.nan)}, "infinities or NaNs 1 .* fc.bias"),
        (lambda state: [1, 2], "holds a list"),
        (lambda state: {"epoch": 3}, "holds a dict; expected a dictionary of tensors"),
    ],
)
def test_other_weights_are_refused(
    inception_state: dict[str, Tensor],
    tmp_path: Path,
    change: Callable[[dict[str, Tensor]], object],
    message: str,
) -> None:
    torch.save(change(inception_state), tmp_path / "x.pth")
    with pytest.raises(ValueError, match=message) as caught:
        InceptionFeatures(tmp_path / "x.pth")
    assert "\n" not in str(caught.value)


def test_files_that_hold_no_weights_are_refused(tmp_path: Path) -> None:
    for name in ("x.pth", "x.safetensors"):
        (tmp_path / name).write_bytes(b"not weights at all")
        with pytest.raises(ValueError, match="is no file of weights") as caught:
            InceptionFeatures(tmp_path / name)
        assert "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match="no weights file"):
        InceptionFeatures(tmp_path / "absent.pth")


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path) -> None:
    torch.save({"fc.bias": Path("harmless")}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match="is no file of weights"):
        InceptionFeatures(tmp_path / "x.pth")


def test_an_unknown_resize_rule_is_refused(inception_file: Path) -> None:
    with pytest.raises(ValueError, match="'bilinear' or 'clean', got 'bicubic'"):
        InceptionFeatures(inception_file, resize="bicubic")


def test_latents_are_no_images(inception_file: Path) -> None:
    with pytest.raises(ValueError, match="grey or RGB"):
        InceptionFeatures(inception_file)(torch.zeros(1, 4, 8, 8))


@pytest.fixture(scope="module")
def dinov2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import Dinov2Config, Dinov2Model

    folder = tmp_path_factory.mktemp("dinov2")
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=8, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14, mlp_ratio=2
    )
    Dinov2Model(config).save_pretrained(folder)
    return folder


def test_dinov2_gives_the_class_token_of_normalised_images(dinov2_folder: Path) -> None:
    from transformers import Dinov2Model

    extractor = DINOv2Features(dinov2_folder)
    assert (extractor.name, extractor.num_features) == ("dinov2-8", 8)
    assert extractor.weights_hash == state_hash(Dinov2Model.from_pretrained(dinov2_folder).state_dict())
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    inputs = []
    for each in pixels:
        channels = [Image.fromarray(each[..., c].astype(np.float32)) for c in range(3)]
        resized = np.stack([np.asarray(c.resize((224, 224), Image.Resampling.BICUBIC)) for c in channels])
        inputs.append((resized.clip(0, 255).transpose(1, 2, 0) / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225])
    values = torch.from_numpy(np.stack(inputs)).permute(0, 3, 1, 2).float()
    with torch.no_grad():
        expected = Dinov2Model.from_pretrained(dinov2_folder).eval()(pixel_values=values).pooler_output
        found = extractor(torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_other_folders_are_no_dinov2(tmp_path: Path, dinov2_folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        DINOv2Features(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(ValueError, match="of type vit; expected dinov2"):
        DINOv2Features(tmp_path)
    (tmp_path / "config.json").write_text((dinov2_folder / "config.json").read_text())
    with pytest.raises(OSError, match=r"model\.safetensors"):
        DINOv2Features(tmp_path)
    from safetensors.torch import load_file

    state = load_file(dinov2_folder / "model.safetensors")
    state.pop("layernorm.weight")
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 tensors of its model, the first layernorm\.weight"):
        DINOv2Features(tmp_path)


@pytest.mark.parametrize("input_range", [(-1, 1), (0, 1), (0, 255)])
def test_a_module_gets_the_range_that_it_takes(input_range: tuple[float, float]) -> None:
    images = torch.tensor([-1.0, -0.201, 0.0, 1.0]).reshape(1, 1, 2, 2)
    extractor = ModuleFeatures(Seen(), name="seen", num_features=4, input_range=input_range)
    low, high = input_range
    expected = to_uint8(images).float() if high == 255 else low + (images + 1) / 2 * (high - low)
    torch.testing.assert_close(extractor(images), expected)


def test_a_module_gets_the_size_that_it_takes() -> None:
    extractor = ModuleFeatures(Seen(), name="seen", num_features=4, size=12)
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    assert extractor(images).shape == (2, 3, 12, 12)
    assert extractor(images).abs().max() <= 1
    assert "12x12" in extractor.preparation


def test_labels_tell_weights_and_preparation_apart() -> None:
    def make(layer: nn.Module, **options: object) -> FeatureExtractor:
        return ModuleFeatures(layer, name="linear", num_features=2, **options)

    layer, other = nn.Linear(2, 2), nn.Linear(2, 2)
    labels = [make(layer).label, make(other).label, make(layer, size=3).label, make(layer, input_range=(0, 1)).label]
    assert len(set(labels)) == 4
    assert make(layer).label == labels[0]
    assert ModuleFeatures(torch.sin, name="sine", num_features=2).weights_hash is None


def test_torchmetrics_takes_an_extractor_of_ours() -> None:
    from torchmetrics.image.fid import FrechetInceptionDistance

    images = load_digits().images[:300]
    metric = FrechetInceptionDistance(feature=DigitFeatures())
    metric.update(images, real=True)
    metric.update(-images, real=False)
    assert float(metric.compute()) > 0
