"""A data set of images or latents whose rows are read when they are asked for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from fixpoint_diffusion.training.data.crops import Crop
from fixpoint_diffusion.training.data.rows import Rows


class ImageDataset(Dataset[dict[str, Any]]):
    """Rows with their labels, cut and mirrored; made by ``fixpoint_diffusion.training.data.open_dataset``.

    ``dataset[index]`` is ``{"images": (C, *size) float32, "labels": int}``, without ``"labels"`` where there are none.
    ``dataset[index, draw]`` is another random cut of the same row. It depends on the data set's seed, the draw and the
    index alone, so a training that says which draw it wants can be resumed, with any number of workers.

    Attributes:
        sample_shape: shape of one row, ``(C, H, W)`` for images.
        labels: class numbers ``(N,)`` in int64, or None.
        num_classes: how many classes there are, or None.
        class_names: one name a class, or None.
        is_latent: rows are latents: floats of any range, neither cut nor mirrored.

    Example:
        See :func:`fixpoint_diffusion.training.data.open_dataset`, which returns one.
    """

    def __init__(
        self,
        rows: Rows,
        *,
        sample_shape: tuple[int, ...],
        crop: Crop,
        labels: Tensor | None = None,
        num_classes: int | None = None,
        class_names: tuple[str, ...] | None = None,
        is_latent: bool = False,
        indices: Tensor | None = None,
    ) -> None:
        self.rows = rows
        self.crop = crop
        self.sample_shape = sample_shape
        self.labels = labels
        self.num_classes = num_classes
        self.class_names = class_names
        self.is_latent = is_latent
        # Rows of the source that this is a part of; None: all.
        self.indices = indices

    def __len__(self) -> int:
        return len(self.rows) if self.indices is None else len(self.indices)

    def __getitem__(self, item: int | tuple[int, int]) -> dict[str, Any]:
        index, draw = item if isinstance(item, tuple) else (item, 0)
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        row = index if self.indices is None else int(self.indices[index])
        image = self.rows.read(row)
        if not self.is_latent:
            image = self.crop.apply(image, row, draw)
        return {"images": image} if self.labels is None else {"images": image, "labels": int(self.labels[index])}

    def fingerprint(self) -> str:
        """A text that changes with the files, the choice of rows, or the labels; contents of files are not read."""
        chosen = None if self.indices is None else self.indices.tolist()
        labels = None if self.labels is None else self.labels.tolist()
        parts = [self.rows.fingerprint(), chosen, labels, self.class_names]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def subset(self, indices: Tensor) -> ImageDataset:
        """The rows ``indices`` ``(M,)``; classes keep their numbers."""
        return ImageDataset(
            self.rows,
            sample_shape=self.sample_shape,
            crop=self.crop,
            labels=None if self.labels is None else self.labels[indices],
            num_classes=self.num_classes,
            class_names=self.class_names,
            is_latent=self.is_latent,
            indices=indices if self.indices is None else self.indices[indices],
        )


def batches_of(loader: DataLoader[dict[str, Any]]) -> Iterator[dict[str, Tensor]]:
    """The loader's batches; of an error in a worker, whose message holds a traceback, the last line."""
    try:
        yield from loader
    except (ValueError, OSError) as error:
        lines = str(error).strip().splitlines()
        if len(lines) < 2:
            raise
        kind = ValueError if isinstance(error, ValueError) else type(error)
        raise kind(lines[-1].removeprefix(f"{kind.__name__}: ")) from error


class EpochSampler(Sampler[tuple[int, int]]):
    """Endless ``(index, draw)`` pairs for an ``ImageDataset``: in each epoch every row once, in a new order.

    The draw is the epoch's number, so that each epoch sees new random cuts.

    Args:
        length: rows of the data set.
        seed: of the orders.
        start: pairs to leave out at the beginning, those that a resumed training has seen.

    >>> from itertools import islice
    >>> whole, resumed = EpochSampler(3, seed=1), EpochSampler(3, seed=1, start=4)
    >>> list(islice(whole, 4, 8)) == list(islice(resumed, 4))
    True
    """

    def __init__(self, length: int, *, seed: int = 0, start: int = 0) -> None:
        if length < 1 or start < 0:
            raise ValueError(f"length must be at least 1 and start at least 0, got {length} and {start}")
        self.length, self.seed, self.start = length, seed, start

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch, offset = divmod(self.start, self.length)
        while True:
            order = np.random.default_rng([self.seed, epoch]).permutation(self.length)
            for index in order[offset:]:
                yield int(index), epoch
            epoch, offset = epoch + 1, 0
