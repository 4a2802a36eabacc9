"""Our solvers on a CUDA device: where they wait for it, compiled and graphed steps beside plain ones, and times.

    python -m benchmarks.device [--out benchmarks/results]

Without such a device it says so and ends. Otherwise it checks that a step never waits for the device and a solve once a
look, that a compiled step and one replayed from a CUDA graph do what a plain one does, and times them beside torchdeq.
torch reports the waits that it knows of; those inside a library are not seen. Most of its minutes go to compiling.
Writes ``device.json`` to the folder.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fixpoint
from benchmarks.overhead import CONTESTANTS, PEERS, SIZES, SOLVERS, Map, Size, affine, f_alone, fastest, ours, timed
from benchmarks.solvers.report import targets_text
from benchmarks.solvers.standings import Target
from fixpoint.bench import provenance
from fixpoint.solvers.history import History

Step = Callable[[Tensor, Tensor, Any], tuple[Tensor, Any]]
Work = Callable[[], None]

CHECKED = Size(rows=32, dim=256, evals=40)
# A step is compiled, and captured, once for each value of the integers in its state. torch.compile stops at eight.
SHORT = {"Anderson m=3": fixpoint.Anderson(memory=3), "Broyden m=5": fixpoint.Broyden(memory=5)}
CHECK_EVERY = 8
_AGREE = 1e-6  # of the largest entry, in float64: another order of summing grows from step to step


def captured(work: Work) -> Work:
    """``work`` as a CUDA graph: it is recorded, not run; what is returned replays it."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


@dataclass(frozen=True, kw_only=True)
class Device:
    """What the checks and times need of a device; tests put something in its place."""

    name: str = "cuda"
    backend: str = "inductor"
    capture: Callable[[Work], Work] = captured
    wait: Work = torch.cuda.synchronize


def walk(step: Step, f: Map, z: Tensor, state: Any, count: int) -> list[Tensor]:
    """The first ``count`` iterates after ``z``."""
    iterates = []
    for _ in range(count):
        z, state = step(z, f(z), state)
        iterates.append(z)
    return iterates


def difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Largest difference of two sequences of iterates, relative to the largest entry; NaN if one is not finite."""
    first, second = torch.stack(list(found)), torch.stack(list(expected))
    return float((first - second).abs().max() / second.abs().max())


class GraphedSteps:
    """The steps of a solver as graphs: one for each value that the integers in its state take, replayed in turn.

    Plain steps are taken until these integers come round. From then on tensors lie where they lie: each graph reads
    what the one before it wrote, and the last one writes to where the first one reads.

    Attributes:
        taken: Plain steps taken.
        z: The iterate, overwritten at each step.
    """

    def __init__(self, solver: fixpoint.Solver, f: Map, z0: Tensor, capture: Callable[[Work], Work]) -> None:
        z, state, seen = z0, solver.init(z0), list[tuple[object, ...]]()
        while (now := tuple(each for each in leaves(state) if not isinstance(each, Tensor))) not in seen:
            seen.append(now)
            z, state = solver.step(z, f(z), state)
        self.taken, cycle = len(seen), len(seen) - seen.index(now)
        self.z, self._fz = z.clone(), torch.empty_like(z)
        self._states = [state]  # what the graphs write to must stay alive
        replays = [capture(partial(self._step, solver, last=index + 1 == cycle)) for index in range(cycle)]
        self.graphs = len(replays)
        self._turns = itertools.cycle(replays)

    def __call__(self, fz: Tensor) -> Tensor:
        """The next iterate, from ``fz = f(self.z)``."""
        self._fz.copy_(fz)
        next(self._turns)()
        return self.z

    def _step(self, solver: fixpoint.Solver, last: bool) -> None:
        # A solver may keep the tensors that it is given, and these two are overwritten.
        z, state = solver.step(self.z.clone(), self._fz.clone(), self._states[-1])
        if last:
            for kept, new in zip(leaves(self._states[0]), leaves(state), strict=True):
                if isinstance(kept, Tensor) and kept is not new:
                    kept.copy_(new)
        self.z.copy_(z)
        self._states.append(state)


def leaves(state: Any) -> list[Any]:
    """What a solver's state is made of: tensors, integers and None."""
    if isinstance(state, tuple):
        return [leaf for part in state for leaf in leaves(part)]
    return [state.states] if isinstance(state, History) else [state]


@contextlib.contextmanager
def on_waiting(mode: str) -> Iterator[None]:
    """Let torch "warn" or raise an "error" where the host waits for the device."""
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def looks(evals: int, check_every: int) -> int:
    """How often a solve that is never done looks at its residuals: first, every so many evaluations, last."""
    return len({1, evals, *range(check_every, evals + 1, check_every)})


def steps_never_wait(name: str, solver: fixpoint.Solver, f: Map, z0: Tensor) -> Target:
    """Steps with an error wherever torch knows that the host waits."""
    state = solver.init(z0)
    walk(solver.step, f, z0, solver.init(z0), CHECKED.evals)  # libraries may wait when they start
    torch.cuda.synchronize()
    found = ""
    try:
        with on_waiting("error"):
            walk(solver.step, f, z0, state, CHECKED.evals)
    except RuntimeError as error:
        found = str(error).partition("\n")[0]
    return Target(f"{name}: {CHECKED.evals} steps never wait", not found, found or "no wait")


