"""The loop for chains: what is evaluated are single steps of single rows, in a window that slides along each chain."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fixpoint.chains.amplification import Gains
from fixpoint.chains.certificate import Certificate, Findings
from fixpoint.chains.error_control import Norms, judge
from fixpoint.chains.sweep import Past
from fixpoint.engine.ambient import without_autocast
from fixpoint.engine.loop import Map, Watcher
from fixpoint.engine.outcome import ACTIVE, LoopResult, figures_like, handing_over, tensor_like
from fixpoint.engine.tolerance import Array, Status, Tolerance, to_host

if TYPE_CHECKING:
    from fixpoint.chains.causal import CausalSweep

_COUNTS = 0.1  # a change of an input tells what the step amplifies, if it is so much of the tolerance
_ROUNDINGS = 30.0  # and so many roundings; nor can a tolerance be finer than that
_AMPLIFIES = 30.0  # up to here, predicted errors were found to be trustworthy as they are
_STRICTER = 10.0  # by how much the tolerance is tightened for a chain that has to go back
_PROBES = 2  # evaluations that measure what a certified chain amplifies
_RETRIES = 2  # so often a chain goes back, before it goes on step by step


@dataclass(frozen=True)
class Windows:
    """Some states of some chains: a stretch of each, padded to a common width W. On the host.

    Attributes:
        rows: ``(R,)``, numbers of the chains.
        count: ``(R,)``, states of each.
        step: ``(R, W)``, numbers of the states; 0 where padded.
        inside: ``(R, W)``, false where padded.
    """

    rows: Array
    count: Array
    step: Array
    inside: Array

    @classmethod
    def of(cls, rows: Array, first: Array, count: Array) -> Windows:
        """``count`` states from the state ``first`` on, ``(R,)`` each."""
        offset = np.arange(count.max(initial=0))
        inside = offset < count[:, None]
        return cls(rows, count, np.where(inside, first[:, None] + offset, 0), inside)

    def places(self, length: int, *, before: bool = False) -> Array:
        """Where the states are kept, ``(R, W)``, if ``length`` places are kept for each chain; -1 where padded.

        ``before`` asks for the states before them instead, and finds -1 for those before the first as well.
        """
        step = self.step - before
        return np.where(self.inside & (step >= 0), self.rows[:, None] * length + step % length, -1)


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
) -> LoopResult:
    """Evaluate windows of ``f`` and sweep along them until every row of ``z`` ``(B, T * D)`` has ended.

    Options as for ``iterate``. Chains are checked after every evaluation, and what is done is not evaluated again.
    """
    run = ChainRun(z, sweeper, tolerance)
    with handing_over(run.outcome):
        while run.remaining and run.nfev < max_evals:
            advance(run, f)
            predicted = run.predicted_error()
            run.trace += [predicted] if record else []
            figures = figures_like(z, run.residual), figures_like(z, predicted)
            if watch and watch(run.nfev, figures[0], run.remaining, run.rows().clone(), figures[1]):
                run.ended_early = Status.STOPPED
                break
    return run.outcome()


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
        self.width = min(options.window or steps, options.max_rows or steps, steps)
        self.states = torch.cat((states.reshape(rows * steps, dim), states.new_zeros(1, dim)))
        # A window of one needs no model.
        self.past = Past.empty((rows * self.width + 1 if self.width > 1 else 1,), options.memory, dim, states)
        # How far the last state of each window has moved from its guess, and the state before that: (B, 2, D).
        self.moved = states.new_zeros(rows, 2, dim)
        # What is certified is a row: its states share atol, so that all together keep to it.
        share = max(steps, 1) ** -0.5 if options.certify else 1.0
        self.allowed = share * per_row(tolerance.atol, rows), per_row(tolerance.rtol, rows)
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
        self.findings: Findings | None = None  # of the certificate, while probes measure what the chains amplify
        self.probes: list[Certificate] = []
        self.nfev = 0
        self.trace: list[Array] = []

    @property
    def steps(self) -> int:
        """T."""
        return self.sweeper.steps

    @property
    def remaining(self) -> int:
        """Rows that have not ended."""
        return int(np.count_nonzero(self.status == ACTIVE))

    def rows(self) -> Tensor:
        """The states as rows ``(B, T * D)``; may share their memory, which the next round writes to."""
        return self.sweeper.join(self.states[:-1].reshape(len(self.start), self.steps, self.sweeper.dim), self.start)

    def predicted_error(self) -> Array:
        """Norm of the predicted errors of each row: infinity while a state has not been seen, or cannot be trusted."""
        return np.where(self.status == Status.NON_FINITE, np.inf, np.sqrt(np.square(self.error).sum(axis=1)))

    def outcome(self) -> LoopResult:
        """What is known by now."""
        z, active = self.start, self.status == ACTIVE
        return LoopResult(
            z=self.rows().clone(),
            residual=figures_like(z, self.residual),
            scale=figures_like(z, np.sqrt(np.square(self.scale).sum(axis=1))),
            status=tensor_like(z, np.where(active, self.ended_early, self.status)),
            evals=tensor_like(z, np.where(active, self.nfev, self.evals)),
            nfev=self.nfev,
            trace=figures_like(z, np.stack(self.trace)) if self.trace else None,
            predicted_error=figures_like(z, self.predicted_error()),
            amplification=figures_like(z, np.exp(self.ahead(np.arange(len(z))).max(axis=1, initial=0.0))),
        )

    def ahead(self, rows: Array) -> Array:
        """Logarithm of how many times larger later states show a state's relative error, ``(R, T)``."""
        return self.gains.ahead(rows, self.scale[rows], self.seen[rows], self.done[rows])

    @property
    def rounding(self) -> float:
        """Relative error that is no more than rounding."""
        return _ROUNDINGS * torch.finfo(self.start.dtype).eps

    def finest(self, rows: Array) -> Array:
        """``(R,)``: logarithm of how many times finer than asked a state can be had, for its rounding."""
        size = np.maximum(self.scale[rows].min(axis=1, initial=np.inf), np.finfo(float).tiny)
        return np.log(np.maximum((self.allowed[0][rows] / size + self.allowed[1][rows]) / self.rounding, 1))

    def bound(self, rows: Array) -> Array:
        """``(R, T)``: what the error of each state may be."""
        return self.allowed[0][rows, None] + self.allowed[1][rows, None] * self.scale[rows]

    def write(self, kept: Tensor, places: Tensor, values: Tensor) -> None:
        """Put ``values`` at their places, and wipe the scratch place."""
        kept[places] = values
        kept[-1] = 0

    def end_rows(self, rows: Array, failed: Array, finished: Array) -> None:
        """Of the given rows, some have failed and some have converged."""
        self.status[rows[finished]] = Status.CONVERGED
        self.status[rows[failed]] = Status.NON_FINITE
        self.evals[rows[failed | finished]] = self.nfev


