"""Images to train and to judge by: scikit-learn's 8x8 digits, or the user's own folder."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")


@dataclass(frozen=True, kw_only=True)
class LabelledImages:
    """Images ``(N, C, H, W)``, float32 in [-1, 1], and their integer labels ``(N,)`` where known."""

    images: Tensor
    labels: Tensor | None = None

    def __post_init__(self) -> None:
        if self.images.ndim != 4 or not self.images.is_floating_point():
            raise ValueError(
                f"images must be a float tensor (N, C, H, W), got {self.images.dtype} {tuple(self.images.shape)}"
            )
        if self.labels is not None and self.labels.shape != self.images.shape[:1]:
            raise ValueError(f"{len(self.images)} images need labels of that length, got {tuple(self.labels.shape)}")

    def __len__(self) -> int:
        return len(self.images)


def load_digits() -> LabelledImages:
    """The 1797 handwritten digits that come with scikit-learn, grey values 0..16 mapped to [-1, 1].

    Returns:
        Images ``(1797, 1, 8, 8)`` in float32 and labels 0..9. Nothing is downloaded.

    Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI repository, 1998 (test part).

    >>> digits = load_digits()
    >>> tuple(digits.images.shape), float(digits.images.min()), float(digits.images.max())
    ((1797, 1, 8, 8), -1.0, 1.0)
    """
    try:
        from sklearn.datasets import load_digits as load
    except ImportError as error:
        raise ImportError("the digits come with scikit-learn: pip install 'fixpoint[diffusion]'") from error

    bunch = load()
    images = torch.from_numpy(bunch.images).to(torch.float32).div(8).sub(1).unsqueeze(1)
    return LabelledImages(images=images, labels=torch.from_numpy(bunch.target).to(torch.int64))


def split_held_out(
    data: LabelledImages, *, fraction: float = 0.2, seed: int = 0
) -> tuple[LabelledImages, LabelledImages]:
    """Cut a set into a part to train on and a part never trained on, each label in its proportion.

    The same set, fraction and seed always give the same two parts; images keep their order in both.

    Args:
        data: the images; without labels they count as one class.
        fraction: the share that is held out, 0 < fraction < 1; at least one image of every label stays on each side.
        seed: which images are held out.

    Returns:
        ``(train, held_out)``.

    Raises:
        ValueError: if the fraction is out of range, or a label has a single image.

    >>> train, held_out = split_held_out(load_digits())
    >>> len(train), len(held_out)
    (1438, 359)
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction must lie between 0 and 1, got {fraction}")
    labels = np.zeros(len(data), dtype=np.int64) if data.labels is None else data.labels.numpy()
    rng = np.random.default_rng(seed)
    held_out = np.zeros(len(data), dtype=bool)
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        if len(members) < 2:
            raise ValueError(f"label {label} has one image; a split needs at least two of each label")
        count = min(max(round(fraction * len(members)), 1), len(members) - 1)
        held_out[members[:count]] = True
    return _subset(data, ~held_out), _subset(data, held_out)


def load_images(source: str | Path) -> LabelledImages:
    """Images by the name of a data set ("digits"), from a ``.npy`` file, or from a folder of images.

    Args:
        source: ``"digits"``; or a ``.npy`` file that holds ``(N, C, H, W)``, either uint8 (0..255) or float in [-1, 1];
            or a folder with one such file, or with image files of one size and one colour mode (grey or RGB).

    Raises:
        FileNotFoundError: if there is no such data set, file or folder.
        ValueError: if what is there does not make one array of images in range.
    """
    if str(source) == "digits":
        return load_digits()
    path = Path(source)
    if path.is_file() and path.suffix == ".npy":
        return LabelledImages(images=_read_npy(path))
    if not path.is_dir():
        raise FileNotFoundError(f"no data set, .npy file or folder {str(source)!r}; the built-in set is 'digits'")
    arrays = sorted(path.glob("*.npy"))
    files = sorted((p for p in path.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES), key=_natural_order)
    if len(arrays) == 1 and not files:
        return LabelledImages(images=_read_npy(arrays[0]))
    if arrays or not files:
        raise ValueError(
            f"{path} holds {len(arrays)} .npy and {len(files)} image files; "
            f"expected one .npy file (N, C, H, W), or images only ({', '.join(IMAGE_SUFFIXES)})"
        )
    return LabelledImages(images=_read_pictures(files))


def _subset(data: LabelledImages, mask: np.ndarray) -> LabelledImages:
    index = torch.from_numpy(np.flatnonzero(mask))
    return LabelledImages(images=data.images[index], labels=None if data.labels is None else data.labels[index])


def _natural_order(path: Path) -> list[tuple[int, str]]:
    """``2.png`` before ``10.png``."""
    return [(int(part or 0), text) for text, part in re.findall(r"(\D+)|(\d+)", path.name)]


def _read_npy(path: Path) -> Tensor:
    array = np.load(path, allow_pickle=False)
    if array.ndim != 4 or array.shape[1] not in (1, 3, 4):
        raise ValueError(f"{path} holds an array of shape {array.shape}; expected (N, C, H, W) with C 1, 3 or 4")
    return _to_unit_range(array, path)


def _read_pictures(files: list[Path]) -> Tensor:
    from PIL import Image

    pictures = []
    for file in files:
        with Image.open(file) as image:
            pictures.append(np.asarray(image if image.mode in ("L", "RGB") else image.convert("RGB")))
        if pictures[-1].shape != pictures[0].shape:
            raise ValueError(f"{file} is {pictures[-1].shape}, {files[0]} is {pictures[0].shape}; all must be alike")
    array = np.stack(pictures)
    return _to_unit_range(array[:, None] if array.ndim == 3 else array.transpose(0, 3, 1, 2), files[0].parent)


def _to_unit_range(array: np.ndarray, path: Path) -> Tensor:
    if array.dtype == np.uint8:
        return torch.from_numpy(array.astype(np.float32)).div(127.5).sub(1)
    if not np.issubdtype(array.dtype, np.floating):
        raise ValueError(f"{path} holds {array.dtype}; expected uint8 (0..255) or floats in [-1, 1]")
    low, high = float(array.min()), float(array.max())
    if not (low >= -1 and high <= 1):  # also true of NaN
        raise ValueError(f"{path} holds values from {low:g} to {high:g}; floats must lie in [-1, 1]")
    return torch.from_numpy(array.astype(np.float32))
