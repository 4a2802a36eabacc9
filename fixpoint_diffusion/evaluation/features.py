"""The features of a set of images, gathered in one pass that holds no more than a batch of images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fixpoint import ProgressBar
from fixpoint_diffusion.evaluation.extractors import FeatureExtractor
from fixpoint_diffusion.evaluation.images import Images
from fixpoint_diffusion.evaluation.statistics import FeatureStatistics, RunningMoments
from fixpoint_diffusion.ranks import ALONE, Ranks

BLOCKS = 10
_ROWS_AT_ONCE = 1000  # an update of the covariance costs d^2 whatever the number of rows


@dataclass(frozen=True, kw_only=True)
class CollectedFeatures:
    """What is kept of a set of images.

    Attributes:
        name: what the set is called.
        num_images: N.
        features: what computed the features (``FeatureExtractor.label``).
        blocks: moments of ten random parts of the set, as equal as N allows.
        kept: at most ``max_kept`` features, drawn at random without replacement, in random order; ``(K, d)``.

    Example:
        See :func:`fixpoint_diffusion.evaluation.collect_features`, which returns one.
    """

    name: str
    num_images: int
    features: str
    blocks: tuple[RunningMoments, ...]
    kept: Tensor

    def statistics(self, blocks: Sequence[int] = range(BLOCKS)) -> FeatureStatistics:
        """Mean and covariance of all images, or of those in some blocks."""
        return RunningMoments.union(self.blocks[b] for b in blocks).statistics(label=self.features)


def collect_features(
    images: Images,
    extractor: FeatureExtractor,
    *,
    batch_size: int = 64,
    max_kept: int = 10_000,
    seed: int = 0,
    device: str | torch.device = "cpu",
    progress: bool = False,
    ranks: Ranks = ALONE,
) -> CollectedFeatures:
    """Compute the features of all images, batch by batch.

    Memory is a batch of images, ten covariances and the kept features, whatever the number of images. Several processes
    each take a share of the batches, and all get what one would have, the covariances to rounding.

    Args:
        images: the set.
        extractor: computes the features; moved to ``device``, set to evaluation mode.
        batch_size: images at once.
        max_kept: how many features to keep for the distances that need them one by one.
        seed: which are kept, and which image is in which block.
        device: where the extractor runs.
        progress: show a bar.
        ranks: the processes that share the work, each of which calls this with the same arguments.

    Raises:
        FailedElsewhereError: if another rank has failed.
        ValueError: if there are fewer than two images, or features are not finite or not ``(n, num_features)``.

    >>> from fixpoint_diffusion.evaluation import DigitFeatures
    >>> found = collect_features(Images("digits"), DigitFeatures(), max_kept=100)
    >>> found.num_images, tuple(found.kept.shape), sum(block.count for block in found.blocks)
    (1797, (100, 64), 1797)
    """
    extractor = extractor.to(device).eval()
    generator = torch.Generator().manual_seed(seed)
    blocks = tuple(RunningMoments() for _ in range(BLOCKS))
    kept = _Reservoir(max_kept)
    waiting: list[Tensor] = []  # NaN where the features are another rank's
    count = 0

    def give_to_blocks() -> None:
        rows = torch.cat(waiting)
        waiting.clear()
        order = torch.randperm(len(rows), generator=generator, device="cpu")
        for block, part in zip(blocks, order.tensor_split(BLOCKS), strict=True):
            chosen = rows[part]
            block.update(chosen[chosen.isfinite().all(dim=1)])

    def features_of(batch: Tensor) -> Tensor:
        features = extractor(batch.to(device)).detach().to("cpu")
        if tuple(features.shape) != (len(batch), extractor.num_features):
            expected = (len(batch), extractor.num_features)
            raise ValueError(f"{extractor.name} gave features {tuple(features.shape)}; expected {expected}")
        if not bool(features.isfinite().all()):
            raise ValueError(f"{extractor.name} gave infinities or NaNs for images of {images.name}")
        return features

    def collect() -> None:
        nonlocal count
        with torch.no_grad(), ProgressBar.tqdm(desc=images.name, unit="image", disable=not progress) as bar:
            for number, (size, read) in enumerate(images.parts(batch_size)):
                # Random numbers are drawn for every image, so that they are the same for any number of ranks.
                keys = torch.rand(size, generator=generator, dtype=torch.float64, device="cpu")
                if number % ranks.size == ranks.rank:
                    waiting.append(features_of(read()))
                    kept.add(waiting[-1], keys)
                else:
                    waiting.append(torch.full((size, extractor.num_features), torch.nan, device="cpu"))
                if sum(map(len, waiting)) >= _ROWS_AT_ONCE:
                    give_to_blocks()
                count += size
                bar.update(size)
        if waiting:
            give_to_blocks()
        if count < 2:
            raise ValueError(f"{images.name} holds {count} images; expected at least two")

    ranks.together(collect)
    return CollectedFeatures(
        name=images.name,
        num_images=count,
        features=extractor.label,
        blocks=tuple(block.of_all(ranks, extractor.num_features) for block in blocks),
        kept=_Reservoir.union(ranks.gather(kept)).shuffled(),
    )


class _Reservoir:
    """A uniform draw of at most ``size`` rows from a stream of unknown length: those with the smallest random keys."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.rows: list[Tensor] = []
        self.keys: list[Tensor] = []

    def add(self, rows: Tensor, keys: Tensor) -> None:
        self.rows.append(rows)
        self.keys.append(keys)
        if sum(map(len, self.keys)) > 2 * self.size:
            self._shrink()

    @classmethod
    def union(cls, parts: Sequence[_Reservoir]) -> _Reservoir:
        whole = cls(parts[0].size)
        for part in parts:
            for rows, keys in zip(part.rows, part.keys, strict=True):
                whole.add(rows, keys)
        return whole

    def shuffled(self) -> Tensor:
        self._shrink()
        return self.rows[0]

    def _shrink(self) -> None:
        if self.keys:
            keys, rows = torch.cat(self.keys), torch.cat(self.rows)
            order = keys.argsort()[: self.size]
            self.keys, self.rows = [keys[order]], [rows[order]]