def solve_waits_at_looks(name: str, solver: fixpoint.Solver, f: Map, z0: Tensor) -> Target:
    """Solves that differ in ``check_every`` alone: what start and end wait for is the same in both."""

    def waits(check_every: int) -> int:
        with warnings.catch_warnings(record=True) as caught, on_waiting("warn"):
            warnings.simplefilter("always")
            ours(solver, check_every)(f, z0, CHECKED.evals)
        return sum("called a synchronizing" in str(warning.message) for warning in caught)

    waits(1)  # libraries may wait when they start
    (often, seldom), (more, fewer) = (
        (count(1), count(CHECK_EVERY)) for count in (waits, partial(looks, CHECKED.evals))
    )
    shown = f"{often} waits for {more} looks, {seldom} for {fewer} with check_every={CHECK_EVERY}"
    return Target(f"{name}: a solve waits once a look", often - seldom == more - fewer, shown)


def compiled_agrees(name: str, solver: fixpoint.Solver, f: Map, z0: Tensor, device: Device) -> Target:
    """Steps compiled as one graph beside plain ones."""
    torch.compiler.reset()  # versions compiled before would count against the limit
    step = torch.compile(solver.step, fullgraph=True, backend=device.backend)
    plain = walk(solver.step, f, z0, solver.init(z0), CHECKED.evals)
    return _agreement(f"{name}: a compiled step", lambda: walk(step, f, z0, solver.init(z0), CHECKED.evals), plain)


def graphed_agrees(name: str, solver: fixpoint.Solver, f: Map, z0: Tensor, device: Device) -> Target:
    """Steps replayed from graphs, twice round, beside plain ones."""

    def replayed() -> list[Tensor]:
        steps = GraphedSteps(solver, f, z0, device.capture)
        plain[:] = walk(solver.step, f, z0, solver.init(z0), steps.taken + 2 * steps.graphs)[steps.taken :]
        return [steps(f(steps.z)).clone() for _ in plain]

    plain: list[Tensor] = []
    return _agreement(f"{name}: a step replayed from a graph", replayed, plain)


def _agreement(what: str, run: Callable[[], list[Tensor]], plain: list[Tensor]) -> Target:
    """Not met where ``run`` fails, too: the other checks are still of interest."""
    try:
        gap = difference(run(), plain)
    except RuntimeError as error:
        return Target(
            f"{what} equals a plain one", False, f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        )
    return Target(f"{what} equals a plain one", gap <= _AGREE, f"differs by {gap:.1e}")


def milliseconds(size: Size, device: Device) -> dict[str, float]:
    """Per evaluation beyond f: solves of ours and torchdeq's; steps of short memories, plain, compiled and graphed."""
    f, z0 = affine(size, device.name)
    torch.compiler.reset()
    runs = {"f": f_alone} | {name: run for name, run in CONTESTANTS.items() if name not in SOLVERS}
    runs |= {name: ours(SOLVERS[name], check_every=CHECK_EVERY) for name in PEERS}
    tasks = {name: timed(run, f, z0, size.evals) for name, run in runs.items()}

    def stepping(step: Step, solver: fixpoint.Solver) -> int:
        return len(walk(step, f, z0, solver.init(z0), size.evals))

    def replaying(steps: GraphedSteps) -> int:
        for _ in range(size.evals):
            steps(f(steps.z))
        return size.evals

    for name, solver in SHORT.items():
        tasks[f"{name} step, plain"] = partial(stepping, solver.step, solver)
        compiled = torch.compile(solver.step, fullgraph=True, backend=device.backend)
        tasks[f"{name} step, compiled"] = partial(stepping, compiled, solver)
        tasks[f"{name} step, graphed"] = partial(replaying, GraphedSteps(solver, f, z0, device.capture))

    def to_the_end(task: Callable[[], int]) -> int:
        done = task()
        device.wait()
        return done

    device.wait()
    seconds = fastest({name: partial(to_the_end, task) for name, task in tasks.items()}, size.rounds)
    return {name: 1e3 * (each - seconds["f"]) for name, each in seconds.items() if name != "f"}


def table(times: Sequence[tuple[Size, dict[str, float]]]) -> str:
    """A line for each contestant, a column for each size."""
    lines = [" " * 28 + "".join(f"{size!s:>14}" for size, _ in times)]
    lines += [f"{name:28}" + "".join(f"{each[name]:>14.4f}" for _, each in times) for name in times[0][1]]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Check and time on the CUDA device, print and write what came out; without one, say so."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder for the results")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("no CUDA device: nothing measured")
        return 0
    device = Device()
    f, z0 = affine(CHECKED, device.name, torch.float64)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        checks = [
            check(name, SOLVERS[name], f, z0) for check in (steps_never_wait, solve_waits_at_looks) for name in PEERS
        ]
        checks += [compiled_agrees(name, solver, f, z0, device) for name, solver in SHORT.items()]
        checks += [graphed_agrees(name, SOLVERS[name], f, z0, device) for name in PEERS]
        print(targets_text(checks), "", "Milliseconds per evaluation beyond f", sep="\n", flush=True)
        times = [(size, milliseconds(size, device)) for size in SIZES]
    print(table(times))
    document = {
        "machine": provenance.machine(),
        "versions": {**provenance.versions(), "torchdeq": metadata.version("torchdeq")},
        "commit": provenance.commit(),
        "checks": [asdict(check) for check in checks],
        "sizes": [{"size": asdict(size), "milliseconds": each} for size, each in times],
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "device.json").write_text(json.dumps(document, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
