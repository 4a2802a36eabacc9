"""The loop for chains: what is evaluated are single steps of single rows, in a window that slides along each chain."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fixpoint.chains.amplification import STRICTER, doubtful, note_gains
from fixpoint.chains.certificate import certify, conclude
from fixpoint.chains.error_control import Norms, judge
from fixpoint.chains.run import ChainRun, Windows, evaluate, evaluate_some
from fixpoint.chains.sweep import WindowPast, parts, taken
from fixpoint.engine.ambient import without_autocast
from fixpoint.engine.loop import Map, Watcher
from fixpoint.engine.norms import safe_norm, to_host
from fixpoint.engine.outcome import ACTIVE, LoopResult, figures_like, handing_over, tensor_like
from fixpoint.engine.tolerance import Status, Tolerance

if TYPE_CHECKING:
    from fixpoint.chains.causal_sweep import CausalSweep
    from fixpoint.chains.twin import Twin
    from fixpoint.engine.norms import Array


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
            advance(run, f, last=run.nfev + 1 == max_evals)
            predicted = run.predicted_error()
            run.trace += [predicted] if record else []
            figures = figures_like(z, run.residual), figures_like(z, predicted)
            if watch and watch(run.nfev, figures[0], run.remaining, run.rows().clone(), figures[1]):
                run.ended_early = Status.STOPPED
                break
    return run.outcome()


def advance(run: ChainRun, f: Map, *, last: bool = False) -> None:
    """Make one evaluation of ``f``, and whatever follows from it; ``last``: there will be no other."""
    if run.twin is not None:
        follow(run, run.twin)
        return
    active = np.flatnonzero(run.status == ACTIVE)
    unfinished = active[run.done[active] < run.steps][: run.sweeper.options.max_states]
    if not unfinished.size:
        certify(run, f, active)
    elif last and run.to_compare.size:
        # Not for its images: rows that have converged must keep their residual with the states that are handed over.
        evaluate(run, f, np.zeros(0, dtype=np.int64))
    elif run.width == 1 or run.in_order[unfinished].all():
        take_steps(run, f, unfinished)
    else:
        windows = open_windows(run, unfinished)
        if run.sparse is not None and getattr(f, "may_skip", False):  # torch.func leaves nothing of f but the map
            windows = replace(windows, evaluated=run.sparse.choose(run, windows))
        sweep_windows(run, f, windows)


def follow(run: ChainRun, twin: Twin) -> None:
    """Make one evaluation of a twin; once it is solved, judge the chains by what it has shown."""
    advance(twin.run, twin)
    run.twin_evals += 1
    if not twin.run.remaining:
        assert run.certificate is not None
        assert run.findings is not None
        twin.note_gains()
        conclude(run, run.certificate.rows, run.findings, twin.rows)


def take_steps(run: ChainRun, f: Map, rows: Array) -> None:
    """One exact step of each row, where a window holds no more: the ordinary, sequential run."""
    step = run.done[rows]
    places = rows * run.steps + step
    images = evaluate(run, f, places)
    scale = to_host(safe_norm(images))
    finite = np.isfinite(scale)
    # What is broken stays out of the states, where it would spoil the gradients of other samples.
    known, index = torch.isfinite(images).all(dim=1, keepdim=True), tensor_like(run.start, places)
    run.states[index] = torch.where(known, images, run.states[index])
    run.error[rows, step] = np.where(finite, 0.0, np.inf)
    run.scale[rows, step] = scale
    run.done[rows] += finite
    run.end[rows] = run.done[rows]
    last = run.done[rows] == run.steps
    run.residual[rows[last]] = 0.0  # f was evaluated at each of these states, and they are what it returned
    run.end_rows(rows, ~finite, last & (not run.sweeper.options.certify))


def open_windows(run: ChainRun, rows: Array) -> Windows:
    """Windows of the given rows, from the first state that is not done; new states are moved from their guesses."""
    width = run.sweeper.options.widest(len(rows), run.steps)
    share = np.where(run.in_order[rows], 1, width)
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
    chains = len(run.start)
    last, before = run.moved[rows].unbind(1)
    moved = run.sweeper.follow(step, last, before)
    places = tensor_like(run.start, new.places(run.steps, chains))
    run.write(run.states, places, taken(run.states, places) + moved)
    # The last two of the states before the windows and those that have entered.
    moved = torch.cat((before[:, None], last[:, None], moved), dim=1)
    number, count = torch.arange(len(rows), device=moved.device), tensor_like(run.start, new.count)
    run.moved[rows] = torch.stack((moved[number, count + 1], moved[number, count]), dim=1)
    # What these places remember was of other steps.
    run.past.known[tensor_like(run.start, new.places(run.width, chains))] = False


def sweep_windows(run: ChainRun, f: Map, windows: Windows) -> None:
    """Evaluate the windows, sweep along them, and see which states are done."""
    z, chains = run.start, len(run.start)
    on_host = windows.places(run.steps, chains)
    places, step = tensor_like(z, on_host), tensor_like(z, windows.step)
    inside = np.flatnonzero(windows.inside)
    asked, at = on_host.ravel()[inside], tensor_like(z, inside)
    evaluated = np.flatnonzero(windows.evaluated.ravel()[inside])
    found, missed, slopes = evaluate_some(run, f, asked, evaluated)
    images = found.new_zeros(on_host.size, found.shape[1])
    images[at] = found
    del found
    extra = []
    if run.sparse is not None:
        of_all = images.new_zeros(on_host.size)
        if missed is not None:
            of_all.index_copy_(0, at, missed.to(of_all.dtype))
        extra = [of_all.reshape(on_host.shape)]
    if slopes is not None:
        slopes = torch.zeros_like(images).index_copy(0, at, slopes).reshape(*on_host.shape, -1)
    images = images.reshape(*on_host.shape, -1)
    before = tensor_like(z, windows.places(run.steps, chains, before=True))
    states, inputs = taken(run.states, places), taken(run.states, before)
    known = torch.isfinite(images).all(dim=2)
    kept = tensor_like(z, windows.places(run.width, chains))
    past = WindowPast(run.past, kept, run.past.known[kept])
    if run.sparse is not None:
        past = past.without_newest(tensor_like(z, run.sparse.changed(windows)))
    changes = measured_changes(images, inputs, known, past)
    images = torch.where(known[..., None], images, states)
    swept = run.sweeper.swept(states, inputs, images, known, step, past, slopes)
    run.write(run.states, places, swept.states)
    run.remember(past, inputs, images, swept.sound)
    change = states.neg_().add_(swept.states)  # in the memory of the states that were
    rows, last = tensor_like(z, windows.rows), tensor_like(z, windows.count - 1)
    number = torch.arange(len(rows), device=change.device)
    change_before = torch.where((last > 0)[:, None], change[number, (last - 1).clamp(min=0)], 0)
    run.moved[rows] += torch.stack((change[number, last], change_before), dim=1)
    norms = [safe_norm(x) for x in (change, swept.states, swept.corrections)]
    norms.append(torch.nn.functional.pad(norms[0][:, :-1], (1, 0)))  # of the change of the state before
    figures = to_host(torch.stack([*norms, *changes, swept.sound, known, *extra]))  # one transfer a round
    error, scale, grown, met, image_change, input_change, sound, finite, *seen = figures
    shown = Norms(error, scale, grown, met, image_change, input_change, sound > 0, finite > 0)
    settle(run, windows, shown if run.sparse is None else run.sparse.note(windows, shown, *seen))


def measured_changes(images: Tensor, inputs: Tensor, known: Tensor, past: WindowPast) -> tuple[Tensor, Tensor]:
    """Norms ``(B, W)`` of the changes of images and inputs since the round before; 0 where there was none."""
    norms = []
    for part in parts(images):
        inputs_before, images_before = past.newest(part)
        changes = images[:, part] - images_before, inputs[:, part] - inputs_before
        norms.append([safe_norm(x) for x in changes])
    known = known & past.known[..., 0]
    image_change, input_change = (torch.where(known, torch.cat(x, dim=1), 0) for x in zip(*norms, strict=True))
    return image_change, input_change


def settle(run: ChainRun, windows: Windows, norms: Norms) -> None:
    """Note what a round has shown of its windows, and end the rows that are done or lost."""
    rows, inside = windows.rows, windows.inside
    error_before = run.error[rows[:, None], windows.step]
    row, step = np.broadcast_to(rows[:, None], inside.shape)[inside], windows.step[inside]
    note_gains(run, row, step, norms, inside)
    run.scale[row, step] = norms.scale[inside]
    ahead = np.minimum(run.ahead(rows) + run.retries[rows, None] * np.log(STRICTER), run.finest(rows))
    allowed, ahead = (np.take_along_axis(x, windows.step, axis=1) for x in (run.bound(rows), ahead))
    verdict = judge(norms, inside, error_before, allowed, ahead, run.end[rows] == run.steps)
    run.error[row, step] = verdict.error[inside]
    run.residual[rows] = np.nan  # the states are others now
    run.done[rows] += verdict.done
    finished = (run.done[rows] == run.steps) & (not run.sweeper.options.certify)
    finished[finished] = ~doubtful(run, rows[finished])
    run.end_rows(rows, verdict.failed, finished)
