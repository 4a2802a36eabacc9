"""Judging a set of images against a reference: every figure with what it depends on."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from fixpoint_diffusion.evaluation.distances import (
    frechet_distance,
    kernel_distance,
    precision_recall,
    sliced_wasserstein_of_blocks,
)
from fixpoint_diffusion.evaluation.extractors import FeatureExtractor
from fixpoint_diffusion.evaluation.features import BLOCKS, CollectedFeatures, collect_features
from fixpoint_diffusion.evaluation.images import Images
from fixpoint_diffusion.evaluation.statistics import FeatureStatistics, is_statistics_file
from fixpoint_diffusion.evaluation.uncertainty import (
    CONFIDENCE,
    Estimate,
    estimate_by_blocks,
    estimate_of_share,
    estimate_of_subsets,
)
from fixpoint_diffusion.files import written_whole
from fixpoint_diffusion.ranks import ALONE, Ranks

METRICS = ("frechet", "kernel", "precision", "recall", "mind")
_BY_BLOCKS_FROM = 40  # images; with fewer, a block has less than four
ImageSet = Images | Tensor | str | Path | FeatureStatistics


@dataclass(frozen=True, kw_only=True)
class EvaluationReport:
    """The figures of a set of samples, and everything that they depend on.

    Attributes:
        samples, reference: where the images are.
        num_samples, num_reference: how many there are; None where a statistics file does not say.
        num_features, extractor, weights_hash, preparation: what computed the features; see ``FeatureExtractor``.
        reference_features: what computed the reference's: the same, or "not recorded" in a statistics file.
        images_one_by_one: how many samples and how many reference images the kernel distance, precision, recall and
            MIND are of; they are drawn at random where there are more.
        seed: of all random choices.
        confidence: of the intervals.
        figures: by the name of the metric.
        notes: what a reader should know, one sentence each.

    Example:
        See :func:`fixpoint_diffusion.evaluation.evaluate`, which returns one.
    """

    samples: str
    reference: str
    num_samples: int | None
    num_reference: int | None
    extractor: str
    num_features: int
    weights_hash: str | None
    preparation: str
    reference_features: str
    images_one_by_one: tuple[int, int] | None
    seed: int
    confidence: float
    figures: dict[str, Estimate]
    notes: tuple[str, ...]

    def to_json(self) -> str:
        """As a JSON object."""
        return json.dumps(asdict(self), indent=2, allow_nan=False) + "\n"

    def save(self, path: str | Path) -> None:
        """Write the JSON object to a file, complete or not at all."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(path) as file:
            file.write(self.to_json().encode())


def evaluate(
    samples: ImageSet | CollectedFeatures,
    reference: ImageSet | CollectedFeatures,
    extractor: FeatureExtractor,
    *,
    metrics: Sequence[str] | None = None,
    batch_size: int = 64,
    max_kept: int = 10_000,
    seed: int = 0,
    device: str | torch.device = "cpu",
    progress: bool = False,
    ranks: Ranks = ALONE,
) -> EvaluationReport:
    """Judge samples against a reference.

    - ``frechet``: Frechet distance, over all images. Biased by about ``d / N``: compare at equal N, or the
      extrapolation ``at_infinite_n``, which is over the samples; the reference is taken as it is.
    - ``kernel``: squared kernel distance, unbiased.
    - ``precision``, ``recall``: shares of samples that look real, and of what is real among the samples.
    - ``mind``: sliced Wasserstein distance; ranks as the Frechet distance does, with fewer images.

    Args:
        samples, reference: images (``Images``, a tensor in [-1, 1], or a path), statistics (``FeatureStatistics`` or a
            path to a file of them), or what ``collect_features`` made, to use one reference several times.
        extractor: computes the features.
        metrics: names of figures; None: all that can be had. Statistics allow ``frechet`` alone.
        batch_size: images at once in the extractor.
        max_kept: how many images of each set the metrics other than ``frechet`` see at most.
        seed: of all random choices.
        device: where the extractor runs.
        progress: show bars.
        ranks: the processes that share the images; see ``collect_features``.

    Raises:
        ValueError: if a name is unknown, images are in another range than stated, sets are too small, or statistics
            come from another extractor.
        FileNotFoundError: if there is nothing at a path.

    >>> from fixpoint_diffusion.evaluation import DigitFeatures
    >>> report = evaluate("digits", "digits", DigitFeatures(), metrics=["frechet"])
    >>> report.num_samples, round(report.figures["frechet"].value, 6)
    (1797, 0.0)
    """
    unknown = [name for name in metrics or () if name not in METRICS]
    if unknown or (metrics is not None and not metrics):
        raise ValueError(f"metrics are {', '.join(METRICS)}; got {', '.join(unknown) or 'none'}")
    (name, opened), (reference_name, opened_reference) = _open(samples), _open(reference)
    for where, each in ((name, opened), (reference_name, opened_reference)):
        _check_comparable(where, each, extractor, metrics)

    def collected(each: _Opened) -> CollectedFeatures | FeatureStatistics:
        if not isinstance(each, Images):
            return each
        return collect_features(
            each,
            extractor,
            batch_size=batch_size,
            max_kept=max_kept,
            seed=seed,
            device=device,
            progress=progress,
            ranks=ranks,
        )

    one, other = collected(opened), collected(opened_reference)
    both_collected = isinstance(one, CollectedFeatures) and isinstance(other, CollectedFeatures)
    chosen = tuple(metrics) if metrics else METRICS if both_collected else ("frechet",)
    return EvaluationReport(
        samples=name,
        reference=reference_name,
        num_samples=one.num_images,
        num_reference=other.num_images,
        extractor=extractor.name,
        num_features=extractor.num_features,
        weights_hash=extractor.weights_hash,
        preparation=extractor.preparation,
        reference_features=other.features or "not recorded",
        images_one_by_one=_numbers_kept(one, other) if set(chosen) != {"frechet"} else None,
        seed=seed,
        confidence=CONFIDENCE,
        figures=_figures(one, other, chosen, seed),
        notes=tuple(_notes(one, other, extractor)),
    )


