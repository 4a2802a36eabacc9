"""Where a data set's rows come from: picture files, arrays on disk, or a tensor in memory. All are read lazily."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fixpoint_diffusion.files import map_array
from fixpoint_diffusion.training.data.pictures import CHANNELS, convert_channels, read_picture

# Rows that are looked at when an array is opened; each row is checked again when it is read.
CHECKED_ROWS = 64


class Rows(Protocol):
    """Rows that can be read one at a time."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> Tensor:
        """Row ``index`` as float32, without a batch dimension."""

    def fingerprint(self) -> str:
        """A text that changes when the rows do, as far as can be told without reading them."""


@dataclass(frozen=True)
class TensorRows:
    """Images ``(N, C, H, W)`` in memory, in [-1, 1]."""

    images: Tensor
    channels: str

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> Tensor:
        return torch.from_numpy(_to_channels(self.images[index].numpy(), self.channels))

    def fingerprint(self) -> str:
        return hashlib.sha256(self.images.contiguous().numpy().tobytes()).hexdigest()


@dataclass(frozen=True)
class PictureRows:
    """Picture files below a folder, decoded when they are read."""

    folder: Path
    files: Sequence[Path]
    channels: str

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int) -> Tensor:
        return torch.from_numpy(read_picture(self.files[index], self.channels))

    def fingerprint(self) -> str:
        names = (f"{file.relative_to(self.folder).as_posix()} {file.stat().st_size}\n" for file in self.files)
        return hashlib.sha256("".join(names).encode()).hexdigest()


@dataclass
class ArrayRows:
    """Rows of one or several ``.npy`` files ``(N, ...)``, mapped into memory and read when asked for.

    Args:
        files: the files, whose rows follow each other.
        channels: a key of ``CHANNELS`` for images: rows are ``(C, H, W)``, uint8, uint16 or float in [-1, 1]. None for
            latents: rows are floats of any shape and range.

    Raises:
        ValueError: if an array cannot be used so; of the values, a few rows are checked now, each one when read.
    """

    files: Sequence[Path]
    channels: str | None
    _arrays: list[np.ndarray] | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        for file, array in zip(self.files, self.arrays, strict=True):
            self._check_array(file, array)
        first = self.arrays[0]
        for file, array in zip(self.files, self.arrays, strict=True):
            if array.shape[1:] != first.shape[1:]:
                raise ValueError(f"{file} has rows {array.shape[1:]}, {self.files[0]} has {first.shape[1:]}")
        self._ends = np.cumsum([len(array) for array in self.arrays])
        for index in np.unique(np.linspace(0, len(self) - 1, CHECKED_ROWS).astype(int)):
            self.read(int(index))

    @property
    def arrays(self) -> list[np.ndarray]:
        if self._arrays is None:
            self._arrays = [map_array(file) for file in self.files]
        return self._arrays

    def __getstate__(self) -> dict[str, Any]:
        # A mapped array is pickled with all of its content; a worker process maps the files anew.
        return {**self.__dict__, "_arrays": None}

    def __len__(self) -> int:
        return int(self._ends[-1])

    def read(self, index: int) -> Tensor:
        shard = int(np.searchsorted(self._ends, index, side="right"))
        begin = int(self._ends[shard - 1]) if shard else 0
        file, row = self.files[shard], np.array(self.arrays[shard][index - begin])
        values = row.astype(np.float32)
        if row.dtype.kind == "u":
            values = values / (np.iinfo(row.dtype).max / 2) - 1
        elif self.channels is None:
            if not np.isfinite(values).all():
                raise ValueError(f"{file}: row {index - begin} holds values that are not finite")
        elif not (values.min() >= -1 and values.max() <= 1):  # also true of NaN
            raise ValueError(
                f"{file}: row {index - begin} holds values from {values.min():g} to {values.max():g}; images as floats "
                f"must lie in [-1, 1]: clip what a sampler has overshot, or open latents with latents=True (--latents)"
            )
        return torch.from_numpy(values if self.channels is None else _to_channels(values, self.channels))

    def fingerprint(self) -> str:
        parts = [
            f"{file.name} {array.shape} {array.dtype}\n" for file, array in zip(self.files, self.arrays, strict=True)
        ]
        return hashlib.sha256("".join(parts).encode()).hexdigest()

    def _check_array(self, file: Path, array: np.ndarray) -> None:
        kind = array.dtype
        if self.channels is None:
            if array.ndim < 2 or array.size == 0 or kind.kind != "f":
                raise ValueError(f"{file} holds {kind} {array.shape}; latents are floats (N, ...), with N at least 1")
            return
        if array.ndim != 4 or array.size == 0 or array.shape[1] > 4:
            swapped = array.ndim == 4 and array.shape[1] > 4 and array.shape[3] <= 4
            cure = "; move the channels forward: array.transpose(0, 3, 1, 2)" if swapped else ""
            cure = "; grey images are array[:, None]" if array.ndim == 3 else cure
            raise ValueError(
                f"{file} holds an array of shape {array.shape}; expected images (N, C, H, W) with C from 1 to 4{cure}"
            )
        if kind.kind != "f" and kind not in (np.dtype(np.uint8), np.dtype(np.uint16)):
            raise ValueError(f"{file} holds {kind}; expected uint8 (0..255), uint16 (0..65535) or floats in [-1, 1]")


def natural_channels(count: int) -> str:
    """The name of 1 to 4 channels."""
    return list(CHANNELS)[count - 1]


def _to_channels(values: np.ndarray, channels: str) -> np.ndarray:
    """Change the channels of one image ``(C, H, W)`` in [-1, 1], where they are others."""
    if len(values) == CHANNELS[channels]:
        return values
    return convert_channels((values + 1) / 2, natural_channels(len(values)), channels) * 2 - 1
