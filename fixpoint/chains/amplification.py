"""How much a chain amplifies errors, as its steps were seen to do. Small arrays on the host, no tensors."""

from __future__ import annotations

import numpy as np

from fixpoint.engine.tolerance import Array

_LARGEST_LOG = 700.0  # of what float64 can hold


class Gains:
    """Of every step of every chain, logarithms of how many times larger a change of its input came out of it.

    A gain is measured from two evaluations of the step, at inputs that differ by enough to count. The larger one of the
    last two counts: which way the next error will point is not known, and early rounds were far from the solution.
    Where nothing was measured, the gain is the one by which the solver's model of the step enlarged the predicted error.
    """

    def __init__(self, rows: int, steps: int) -> None:
        self._measured = np.full((2, rows, steps), -np.inf)  # newest first
        self._modelled = np.zeros((rows, steps))

    def note(self, row: Array, step: Array, measured: Array, modelled: Array) -> None:
        """Take in the gains of steps, ``(N,)`` each; NaN where there is none."""
        with np.errstate(all="ignore"):
            measured, modelled = np.log(measured), np.log(modelled)
        known = np.isfinite(measured)
        newest, before = self._measured
        before[row[known], step[known]] = newest[row[known], step[known]]
        newest[row[known], step[known]] = measured[known]
        known = np.isfinite(modelled)
        self._modelled[row[known], step[known]] = modelled[known]

    def of(self, rows: Array) -> Array:
        """``(R, T)``: the logarithm of every step's gain."""
        measured = self._measured[:, rows].max(axis=0)
        return np.where(np.isfinite(measured), measured, self._modelled[rows])

    def ahead(self, rows: Array, scale: Array, seen: Array, done: Array) -> Array:
        """Logarithm of how many times larger later states show the relative error of each state: ``(R, T)``, >= 0.

        Args:
            rows: ``(R,)``.
            scale: ``(R, T)``, norms of the states.
            seen: ``(R,)``: of so many states something is known. Errors are taken to grow beyond them at the pace at
                which they grew over the states that are done, if they did.
            done: ``(R,)``, so many states are done.
        """
        step = np.arange(scale.shape[1])
        with np.errstate(all="ignore"):
            growth = self.of(rows) + np.log(np.concatenate((scale[:, :1], scale[:, :-1]), axis=1) / scale)
        growth = np.where(np.isfinite(growth) & (step < seen[:, None]), growth, 0)
        growth[:, :1] = 0  # what starts a chain has no error
        so_far = np.where(step < done[:, None], growth, 0).sum(axis=1)
        pace = np.maximum(so_far, 0) / np.maximum(done, 1)
        total = np.cumsum(np.where(step < seen[:, None], growth, pace[:, None]), axis=1)
        return np.minimum(np.maximum.accumulate(total[:, ::-1], axis=1)[:, ::-1] - total, _LARGEST_LOG)

    def accumulated(self, rows: Array, defects: Array) -> Array:
        """``(R, T)``: the error that states have by their own defects and by those before them.

        Defects ``(R, T)`` of different states point in different directions: their squares add up.
        """
        gains = np.exp(np.minimum(self.of(rows), _LARGEST_LOG))
        errors, error = np.empty_like(defects), np.zeros(len(rows))
        with np.errstate(over="ignore"):
            for k in range(defects.shape[1]):
                error = np.hypot(defects[:, k], gains[:, k] * error)
                errors[:, k] = error
        return errors
