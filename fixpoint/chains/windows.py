"""The loop for chains: what is evaluated are single steps of single rows, in a window that slides along each chain."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fixpoint.chains.error_control import accept, log_amplification, log_growth
from fixpoint.chains.sweep import Past
from fixpoint.engine.ambient import without_autocast
from fixpoint.engine.loop import LoopResult, Map, Watcher, figures_like, like
from fixpoint.engine.tolerance import Array, Status, Tolerance

if TYPE_CHECKING:
    from fixpoint.chains.causal import CausalSweep

_ACTIVE = -1
# A state so many times larger than all before it is a wrong model's, not the chain's.
_WILD = 100.0


@without_autocast
def iterate_windows(
    f: Map,
    z: Tensor,
    sweeper: CausalSweep,
    tolerance: Tolerance,
    *,
    max_evals: int,
    record: bool = False,
    watch: Watcher | None = None,
    announce: Callable[[Any], object] = lambda _: None,
    **_: Any,
) -> LoopResult:
    """Evaluate windows of ``f`` and sweep along them until every row of ``z`` ``(B, T * D)`` has ended.

    Options as for ``iterate``. Chains are checked after every evaluation and leave out what is done by themselves.
    """
    chains = _Chains(z, sweeper, tolerance)
    announce(chains)
    while chains.remaining and chains.nfev < max_evals:
        if chains.swept:
            chains.certify(f)
        elif chains.width == 1:
            chains.run_steps(f)
        else:
            chains.round(f)
        chains.trace += [chains.residual()] if record else []
        # A copy: the states are written to in the next round.
        if watch and watch(chains.nfev, figures_like(z, chains.residual()), chains.remaining, chains.rows.clone()):
            break
    return chains.outcome()


class _Chains:
    """States, windows and figures of all rows. Figures and windows are kept on the host, as small arrays."""

    def __init__(self, z: Tensor, sweeper: CausalSweep, tolerance: Tolerance) -> None:
        self._like, self._sweeper, self._tolerance = z, sweeper, tolerance
        self.states = sweeper.split(z).clone()
        rows, steps, dim = self.states.shape
        options = sweeper.options
        self.width = min(options.window or steps, options.max_rows or steps, steps)
        self._past = Past.empty(rows, self.width, options.memory, dim, self.states)
        # How far the last two states of each window are from their guess.
        self._moved, self._moved_before = self.states.new_zeros(2, rows, dim).unbind(0)
        self.done = np.zeros(rows, dtype=np.int64)  # states that are done
        self._end = np.zeros(rows, dtype=np.int64)  # states that are, or were, in the window
        self._error = np.full((rows, steps), np.inf)  # predicted error of each state, and its norm
        self._scale = np.ones((rows, steps))
        self.status = np.full(rows, _ACTIVE)
        self.evals = np.zeros(rows, dtype=np.int64)
        self._grown = np.zeros(rows)  # logarithm of what the steps done have made of relative errors
        self.nfev = 0
        self.trace: list[Array] = []

    @property
    def rows(self) -> Tensor:
        """The states as rows ``(B, T * D)``."""
        return self._sweeper.join(self.states, self._like)

    @property
    def remaining(self) -> int:
        """Rows that have not ended."""
        return int(np.count_nonzero(self.status == _ACTIVE))

    @property
    def swept(self) -> bool:
        """Whether every row that has not ended waits for its certificate alone."""
        return bool((self.done[self.status == _ACTIVE] == self._sweeper.steps).all())

    def residual(self) -> Array:
        """Norm of the predicted error of each row: infinity while a state has not been seen."""
        return np.sqrt(np.square(self._error).sum(axis=1))

    def outcome(self) -> LoopResult:
        """What is known by now; rows that have not ended are called ``MAX_EVALS``."""
        active = self.status == _ACTIVE
        residual = figures_like(self._like, np.where(self.status == Status.NON_FINITE, np.inf, self.residual()))
        scale = figures_like(self._like, np.sqrt(np.square(self._scale).sum(axis=1)))
        status = like(self._like, np.where(active, Status.MAX_EVALS, self.status))
        evals = like(self._like, np.where(active, self.nfev, self.evals))
        trace = figures_like(self._like, np.stack(self.trace)) if self.trace else None
        return LoopResult(self.rows, residual, scale, status, evals, self.nfev, trace)

    def round(self, f: Map) -> None:
        """Evaluate the windows, sweep along them, and move them on."""
        rows, count = self._open_windows()
        step = self.done[rows, None] + np.arange(count.max())
        inside = np.arange(count.max()) < count[:, None]
        place = _Place(self._like, rows, step, inside, self.width)
        images = place.spread(self._evaluate(f, place))
        inputs = torch.where(place.first, 0, self.states[place.row, (place.step - 1).clamp(min=0)])
        states = self.states[place.row, place.step]
        finite = torch.isfinite(images).all(dim=2, keepdim=True)
        known = finite & place.inside[..., None]
        images = torch.where(known, images, states)
        past = Past(*(x[place.row, place.slot] for x in self._past))
        carried = self._sweeper.carry(inputs, images, images - states, place.step, past)
        after = images + carried
        after, sound = _held(after, finite)
        change = after - states
        before = torch.cat((torch.zeros_like(change[:, :1]), change[:, :-1]), dim=1)
        norms = [torch.linalg.vector_norm(x, dim=2) for x in (change, after, carried, before)]
        error, scale, stretched, met, trusted, finite_ = (
            torch.stack([*norms, sound, finite[..., 0]]).cpu().double().numpy()
        )

        self.states.index_put_(place.where, after[place.chosen])
        newest = past.with_newest(inputs, images)
        for ours, new in zip(self._past, newest, strict=True):
            new = new & known & sound[..., None] if new.dtype == torch.bool else new
            ours.index_put_(place.kept_where, new[place.chosen])
        last, number = like(self._like, count - 1), torch.arange(len(rows), device=change.device)
        self._moved.index_add_(0, place.rows, change[number, last])
        self._moved_before.index_add_(0, place.rows, before[number, last])
        self._settle(rows, step, inside, error, scale, np.stack((stretched, met)), trusted > 0, finite_ > 0)

    def _evaluate(self, f: Map, place: _Place) -> Tensor:
        """Images ``(N, D)`` of what is inside the windows."""
        self.nfev += 1
        return self._part(f, place.where)

    def _part(self, f: Map, where: tuple[Tensor, Tensor]) -> Tensor:
        """Rows and steps ``where``, ``(N,)`` each, of ``f``: ``(N, D)``."""
        part = getattr(f, "part", None)
        images = self._sweeper.split(f(self.rows))[where] if part is None else part(self.rows, *where)
        return images.to(self.states.dtype)

    def _waiting(self) -> Array:
        """Rows that have states to do, as many as there is room for."""
        rows = np.flatnonzero((self.status == _ACTIVE) & (self.done < self._sweeper.steps))
        return rows[: self._sweeper.options.max_rows]

    def _open_windows(self) -> tuple[Array, Array]:
        """Rows with a window in this round, and how many states each has; new states are moved from their guess."""
        steps, limit = self._sweeper.steps, self._sweeper.options.max_rows
        rows = self._waiting()
        share = self.width if limit is None else min(self.width, limit // len(rows))
        end = np.maximum(self._end[rows], np.minimum(self.done[rows] + share, steps))
        self._move_guesses(rows, end)
        self._end[rows] = end
        return rows, end - self.done[rows]

    def _move_guesses(self, rows: Array, end: Array) -> None:
        """Take the states that enter the windows along with the last state before them, as their slopes would."""
        new = end - self._end[rows]
        if not new.any() or not self._end[rows].any():
            return
        step = self._end[rows, None] + np.arange(new.max())
        place = _Place(self._like, rows, step, np.arange(new.max()) < new[:, None], self.width)
        previous, before = self._moved[place.rows], self._moved_before[place.rows]
        moved = self._sweeper.follow(place.step, previous, before)
        self.states.index_put_(place.where, moved[place.chosen], accumulate=True)
        last = like(self._like, np.maximum(new - 1, 0))
        number = torch.arange(len(rows), device=moved.device)
        entered = like(self._like, new > 0)[:, None]
        moved = torch.cat((previous[:, None], moved), dim=1)
        self._moved.index_copy_(0, place.rows, torch.where(entered, moved[number, last + 1], previous))
        self._moved_before.index_copy_(0, place.rows, torch.where(entered, moved[number, last], before))
        # What these slots of the memory told was about other steps.
        self._past.known.index_put_(place.kept_where, self._past.known.new_zeros(()))

    def _settle(
        self,
        rows: Array,
        step: Array,
        inside: Array,
        error: Array,
        scale: Array,
        stretch: Array,
        trusted: Array,
        finite: Array,
    ) -> None:
        """Decide which states are done and which rows have ended, from the norms of this round's windows."""
        error, scale = np.where(inside, error, 0), np.where(inside, scale, 1)
        failed = ~finite[:, 0]  # the input of a window's first state is exact
        limit = self._tolerance.atol + self._tolerance.rtol * scale
        error[:, 0] = 0.0
        growth = log_growth(stretch, scale, inside)
        # Beyond the window, errors are taken to grow at the pace seen so far.
        pace = np.maximum(self._grown[rows], 0) / np.maximum(self.done[rows], 1)
        beyond = pace * (self._sweeper.steps - self._end[rows])
        ahead = np.minimum(log_amplification(growth) + beyond[:, None], 700)
        allowed = np.where(trusted, limit / np.exp(ahead), -1)
        before = self._error[rows[:, None], np.minimum(step, self._sweeper.steps - 1)]
        done, error = accept(error, before, allowed, inside, self._end[rows] == self._sweeper.steps)
        done[failed] = 0
        self._grown[rows] += np.where(np.arange(growth.shape[1]) < done[:, None], growth, 0).sum(axis=1)
        row, place = np.nonzero(inside)
        self._error[rows[row], step[row, place]] = np.where(trusted, error, np.inf)[row, place]
        self._scale[rows[row], step[row, place]] = scale[row, place]
        self._end_rows(rows, done, failed)

    def run_steps(self, f: Map) -> None:
        """One exact step of each row, where no more may be in a window: nothing is predicted."""
        self.nfev += 1
        rows = self._waiting()
        step = self.done[rows]
        where = like(self._like, rows), like(self._like, step)
        images = self._part(f, where)
        self.states.index_put_(where, images)
        scale = torch.linalg.vector_norm(images, dim=1).cpu().double().numpy()
        finite = np.isfinite(scale)
        self._error[rows, step] = np.where(finite, 0.0, np.inf)
        self._scale[rows, step] = scale
        self._end_rows(rows, finite.astype(np.int64), ~finite)

    def _end_rows(self, rows: Array, done: Array, failed: Array) -> None:
        """Count the states that are ``done`` now, and end the rows that have no more or have failed."""
        self.done[rows] += done
        self.status[rows[failed]] = Status.NON_FINITE
        if not self._sweeper.options.certify:
            self.status[rows[self.done[rows] == self._sweeper.steps]] = Status.CONVERGED
        self.evals[rows[self.status[rows] != _ACTIVE]] = self.nfev

    def certify(self, f: Map) -> None:
        """Evaluate whole chains once more: rows whose every state meets the tolerance have converged, others go on."""
        rows = np.flatnonzero(self.status == _ACTIVE)
        steps = self._sweeper.steps
        step = np.tile(np.arange(steps), (len(rows), 1))
        place = _Place(self._like, rows, step, np.ones_like(step, dtype=bool), steps)
        images = place.spread(self._evaluate(f, place))
        inputs = torch.cat((torch.zeros_like(self.states[:, :1]), self.states[:, :-1]), dim=1)[place.rows]
        defects = images - self.states[place.rows]
        if self._sweeper.slopes is None:
            carried = torch.zeros_like(defects)  # nothing is known of how they add up
        else:
            past = Past.empty(len(rows), steps, 1, defects.shape[2], defects)
            carried = self._sweeper.carry(inputs, images, defects, place.step, past)
        norms = [torch.linalg.vector_norm(x, dim=2) for x in (defects, images, defects + carried)]
        defect, scale, error = torch.stack(norms).cpu().double().numpy()
        bound = self._tolerance.atol + self._tolerance.rtol * scale
        good = np.isfinite(defect) & (error <= bound)
        failed = ~np.isfinite(defect).all(axis=1)
        passed = good.all(axis=1)
        self._error[rows], self._scale[rows] = defect, scale
        self.status[rows[passed]] = Status.CONVERGED
        self.status[rows[failed]] = Status.NON_FINITE
        self.evals[rows[passed | failed]] = self.nfev
        again = rows[~passed & ~failed]
        self.done[again] = np.argmin(good[~passed & ~failed], axis=1)
        self._end[again] = steps if self.width == steps else self.done[again]
        self._past.known[like(self._like, again)] = False
        for moved in (self._moved, self._moved_before):
            moved[like(self._like, again)] = 0


