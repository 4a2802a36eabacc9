"""``open_dataset``: one way to pictures, arrays and latents."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fixpoint_diffusion.files import check_source, map_array
from fixpoint_diffusion.training.data.crops import Crop
from fixpoint_diffusion.training.data.dataset import ImageDataset
from fixpoint_diffusion.training.data.folders import scan_folder
from fixpoint_diffusion.training.data.labelled import LabelledImages, load_digits
from fixpoint_diffusion.training.data.latents import INFO_FILE, LABELS_FILE, LatentsInfo
from fixpoint_diffusion.training.data.pictures import CHANNELS, PictureHeader, read_header
from fixpoint_diffusion.training.data.rows import ArrayRows, PictureRows, TensorRows, natural_channels


def open_dataset(
    source: str | Path | LabelledImages,
    *,
    channels: str | None = None,
    size: int | tuple[int, int] | None = None,
    crop: str = "center",
    flip: bool = False,
    labels: bool = True,
    latents: bool = False,
    seed: int = 0,
) -> ImageDataset:
    """Open images or latents as a torch ``Dataset``; files are looked at now and read when a row is asked for.

    Args:
        source: one of

            - a folder of pictures in any format and mode that Pillow opens; where they lie in subfolders, each
              subfolder is a class;
            - a ``.npy`` file of images ``(N, C, H, W)``, uint8 (0..255), uint16 (0..65535) or floats in [-1, 1]; or a
              folder with one such file, and with classes ``(N,)`` in a ``labels.npy`` if wanted;
            - a folder that ``fixpoint-diffusion encode`` wrote;
            - ``"digits"``, scikit-learn's; or images in memory.
        channels: ``"L"`` (grey), ``"LA"``, ``"RGB"`` or ``"RGBA"``. Where opacity is given up, colours are laid over
            white. None: as the files have it, if all agree and none has opacity.
        size: height and width of the images, one number for a square; None: all must have one size already.
        crop: how ``size`` is reached: ``"center"`` scales until the image just covers it, and cuts the middle;
            ``"random"`` scales alike and cuts at a random place; ``"patch"`` cuts at a random place without scaling.
        flip: mirror left and right in half of the draws.
        labels: False: leave out labels; subfolders are then no classes.
        latents: the ``.npy`` file holds latents: floats of any shape ``(N, ...)`` and range.
        seed: of random places and flips.

    Returns:
        An ``ImageDataset``, whose rows are ``{"images": float32 in [-1, 1], "labels": int}``.

    Raises:
        FileNotFoundError: if there is no such data set, file or folder.
        ValueError: if the files do not make one data set; the message names the file and says what would.

    >>> digits = open_dataset("digits", size=16)
    >>> digits.sample_shape, digits.num_classes, sorted(digits[3])
    ((1, 16, 16), 10, ['images', 'labels'])
    """
    if channels is not None and channels not in CHANNELS:
        raise ValueError(f"channels must be one of {', '.join(CHANNELS)}, got {channels!r}")
    cut = Crop(size=(size, size) if isinstance(size, int) else size, place=crop, flip=flip, seed=seed)
    if isinstance(source, LabelledImages) or str(source) == "digits":
        return _from_memory(source if isinstance(source, LabelledImages) else load_digits(), channels, cut, labels)
    check_source(source)
    path = Path(source)
    encoded = (path / INFO_FILE).is_file()
    if latents or encoded:
        if channels is not None or cut.size is not None or flip:
            raise ValueError(f"{path}: latents are taken as they are; channels, size, crop and flip are for images")
        return _from_encoded(path, labels) if encoded else _from_arrays(path, None, cut, labels, latent=True)
    if path.is_file() or any(path.glob("*.npy")):
        return _from_arrays(path, channels, cut, labels, latent=False)
    return _from_pictures(path, channels, cut, labels)


def _from_memory(data: LabelledImages, channels: str | None, cut: Crop, labels: bool) -> ImageDataset:
    count, *size = data.images.shape[1:]
    if count > 4:
        raise ValueError(f"the images have {count} channels; expected 1 to 4")
    chosen = channels or natural_channels(count)
    cut.check(size[0], size[1], "the first image")
    classes = data.labels if labels else None
    return ImageDataset(
        TensorRows(data.images, chosen),
        sample_shape=(CHANNELS[chosen], *(cut.size or size)),
        crop=cut,
        labels=classes,
        num_classes=None if classes is None else int(classes.max()) + 1,
    )


def _from_pictures(folder: Path, channels: str | None, cut: Crop, labels: bool) -> ImageDataset:
    found = scan_folder(folder, labels=labels)
    first: PictureHeader | None = None
    for file in found.files:
        header = read_header(file)
        first = first or header
        if channels is None:
            _check_natural(header, file, first, found.files[0])
        if cut.size is None and (header.height, header.width) != (first.height, first.width):
            raise ValueError(
                f"{file} is {header.height}x{header.width}, {found.files[0]} is {first.height}x{first.width}: "
                f"give a size (--size), to which all are cut"
            )
        cut.check(header.height, header.width, str(file))
    assert first is not None  # scan_folder refuses an empty folder
    chosen = channels or first.channels
    return ImageDataset(
        PictureRows(folder, found.files, chosen),
        sample_shape=(CHANNELS[chosen], *(cut.size or (first.height, first.width))),
        crop=cut,
        labels=None if found.labels is None else torch.tensor(found.labels, device="cpu"),
        num_classes=None if found.class_names is None else len(found.class_names),
        class_names=found.class_names,
    )


def _check_natural(header: PictureHeader, file: Path, first: PictureHeader, first_file: Path) -> None:
    if header.channels.endswith("A"):
        raise ValueError(
            f"{file} has transparency: choose the channels (--channels), {header.channels[:-1]!r} (laid over white) or "
            f"{header.channels!r} (with opacity)"
        )
    if header.channels != first.channels:
        raise ValueError(
            f"{file} has the channels {header.channels!r}, {first_file} has {first.channels!r}: choose the channels "
            f"(--channels), 'L' (grey) or 'RGB'"
        )


def _from_arrays(path: Path, channels: str | None, cut: Crop, labels: bool, *, latent: bool) -> ImageDataset:
    """A ``.npy`` file, or a folder of one, with ``labels.npy`` beside it where there is one."""
    if path.is_file() and path.suffix != ".npy":
        raise ValueError(f"{path} is no .npy file; pictures are opened by their folder")
    arrays = [path] if path.is_file() else sorted(p for p in path.glob("*.npy") if p.name != LABELS_FILE)
    if path.is_dir():
        others = [p.name for p in path.iterdir() if p.suffix != ".npy" and not p.name.startswith(".")]
        if len(arrays) != 1 or others:
            raise ValueError(
                f"{path} holds {len(arrays)} .npy files of data and {len(others)} others {sorted(others)[:3]}; "
                f"expected one .npy file, with a {LABELS_FILE} or without, or pictures only"
            )
    if latent:
        rows, chosen = ArrayRows(arrays, None), None
    else:
        shape = map_array(arrays[0]).shape
        if channels is None and len(shape) == 4 and shape[1] in (2, 4):
            natural = natural_channels(shape[1])
            raise ValueError(
                f"{arrays[0]} has {shape[1]} channels: choose {natural!r} (with opacity) or {natural[:-1]!r} (laid "
                f"over white) by --channels, or open it as --latents; channels stand before height and width"
            )
        chosen = channels or natural_channels(shape[1] if len(shape) == 4 and 1 <= shape[1] <= 4 else 1)
        rows = ArrayRows(arrays, chosen)
    sample_shape = rows.arrays[0].shape[1:]
    if chosen is not None:
        cut.check(sample_shape[1], sample_shape[2], str(arrays[0]))
        sample_shape = (CHANNELS[chosen], *(cut.size or sample_shape[1:]))
    beside = arrays[0].parent / LABELS_FILE
    classes = _read_labels(beside, len(rows)) if labels and path.is_dir() and beside.is_file() else None
    return ImageDataset(
        rows,
        sample_shape=sample_shape,
        crop=cut,
        labels=classes,
        num_classes=None if classes is None else int(classes.max()) + 1,
        is_latent=latent,
    )


def _from_encoded(folder: Path, labels: bool) -> ImageDataset:
    """What ``fixpoint-diffusion encode`` wrote."""
    info = LatentsInfo.load(folder)
    shards = info.shards(folder)
    missing = sum(not file.is_file() for file, _ in shards)
    if missing:
        raise ValueError(f"{folder}: {missing} of {len(shards)} shards are missing; run the same encode command again")
    rows = ArrayRows([file for file, _ in shards], None)
    for (file, count), array in zip(shards, rows.arrays, strict=True):
        if array.shape != (count, *info.sample_shape):
            raise ValueError(f"{file} holds {array.shape}; {INFO_FILE} says {(count, *info.sample_shape)}")
    classes = None
    if labels and info.num_classes is not None:
        classes = _read_labels(folder / LABELS_FILE, len(rows))
    return ImageDataset(
        rows,
        sample_shape=tuple(info.sample_shape),
        crop=Crop(),
        labels=classes,
        num_classes=None if classes is None else info.num_classes,
        class_names=None if classes is None or info.class_names is None else tuple(info.class_names),
        is_latent=True,
    )


def _read_labels(file: Path, count: int) -> Tensor:
    if not file.is_file():
        raise FileNotFoundError(f"no {file}")
    array = np.array(map_array(file))
    if array.shape != (count,) or array.dtype.kind not in "iu" or array.min() < 0:
        raise ValueError(f"{file} holds {array.dtype} {array.shape}; expected {count} class numbers from 0")
    return torch.from_numpy(array.astype(np.int64))
