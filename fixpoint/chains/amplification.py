"""How much a chain amplifies errors, as its steps were seen to do; and chains that go back for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from fixpoint.chains.error_control import Norms
from fixpoint.engine.norms import Array
from fixpoint.engine.outcome import tensor_like

if TYPE_CHECKING:
    from fixpoint.chains.run import ChainRun

AMPLIFIES = 30.0  # up to here, predicted errors were found to be trustworthy as they are
STRICTER = 10.0  # by how much the tolerance is tightened for a chain that has to go back
_LARGEST_AMPLIFY = 300.0  # the same where the largest gains that were ever seen are multiplied
_COUNTS = 0.1  # a change of an input tells what the step amplifies, if it is so much of the tolerance
_MODELLED = 4.0  # a modelled gain counts if the input's error is so many times what is called rounding
_RETRIES = 2  # so often a chain goes back, before it goes on step by step
_LARGEST_LOG = 700.0  # of what float64 can hold


class Gains:
    """Of every step of every chain, logarithms of how many times larger a change of its input came out of it.

    Best is what a twin has measured, see :class:`~fixpoint.chains.twin.Twin`. Before that, a gain is measured from two
    evaluations of the step, at inputs that differ by enough to count. The larger one of the last two counts: which way
    the next error will point is not known, and early rounds were far from the solution. Where nothing was measured,
    the gain is that by which the solver's model enlarged the predicted error.
    """

    def __init__(self, rows: int, steps: int) -> None:
        self._by_twin = np.full((rows, steps), -np.inf)
        self._measured = np.full((2, rows, steps), -np.inf)  # newest first
        self._largest = np.full((rows, steps), -np.inf)  # of all that were measured
        self._modelled = np.full((rows, steps), np.nan)

    def note(self, row: Array, step: Array, measured: Array, modelled: Array) -> None:
        """Take in the gains of steps, ``(N,)`` each; NaN where there is none."""
        with np.errstate(all="ignore"):
            measured, modelled = np.log(measured), np.log(modelled)
        known = np.isfinite(measured)
        newest, before = self._measured
        before[row[known], step[known]] = newest[row[known], step[known]]
        newest[row[known], step[known]] = measured[known]
        self._largest[row[known], step[known]] = np.maximum(self._largest[row[known], step[known]], measured[known])
        known = np.isfinite(modelled)
        self._modelled[row[known], step[known]] = modelled[known]

    def note_twin(self, rows: Array, gains: Array) -> None:
        """Take in what twins have measured of whole chains, ``(R, T)``; NaN where a step was not.

        A chain that is measured again, at states that are nearer to the solution, may show less than before: where its
        steps bend, what they amplify depends on the place. The measurement in which it amplifies most is kept.
        """
        with np.errstate(all="ignore"):
            logs = np.log(gains)
        more = _most(logs) >= _most(self._by_twin[rows])
        self._by_twin[rows[more]] = logs[more]

    def of(self, rows: Array) -> Array:
        """``(R, T)``: the logarithm of every step's gain."""
        return first_finite(self._known(rows), np.zeros(1))

    def _known(self, rows: Array) -> Array:
        """The same; not finite where nothing is known of a step."""
        return first_finite(self._by_twin[rows], self._measured[:, rows].max(axis=0), self._modelled[rows])

    def exponents(self, rows: Array) -> Array:
        """``(R,)``: the mean of the logarithms over the steps of which one is known; NaN without any.

        The first step does not count: nothing changes what starts a chain.
        """
        logs = self._known(rows)[:, 1:]
        finite = np.isfinite(logs)
        with np.errstate(invalid="ignore"):
            return np.where(finite, logs, 0).sum(axis=1) / finite.sum(axis=1)

    def largest(self, rows: Array) -> Array:
        """``(R, T)``: the same, if of all gains that were measured the largest one counts."""
        return first_finite(self._largest[rows], self._modelled[rows], np.zeros(1))

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


def _most(logs: Array) -> Array:
    """``(R,)``: the largest sum of consecutive logarithms ``(R, T)``, at least 0; what is not finite counts as 0."""
    total = np.cumsum(np.where(np.isfinite(logs), logs, 0), axis=1)
    least = np.minimum(np.minimum.accumulate(total, axis=1), 0)
    return (total - least).max(axis=1, initial=0)


