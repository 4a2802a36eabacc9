"""How sure a distance is: confidence intervals, and what it tends to as the number of images grows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

CONFIDENCE = 0.95
_Z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A value, its 95% confidence interval, and its extrapolation to infinitely many samples; None where not known.

    Example:
        See :func:`fixpoint_diffusion.evaluation.evaluate`, whose figures they are.
    """

    value: float
    interval: tuple[float, float] | None = None
    at_infinite_n: float | None = None


def estimate_by_blocks(value: Callable[[Sequence[int]], float], sizes: Sequence[int]) -> Estimate:
    """An estimate of a figure that can be computed on any union of equal blocks of the samples.

    The interval is the jackknife's, with Student's t: the figure is computed with each block left out. The
    extrapolation is a straight line in ``1 / n`` through the figures of unions of 1/2 to all of the blocks, at
    ``1 / n = 0``: for the Frechet distance, whose bias is about proportional to ``1 / n``, it is FID-infinity.

    Args:
        value: the figure of the union of the blocks with these numbers.
        sizes: how many samples each block has.

    Source: Efron, "The Jackknife, the Bootstrap and Other Resampling Plans" (1982); Chong and Forsyth, "Effectively
        Unbiased FID and Inception Score and Where to Find Them" (CVPR 2020).

    >>> blocks = [0.9, 1.1, 1.0, 1.0]
    >>> estimate = estimate_by_blocks(lambda chosen: sum(blocks[b] for b in chosen) / len(chosen), [25] * 4)
    >>> round(estimate.value, 6), round(estimate.at_infinite_n, 6)
    (1.0, 1.0)
    """
    from scipy.stats import t

    count = len(sizes)
    everything = list(range(count))
    whole = value(everything)
    without = [value([b for b in everything if b != left_out]) for left_out in everything]
    mean = sum(without) / count
    error = math.sqrt((count - 1) / count * sum((each - mean) ** 2 for each in without))
    half_width = float(t.ppf((1 + CONFIDENCE) / 2, count - 1)) * error

    points = [(1 / sum(sizes), whole)]
    points += [(1 / (sum(sizes) - sizes[b]), each) for b, each in zip(everything, without, strict=True)]
    for size in range(count // 2, count - 1):
        for first in (0, count // 2):
            chosen = [(first + k) % count for k in range(size)]
            points.append((1 / sum(sizes[b] for b in chosen), value(chosen)))
    inverse_sizes, values = np.array(points).T
    slope_and_limit = np.polyfit(inverse_sizes, values, 1)
    return Estimate(
        value=whole, interval=(whole - half_width, whole + half_width), at_infinite_n=float(slope_and_limit[1])
    )


def estimate_of_share(share: float, count: int) -> Estimate:
    """An estimate of a share of ``count`` images, with Wilson's interval.

    Source: Wilson, "Probable Inference, the Law of Succession, and Statistical Inference" (1927).

    >>> estimate_of_share(1.0, 100).interval[0] < 0.97
    True
    """
    centre = (share + _Z**2 / (2 * count)) / (1 + _Z**2 / count)
    half_width = _Z / (1 + _Z**2 / count) * math.sqrt(share * (1 - share) / count + _Z**2 / (4 * count**2))
    # At 0 and 1 the ends are these numbers; rounding would leave a little beside them.
    low, high = 0.0 if share == 0 else centre - half_width, 1.0 if share == 1 else centre + half_width
    return Estimate(value=share, interval=(max(low, 0.0), min(high, 1.0)))


def estimate_of_subsets(mean: float, std: float, *, subset_size: int, count: int) -> Estimate:
    """An estimate of an unbiased figure from its spread over random subsets.

    Subsets of ``m`` of ``n`` images spread by ``sigma^2 / m (1 - m / n)``; the whole has ``sigma^2 / n``.

    Source: Politis and Romano, "Large Sample Confidence Regions Based on Subsamples under Minimal Assumptions" (1994).
    """
    half_width = _Z * std * math.sqrt(subset_size / (count - subset_size))
    return Estimate(value=mean, interval=(mean - half_width, mean + half_width), at_infinite_n=mean)
