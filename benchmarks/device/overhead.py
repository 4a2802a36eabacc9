"""Part 2: what a step costs beyond f, where it waits for the device, and the same compiled and in CUDA graphs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import fixpoint
from benchmarks.device.common import Part
from benchmarks.device.graphs import GraphedSteps, backend, capture, on_waiting, profiled, solvers_as_there
from benchmarks.overhead import CONTESTANTS, PEERS, SIZES, SOLVERS, Map, Size, affine, f_alone, fastest, ours, timed
from fixpoint.engine.norms import to_host

Step = Callable[[Tensor, Tensor, Any], tuple[Tensor, Any]]

CHECKED = Size(rows=32, dim=256, evals=40)
TINY = (Size(rows=1, dim=10, evals=6, rounds=1), Size(rows=3, dim=8, evals=6, rounds=1))
# A step is captured once for each value of the integers in its state, so memories are short.
SHORT = {"Anderson m=3": fixpoint.Anderson(memory=3), "Broyden m=5": fixpoint.Broyden(memory=5)}
CHECK_EVERY = 8
_AGREE = 1e-6  # of the largest entry, in float64: another order of summing grows from step to step
_COMPILING = 30.0  # seconds that must be left before a step is compiled


def main(part: Part) -> None:
    """What needs no compiler first."""
    sizes = sizes_of(part)
    with torch.no_grad(), warnings.catch_warnings(), solvers_as_there(part):
        warnings.simplefilter("ignore")
        runs = contestants(part.has("torchdeq"))
        f, z0 = affine(CHECKED, part.device, torch.float64)
        with part.attempt("figures_are_those_before_what_is_queued"):
            part.add("checks", **figures_are_those_before_what_is_queued(part))
        for name in PEERS:
            solver = SOLVERS[name]
            for check in (steps_never_wait, solve_waits_at_checks):
                with part.attempt(f"{name}: {check.__name__}"):
                    part.add("checks", **check(part, name, solver, f, z0))
            with part.attempt(f"{name}: graphed"):
                part.add("checks", **graphed_agrees(part, name, solver, f, z0))
        for size in sizes:
            with part.attempt(f"times at {size}"):
                times(part, size, runs)
        with part.attempt("profile"):
            profile(part, sizes[1], runs)
        for name, solver in SHORT.items():
            if part.left < _COMPILING and not part.rehearse:
                part.leave_out(f"{name}: compiled", "no time left")
                continue
            with part.attempt(f"{name}: compiled"):
                compiled(part, name, solver, f, z0)


def sizes_of(part: Part) -> tuple[Size, ...]:
    return TINY if part.rehearse else SIZES


def contestants(peers: bool) -> dict[str, Any]:
    """Whole solves by name: ours check every evaluation and every eighth, torchdeq's where they are there."""
    runs: dict[str, Any] = {name: ours(solver) for name, solver in SOLVERS.items()}
    runs |= {f"{name}, check_every={CHECK_EVERY}": ours(SOLVERS[name], CHECK_EVERY) for name in PEERS}
    return runs | ({name: CONTESTANTS[name] for name in PEERS.values()} if peers else {})


def walk(step: Step, f: Map, z: Tensor, state: Any, count: int) -> list[Tensor]:
    """The first ``count`` states after ``z``."""
    states = []
    for _ in range(count):
        z, state = step(z, f(z), state)
        states.append(z)
    return states


def difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Largest difference of two sequences of states, relative to the largest entry; NaN if one is not finite."""
    first, second = torch.stack(list(found)), torch.stack(list(expected))
    return float((first - second).abs().max() / second.abs().max())


def checks_of(evals: int, check_every: int) -> int:
    """How often a solve that is never done checks its residuals: first, every so many evaluations, last."""
    return len({1, evals, *range(check_every, evals + 1, check_every)})


def steps_never_wait(part: Part, name: str, solver: fixpoint.Solver, f: Map, z0: Tensor) -> dict[str, Any]:
    """Steps with an error wherever torch knows that the host waits."""
    state = solver.init(z0)
    walk(solver.step, f, z0, solver.init(z0), CHECKED.evals)  # libraries may wait when they start
    part.wait()
    found = ""
    try:
        with on_waiting(part, "error"):
            walk(solver.step, f, z0, state, CHECKED.evals)
    except RuntimeError as error:
        found = str(error).partition("\n")[0]
    return {"check": f"{name}: {CHECKED.evals} steps never wait", "met": not found, "found": found or "no wait"}


def figures_are_those_before_what_is_queued(part: Part) -> dict[str, Any]:
    """What is read while the device works is what it had before, by way of pinned memory, which is not kept."""
    x = torch.arange(1000.0, dtype=torch.float64, device=part.device)
    expected, pinned = x.tolist(), x.to("cpu", non_blocking=True).is_pinned()
    copy = x.clone()
    figures = to_host(copy, lambda: copy.add_(1)) if copy.is_cuda else to_host(copy)
    right, kept = figures.tolist() == expected, torch.from_numpy(figures).is_pinned()
    met = right and not kept and (pinned or part.device == "cpu")
    found = f"figures {'right' if right else 'wrong'}, pinned on the way: {pinned}, kept pinned: {kept}"
    return {"check": "figures are those before what is queued", "met": met, "found": found}


def solve_waits_at_checks(part: Part, name: str, solver: fixpoint.Solver, f: Map, z0: Tensor) -> dict[str, Any]:
    """Solves that differ in ``check_every`` alone: what start and end wait for is the same in both."""

    synchronize = torch.cuda.Event.synchronize

    def waits(check_every: int) -> int:
        events: list[torch.cuda.Event] = []  # that the host waited for; torch does not warn of these

        def noted(event: torch.cuda.Event) -> None:
            events.append(event)
            synchronize(event)

        with warnings.catch_warnings(record=True) as caught, on_waiting(part, "warn"):
            warnings.simplefilter("always")
            with mock.patch.object(torch.cuda.Event, "synchronize", noted):
                ours(solver, check_every)(f, z0, CHECKED.evals)
        return len(events) + sum("called a synchronizing" in str(warning.message) for warning in caught)

    waits(1)  # libraries may wait when they start
    often, seldom = waits(1), waits(CHECK_EVERY)
    more, fewer = (checks_of(CHECKED.evals, every) for every in (1, CHECK_EVERY))
    met = often - seldom == more - fewer or part.device == "cpu"  # a CPU is never waited for
    found = f"{often} waits for {more} checks, {seldom} for {fewer} with check_every={CHECK_EVERY}"
    return {"check": f"{name}: a solve waits once a check", "met": met, "found": found}


def compiled(part: Part, name: str, solver: fixpoint.Solver, f: Map, z0: Tensor) -> None:
    """Compiled steps beside plain ones: what they give, and their time in float64, alone and in whole solves."""
    steps = fixpoint.Compiled(solver)
    tasks = {"f": timed(f_alone, f, z0, CHECKED.evals)}
    with mock.patch.object(torch, "compile", partial(torch.compile, backend=backend(part))):
        plain, found = (walk(each.step, f, z0, each.init(z0), CHECKED.evals) for each in (solver, steps))
        part.add("checks", **_agreement(f"{name}: a compiled step", found, plain))
        for how, each in (("plain", solver), ("compiled", steps)):
            tasks[f"{name} step, float64, {how}"] = partial(_stepping, each.step, each, f, z0, CHECKED.evals)
            tasks[f"{name}, float64, {how}"] = timed(ours(each), f, z0, CHECKED.evals)
        _add_times(part, replace(CHECKED, rounds=sizes_of(part)[0].rounds), tasks, of_f=False)


def graphed_agrees(part: Part, name: str, solver: fixpoint.Solver, f: Map, z0: Tensor) -> dict[str, Any]:
    """Steps replayed from graphs, twice round, beside plain ones."""
    steps = GraphedSteps(solver, f, z0, capture(part))
    plain = walk(solver.step, f, z0, solver.init(z0), steps.taken + 2 * steps.graphs)[steps.taken :]
    return _agreement(f"{name}: a step replayed from a graph", [steps(f(steps.z)).clone() for _ in plain], plain)


def _agreement(what: str, found: Sequence[Tensor], plain: Sequence[Tensor]) -> dict[str, Any]:
    gap = difference(found, plain)
    return {"check": f"{what} equals a plain one", "met": gap <= _AGREE, "found": f"differs by {gap:.1e}"}


def times(part: Part, size: Size, runs: dict[str, Any]) -> None:
    """Milliseconds per evaluation beyond f: whole solves, and steps of short memories, plain and graphed."""
    f, z0 = affine(size, part.device)
    tasks = {name: timed(run, f, z0, size.evals) for name, run in {"f": f_alone, **runs}.items()}
    for name, solver in SHORT.items():
        tasks[f"{name} step, plain"] = partial(_stepping, solver.step, solver, f, z0, size.evals)
        with part.attempt(f"{name}: graphs at {size}"):
            graphs = GraphedSteps(solver, f, z0, capture(part))
            tasks[f"{name} step, graphed"] = partial(_replaying, graphs, f, size.evals)
    _add_times(part, size, tasks)


def _add_times(part: Part, size: Size, tasks: dict[str, Callable[[], int]], *, of_f: bool = True) -> None:
    def to_the_end(task: Callable[[], int]) -> int:
        done = task()
        part.wait()
        return done

    for task in tasks.values():  # libraries set themselves up, compilers compile
        to_the_end(task)
    rounds = min(size.rounds, 10)
    seconds = fastest({name: partial(to_the_end, task) for name, task in tasks.items()}, rounds)
    if of_f:
        part.add("times", rows=size.rows, dim=size.dim, name="f alone", milliseconds=1e3 * seconds["f"])
    for name in [name for name in tasks if name != "f"]:
        part.add("times", rows=size.rows, dim=size.dim, name=name, milliseconds=1e3 * (seconds[name] - seconds["f"]))


def _stepping(step: Step, solver: fixpoint.Solver, f: Map, z0: Tensor, evals: int) -> int:
    return len(walk(step, f, z0, solver.init(z0), evals))


def _replaying(steps: GraphedSteps, f: Map, evals: int) -> int:
    for _ in range(evals):
        steps(f(steps.z))
    return evals


def profile(part: Part, size: Size, runs: dict[str, Any]) -> None:
    """Operations, launches and waits per evaluation, f's among them, by the profiler."""
    few, many = (4, 8) if part.rehearse else (12, 30)
    f, z0 = affine(replace(size, evals=many), part.device)
    for name, run in {"f": f_alone, **runs}.items():
        part.add("launches", name=name, **profiled(part, partial(run, f, z0), few, many))