def per_row(limit: Any, rows: int) -> Array:
    """A number, or one for each row, as ``(rows,)`` on the host."""
    return torch.as_tensor(limit, dtype=torch.float64).cpu().reshape(-1).expand(rows).numpy()


def advance(run: ChainRun, f: Map) -> None:
    """Make one evaluation of ``f``, and whatever follows from it."""
    active = np.flatnonzero(run.status == ACTIVE)
    unfinished = active[run.done[active] < run.steps][: run.sweeper.options.max_rows]
    if not unfinished.size:
        certify(run, f, active)
    elif run.width == 1 or run.in_order[unfinished].all():
        take_steps(run, f, unfinished)
    else:
        sweep_windows(run, f, open_windows(run, unfinished))


def evaluate(run: ChainRun, f: Map, places: Array, states: Tensor | None = None) -> Tensor:
    """Images ``(N, D)`` of the states at these places ``(N,)``; of other states ``(B, T * D)`` if given."""
    states = run.rows() if states is None else states
    part = getattr(f, "part", None)  # torch.func leaves none
    if run.sweeper.single_steps and part is not None:
        row, step = np.divmod(places, run.steps)
        images = part(states, tensor_like(run.start, row), tensor_like(run.start, step))
    else:
        every = f(states.clone())  # f may keep what it got
        images = run.sweeper.split(every).flatten(0, 1)[tensor_like(run.start, places)]
    run.nfev += 1
    return images.to(run.states.dtype)


