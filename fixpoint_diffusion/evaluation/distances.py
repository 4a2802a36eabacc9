"""Distances between two sets of features, and precision and recall."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fixpoint_diffusion.evaluation.statistics import FeatureStatistics
from fixpoint_diffusion.extras import needed_for

# Distances below this share of the points' norms are rounding, where they come from norms and products in float64.
_ROUNDING = 1e-6


def frechet_distance(samples: Tensor | FeatureStatistics, reference: Tensor | FeatureStatistics) -> float:
    """Frechet distance of the Gaussians fitted to two sets of features (FID with Inception's features).

    The trace of ``(C C')^(1/2)`` is the sum of the roots of the eigenvalues of the symmetric ``L^T C' L`` with
    ``C = L L^T``: faster than those of ``C C'``, and right where a covariance is singular.

    Args:
        samples, reference: features ``(N, d)`` with N at least 2, or their statistics.

    Returns:
        ``||m - m'||^2 + tr(C + C' - 2 (C C')^(1/2))``, at least 0.

    Raises:
        ValueError: if the dimensions differ, features are not finite, or there are fewer than two.

    Source: Heusel et al., "GANs Trained by a Two Time-Scale Update Rule..." (NeurIPS 2017), Eq. 6.

    >>> x = torch.randn(100, 4, generator=torch.Generator().manual_seed(0))
    >>> round(frechet_distance(x, x + 1), 6)
    4.0
    """
    one, other = (
        each if isinstance(each, FeatureStatistics) else FeatureStatistics.from_features(each)
        for each in (samples, reference)
    )
    if one.mean.shape != other.mean.shape:
        raise ValueError(f"features have {len(one.mean)} dimensions, the reference's {len(other.mean)}")
    factor = _factor(one.cov)
    overlap = torch.linalg.eigvalsh(factor.T @ other.cov @ factor).clamp(min=0).sqrt().sum()
    distance = (one.mean - other.mean).square().sum() + one.cov.trace() + other.cov.trace() - 2 * overlap
    return max(float(distance), 0.0)


@dataclass(frozen=True, kw_only=True)
class KernelDistance:
    """Mean of the unbiased squared kernel distance over subsets, its spread, and how many images a subset has.

    Example:
        See :func:`fixpoint_diffusion.evaluation.kernel_distance`, which returns one.
    """

    mean: float
    std: float
    subset_size: int


def kernel_distance(samples: Tensor, reference: Tensor, *, subsets: int = 100, seed: int = 0) -> KernelDistance:
    """Squared maximum mean discrepancy with the kernel ``(x . y / d + 1)^3`` (KID with Inception's features).

    Computed by torchmetrics on random subsets of 1000 images, or of half the smaller set where that is less. It is
    unbiased: its mean does not depend on the number of images, and can be slightly below 0.

    Args:
        samples, reference: features ``(N, d)`` and ``(M, d)``, at least 4 each.
        subsets: how many subsets.
        seed: which subsets.

    Raises:
        ValueError: if the dimensions differ, or there are fewer than four.
        ImportError: without torchmetrics.

    Source: Binkowski et al., "Demystifying MMD GANs" (ICLR 2018).

    >>> x = torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
    >>> kernel_distance(x[:100], x[100:]).mean < 0.1 * kernel_distance(x[:100], x[100:] + 1).mean
    True
    """
    with needed_for("the kernel distance"):
        from torchmetrics.image.kid import KernelInceptionDistance

    samples, reference = _pair(samples, reference, least=4)
    subset_size = min(1000, len(samples) // 2, len(reference) // 2)
    # torchmetrics draws its subsets from the global state.
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.filterwarnings("ignore", message=".*save all extracted features in buffer")
        metric = KernelInceptionDistance(
            feature=_Given(samples.shape[1]),
            subsets=subsets,
            subset_size=subset_size,
            sync_on_compute=False,  # each process has the features of all images
        )
        torch.manual_seed(seed)
        metric.update(reference, real=True)
        metric.update(samples, real=False)
        mean, std = metric.compute()
    return KernelDistance(mean=float(mean), std=float(std), subset_size=subset_size)


class _Given(nn.Module):
    """The extractor of a metric of torchmetrics that is handed features, not images."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def sliced_wasserstein(samples: Tensor, reference: Tensor, *, projections: int = 1000, seed: int = 0) -> float:
    """Squared 2-Wasserstein distance along random directions, times ``3 d`` (MIND with Inception's features).

    It assumes no Gaussian and needs no covariance; its source finds 5,000 images enough to rank models.

    Args:
        samples, reference: features ``(N, d)`` and ``(M, d)``; N and M may differ.
        projections: number of random directions.
        seed: which directions.

    Returns:
        ``3 d`` times the mean over directions of the squared distance between the two sets of projections.

    Raises:
        ValueError: if the dimensions differ, or a set is empty.

    Source: Berthet et al., "MIND: Monge Inception Distance for Generative Models Evaluation" (2026), arXiv 2605.06797.

    >>> x = torch.randn(100, 4, generator=torch.Generator().manual_seed(0))
    >>> sliced_wasserstein(x, x)
    0.0
    """
    return sliced_wasserstein_of_blocks([samples], reference, projections=projections, seed=seed)([0])


def sliced_wasserstein_of_blocks(
    blocks: Sequence[Tensor], reference: Tensor, *, projections: int = 1000, seed: int = 0
) -> Callable[[Sequence[int]], float]:
    """``sliced_wasserstein`` of any union of blocks of samples, as a function of the blocks' numbers.

    Projections are computed and sorted once: a subset of what is sorted is sorted.
    """
    samples, reference = _pair(torch.cat(list(blocks)), reference, least=1)
    d = samples.shape[1]
    directions = torch.randn(
        projections, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64, device="cpu"
    )
    directions = directions / directions.norm(dim=1, keepdim=True)
    ordered, order = (directions @ samples.T).sort(dim=1)
    others = (directions @ reference.T).sort(dim=1).values
    owners = torch.cat([torch.full((len(block),), number, device="cpu") for number, block in enumerate(blocks)])[order]

    def distance(chosen: Sequence[int]) -> float:
        mine = ordered[torch.isin(owners, torch.tensor(list(chosen), device="cpu"))].reshape(projections, -1)
        # The quantile functions are steps: constant between neighbours among all multiples of 1/N and 1/M.
        n, m = mine.shape[1], others.shape[1]
        places = torch.arange(n + 1, device="cpu") * m, torch.arange(m + 1, device="cpu") * n
        steps = torch.unique(torch.cat(places))  # in units of 1 / (N M)
        widths = steps.diff().double() / (n * m)
        rows, other_rows = steps[:-1] // m, steps[:-1] // n
        total = 0.0
        for some, other in zip(mine.split(50), others.split(50), strict=True):  # memory
            total += float(((some[:, rows] - other[:, other_rows]).square() @ widths).sum())
        return 3 * d * total / projections

    return distance


@dataclass(frozen=True, kw_only=True)
class PrecisionRecall:
    """Precision: share of samples within the reference's manifold. Recall: share of the reference within theirs.

    Example:
        See :func:`fixpoint_diffusion.evaluation.precision_recall`, which returns one.
    """

    precision: float
    recall: float


def precision_recall(samples: Tensor, reference: Tensor, *, neighbours: int = 3) -> PrecisionRecall:
    """How many samples look real, and how much of what is real is among the samples.

    The manifold of a set is the union of balls around its features, each as wide as to its k-th nearest neighbour.

    Args:
        samples, reference: features ``(N, d)`` and ``(M, d)``, more than ``neighbours`` each; memory grows with N + M,
            time with their product.
        neighbours: k.

    Raises:
        ValueError: if the dimensions differ, or there are too few.

    Source: Kynkaanniemi et al., "Improved Precision and Recall Metric for Assessing Generative Models" (NeurIPS 2019).

    >>> x = torch.randn(100, 2, generator=torch.Generator().manual_seed(0))
    >>> precision_recall(x, x)
    PrecisionRecall(precision=1.0, recall=1.0)
    """
    samples, reference = _pair(samples, reference, least=neighbours + 1)
    return PrecisionRecall(
        precision=_share_within(samples, reference, neighbours), recall=_share_within(reference, samples, neighbours)
    )


def _share_within(points: Tensor, manifold: Tensor, neighbours: int) -> float:
    """The share of points that lie in a ball around one of the manifold's."""
    # The point itself is the nearest, at distance 0.
    radii = torch.cat([_distances(rows, manifold).kthvalue(neighbours + 1).values for rows in manifold.split(1000)])
    inside = torch.cat([(_distances(rows, manifold) <= radii).any(dim=1) for rows in points.split(1000)])
    return float(inside.double().mean())


def _distances(rows: Tensor, others: Tensor) -> Tensor:
    # Differences, not norms and products, where that is affordable: equal points are at distance 0 exactly.
    if rows.shape[1] <= 256:
        return torch.cdist(rows, others, compute_mode="donot_use_mm_for_euclid_dist")
    found = torch.cdist(rows, others, compute_mode="use_mm_for_euclid_dist")
    # Otherwise, what rounding leaves of it: copies of an image have a ball of radius 0, in which all of them lie.
    size = (rows.square().sum(dim=1)[:, None] + others.square().sum(dim=1)).sqrt()
    return found.masked_fill_(found <= _ROUNDING * size, 0)


def _factor(cov: Tensor) -> Tensor:
    """A matrix ``L`` with ``L L^T = cov``, ``(d, rank)``."""
    factor, failed = torch.linalg.cholesky_ex(cov)
    if not failed and bool(factor.isfinite().all()):
        return factor
    values, vectors = torch.linalg.eigh(cov)
    # Eigenvalues of rounding errors are left out: their roots would be far above rounding.
    kept = values > len(values) * torch.finfo(cov.dtype).eps * values[-1].clamp(min=0)
    return vectors[:, kept] * values[kept].sqrt()


def _pair(samples: Tensor, reference: Tensor, *, least: int) -> tuple[Tensor, Tensor]:
    for name, features in (("features", samples), ("the reference's features", reference)):
        if features.ndim != 2 or len(features) < least:
            raise ValueError(f"{name} must be (N, d) with N at least {least}, got {tuple(features.shape)}")
        if not bool(features.isfinite().all()):
            raise ValueError(f"{name} must be finite, got infinities or NaNs")
    if samples.shape[1] != reference.shape[1]:
        raise ValueError(f"features have {samples.shape[1]} dimensions, the reference's {reference.shape[1]}")
    return samples.detach().to("cpu", torch.float64), reference.detach().to("cpu", torch.float64)
