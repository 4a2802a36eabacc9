"""Networks that turn images into features; each knows its name, its weights and its resize rule."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from fixpoint_diffusion.evaluation.inception import NUM_FEATURES, InceptionV3
from fixpoint_diffusion.extras import needed_for
from fixpoint_diffusion.files import sha256_of
from fixpoint_diffusion.sampling.grids import to_pixels


class FeatureExtractor(nn.Module):
    """A module from images ``(N, C, H, W)``, float32 in [-1, 1], to features ``(N, num_features)``.

    What it does to the images before its network (rounding to 8 bits, resizing, another range) is its own affair, and
    said in ``preparation``. Subclasses define ``forward``. The metrics of torchmetrics take one as ``feature``.

    Attributes:
        name: what reports call it.
        num_features: d.
        weights_hash: SHA-256 of its weights, 64 hexadecimal digits; None if it has none that could be read.
        preparation: the resize rule, rounding, and the range that the network sees, in words.

    Example:
        See :class:`fixpoint_diffusion.evaluation.ModuleFeatures`, which makes one of any module.
    """

    def __init__(self, *, name: str, num_features: int, weights_hash: str | None, preparation: str) -> None:
        super().__init__()
        self.name = name
        self.num_features = num_features
        self.weights_hash = weights_hash
        self.preparation = preparation

    @property
    def label(self) -> str:
        """Name, preparation and hash in one line: two sets of features can be compared if theirs are equal."""
        return f"{self.name}; {self.preparation}; sha256 {self.weights_hash or 'unknown'}"


class ModuleFeatures(FeatureExtractor):
    """Features of any module or function ``(N, C, H, W) -> (N, d)``.

    Args:
        module: called in evaluation mode, without gradients.
        name: what reports call it.
        num_features: d.
        input_range: the range of values that it takes; with (0, 255) they are rounded to whole numbers.
        size: images are resized to this height and width (bicubic, antialiased); None: taken as they are.

    >>> pixels = ModuleFeatures(lambda images: images.flatten(1), name="pixels", num_features=64)
    >>> pixels(torch.zeros(3, 1, 8, 8)).shape
    torch.Size([3, 64])
    """

    def __init__(
        self,
        module: Callable[[Tensor], Tensor],
        *,
        name: str,
        num_features: int,
        input_range: tuple[float, float] = (-1, 1),
        size: int | None = None,
    ) -> None:
        low, high = input_range
        resize = "no resizing" if size is None else f"bicubic with antialiasing to {size}x{size}"
        super().__init__(
            name=name,
            num_features=num_features,
            weights_hash=state_hash(module.state_dict()) if isinstance(module, nn.Module) else None,
            preparation=f"{resize}; values {low:g}..{high:g}",
        )
        self.module = module
        self.input_range = input_range
        self.size = size

    def forward(self, images: Tensor) -> Tensor:
        if self.size is not None:
            images = _bicubic(images, self.size).clamp(-1, 1)
        low, high = self.input_range
        if (low, high) == (0, 255):
            return self.module(to_pixels(images).float())
        return self.module(images * ((high - low) / 2) + (high + low) / 2)


class InceptionFeatures(FeatureExtractor):
    """The 2048 features of the Frechet inception distance, with weights from a local file.

    Images are rounded to 8 bits, as an image file holds them; grey images are repeated in three channels. Then:

    - ``resize="bilinear"``: to 299x299 without antialiasing, values ``x / 127.5 - 1``: the rule of pytorch-fid.
    - ``resize="clean"``: bicubic with antialiasing, clipped, values ``(x - 128) / 128``: the rule of clean-fid.

    Distances by different rules cannot be compared.

    Args:
        weights: the usual PyTorch port of TensorFlow's weights, ``pt_inception-2015-12-05-*.pth``, or the same tensors
            in safetensors.
        resize: one of the rules.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it holds other tensors.

    Example:
        See :class:`fixpoint_diffusion.evaluation.DigitFeatures`, which is used alike and needs no file.
    """

    def __init__(self, weights: str | Path, *, resize: str = "bilinear") -> None:
        if resize not in ("bilinear", "clean"):
            raise ValueError(f"resize must be 'bilinear' or 'clean', got {resize!r}")
        rules = {
            "bilinear": "8 bits, bilinear without antialiasing to 299x299, values x / 127.5 - 1 (pytorch-fid)",
            "clean": "8 bits, bicubic with antialiasing to 299x299, values (x - 128) / 128 (clean-fid)",
        }
        path = Path(weights)
        state = _read_state(path)
        super().__init__(
            name="inception-2015-12-05",
            num_features=NUM_FEATURES,
            weights_hash=sha256_of(path),
            preparation=rules[resize],
        )
        self.resize = resize
        with torch.device("meta"):
            self.network = InceptionV3()
        _check_state(state, self.network, path)
        self.network.load_state_dict(state, assign=True)
        self.network.float().eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        pixels = _three_channels(to_pixels(images).float(), self.name)
        if self.resize == "clean":
            return self.network((_bicubic(pixels, 299).clamp(0, 255) - 128) / 128)
        resized = interpolate(pixels, size=(299, 299), mode="bilinear", align_corners=False)
        return self.network(resized / 127.5 - 1)


class DINOv2Features(FeatureExtractor):
    """The class token of a DINOv2 network from a local folder of transformers.

    Images are rounded to 8 bits, grey ones repeated in three channels, resized to 224x224 (bicubic with antialiasing)
    and normalised by ImageNet's mean and standard deviation. Its Frechet distance agrees better with people than
    Inception's.

    Args:
        folder: a model folder with ``config.json`` and safetensors weights.

    Raises:
        OSError: if there is no such folder, or no weights in it.
        ValueError: if it holds another kind of model.

    Source: Stein et al., "Exposing flaws of generative model evaluation metrics..." (NeurIPS 2023).

    Example:
        See :class:`fixpoint_diffusion.evaluation.DigitFeatures`, which is used alike and needs no file.
    """

    def __init__(self, folder: str | Path) -> None:
        path = Path(folder)
        if not (path / "config.json").is_file():
            raise FileNotFoundError(f"{path} is no model folder of transformers: it has no config.json")
        with needed_for("DINOv2", extra="pipelines"):
            from transformers import AutoConfig, AutoModel

        config = AutoConfig.from_pretrained(path, local_files_only=True)
        if config.model_type not in ("dinov2", "dinov2_with_registers"):
            raise ValueError(f"{path} holds a model of type {config.model_type}; expected dinov2")
        network, loading = AutoModel.from_pretrained(
            path, local_files_only=True, use_safetensors=True, output_loading_info=True, dtype=torch.float32
        )
        if loading["missing_keys"]:
            missing = sorted(loading["missing_keys"])
            raise ValueError(f"{path} lacks {len(missing)} tensors of its model, the first {missing[0]}")
        super().__init__(
            name=f"dinov2-{config.hidden_size}",
            num_features=config.hidden_size,
            weights_hash=state_hash(network.state_dict()),
            preparation="8 bits, bicubic with antialiasing to 224x224, ImageNet's mean and deviation",
        )
        self.network = network.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        pixels = _bicubic(_three_channels(to_pixels(images).float(), self.name), 224).clamp(0, 255) / 255
        mean, std = pixels.new_tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
        return self.network(pixel_values=(pixels - mean) / std).last_hidden_state[:, 0]


def state_hash(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over the names, shapes, dtypes and values of a state dict, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().to("cpu").contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _read_state(path: Path) -> dict[str, Tensor]:
    with needed_for("reading weights"):
        from safetensors import SafetensorError
        from safetensors.torch import load_file

    if not path.is_file():
        raise FileNotFoundError(f"no weights file {path}; how to get one is in the documentation (Evaluation)")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # torch's own message tells how to run whatever the file holds
        raise ValueError(f"{path} is no file of weights: it is no pickle of tensors alone") from error
    except (RuntimeError, EOFError, ValueError, KeyError, SafetensorError) as error:
        raise ValueError(f"{path} is no file of weights: {str(error).splitlines()[0][:200]}") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} holds a {type(state).__name__}; expected a dictionary of tensors")
    return state


def _check_state(state: Mapping[str, Tensor], network: nn.Module, path: Path) -> None:
    expected = network.state_dict()
    counters = {name for name in expected if name.endswith("num_batches_tracked")}  # the usual file has none
    missing = sorted(expected.keys() - counters - state.keys())
    unknown = sorted(state.keys() - expected.keys())
    wrong = [name for name in expected if name in state and state[name].shape != expected[name].shape]
    broken = [name for name, tensor in state.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    for names, what in (
        (missing, "lacks"),
        (unknown, "has unknown"),
        (wrong, "has in other shapes"),
        (broken, "has with infinities or NaNs"),
    ):
        if names:
            raise ValueError(f"{path} {what} {len(names)} of Inception's tensors, the first {names[0]}")


def _three_channels(pixels: Tensor, name: str) -> Tensor:
    if pixels.shape[1] not in (1, 3):
        raise ValueError(f"{name} takes grey or RGB images (N, 1 or 3, H, W), got {tuple(pixels.shape)}")
    return pixels.expand(-1, 3, -1, -1)


def _bicubic(images: Tensor, size: int) -> Tensor:
    """What Pillow does on each channel in floats."""
    return interpolate(images, size=(size, size), mode="bicubic", align_corners=False, antialias=True)
