"""Images in memory with their labels, scikit-learn's 8x8 digits, and the part that is held out for judging."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, Self, TypeVar

import numpy as np
import torch
from torch import Tensor

from fixpoint_diffusion.extras import needed_for


class _Labelled(Protocol):
    @property
    def labels(self) -> Tensor | None: ...
    def __len__(self) -> int: ...
    def subset(self, indices: Tensor) -> Self: ...


Data = TypeVar("Data", bound=_Labelled)


@dataclass(frozen=True, kw_only=True)
class LabelledImages:
    """Images ``(N, C, H, W)``, float32 in [-1, 1], and their integer labels ``(N,)`` where known.

    Example:
        See :func:`fixpoint_diffusion.training.data.load_digits`, which returns one.
    """

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

    def subset(self, indices: Tensor) -> LabelledImages:
        """The images ``indices`` ``(M,)`` with their labels."""
        return LabelledImages(images=self.images[indices], labels=None if self.labels is None else self.labels[indices])


def load_digits() -> LabelledImages:
    """The 1797 handwritten digits that come with scikit-learn, grey values 0..16 mapped to [-1, 1].

    Returns:
        Images ``(1797, 1, 8, 8)`` in float32 and labels 0..9. Nothing is downloaded.

    Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI repository, 1998 (test part).

    >>> digits = load_digits()
    >>> tuple(digits.images.shape), float(digits.images.min()), float(digits.images.max())
    ((1797, 1, 8, 8), -1.0, 1.0)
    """
    with needed_for("the data set of digits"):
        from sklearn.datasets import load_digits as load

    bunch = load()
    images = torch.from_numpy(bunch.images).to(torch.float32).div(8).sub(1).unsqueeze(1)
    return LabelledImages(images=images, labels=torch.from_numpy(bunch.target).to(torch.int64))


def split_held_out(data: Data, *, fraction: float = 0.2, seed: int = 0) -> tuple[Data, Data]:
    """Cut a set into a part to train on and a part never trained on, each label in its proportion.

    The same set, fraction and seed always give the same two parts; images keep their order in both.

    Args:
        data: ``LabelledImages`` or what ``open_dataset`` gives; without labels all rows count as one class.
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
    train, judge = (torch.from_numpy(np.flatnonzero(mask)) for mask in (~held_out, held_out))
    return data.subset(train), data.subset(judge)