def first_finite(*choices: Array) -> Array:
    """Entry by entry the first of the arrays that is finite, or else the last."""
    *others, found = choices
    for choice in reversed(others):
        found = np.where(np.isfinite(choice), choice, found)
    return found


def ahead(gains: Array, scale: Array, seen: Array, done: Array) -> Array:
    """Logarithm of how many times larger later states show the relative error of each state: ``(R, T)``, >= 0.

    Args:
        gains: ``(R, T)``, logarithms of the steps' gains.
        scale: ``(R, T)``, norms of the states.
        seen: ``(R,)``: of so many states something is known. Errors are taken to grow beyond them at the pace at
            which they grew over the states that are done, if they did.
        done: ``(R,)``, so many states are done.
    """
    step = np.arange(scale.shape[1])
    with np.errstate(all="ignore"):
        growth = gains + np.log(np.concatenate((scale[:, :1], scale[:, :-1]), axis=1) / scale)
    growth = np.where(np.isfinite(growth) & (step < seen[:, None]), growth, 0)
    growth[:, :1] = 0  # what starts a chain has no error
    so_far = np.where(step < done[:, None], growth, 0).sum(axis=1)
    pace = np.maximum(so_far, 0) / np.maximum(done, 1)
    total = np.cumsum(np.where(step < seen[:, None], growth, pace[:, None]), axis=1)
    return np.minimum(np.maximum.accumulate(total[:, ::-1], axis=1)[:, ::-1] - total, _LARGEST_LOG)


def note_gains(run: ChainRun, row: Array, step: Array, norms: Norms, inside: Array) -> None:
    """Take in what a round has shown of the steps' gains; changes far below the tolerance may be rounding."""
    grown, met, image_change, input_change = (x[inside] for x in norms[2:6])
    before = np.maximum(step - 1, 0)
    scale = run.scale[row, before]
    allowed = run.bound(np.arange(len(run.scale)))[row, before]
    rounding = run.rounding * scale
    counts = np.maximum(_COUNTS * allowed, rounding)
    with np.errstate(all="ignore"):
        measured = np.where(input_change > counts, image_change / input_change, np.nan)
        run.gains.note(row, step, measured, np.where(met > _MODELLED * rounding, grown / met, np.nan))


def doubtful(run: ChainRun, rows: Array) -> Array:
    """``(R,)``: which chains, of which all is done and not exact, may amplify so much that they have to be measured."""
    if not run.doubts or not rows.size:
        return np.zeros(len(rows), dtype=bool)
    largest = ahead(run.gains.largest(rows), run.reference_norms(rows), run.seen[rows], run.done[rows])
    amplify = run.ahead(rows).max(axis=1, initial=0) > np.log(AMPLIFIES)
    amplify |= largest.max(axis=1, initial=0) > np.log(_LARGEST_AMPLIFY)
    return amplify & ~run.in_order[rows] & (run.error[rows] > 0).any(axis=1)


def go_back(run: ChainRun, rows: Array, first: Array) -> None:
    """Chains go on from the states ``first``; step by step, from where they are not exact, if that was tried enough."""
    if not rows.size:
        return
    run.retries[rows] += 1
    ahead = run.ahead(rows)
    hopeless = ((ahead > run.finest(rows)) & (ahead > np.log(AMPLIFIES))).any(axis=1)
    hopeless |= (run.retries[rows] > _RETRIES) | (run.nfev - run.twin_evals > run.steps)
    run.in_order[rows] = run.sweeper.single_steps & hopeless
    inexact = np.argmax(run.error[rows] > 0, axis=1)
    run.done[rows] = np.where(run.in_order[rows], np.minimum(first, inexact), first)
    whole = run.sweeper.options.widest(run.remaining, run.steps) == run.steps  # else there is no room for all states
    run.end[rows] = np.where(run.in_order[rows] | (not whole), run.done[rows], run.steps)
    if not whole and run.width > 1:  # a window of one has no past
        forgotten = rows[:, None] * run.width + np.arange(run.width)
        run.past.known[tensor_like(run.start, forgotten.ravel())] = False
    run.moved[tensor_like(run.start, rows)] = 0
