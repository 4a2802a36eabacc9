"""Chains while they are solved: which of their states are worked on, what is known of them, how they are evaluated."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from fixpoint.chains.amplification import Gains, ahead
from fixpoint.chains.probes import Probes
from fixpoint.chains.sparse import Sparse
from fixpoint.chains.sweep import Past, WindowPast, parts
from fixpoint.engine.layout import as_tensor
from fixpoint.engine.loop import Map
from fixpoint.engine.norms import Array, safe_norm, to_host
from fixpoint.engine.outcome import ACTIVE, LoopResult, figures_like, tensor_like
from fixpoint.engine.tolerance import ROUNDINGS, Status, Tolerance, for_rows

if TYPE_CHECKING:
    from fixpoint.chains.causal_sweep import CausalSweep
    from fixpoint.chains.certificate import Certificate, Findings
    from fixpoint.chains.twin import Twin

_ROUNDINGS = 8.0  # so many roundings are no more than rounding; no tolerance is finer


@dataclass(frozen=True)
class Windows:
    """Some states of some chains: a stretch of each, padded to a common width W. On the host.

    Attributes:
        rows: ``(R,)``, numbers of the chains.
        count: ``(R,)``, states of each.
        step: ``(R, W)``, numbers of the states; 0 where padded.
        inside: ``(R, W)``, false where padded.
        evaluated: ``(R, W)``, steps that are evaluated; the others inside are interpolated.
    """

    rows: Array
    count: Array
    step: Array
    inside: Array
    evaluated: Array

    @classmethod
    def of(cls, rows: Array, first: Array, count: Array) -> Windows:
        """``count`` states from the state ``first`` on, ``(R,)`` each."""
        offset = np.arange(count.max(initial=0))
        inside = offset < count[:, None]
        return cls(rows, count, np.where(inside, first[:, None] + offset, 0), inside, inside)

    def places(self, length: int, chains: int, *, before: bool = False) -> Array:
        """Where the states are kept, ``(R, W)``, if ``length`` places are kept for each of so many chains.

        It is the place after all of them where padded. ``before`` asks for the states before them instead, and finds
        that place for those before the first as well.
        """
        step = self.step - before
        return np.where(self.inside & (step >= 0), self.rows[:, None] * length + step % length, chains * length)


class ChainRun:
    """Chains while they are solved: their states on the device, their figures on the host as small arrays.

    What is kept for each state lies in one tensor ``(places + 1, ...)``. The last place is scratch: padded windows
    read zeros there, and what they write is wiped.
    """

    def __init__(self, z: Tensor, sweeper: CausalSweep, tolerance: Tolerance) -> None:
        self.start, self.sweeper = z, sweeper
        states = sweeper.split(z)
        rows, steps, dim = states.shape
        options = sweeper.options
        self.width = options.widest(1, steps)
        self.probes = Probes(rows, steps, dim, options.probes, states) if options.probes else None
        self.sparse = Sparse(rows, steps) if sweeper.sparse else None
        self.states = torch.cat((states.reshape(rows * steps, dim), states.new_zeros(1, dim)))
        # How far the last state of each window has moved from its guess, and the state before that: (B, 2, D).
        self.moved = states.new_zeros(rows, 2, dim)
        # What is certified is a row: its states share atol, so that all together keep to it.
        share = max(steps, 1) ** -0.5 if options.certify else 1.0
        # What the error of a state may be: so much, (B, T), and so many times its reference norm, (B,).
        self.allowed = share * per_row(tolerance.atol, rows)[:, None] + sweeper.noise, per_row(tolerance.rtol, rows)
        self.done = np.zeros(rows, dtype=np.int64)  # states that are done
        self.end = np.zeros(rows, dtype=np.int64)  # states that are, or were, in the window
        self.error = np.full((rows, steps), np.inf)  # predicted error of each state
        self.scale = np.ones((rows, steps))  # and its norm
        self.residual = np.full(rows, np.nan)  # ||f(z) - z||, where it was measured
        self.gains = Gains(rows, steps)
        self.seen = np.zeros(rows, dtype=np.int64)  # states that have ever been in the window
        self.retries = np.zeros(rows, dtype=np.int64)  # how often states that were done proved not to be
        self.in_order = np.zeros(rows, dtype=bool)  # rows that go on step by step, each from an exact state
        self.status = np.full(rows, ACTIVE if steps else Status.CONVERGED)
        self.evals = np.zeros(rows, dtype=np.int64)
        self.ended_early = Status.MAX_EVALS  # what rows are called that have not ended
        self.certificate: Certificate | None = None
        self.findings: Findings | None = None  # of the certificate, while a twin measures what the chains amplify
        self.twin: Twin | None = None
        self.twin_evals = 0  # evaluations of twins, part of nfev
        self.together = False  # rows were seen to depend on one another: they end at the same certificate
        self.doubts = sweeper.single_steps  # whether chains that may amplify much are measured
        self.nfev = 0
        self.trace: list[Array] = []

    @cached_property
    def past(self) -> Past:
        """What is remembered of the steps; nothing is allocated before the first round has been evaluated."""
        # A window of one needs no model.
        places = len(self.start) * self.width + 1 if self.width > 1 else 1
        return Past.empty((places,), self.sweeper.options.remembered, self.sweeper.dim, self.states)

    @property
    def steps(self) -> int:
        """T."""
        return self.sweeper.steps

    @property
    def remaining(self) -> int:
        """Rows that have not ended."""
        return int(np.count_nonzero(self.status == ACTIVE))

    @property
    def to_compare(self) -> Array:
        """Rows of an f evaluated whole that have converged: later evaluations must find the same residual."""
        measured = (self.status == Status.CONVERGED) & ~np.isnan(self.residual)
        return np.flatnonzero(measured & (not self.sweeper.single_steps))

    def rows(self) -> Tensor:
        """The states as rows ``(B, T * D)``; may share their memory, which the next round writes to."""
        return self.sweeper.join(self.states[:-1].reshape(len(self.start), self.steps, self.sweeper.dim), self.start)

    def predicted_error(self) -> Array:
        """Norm of the predicted errors of each row: infinity while a state has not been seen, or cannot be trusted."""
        with np.errstate(over="ignore"):
            return np.where(self.status == Status.NON_FINITE, np.inf, np.sqrt(np.square(self.error).sum(axis=1)))

    def outcome(self) -> LoopResult:
        """What is known by now."""
        z, active, every = self.start, self.status == ACTIVE, np.arange(len(self.start))
        with np.errstate(over="ignore"):
            scale = np.sqrt(np.square(self.scale).sum(axis=1))
        return LoopResult(
            z=self.rows().clone(),
            residual=figures_like(z, self.residual),
            scale=figures_like(z, scale),
            status=tensor_like(z, np.where(active, self.ended_early, self.status)),
            evals=tensor_like(z, np.where(active, self.nfev, self.evals)),
            nfev=self.nfev,
            trace=figures_like(z, np.stack(self.trace)) if self.trace else None,
            coupled=self.together,
            predicted_error=figures_like(z, self.predicted_error()),
            amplification=figures_like(z, np.exp(self.ahead(every).max(axis=1, initial=0.0))),
            lyapunov=figures_like(z, self.gains.exponents(every)),
        )

    def ahead(self, rows: Array) -> Array:
        """Logarithm of how many times larger later states show a state's relative error, ``(R, T)``."""
        return ahead(self.gains.of(rows), self.reference_norms(rows), self.seen[rows], self.done[rows])

    def reference_norms(self, rows: Array) -> Array:
        """``(R, T)``: what the tolerance of each state is relative to; see ``CausalSweep.reference_norms``."""
        return self.sweeper.reference_norms(self.scale[rows], torch.finfo(self.start.dtype).eps)

    @property
    def rounding(self) -> float:
        """Relative error that is no more than rounding."""
        return _ROUNDINGS * torch.finfo(self.start.dtype).eps

    def finest(self, rows: Array) -> Array:
        """``(R, T)``: logarithm of how many times finer than asked each state can be had, for its rounding."""
        with np.errstate(all="ignore"):  # norms may be 0, or overflow
            finer = (self.allowed[0][rows] / self.scale[rows] + self.allowed[1][rows, None]) / self.rounding
        return np.log(np.nan_to_num(finer).clip(min=1))

    def bound(self, rows: Array) -> Array:
        """``(R, T)``: what the error of each state may be."""
        with np.errstate(invalid="ignore"):  # norms may overflow
            return self.allowed[0][rows] + self.allowed[1][rows, None] * self.reference_norms(rows)

    def write(self, kept: Tensor, places: Tensor, values: Tensor) -> None:
        """Put ``values`` ``(B, W, ...)`` at their places ``(B, W)``, and wipe the scratch place."""
        kept.index_copy_(0, places.flatten(), values.flatten(0, 1))
        kept[-1] = 0

    def remember(self, past: WindowPast, inputs: Tensor, images: Tensor, sound: Tensor) -> None:
        """Add a round of windows to their past."""
        for part in parts(inputs):
            newer = past.of(part).with_newest(inputs[:, part], images[:, part], sound[:, part])
            for ours, new in zip(self.past, newer, strict=True):
                self.write(ours, past.places[:, part], new)

    def end_rows(self, rows: Array, failed: Array, finished: Array) -> None:
        """Of the given rows, some have failed and some have converged."""
        self.status[rows[finished]] = Status.CONVERGED
        self.status[rows[failed]] = Status.NON_FINITE
        self.evals[rows[failed | finished]] = self.nfev