def take_steps(run: ChainRun, f: Map, rows: Array) -> None:
    """One exact step of each row, where a window holds no more: the ordinary, sequential run."""
    step = run.done[rows]
    places = rows * run.steps + step
    images = evaluate(run, f, places)
    run.states[tensor_like(run.start, places)] = images
    scale = to_host(torch.linalg.vector_norm(images, dim=1))
    finite = np.isfinite(scale)
    run.error[rows, step] = np.where(finite, 0.0, np.inf)
    run.scale[rows, step] = scale
    run.done[rows] += finite
    run.end[rows] = run.done[rows]
    last = run.done[rows] == run.steps
    run.residual[rows[last]] = 0.0  # f was evaluated at each of these states, and they are what it returned
    run.end_rows(rows, ~finite, last & (not run.sweeper.options.certify))


def open_windows(run: ChainRun, rows: Array) -> Windows:
    """Windows of the given rows, from the first state that is not done; new states are moved from their guesses."""
    limit = run.sweeper.options.max_rows
    share = run.width if limit is None else min(run.width, limit // len(rows))
    share = np.where(run.in_order[rows], 1, share)
    end = np.maximum(run.end[rows], np.minimum(run.done[rows] + share, run.steps))
    new = end - run.end[rows]
    if new.any() and run.end[rows].any():
        move_guesses(run, Windows.of(rows, run.end[rows], new))
    run.end[rows] = end
    run.seen[rows] = np.maximum(run.seen[rows], end)
    return Windows.of(rows, run.done[rows], end - run.done[rows])


def move_guesses(run: ChainRun, new: Windows) -> None:
    """Move the states that enter the windows as the states before them have moved."""
    rows, step = tensor_like(run.start, new.rows), tensor_like(run.start, new.step)
    last, before = run.moved[rows].unbind(1)
    moved = run.sweeper.follow(step, last, before)
    places = tensor_like(run.start, new.places(run.steps))
    run.write(run.states, places, run.states[places] + moved)
    # The last two of the states before the windows and those that have entered.
    moved = torch.cat((before[:, None], last[:, None], moved), dim=1)
    number, count = torch.arange(len(rows), device=moved.device), tensor_like(run.start, new.count)
    run.moved[rows] = torch.stack((moved[number, count + 1], moved[number, count]), dim=1)
    # What these places remember was of other steps.
    run.past.known[tensor_like(run.start, new.places(run.width))] = False


def sweep_windows(run: ChainRun, f: Map, windows: Windows) -> None:
    """Evaluate the windows, sweep along them, and see which states are done."""
    z, on_host = run.start, windows.places(run.steps)
    places, step = tensor_like(z, on_host), tensor_like(z, windows.step)
    kept = tensor_like(z, windows.places(run.width))
    images = run.states.new_zeros(on_host.size, run.states.shape[1])
    chosen = np.flatnonzero(windows.inside)
    images[tensor_like(z, chosen)] = evaluate(run, f, on_host.ravel()[chosen])
    images = images.reshape(*on_host.shape, -1)
    states, inputs = run.states[places], run.states[tensor_like(z, windows.places(run.steps, before=True))]
    known = torch.isfinite(images).all(dim=2)
    past = Past(*(x[kept] for x in run.past))
    changes = measured_changes(images, inputs, known, past)
    swept = run.sweeper.swept(states, inputs, images, known, step, past)
    change = swept.states - states
    before = torch.cat((torch.zeros_like(change[:, :1]), change[:, :-1]), dim=1)
    run.write(run.states, places, swept.states)
    for ours, new in zip(run.past, swept.past, strict=True):
        run.write(ours, kept, new)
    rows, last = tensor_like(z, windows.rows), tensor_like(z, windows.count - 1)
    number = torch.arange(len(rows), device=change.device)
    run.moved[rows] += torch.stack((change[number, last], before[number, last]), dim=1)
    norms = [torch.linalg.vector_norm(x, dim=2) for x in (change, swept.states, swept.corrections, before)]
    figures = to_host(torch.stack([*norms, *changes, swept.sound, known]))  # one transfer a round
    *sizes, sound, finite = figures
    settle(run, windows, Norms(*sizes, sound > 0, finite > 0))


def measured_changes(images: Tensor, inputs: Tensor, known: Tensor, past: Past) -> tuple[Tensor, Tensor]:
    """Norms ``(B, W)`` of the changes of images and inputs since the round before; 0 where there was none."""
    known = known & past.known[..., 0]
    changes = images - past.images[..., 0, :], inputs - past.inputs[..., 0, :]
    image_change, input_change = (torch.where(known, torch.linalg.vector_norm(x, dim=2), 0) for x in changes)
    return image_change, input_change


def settle(run: ChainRun, windows: Windows, norms: Norms) -> None:
    """Note what a round has shown of its windows, and end the rows that are done or lost."""
    rows, inside = windows.rows, windows.inside
    error_before = run.error[rows[:, None], windows.step]
    row, step = np.broadcast_to(rows[:, None], inside.shape)[inside], windows.step[inside]
    note_gains(run, row, step, norms, inside)
    run.scale[row, step] = norms.scale[inside]
    ahead = np.take_along_axis(run.ahead(rows), windows.step, axis=1) + run.retries[rows, None] * np.log(_STRICTER)
    allowed = run.allowed[0][rows], run.allowed[1][rows]
    ahead = np.minimum(ahead, run.finest(rows)[:, None])
    verdict = judge(norms, inside, error_before, allowed, ahead, run.end[rows] == run.steps)
    run.error[row, step] = verdict.error[inside]
    run.residual[rows] = np.nan  # the states are others now
    run.done[rows] += verdict.done
    if run.sweeper.single_steps:
        reconsider(run, rows[~verdict.failed & (run.done[rows] == run.steps)])
    finished = (run.done[rows] == run.steps) & (not run.sweeper.options.certify)
    run.end_rows(rows, verdict.failed, finished)


def note_gains(run: ChainRun, row: Array, step: Array, norms: Norms, inside: Array) -> None:
    """Take in what a round has shown of the steps' gains; changes far below the tolerance may be rounding."""
    grown, met, image_change, input_change = (x[inside] for x in norms[2:6])
    scale = run.scale[row, np.maximum(step - 1, 0)]
    counts = np.maximum(_COUNTS * (run.allowed[0][row] + run.allowed[1][row] * scale), run.rounding * scale)
    with np.errstate(all="ignore"):
        run.gains.note(row, step, np.where(input_change > counts, image_change / input_change, np.nan), grown / met)


def reconsider(run: ChainRun, rows: Array) -> None:
    """Chains of which all is done go back to the first state whose error later steps enlarge beyond the tolerance."""
    ahead = run.ahead(rows)
    with np.errstate(over="ignore"):
        wrong = run.error[rows] * np.exp(ahead) > run.bound(rows)
    late = wrong.any(axis=1) & (ahead.max(axis=1, initial=0) > np.log(_AMPLIFIES)) & ~run.in_order[rows]
    go_back(run, rows[late], np.argmax(wrong[late], axis=1))


def go_back(run: ChainRun, rows: Array, first: Array) -> None:
    """Chains go on from the states ``first``; step by step, from where they are not exact, if that was tried enough."""
    if not rows.size:
        return
    run.retries[rows] += 1
    ahead = run.ahead(rows).max(axis=1)
    hopeless = (ahead > run.finest(rows)) & (ahead > np.log(_AMPLIFIES))
    run.in_order[rows] = run.sweeper.single_steps & (hopeless | (run.retries[rows] > _RETRIES) | (run.nfev > run.steps))
    inexact = np.argmax(run.error[rows] > 0, axis=1)
    run.done[rows] = np.where(run.in_order[rows], np.minimum(first, inexact), first)
    whole = run.width == run.steps
    run.end[rows] = np.where(run.in_order[rows] | (not whole), run.done[rows], run.steps)
    if not whole:
        forgotten = rows[:, None] * run.width + np.arange(run.width)
        run.past.known[tensor_like(run.start, forgotten.ravel())] = False
    run.moved[tensor_like(run.start, rows)] = 0


def certify(run: ChainRun, f: Map, rows: Array) -> None:
    """Evaluate more of the given chains at the states that are to be handed over; once all is, judge them.

    Where a defect is more than rounding, probes measure what the chain amplifies, before the chain is judged.
    """
    if run.certificate is None:
        run.certificate = Certificate.empty(run.states, rows, run.steps)
    part = run.probes[-1] if run.probes else run.certificate
    pending = part.pending(run.sweeper.options.max_rows)
    part.take(pending, evaluate(run, f, pending, displaced_states(run, part)))
    if not part.complete:
        return
    if run.findings is None:
        run.findings = run.certificate.judge(run.sweeper, run.states, run.allowed)
        run.scale[rows] = run.findings.scale
    else:
        note_probe(run, run.certificate, part)
    suspects = rows[suspicious(run, rows, run.findings)]
    if suspects.size and len(run.probes) < _PROBES:
        size = np.maximum(run.bound(suspects), run.rounding * run.scale[suspects])
        last = run.probes[-1] if run.probes else None
        run.probes.append(run.certificate.probe(suspects, run.steps, size, last))
        return
    conclude(run, rows, run.findings)


def displaced_states(run: ChainRun, part: Certificate) -> Tensor:
    """The states ``(B, T * D)`` at which a part of a certificate evaluates f."""
    if part.displaced is None:
        return run.rows()
    states = run.states[:-1].clone()
    states[tensor_like(states, part.places)] += part.displaced
    return run.sweeper.join(states.reshape(len(run.start), run.steps, -1), run.start)


def suspicious(run: ChainRun, rows: Array, findings: Findings) -> Array:
    """``(R,)``: which chains pass by their defects, which are more than rounding."""
    inexact = (findings.defect > run.rounding * findings.scale).any(axis=1)
    return findings.passed & inexact & ~run.in_order[rows] & run.sweeper.single_steps


def note_probe(run: ChainRun, certificate: Certificate, probe: Certificate) -> None:
    """Take in what a probe has shown: by how much each step enlarged the displacement of its input."""
    assert probe.displaced is not None
    size = to_host(torch.linalg.vector_norm(probe.displaced, dim=1)).reshape(len(probe.rows), run.steps)
    gains = certificate.changes(probe, run.steps)[:, 1:] / size[:, :-1]
    row, step = np.broadcast_arrays(probe.rows[:, None], np.arange(1, run.steps))
    run.gains.note(row.ravel(), step.ravel(), gains.ravel(), np.full(gains.size, np.nan))


def conclude(run: ChainRun, rows: Array, findings: Findings) -> None:
    """End the chains that pass; the others go on from their first wrong state."""
    run.residual[rows] = findings.residual
    # A small defect is a large error where the steps after it enlarge it.
    error = run.gains.accumulated(rows, findings.defect)
    rough = run.ahead(rows).max(axis=1, initial=0) > np.log(_AMPLIFIES)
    wrong = error > run.bound(rows) / np.where(rough, _STRICTER, 1)[:, None]
    amplified = suspicious(run, rows, findings) & wrong.any(axis=1)
    first = np.where(amplified, np.argmax(findings.defect > 0, axis=1), findings.first_wrong)
    passed = findings.passed & ~amplified
    again = ~passed & ~findings.failed
    run.end_rows(rows, findings.failed, passed)
    run.error[rows[again]] = findings.defect[again]
    run.certificate, run.findings, run.probes = None, None, []
    go_back(run, rows[again], first[again])
