"""Which states of a chain are done, judged by their predicted errors. Small arrays on the host, no tensors."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from fixpoint.engine.norms import Array

# States before the last are done at this share of the tolerance: later ones inherit and may enlarge what is left.
_PRUDENCE = 4.0
# A predicted error that falls to a third in every round will sum to half of itself over all rounds to come.
_FALLING = 3.0

_INEXACT = np.finfo(np.float64).tiny  # what marks a state of a predicted error of 0 that may have one


class Norms(NamedTuple):
    """Norms ``(B, W)`` that a sweep over windows leaves, and what it says of each state."""

    error: Array  # of what the sweep changed in each state: the predicted error of the state before it
    scale: Array  # of the new state
    grown: Array  # of what the model of each step makes of the predicted error of its input
    met: Array  # of that error of its input
    image_change: Array  # of what each image has changed by since the round before
    input_change: Array  # of what its input has changed by; 0 where it counts for nothing
    sound: Array  # bool: whether the prediction can be trusted
    finite: Array  # bool: whether the image was finite


class Verdict(NamedTuple):
    """What a round settles."""

    done: Array  # (B,) states from the first of the window on that are done
    error: Array  # (B, W) predicted errors of the new states, infinity where none can be trusted
    failed: Array  # (B,) whether the chain is lost: the image of a state with an exact input was not finite


def judge(norms: Norms, inside: Array, error_before: Array, allowed: Array, ahead: Array, at_end: Array) -> Verdict:
    """Decide which states of each window are done.

    Args:
        norms: of the sweep.
        inside: ``(B, W)``, which states are in the window; the first always is, and its input is exact.
        error_before: ``(B, W)``, predicted errors a round earlier, infinity where there were none.
        allowed: ``(B, W)``, what the error of each state may be.
        ahead: ``(B, W)``, logarithm of how many times larger later states will show a state's relative error.
        at_end: ``(B,)``, whether the window reaches the end of its chain.
    """
    error = np.where(inside, norms.error, 0)
    error[:, 0] = 0.0
    # The first state is exact now, however far it has moved: what the model makes of that move is the second's error,
    # even where that happens to stay where it was.
    error[:, 1:2] = np.where(inside, np.maximum(error, norms.grown), error)[:, 1:2]
    # A state whose input has moved is not exact, even where the model says that its step does not see the move.
    error = np.where(inside & (norms.met > 0), np.maximum(error, _INEXACT), error)
    failed = ~norms.finite[:, 0]
    limit = np.where(norms.sound, allowed / np.exp(ahead), -1)
    done, error = accept(error, error_before, limit, inside, at_end)
    done[failed] = 0
    return Verdict(done, np.where(norms.sound, error, np.inf), failed)


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
    """Predicted errors ``(B, W)`` of the states after a sweep, from those of the states before it and a round earlier.

    The same again, to be safe, unless the last round was seen to do better.
    """
    falling = np.isfinite(error_before) & (error <= error_before / _FALLING)
    return np.where(falling, error / 2, error)
