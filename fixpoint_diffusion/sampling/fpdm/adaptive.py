"""The threshold with which an FPDM's adaptive iterations meet a budget, found on probe batches (FPDM, Appendix C)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from fixpoint_diffusion.models.fpdm import FPDM
from fixpoint_diffusion.processes import NoiseSchedule
from fixpoint_diffusion.sampling.fpdm.iterations import ToTolerance
from fixpoint_diffusion.sampling.fpdm.sampler import sample_fpdm

_WITHIN = 0.1  # of the budget, what the probe batch may miss it by
_AIM = 0.02  # at which the search ends early
_PROBES = 20
# Powers of 2 beyond these would leave float64's range. A layer that is solved exactly looks for ever smaller ones.
_MOST_EXPONENT = 1000.0


def adaptive_tolerance(
    model: FPDM,
    x_T: Tensor,
    schedule: NoiseSchedule,
    *,
    budget: float,
    steps: int = 50,
    max_iterations: int = 50,
    per_sample: bool = True,
    **options: Any,
) -> ToTolerance:
    """The threshold on the last difference with which sampling spends ``budget`` iterations an image.

    Every probe samples from ``x_T`` with one threshold: where that took too many iterations the next threshold is
    higher, else lower, by bisection of its logarithm, at most 20 times. Images that are sampled later need about as
    many iterations as those of the probes, so take a batch that is like them in number, classes and guidance.

    Args:
        model, schedule, steps: As for :func:`sample_fpdm`.
        x_T: Noise of the probe batch ``(N, C, H, W)``.
        budget: Iterations of the layer in all steps together, mean over images, as the ``total`` of :func:`allocate`.
        max_iterations, per_sample: Of the result.
        **options: Of :func:`sample_fpdm`, as the images will be sampled: ``eta``, ``reuse``, ``solver``, ``y`` ...

    Returns:
        The tolerance, to be passed as ``iterations`` of :func:`sample_fpdm`. On the probe batch it meets the budget
        within 10 %.

    Raises:
        ValueError: If the budget is less than one iteration a step or more than ``max_iterations``, or no threshold
            meets it: where all images stop together, few steps allow few totals.

    Source: Bai and Melas-Kyriazi, CVPR 2024, Appendix C.

    >>> from fixpoint_diffusion import initial_noise
    >>> from fixpoint_diffusion.experiments.fpdm import embedded_fpdm
    >>> model, schedule = embedded_fpdm()
    >>> probe, x_T = (initial_noise(seed, range(16), (1, 8, 8)) for seed in (0, 1))
    >>> tolerance = adaptive_tolerance(model, probe, schedule, budget=40, steps=10)
    >>> samples = sample_fpdm(model, x_T, schedule, steps=10, iterations=tolerance)
    >>> 36 < float(samples.iterations.double().mean(dim=1).sum()) < 44
    True
    """

    def spent(until: ToTolerance) -> float:
        samples = sample_fpdm(model, x_T, schedule, steps=steps, iterations=until, **options)
        return float(samples.iterations.double().mean(dim=1).sum())

    return threshold_for(spent, budget=budget, steps=steps, max_iterations=max_iterations, per_sample=per_sample)


def threshold_for(
    spent: Callable[[ToTolerance], float],
    *,
    budget: float,
    steps: int,
    max_iterations: int = 50,
    per_sample: bool = True,
) -> ToTolerance:
    """As :func:`adaptive_tolerance`, for a run of so many steps whose iterations an image ``spent`` tells."""
    if not steps <= budget <= steps * max_iterations:
        raise ValueError(
            f"a budget of {budget:g} iterations cannot be met in {steps} steps of 1 to {max_iterations} iterations"
        )

    def until(exponent: float) -> ToTolerance:
        return ToTolerance(atol=2.0**exponent, max_iterations=max_iterations, per_sample=per_sample)

    # In logarithms to base 2: the ends of the interval, None where not known yet, and the best so far.
    few: float | None = None
    many: float | None = None
    best, missed = 0.0, math.inf
    exponent, stride = 0.0, 2.0
    for _ in range(_PROBES):
        cost = spent(until(exponent))
        if abs(cost / budget - 1) < missed:
            best, missed = exponent, abs(cost / budget - 1)
        if missed <= _AIM:
            break
        few, many = (exponent, many) if cost <= budget else (few, exponent)
        if few is not None and many is not None:
            exponent = (few + many) / 2
        else:
            exponent += stride if many is not None else -stride
            stride *= 1.5
            exponent = min(max(exponent, -_MOST_EXPONENT), _MOST_EXPONENT)
    if missed > _WITHIN:
        raise ValueError(
            f"no threshold was found that spends {budget:g} iterations within {_WITHIN:.0%}: the nearest, "
            f"{2.0**best:.3g}, missed by {missed:.0%}"
        )
    return until(best)
