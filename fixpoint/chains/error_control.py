"""What the predicted errors of a chain's states say: which are done, and what becomes of the errors that are left."""

from __future__ import annotations

import numpy as np

from fixpoint.engine.tolerance import Array

# States before the last are done at this share of the tolerance: later ones inherit and may enlarge what is left.
_PRUDENCE = 4.0
# A predicted error that falls to a third in every round will sum to half of itself over all that are to come.
_FALLING = 3.0


def accept(error: Array, error_before: Array, allowed: Array, inside: Array, at_end: Array) -> tuple[Array, Array]:
    """How many states of each window are done ``(B,)``, and the predicted errors of its states from then on ``(B, W)``.

    Args:
        error: predicted errors ``(B, W)`` of the states that a sweep has just replaced; 0 for the first, whose input
            is exact.
        error_before: the same a round earlier; infinity where there was none.
        allowed: what each may be; negative where the prediction is not trusted.
        inside: which of the W are in the window, the first always.
        at_end: ``(B,)``, whether the window reaches the end of its chain; all of it may then be done at once.
    """
    good = (error <= allowed / _PRUDENCE) & inside
    prefix = np.cumprod(good, axis=1).sum(axis=1)
    left = after_sweep(error, error_before)
    finished = at_end & ((left <= allowed) | ~inside).all(axis=1)
    return np.where(finished, inside.sum(axis=1), prefix), np.where(finished[:, None], left, error)


def after_sweep(error: Array, error_before: Array) -> Array:
    """``(B, W)``: predicted error of the states after a sweep, from that of the states before it and a round earlier.

    That is the same again, to be safe, unless a round is seen to do better.
    """
    falling = np.isfinite(error_before) & (error <= error_before / _FALLING)
    return np.where(falling, error / 2, error)


def log_growth(stretch: Array, scale: Array, inside: Array) -> Array:
    """``(B, W)``: logarithm of what each step makes of a relative error.

    ``stretch`` are the norms of what each step was seen to make of a displacement, and of that displacement.
    """
    with np.errstate(all="ignore"):
        before = np.concatenate((scale[:, :1], scale[:, :-1]), axis=1)
        growth = np.log(stretch[0] / stretch[1] * before / scale)
    return np.where(np.isfinite(growth) & inside, growth, 0)


def log_amplification(growth: Array) -> Array:
    """``(B, W)``: logarithm of how many times larger later states will show a state's relative error, at least 0."""
    total = np.cumsum(growth, axis=1)
    return np.maximum.accumulate(total[:, ::-1], axis=1)[:, ::-1] - total
