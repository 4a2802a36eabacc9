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
) -> CollectedFeatures:
    """Compute the features of all images, batch by batch.

    Memory is a batch of images, ten covariances and the kept features, whatever the number of images.

    Args:
        images: the set.
        extractor: computes the features; moved to ``device``, set to evaluation mode.
        batch_size: images at once.
        max_kept: how many features to keep for the distances that need them one by one.
        seed: which are kept, and which image is in which block.
        device: where the extractor runs.
        progress: show a bar.

    Raises:
        ValueError: if there are fewer than two images, or features are not finite or not ``(n, num_features)``.

    >>> from fixpoint_diffusion.evaluation import DigitFeatures
    >>> found = collect_features(Images("digits"), DigitFeatures(), max_kept=100)
    >>> found.num_images, tuple(found.kept.shape), sum(block.count for block in found.blocks)
    (1797, (100, 64), 1797)
    """
    extractor = extractor.to(device).eval()
    generator = torch.Generator().manual_seed(seed)
    blocks = tuple(RunningMoments() for _ in range(BLOCKS))
    kept = _Reservoir(max_kept, generator)
    waiting: list[Tensor] = []
    count = 0

    def give_to_blocks() -> None:
        rows = torch.cat(waiting)
        waiting.clear()
        order = torch.randperm(len(rows), generator=generator)
        for block, part in zip(blocks, order.tensor_split(BLOCKS), strict=True):
            block.update(rows[part])

    with torch.no_grad(), ProgressBar.tqdm(desc=images.name, unit="image", disable=not progress) as bar:
        for batch in images.batches(batch_size):
            features = extractor(batch.to(device)).detach().to("cpu")
            if tuple(features.shape) != (len(batch), extractor.num_features):
                expected = (len(batch), extractor.num_features)
                raise ValueError(f"{extractor.name} gave features {tuple(features.shape)}; expected {expected}")
            if not bool(features.isfinite().all()):
                raise ValueError(f"{extractor.name} gave infinities or NaNs for images of {images.name}")
            kept.add(features)
            waiting.append(features)
            if sum(map(len, waiting)) >= _ROWS_AT_ONCE:
                give_to_blocks()
            count += len(batch)
            bar.update(len(batch))
    if waiting:
        give_to_blocks()
    if count < 2:
        raise ValueError(f"{images.name} holds {count} images; expected at least two")
    return CollectedFeatures(
        name=images.name, num_images=count, features=extractor.label, blocks=blocks, kept=kept.shuffled()
    )


class _Reservoir:
    """A uniform draw of at most ``size`` rows from a stream of unknown length: those with the smallest random keys."""

    def __init__(self, size: int, generator: torch.Generator) -> None:
        self.size, self.generator = size, generator
        self.rows: list[Tensor] = []
        self.keys: list[Tensor] = []

    def add(self, rows: Tensor) -> None:
        self.rows.append(rows)
        self.keys.append(torch.rand(len(rows), generator=self.generator, dtype=torch.float64))
        if sum(map(len, self.keys)) > 2 * self.size:
            self._shrink()

    def shuffled(self) -> Tensor:
        self._shrink()
        return self.rows[0]

    def _shrink(self) -> None:
        if self.keys:
            keys, rows = torch.cat(self.keys), torch.cat(self.rows)
            order = keys.argsort()[: self.size]
            self.keys, self.rows = [keys[order]], [rows[order]]