def per_row(limit: Any, rows: int) -> Array:
    """A number, or one for each row, as ``(rows,)`` on the host; under ``torch.vmap`` the rows come several times."""
    return as_tensor(for_rows(limit, rows)).to("cpu", torch.float64).reshape(-1).expand(rows).numpy()


def evaluate(run: ChainRun, f: Map, places: Array, states: Tensor | None = None) -> Tensor:
    """Images ``(N, D)`` of the states at these places ``(N,)``; of other states ``(B, T * D)`` if given."""
    states = run.rows() if states is None else states
    part = getattr(f, "part", None)  # torch.func leaves none
    if run.sweeper.single_steps and part is not None:
        row, step = np.divmod(places, run.steps)
        images = part(states, tensor_like(run.start, row), tensor_like(run.start, step))
    else:
        every = run.sweeper.split(f(states.clone()))  # f may keep what it got
        images = every.flatten(0, 1)[tensor_like(run.start, places)]
        if run.to_compare.size:
            reopen_what_moved(run, every)
    run.nfev += 1
    return images.to(run.states.dtype)


def reopen_what_moved(run: ChainRun, images: Tensor) -> None:
    """If a row that has converged has another residual by these images ``(B, T, D)``, let all rows go on.

    For an f that is evaluated whole may couple rows. From then on they end together.
    """
    rows = run.to_compare
    states = run.states[:-1].reshape(images.shape)[tensor_like(run.start, rows)]
    images = images[tensor_like(run.start, rows)].to(states.dtype)
    found, scale = to_host(torch.stack([safe_norm(x.flatten(1)) for x in (images - states, images)]))
    with np.errstate(invalid="ignore"):
        same = np.abs(found - run.residual[rows]) <= ROUNDINGS * torch.finfo(run.start.dtype).eps * scale
    if same.all():
        return
    run.together = True
    run.status[rows] = ACTIVE
    run.residual[rows], run.error[rows], run.done[rows] = np.nan, np.inf, 0
    run.end[rows] = run.steps if run.width == run.steps else 0
    run.moved[tensor_like(run.start, rows)] = 0
    run.past.known[:] = False  # what is remembered is of another map of each row


