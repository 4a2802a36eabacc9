"""Which steps of a window are evaluated, of chains that can interpolate the others.

Early rounds are far from the solution, and neighbouring steps of a long chain do nearly the same. So all steps are
evaluated only up to where states are near the tolerance, or as near as interpolation brings them. Beyond, every eighth
or fourth is. A state is done only if its step and all before it in the window were evaluated.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from fixpoint.chains.error_control import Norms
from fixpoint.engine.norms import Array

if TYPE_CHECKING:
    from fixpoint.chains.run import ChainRun, Windows

# Steps from one that is evaluated to the next, in windows of at least so many states.
_SPACINGS = ((512, 8), (64, 4))
# All steps are evaluated where the predicted error of the state before is at most so many times the tolerance,
_NEAR = 10.0
# or so many times what interpolation seems to miss: a round takes no more than that from an error.
_ROUND = 10.0
# Leaving an evaluated step out doubles the gap, and the interpolation error becomes about so many times larger.
_DISTANCE = 3.0


class Sparse:
    """What is known of chains of which not all steps have to be evaluated, on the host: ``(B, T)`` each.

    Attributes:
        expected: Predicted error of each state before it was swept last; infinity before.
        missed: Estimated error that interpolation adds between this evaluated step and the next; 0 at other steps.
        evaluated: Whether the image of the step was evaluated, when it was in a window last.
        prefix: ``(B,)``: all steps before this number are evaluated in every round.
    """

    def __init__(self, rows: int, steps: int) -> None:
        self.expected = np.full((rows, steps), np.inf)
        self.missed = np.zeros((rows, steps))
        self.evaluated = np.zeros((rows, steps), dtype=bool)
        self.prefix = np.zeros(rows, dtype=np.int64)

    def choose(self, run: ChainRun, windows: Windows) -> Array:
        """``(R, W)``: which steps of the windows to evaluate, among them the first and the last of each."""
        rows, step, inside, spacing = windows.rows, windows.step, windows.inside, spacings(windows)
        before = np.maximum(step - 1, 0)
        expected, bound = (np.take_along_axis(x, before, axis=1) for x in (self.expected[rows], run.bound(rows)))
        # Errors of different steps add as squares.
        missed = np.take_along_axis(np.sqrt(np.cumsum(np.square(self.missed[rows]), axis=1)), step, axis=1)
        near = (expected <= np.maximum(_NEAR * bound, _ROUND * missed)) & inside
        near[:, 0] = True
        self.prefix[rows] = np.maximum(self.prefix[rows], run.done[rows] + np.cumprod(near, axis=1).sum(axis=1))
        chosen = (step < self.prefix[rows, None]) | (step % spacing == spacing - 1)
        chosen[:, 0] = True
        chosen[np.arange(len(rows)), windows.count - 1] = True
        return inside & chosen

    def changed(self, windows: Windows) -> Array:
        """``(R, W)``: steps that are evaluated where they were interpolated in the last round, or the other way round.

        The change of their images holds what interpolation missed, which says nothing of how they follow their inputs.
        """
        return windows.evaluated != self.evaluated[windows.rows[:, None], windows.step]

    def note(self, windows: Windows, norms: Norms, missed: Array) -> Norms:
        """Take in what a round has shown of its windows; a state whose step was interpolated is not to be done."""
        inside, evaluated = windows.inside, windows.evaluated
        row, step = np.broadcast_to(windows.rows[:, None], inside.shape)[inside], windows.step[inside]
        self.expected[row, step] = norms.error[inside]
        # Of a row that is evaluated whole nothing is interpolated, whatever is evaluated beside it.
        some = (inside & ~evaluated).any(axis=1, keepdims=True)
        self.missed[row, step] = (some * spacings(windows) / _DISTANCE * missed)[inside]
        self.evaluated[row, step] = evaluated[inside]
        return norms._replace(sound=norms.sound & evaluated)


def spacings(windows: Windows) -> Array:
    """``(R, 1)``: steps from one that is evaluated to the next, in each of the windows."""
    count = windows.count[:, None]
    return np.select([count >= least for least, _ in _SPACINGS], [spacing for _, spacing in _SPACINGS], 1)