_Opened = Images | FeatureStatistics | CollectedFeatures


def _open(given: ImageSet | CollectedFeatures) -> tuple[str, _Opened]:
    """What a set is called, and the set."""
    if isinstance(given, str | Path):
        if is_statistics_file(given):
            return str(given), FeatureStatistics.load(given)
        return str(given), Images(given)
    if isinstance(given, Tensor):
        given = Images(given)
    return ("statistics" if isinstance(given, FeatureStatistics) else given.name), given


def _check_comparable(name: str, given: _Opened, extractor: FeatureExtractor, metrics: Sequence[str] | None) -> None:
    """Refuse features of another extractor, and metrics that statistics cannot give, before any work."""
    if isinstance(given, Images):
        return
    dimension = len(given.mean) if isinstance(given, FeatureStatistics) else given.kept.shape[1]
    if dimension != extractor.num_features:
        found = f"{dimension} features; {extractor.name} has {extractor.num_features}"
        raise ValueError(f"{name} holds statistics of {found}")
    if given.features not in (None, extractor.label):
        raise ValueError(f"{name} holds features of: {given.features}; expected: {extractor.label}")
    others = [metric for metric in metrics or () if metric != "frechet"]
    if isinstance(given, FeatureStatistics) and others:
        raise ValueError(f"{name} holds statistics, which give frechet alone; {', '.join(others)} needs the images")


def _figures(
    one: CollectedFeatures | FeatureStatistics,
    other: CollectedFeatures | FeatureStatistics,
    metrics: Sequence[str],
    seed: int,
) -> dict[str, Estimate]:
    figures: dict[str, Estimate] = {}
    if "frechet" in metrics:
        whole = other if isinstance(other, FeatureStatistics) else other.statistics()
        if isinstance(one, CollectedFeatures):
            collected = one  # for the closure
            figures["frechet"] = _by_blocks(
                lambda blocks: frechet_distance(collected.statistics(blocks), whole),
                [moments.count for moments in one.blocks],
            )
        else:
            figures["frechet"] = Estimate(value=frechet_distance(one, whole))
    if isinstance(one, FeatureStatistics) or isinstance(other, FeatureStatistics):
        return figures
    if "kernel" in metrics:
        kernel = kernel_distance(one.kept, other.kept, seed=seed)
        figures["kernel"] = estimate_of_subsets(
            kernel.mean, kernel.std, subset_size=kernel.subset_size, count=min(len(one.kept), len(other.kept))
        )
    if "precision" in metrics or "recall" in metrics:
        shares = precision_recall(one.kept, other.kept)
        for name, share, count in (
            ("precision", shares.precision, len(one.kept)),
            ("recall", shares.recall, len(other.kept)),
        ):
            if name in metrics:
                figures[name] = estimate_of_share(share, count)
    if "mind" in metrics:
        blocks = one.kept.tensor_split(BLOCKS)
        of_blocks = sliced_wasserstein_of_blocks(blocks, other.kept, seed=seed)
        figures["mind"] = _by_blocks(of_blocks, [len(block) for block in blocks])
    return figures


def _by_blocks(value: Callable[[Sequence[int]], float], sizes: Sequence[int]) -> Estimate:
    if sum(sizes) < _BY_BLOCKS_FROM:
        return Estimate(value=value(range(len(sizes))))
    return estimate_by_blocks(value, sizes)


def _numbers_kept(
    one: CollectedFeatures | FeatureStatistics, other: CollectedFeatures | FeatureStatistics
) -> tuple[int, int] | None:
    if isinstance(one, CollectedFeatures) and isinstance(other, CollectedFeatures):
        return len(one.kept), len(other.kept)
    return None


def _notes(
    one: CollectedFeatures | FeatureStatistics,
    other: CollectedFeatures | FeatureStatistics,
    extractor: FeatureExtractor,
) -> Iterator[str]:
    for name, each in (("samples", one), ("reference", other)):
        if each.num_images is not None and each.num_images <= extractor.num_features:
            yield (
                f"{each.num_images} images of the {name} for {extractor.num_features} features: "
                "the covariance is singular and the Frechet distance strongly biased"
            )
        if each.features is None:
            yield f"the file of the {name} does not say which extractor made it"
    if extractor.weights_hash is None:
        yield "the extractor's weights could not be read: the report does not identify them"
