"""Mean and covariance of features, gathered batch by batch, and the files in which tools exchange them."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fixpoint_diffusion.files import written_whole
from fixpoint_diffusion.ranks import Ranks

# The common tools write the first of each.
_MEAN_KEYS, _COV_KEYS = ("mu", "mean", "m"), ("sigma", "cov", "s")


@dataclass(frozen=True, kw_only=True)
class FeatureStatistics:
    """Mean and covariance of the features of a set of images.

    Attributes:
        mean: ``(d,)`` float64.
        cov: ``(d, d)`` float64, with ``N - 1`` in the denominator.
        num_images: N; None where a file does not say.
        features: what computed the features (``FeatureExtractor.label``); None where a file does not say.

    Example:
        See :func:`fixpoint_diffusion.evaluation.frechet_distance`, which compares two.
    """

    mean: Tensor
    cov: Tensor
    num_images: int | None = None
    features: str | None = None

    def __post_init__(self) -> None:
        d = self.mean.numel()
        if self.mean.ndim != 1 or tuple(self.cov.shape) != (d, d) or d == 0:
            raise ValueError(
                f"statistics need a mean (d,) and a covariance (d, d), "
                f"got {tuple(self.mean.shape)} and {tuple(self.cov.shape)}"
            )
        if not bool(self.mean.isfinite().all() and self.cov.isfinite().all()):
            raise ValueError("statistics must be finite, got infinities or NaNs")
        scale = float(self.cov.diagonal().abs().max())
        if not torch.allclose(self.cov, self.cov.T, rtol=0, atol=1e-5 * scale) or float(self.cov.diagonal().min()) < 0:
            raise ValueError("a covariance must be symmetric with a diagonal of at least 0")

    @classmethod
    def from_features(cls, features: Tensor, *, label: str | None = None) -> FeatureStatistics:
        """The statistics of features ``(N, d)``, N at least 2.

        >>> FeatureStatistics.from_features(torch.tensor([[0.0], [2.0]])).cov
        tensor([[2.]], dtype=torch.float64)
        """
        moments = RunningMoments()
        moments.update(features)
        return moments.statistics(label=label)

    def save(self, path: str | Path) -> None:
        """Write a ``.npz`` file with ``mu`` and ``sigma``, as the common tools read it, and what else is known.

        The file is complete or not there.
        """
        path = Path(path)
        if path.suffix != ".npz":
            raise ValueError(f"a statistics file is a .npz file, got {path}")
        known = {"num_images": self.num_images, "features": self.features}
        arrays: dict[str, Any] = {name: value for name, value in known.items() if value is not None}
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(path) as file:
            np.savez(file, mu=self.mean.numpy(), sigma=self.cov.numpy(), **arrays)

    @classmethod
    def load(cls, path: str | Path) -> FeatureStatistics:
        """Read a statistics file of ours or of another tool: a mean (``mu``) and a covariance (``sigma``) in ``.npz``.

        Raises:
            ValueError: if the file holds no such arrays, or they are no mean and covariance.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                mean_key = next((key for key in _MEAN_KEYS if key in file.files), None)
                cov_key = next((key for key in _COV_KEYS if key in file.files), None)
                if mean_key is None or cov_key is None:
                    raise ValueError(f"holds {', '.join(file.files) or 'nothing'}; expected mu and sigma")
                if wrong := [key for key in (mean_key, cov_key) if file[key].dtype.kind not in "fiu"]:
                    raise ValueError(f"{wrong[0]} holds {file[wrong[0]].dtype}; expected real numbers")
                mean, cov = (torch.from_numpy(file[key].astype(np.float64)) for key in (mean_key, cov_key))
                num_images = int(file["num_images"]) if "num_images" in file.files else None
                features = str(file["features"]) if "features" in file.files else None
            return cls(mean=mean, cov=cov, num_images=num_images, features=features)
        except (ValueError, TypeError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} is not a statistics file: {error}") from error


def is_statistics_file(path: str | Path) -> bool:
    """Whether a ``.npz`` file names a mean and a covariance among its arrays."""
    path = Path(path)
    if path.suffix.lower() != ".npz" or not path.is_file() or not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        names = {name.removesuffix(".npy") for name in archive.namelist()}
    return bool(names.intersection(_MEAN_KEYS)) and bool(names.intersection(_COV_KEYS))


@dataclass(kw_only=True)
class RunningMoments:
    """Mean and centred second moment of features that arrive in batches, in float64.

    Source: Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances" (1979).

    >>> moments = RunningMoments()
    >>> moments.update(torch.tensor([[0.0]])); moments.update(torch.tensor([[2.0]]))
    >>> moments.statistics().mean
    tensor([1.], dtype=torch.float64)
    """

    count: int = 0
    mean: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64, device="cpu"))
    scatter: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.float64, device="cpu"))

    def update(self, features: Tensor) -> None:
        """Add a batch ``(n, d)``."""
        if features.ndim != 2:
            raise ValueError(f"features must be (N, d), got {tuple(features.shape)}")
        if not len(features):
            return
        features = features.to("cpu", torch.float64)
        mean = features.mean(dim=0)
        centred = features - mean
        self._merge(len(features), mean, centred.T @ centred)

    def statistics(self, *, label: str | None = None) -> FeatureStatistics:
        """The mean and covariance so far.

        Raises:
            ValueError: if there were fewer than two images.
        """
        if self.count < 2:
            raise ValueError(f"statistics need at least two images, got {self.count}")
        return FeatureStatistics(
            mean=self.mean, cov=self.scatter / (self.count - 1), num_images=self.count, features=label
        )

    @classmethod
    def union(cls, parts: Iterable[RunningMoments]) -> RunningMoments:
        """The moments of all images of the parts together."""
        whole = cls()
        for part in parts:
            if part.count:
                whole._merge(part.count, part.mean, part.scatter)
        return whole

    def of_all(self, ranks: Ranks, dim: int) -> RunningMoments:
        """The moments of all ranks together, of features of ``dim`` numbers, the same on each."""
        if ranks.size == 1:
            return self
        mean = self.mean if self.count else torch.zeros(dim, dtype=torch.float64, device="cpu")
        scatter = self.scatter if self.count else torch.zeros(dim, dim, dtype=torch.float64, device="cpu")
        count = int(ranks.sum(torch.tensor(self.count)))
        whole = ranks.sum(self.count * mean) / max(count, 1)
        shift = mean - whole
        return RunningMoments(
            count=count, mean=whole, scatter=ranks.sum(scatter + torch.outer(shift, shift) * self.count)
        )

    def _merge(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        if not self.count:
            self.count, self.mean, self.scatter = count, mean, scatter
            return
        if mean.shape != self.mean.shape:
            raise ValueError(f"features of dimension {len(mean)} among those of dimension {len(self.mean)}")
        total, shift = self.count + count, mean - self.mean
        self.scatter = self.scatter + scatter + torch.outer(shift, shift) * (self.count * count / total)
        self.mean = self.mean + shift * (count / total)
        self.count = total