class Evaluated(NamedTuple):
    """What an evaluation of N steps gave."""

    images: Tensor  # (N, D)
    missed: Tensor | None  # (N,): by how much interpolation would have missed them; None: nothing is interpolated
    slopes: Tensor | None  # (N, D): of the entries of the states; None: not measured


def evaluate_some(run: ChainRun, f: Map, places: Array, evaluated: Array) -> Evaluated:
    """Evaluate the states at these places ``(N,)``, those of the numbers ``evaluated``, and interpolate the others."""
    whole = len(evaluated) == len(places)
    probed = run.probes is not None and getattr(f, "may_skip", False)  # torch.func leaves nothing of f but the map
    if whole and not probed:
        return Evaluated(evaluate(run, f, places), None, None)
    row, step = np.divmod(places, run.steps)
    asked, slopes = [tensor_like(run.start, x) for x in (row, step, evaluated)], None
    if probed:
        assert run.probes is not None
        signs = run.probes.signs(row[evaluated], step[evaluated])
        images, missed, slopes = cast(Any, f).probed_part(run.rows(), *asked, signs)
        # A step that was interpolated takes the slopes of the one evaluated before it.
        last = np.searchsorted(evaluated, np.arange(len(places)), side="right") - 1
        slopes = slopes.to(run.states.dtype)[tensor_like(run.start, last)]
    else:
        images, missed = cast(Any, f).sparse_part(run.rows(), *asked)
    if not cast(Any, f).may_skip:  # seen now: it drew other numbers for these rows than it will for all
        return Evaluated(evaluate(run, f, places), None, None)
    run.nfev += 1
    return Evaluated(images.to(run.states.dtype), missed, slopes)
