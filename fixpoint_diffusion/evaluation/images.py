"""Sets of images to judge: a tensor, a folder, an array file or shards, read batch by batch in one stated range."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from fixpoint_diffusion.sampling.run_folder import IMAGES, RECORD, run_files
from fixpoint_diffusion.training.data import load_digits
from fixpoint_diffusion.training.data.folders import visible_files
from fixpoint_diffusion.training.data.pictures import picture_suffixes, read_header, read_picture

ARRAY_SUFFIXES = (".npy", ".npz")
VALUE_RANGES = ((-1, 1), (0, 1), (0, 255))
# What overshoots [-1, 1] so far is in another range, or a sample that has diverged.
_LIMIT = 10
_Read = Callable[[], Tensor]
_Range = tuple[float, float] | None


@dataclass(frozen=True)
class Images:
    """A set of images and the range of its values.

    Attributes:
        data: a tensor ``(N, C, H, W)``; or a path: a folder of pictures of any mode (subfolders included; opacity is
            laid over white), an array file (``.npy``, or ``.npz`` with one array of images), a folder of such files
            (shards), or a folder that ``fixpoint-diffusion sample`` wrote. Arrays are ``(N, C, H, W)`` or
            ``(N, H, W, C)`` with C 1 or 3. ``"digits"`` is scikit-learn's set.
        value_range: what the values of a tensor or an array mean: ``(-1, 1)``, ``(0, 1)`` or ``(0, 255)``. None:
            floats in [-1, 1], and refused if they look otherwise: no negative value among the first batch, or values
            beyond 10. Pictures say it themselves.

    Values slightly outside their range, as samplers make them, are clipped.

    Raises:
        ValueError: while reading, if the values are not finite, are in another range than stated, or a file holds
            something else than images.
        FileNotFoundError: if there is nothing at the path.

    >>> images = Images(torch.rand(5, 1, 8, 8), value_range=(0, 1))
    >>> [tuple(batch.shape) for batch in images.batches(2)]
    [(2, 1, 8, 8), (2, 1, 8, 8), (1, 1, 8, 8)]
    """

    data: Tensor | str | Path
    value_range: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if self.value_range is not None and tuple(self.value_range) not in VALUE_RANGES:
            raise ValueError(f"value_range must be one of {', '.join(map(str, VALUE_RANGES))}, got {self.value_range}")

    @property
    def name(self) -> str:
        """The path, or the shape of the tensor."""
        return f"tensor {tuple(self.data.shape)}" if isinstance(self.data, Tensor) else str(self.data)

    def batches(self, batch_size: int) -> Iterator[Tensor]:
        """The images in order, ``(n, C, H, W)`` float32 in [-1, 1] n at most ``batch_size``, of one size."""
        return (read() for _, read in self.parts(batch_size))

    def parts(self, batch_size: int) -> Iterator[tuple[int, Callable[[], Tensor]]]:
        """Of each of these batches, how many images it has, and what reads it, until the next is asked for."""
        for number, (count, raw, known_range) in enumerate(self._raw(batch_size)):
            if self.value_range is not None and known_range not in (None, tuple(self.value_range)):
                raise ValueError(f"{self.name} says its range of values itself: state none (--value-range)")

            def read(raw: _Read = raw, known: _Range = known_range, first: bool = number == 0) -> Tensor:
                batch, stated = raw(), known or self.value_range
                check_range(batch, stated, name=self.name, by_sight=first)
                return to_symmetric(batch, stated or (-1, 1), name=self.name)

            yield count, read

    def _raw(self, batch_size: int) -> Iterator[tuple[int, _Read, _Range]]:
        """Sizes of batches, what reads them ``(n, C, H, W)`` as stored, and their range where the format says it."""
        if isinstance(self.data, Tensor):
            if self.data.ndim != 4:
                raise ValueError(f"images must be (N, C, H, W), got {tuple(self.data.shape)}")
            yield from ((len(batch), partial(_same, batch), None) for batch in self.data.detach().split(batch_size))
        elif str(self.data) == "digits":
            digits = load_digits().images.split(batch_size)
            yield from ((len(batch), partial(_same, batch), (-1, 1)) for batch in digits)
        else:
            path = Path(self.data)
            pictures, arrays = _files(path)
            for file in arrays:
                yield from ((count, read, None) for count, read in _array_batches(file, batch_size))
            for batch in _picture_batches(pictures, batch_size):
                yield len(batch), partial(_read_pictures, batch), (-1, 1)


def check_range(images: Tensor, value_range: tuple[float, float] | None, *, name: str, by_sight: bool = True) -> None:
    """Refuse images that are not in the range in which they are said to be, or not in [-1, 1] where none is said.

    Args:
        images: any shape and dtype.
        value_range: the range that is said.
        name: what the message calls them.
        by_sight: judge by the values too, not by the dtype alone; a few images may be all black or all white.

    Raises:
        ValueError: with the range that was found and how to state it.
    """
    remedy = "state their range: Images(..., value_range=(0, 255) or (0, 1)), on the command line --value-range"
    if value_range is None and not images.is_floating_point():
        raise ValueError(f"{name} holds {images.dtype} values; expected floats in [-1, 1]; or {remedy}")
    if value_range is not None and tuple(value_range) != (0, 255) and not images.is_floating_point():
        raise ValueError(f"{name} holds {images.dtype} values, but value_range says {value_range}; expected (0, 255)")
    if not by_sight or not images.numel():
        return
    low, high = float(images.min()), float(images.max())
    if value_range is None and low >= 0:
        raise ValueError(f"{name} holds values from {low:g} to {high:g}, none negative; expected [-1, 1]; or {remedy}")
    if value_range is not None and tuple(value_range) == (0, 255) and images.is_floating_point() and high <= 1:
        raise ValueError(f"{name} holds values from {low:g} to {high:g}, but value_range says (0, 255)")
    # Samplers overshoot a little; images in [-1, 1] go all the way.
    if value_range is not None and value_range[0] == 0 and low < -0.5 * value_range[1]:
        raise ValueError(f"{name} holds values from {low:g} to {high:g}, but value_range says {tuple(value_range)}")


def to_symmetric(images: Tensor, value_range: tuple[float, float], *, name: str) -> Tensor:
    """Map images from ``value_range`` to float32 in [-1, 1], and clip what a sampler overshoots.

    Raises:
        ValueError: if values are not finite, or so far out that the range cannot be right.
    """
    low, high = value_range
    mapped = images.to(torch.float32) * (2 / (high - low)) - (high + low) / (high - low)
    if not bool(mapped.isfinite().all()):
        raise ValueError(f"{name}: images must be finite, got infinities or NaNs")
    if mapped.numel() and float(mapped.abs().max()) > _LIMIT:
        found = f"values from {float(images.min()):g} to {float(images.max()):g}"
        raise ValueError(
            f"{name} holds {found}; expected [{low:g}, {high:g}]; if they are samples, they may have diverged"
        )
    return mapped.clamp_(-1, 1)


def _files(path: Path) -> tuple[list[Path], list[Path]]:
    """Picture files and array files at a path, in natural order; of one kind only."""
    run = path.parent if path.name == IMAGES else path
    if (run / RECORD).is_file():  # beside its images a sampling run keeps a picture of some of them
        files = run_files(run)
    elif path.is_file():
        files = [path]
    elif path.is_dir():
        files = visible_files(path)
    else:
        raise FileNotFoundError(f"no images at {path}; expected a folder, an array file, a statistics file or digits")
    suffixes = picture_suffixes()
    pictures = [p for p in files if p.suffix.lower() in suffixes]
    arrays = [p for p in files if p.suffix.lower() in ARRAY_SUFFIXES]
    if bool(pictures) == bool(arrays):
        raise ValueError(
            f"{path} holds {len(pictures)} pictures and {len(arrays)} array files; "
            f"expected only pictures or only arrays ({', '.join(ARRAY_SUFFIXES)})"
        )
    return pictures, arrays


def _picture_batches(files: list[Path], batch_size: int) -> Iterator[list[tuple[Path, str]]]:
    """Batches of pictures, each a file and its channels without opacity; a new one begins where the size changes."""
    batch, size = list[tuple[Path, str]](), None
    for file in files:
        header = read_header(file)
        channels = header.channels.removesuffix("A")
        if batch and ((channels, header.height, header.width) != size or len(batch) == batch_size):
            yield batch
            batch = []
        batch.append((file, channels))
        size = (channels, header.height, header.width)
    if batch:
        yield batch


def _read_pictures(files: list[tuple[Path, str]]) -> Tensor:
    """``(n, C, H, W)`` in [-1, 1], grey or RGB as the files have it."""
    return torch.stack([torch.from_numpy(read_picture(file, channels)) for file, channels in files])


def _same(batch: Tensor) -> Tensor:
    return batch


def _array_batches(file: Path, batch_size: int) -> Iterator[tuple[int, _Read]]:
    """Sizes of batches of an array file and what reads them, channels first; no more than a batch is in memory."""
    try:
        if file.suffix.lower() == ".npz":
            with zipfile.ZipFile(file) as archive, archive.open(_image_member(archive, file)) as member:
                yield from _stream(member, file, batch_size)
        else:
            with file.open("rb") as stream:
                yield from _stream(stream, file, batch_size)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{file} is damaged: {error}") from error


def _image_member(archive: zipfile.ZipFile, file: Path) -> str:
    names = [name for name in archive.namelist() if name.endswith(".npy")]
    chosen = names if len(names) == 1 else [name for name in names if name in ("images.npy", "arr_0.npy")]
    if len(chosen) != 1:
        found = ", ".join(name.removesuffix(".npy") for name in names) or "nothing"
        raise ValueError(f"{file} holds {found}; expected one array, or one named images or arr_0")
    return chosen[0]


def _stream(stream: IO[bytes], file: Path, batch_size: int) -> Iterator[tuple[int, _Read]]:
    try:
        version = np.lib.format.read_magic(stream)
        read: Any = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(stream)
    except ValueError as error:
        raise ValueError(f"{file} is not an array of NumPy: {error}") from error
    channels_last = len(shape) == 4 and shape[3] in (1, 3) and shape[1] not in (1, 3)
    if len(shape) != 4 or not (channels_last or shape[1] in (1, 3)) or fortran:
        order = " in Fortran order" if fortran else ""
        raise ValueError(f"{file} holds an array {shape}{order}; expected (N, C, H, W) or (N, H, W, C) with C 1 or 3")
    if dtype != np.uint8 and not np.issubdtype(dtype, np.floating):
        raise ValueError(f"{file} holds {dtype}; expected uint8 or floats")
    row, begin = int(np.prod(shape[1:])) * dtype.itemsize, stream.tell()

    def read_from(first: int, count: int) -> Tensor:
        stream.seek(begin + first * row)
        content = stream.read(count * row)
        if len(content) < count * row:
            raise ValueError(f"{file} is cut short: {shape[0]} images announced, {first + len(content) // row} found")
        array = np.frombuffer(content, dtype).reshape(count, *shape[1:])
        array = array.transpose(0, 3, 1, 2) if channels_last else array
        return torch.from_numpy(np.array(array, dtype=np.uint8 if dtype == np.uint8 else np.float32))

    for first in range(0, shape[0], batch_size):
        count = min(batch_size, shape[0] - first)
        yield count, partial(read_from, first, count)