class _Place:
    """Where the states of some windows are, as tensors on the device of the states."""

    def __init__(self, z: Tensor, rows: Array, step: Array, inside: Array, width: int) -> None:
        self.rows = like(z, rows)
        self.inside = like(z, inside)
        step = np.where(inside, step, 0)
        self.step = like(z, step)
        self.slot = like(z, step % width)
        self.row = like(z, np.tile(rows[:, None], (1, step.shape[1])))
        self.first = like(z, (step == 0)[..., None])
        # Found on the host: a mask as an index would make it wait for the device.
        line, column = np.nonzero(inside)
        self.chosen = like(z, line), like(z, column)  # of a window's states, those that are inside
        self.where = like(z, rows[line]), like(z, step[line, column])  # those among all states
        self.kept_where = self.where[0], like(z, step[line, column] % width)  # and among what is remembered

    def spread(self, values: Tensor) -> Tensor:
        """``(N, D)`` of what is inside, as ``(B, W, D)`` with zeros elsewhere."""
        out = values.new_zeros(*self.step.shape, values.shape[1])
        out[self.chosen] = values
        return out


def _held(after: Tensor, finite: Tensor) -> tuple[Tensor, Tensor]:
    """States ``(B, W, D)`` without those that a wrong model has thrown far out, and which are sound ``(B, W)``.

    From the first state on that is not finite, or a hundred times larger than all before it, the chain starts over
    from the state before: one exact state more in each round is certain in any case.
    """
    size = torch.linalg.vector_norm(after, dim=2)
    largest = size.cummax(dim=1).values
    sane = torch.isfinite(size) & finite[..., 0]
    sane[:, 1:] &= size[:, 1:] <= _WILD * largest[:, :-1]
    sane[:, 0] = True
    sound = sane.cumprod(dim=1).bool()
    index = torch.minimum(torch.arange(after.shape[1], device=after.device), sound.sum(dim=1, keepdim=True) - 1)
    return after.gather(1, index[..., None].expand_as(after)), sound
