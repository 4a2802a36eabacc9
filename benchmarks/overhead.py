"""What a solver costs per evaluation beyond f: ours beside torchdeq's, in one process, all taking turns.

    python -m benchmarks.overhead [--out benchmarks/results] [--quick] [--threads 1]

f is a diagonal affine map that costs next to nothing; its own time is measured alone and taken off. Evaluations are
counted from outside, and what a solve sets up is spread over them. The least time over the rounds counts. The floor is
the time in which this machine copies as many bytes as an evaluation must move, in turn with the others. Writes
``overhead.json`` and ``overhead.txt`` to the folder.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fixpoint
from benchmarks.solvers.report import targets_text
from benchmarks.solvers.standings import Target, geometric_mean
from benchmarks.written import write

Map = Callable[[Tensor], Tensor]
Run = Callable[[Map, Tensor, int], object]


@dataclass(frozen=True, kw_only=True)
class Size:
    """A state ``(rows, dim)``, the evaluations of a solve and how often each solve is timed."""

    rows: int
    dim: int
    evals: int = 30
    rounds: int = 25

    def __str__(self) -> str:
        return f"{self.rows} x {self.dim}"


SIZES = (
    Size(rows=4, dim=32),
    Size(rows=1, dim=100),
    Size(rows=32, dim=256),
    Size(rows=64, dim=4096),
    Size(rows=16, dim=65536, rounds=5),
    Size(rows=8, dim=1048576, evals=12, rounds=5),
)
QUICK = tuple(replace(size, rounds=3) for size in SIZES[:4])


class Counted:
    """f that counts its calls."""

    def __init__(self, f: Map) -> None:
        self.f, self.calls = f, 0

    def __call__(self, z: Tensor) -> Tensor:
        self.calls += 1
        return self.f(z)


def affine(size: Size, device: str = "cpu", dtype: torch.dtype = torch.float32) -> tuple[Map, Tensor]:
    """``z -> w z + c`` entry by entry with w in [0, 0.98], and a start of zeros."""
    generator = torch.Generator().manual_seed(0)
    w = 0.98 * torch.rand(size.rows, size.dim, generator=generator).to(device, dtype)
    c = torch.randn(size.rows, size.dim, generator=generator).to(device, dtype)
    return (lambda z: torch.addcmul(c, w, z)), torch.zeros_like(c)


def f_alone(f: Map, z0: Tensor, evals: int) -> None:
    """The evaluations and nothing else."""
    z = z0
    for _ in range(evals):
        z = f(z)


def ours(solver: fixpoint.Solver, check_every: int = 1) -> Run:
    """``fixpoint.solve`` with ``solver``; no row can meet the tolerance."""

    def run(f: Map, z0: Tensor, evals: int) -> None:
        fixpoint.solve(
            f, z0, solver=solver, rtol=0, max_evals=evals, check_every=check_every, on_failure="ignore", backward=None
        )

    return run


def torchdeq(name: str, **options: int) -> Run:
    """A solver of torchdeq; no row can meet the tolerance. Its Broyden makes one evaluation more."""

    def run(f: Map, z0: Tensor, evals: int) -> None:
        from torchdeq.solver import get_solver  # not where our own are timed without it

        get_solver(name)(f, z0, max_iter=evals, tol=0.0, stop_mode="rel", **options)

    return run


SOLVERS = {"Picard": fixpoint.Picard(), "Anderson": fixpoint.Anderson(), "Broyden": fixpoint.Broyden()}
PEERS = {"Anderson": "torchdeq Anderson m=5", "Broyden": "torchdeq Broyden"}
CONTESTANTS: dict[str, Run] = {
    "Picard": ours(SOLVERS["Picard"]),
    "Anderson": ours(SOLVERS["Anderson"]),
    "torchdeq Anderson m=5": torchdeq("anderson", m=5),
    "Broyden": ours(SOLVERS["Broyden"]),
    "torchdeq Broyden": torchdeq("broyden"),
}


def timed(run: Run, f: Map, z0: Tensor, evals: int) -> Callable[[], int]:
    """The task of one solve; it returns how often f was called."""

    def task() -> int:
        counted = Counted(f)
        run(counted, z0, evals)
        return counted.calls

    return task


def copying(count: float, times: int) -> Callable[[], int]:
    """The task of moving ``count`` bytes so many times: half are read, half are written."""
    source = torch.ones(max(round(count / 2), 1), dtype=torch.uint8)
    target = torch.empty_like(source)

    def task() -> int:
        for _ in range(times):
            target.copy_(source)
        return times

    return task


def fastest(tasks: Mapping[str, Callable[[], int]], rounds: int) -> dict[str, float]:
    """Least seconds per unit of what each task says it did, over the rounds; in a round all tasks take their turn."""
    best = dict.fromkeys(tasks, math.inf)
    for _ in range(rounds):
        for name, task in tasks.items():
            start = time.perf_counter()
            done = task()
            best[name] = min(best[name], (time.perf_counter() - start) / done)
    return best


class Operations(TorchDispatchMode):
    """Counts the tensor operations that are dispatched; views, which move nothing, apart."""

    def __init__(self) -> None:
        super().__init__()
        self.work = self.views = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.views += function.is_view
        self.work += not function.is_view
        return function(*args, **(kwargs or {}))


def operations(run: Run, f: Map, z0: Tensor, evals: int) -> tuple[int, float, float]:
    """Evaluations of f in a solve; tensor operations and views that it dispatches for each, beyond those of f."""
    counted = Counted(f)
    with Operations() as alone:
        f(z0)
    with Operations() as total:
        run(counted, z0, evals)
    return counted.calls, total.work / counted.calls - alone.work, total.views / counted.calls - alone.views


def step_operations(solver: fixpoint.Solver, size: Size) -> float:
    """Tensor operations per step where the small systems are tensors too, as on a GPU; found on the meta device."""
    z = torch.empty(size.rows, size.dim, device="meta")
    state = solver.init(z)
    with Operations() as counted:
        for _ in range(size.evals - 1):
            z, state = solver.step(z, z, state)
    return counted.work / (size.evals - 1)


def histories(solver: fixpoint.Solver, size: Size) -> list[tuple[float, int]]:
    """For each step of a solve, the states a row that the histories hold before it, and those it writes.

    Raises:
        TypeError: For a solver whose histories this does not know.
    """
    steps = size.evals - 1
    if isinstance(solver, fixpoint.Picard):
        return [(0, 0)] * steps
    if isinstance(solver, fixpoint.Anderson):
        f, z = affine(size)  # what it holds depends on the problem
        state, counts = solver.init(z), []
        for step in range(steps):
            held = torch.isfinite(torch.as_tensor(state.lengths)).sum().item() / size.rows
            counts.append((2 * held, 2 * (step > 0)))
            z, state = solver.step(z, f(z), state)
        return counts
    if isinstance(solver, fixpoint.Broyden):
        held = [0]
        while len(held) < steps:
            full = held[-1] + 1 == solver.memory
            held.append((2 if solver.memory > 2 else 0) if full else held[-1] + 1)  # a restart keeps two states
        return [(count, 1) for count in held[:steps]]
    raise TypeError(f"the histories of {solver!r} are not known here")


def floor_bytes(solver: fixpoint.Solver, size: Size) -> float:
    """Bytes per evaluation that a solve of this length must move, beyond f's own.

    Each evaluation reads z and f(z), from which the norms come in the same pass. Each step reads every state in its
    histories once, writes one slot of each, and writes the next z (Picard's is f(z) itself).
    """
    moved = 2 * size.evals + sum(read + written for read, written in histories(solver, size))
    if not isinstance(solver, fixpoint.Picard):
        moved += size.evals - 1
    return moved * size.rows * size.dim * 4 / size.evals


@dataclass(frozen=True, kw_only=True)
class Figures:
    """One contestant at one size, per evaluation beyond f; the last four are None for a peer."""

    seconds: float
    calls: int
    operations: float
    views: float
    step_operations: float | None = None
    floor_bytes: float | None = None
    floor_seconds: float | None = None
    states: float | None = None


@dataclass(frozen=True, kw_only=True)
class Measured:
    """All contestants at one size, and the seconds that f takes alone."""

    size: Size
    f_seconds: float
    contestants: dict[str, Figures]

    def ratio(self, name: str) -> float:
        """Our time by the peer's; NaN where f's own time drowns one of them."""
        mine, theirs = self.contestants[name].seconds, self.contestants[PEERS[name]].seconds
        return mine / theirs if mine > 0 and theirs > 0 else math.nan


def measure(size: Size) -> Measured:
    """Count, then time every contestant and the copies that are the floor, in turn."""
    f, z0 = affine(size)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        counts = {name: operations(run, f, z0, size.evals) for name, run in CONTESTANTS.items()}
        on_device = {name: step_operations(solver, size) for name, solver in SOLVERS.items()}
        moved = {name: floor_bytes(solver, size) for name, solver in SOLVERS.items()}
        tasks = {name: timed(run, f, z0, size.evals) for name, run in {"f": f_alone, **CONTESTANTS}.items()}
        tasks |= {f"floor of {name}": copying(count, size.evals) for name, count in moved.items()}
        seconds = fastest(tasks, size.rounds)
    contestants = {
        name: Figures(seconds=seconds[name] - seconds["f"], calls=calls, operations=work, views=views)
        for name, (calls, work, views) in counts.items()
    }
    for name, solver in SOLVERS.items():
        contestants[name] = replace(
            contestants[name],
            step_operations=on_device[name],
            floor_bytes=moved[name],
            floor_seconds=seconds[f"floor of {name}"],
            states=fixpoint.estimate_memory(z0, solver=solver, max_evals=size.evals).states,
        )
    return Measured(size=size, f_seconds=seconds["f"], contestants=contestants)


# The most that the geometric mean of a ratio may be, and that of any size.
LIMITS = {"Anderson": (0.5, 0.75), "Broyden": (0.25, 1.0)}
# The most seconds that Picard may take beyond f, at the first size.
PICARD_LIMIT = 15e-6


def targets(results: Sequence[Measured]) -> list[Target]:
    """The aims for the time per evaluation beyond f, on one run."""
    aims = []
    for name, peer in PEERS.items():
        most, anywhere = LIMITS[name]
        ratios = {str(result.size): result.ratio(name) for result in results}
        mean = geometric_mean(ratios.values())
        what = f"{name} / {peer}"
        aims.append(Target(f"{what}, geometric mean over the sizes, at most {most}", mean <= most, f"{mean:.2f}"))
        above = tuple(f"{size}: {ratio:.2f}" for size, ratio in ratios.items() if not ratio <= anywhere)
        span = f"{min(ratios.values()):.2f} to {max(ratios.values()):.2f}"
        aims.append(Target(f"{what}, nowhere above {anywhere}", not above, span, above))
    seconds = results[0].contestants["Picard"].seconds
    name = f"Picard at {results[0].size}, at most {1e6 * PICARD_LIMIT:.0f} microseconds beyond f"
    aims.append(Target(name, seconds <= PICARD_LIMIT, f"{1e6 * seconds:.0f}"))
    return aims


def table(results: Sequence[Measured]) -> str:
    """A line for each contestant at each size."""
    heads = ("ms", "/ torchdeq", "/ floor", "operations", "views", "on a GPU", "states")
    lines = [" " * 24 + "".join(f"{head:>12}" for head in heads)]
    for result in results:
        lines += ["", f"{result.size}, {result.size.evals} evaluations; f alone {_shown(1e3 * result.f_seconds, 4)} ms"]
        for name, found in result.contestants.items():
            cells = (
                _shown(1e3 * found.seconds, 4),
                _shown(result.ratio(name) if name in PEERS else None, 2),
                _shown(found.seconds / found.floor_seconds if found.floor_seconds else None, 1),
                *(_shown(each, 1) for each in (found.operations, found.views, found.step_operations, found.states)),
            )
            lines.append(f"  {name:22}" + "".join(f"{cell:>12}" for cell in cells))
    return "\n".join(lines)


def _shown(figure: float | None, digits: int) -> str:
    return "-" if figure is None else f"{figure:.{digits}f}"


_LEGEND = """\
ms: milliseconds per evaluation beyond f. / floor: that time by the time of a copy of the bytes that must move (z and
f(z) read, the next z written, each history read once and one slot of each written). operations, views: dispatched by
torch per evaluation beyond f; small systems on the CPU are NumPy's and not among them. on a GPU: operations of one
step where they are torch's too. states: most states held while f runs, the loop's own among them."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure every size, print the table and the targets, and write both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder for the results")
    parser.add_argument("--quick", action="store_true", help="the four small sizes, three rounds: a look in passing")
    parser.add_argument("--threads", type=int, help="threads of torch; torch's own choice if not given")
    options = parser.parse_args(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    results = [measure(size) for size in (QUICK if options.quick else SIZES)]
    aims = targets(results)
    head = f"float32, {torch.get_num_threads()} threads; least time over the rounds"
    text = "\n\n".join((head, table(results), _LEGEND, targets_text(aims)))
    print(text)
    write(
        options.out,
        "overhead",
        text,
        quick=options.quick,
        targets=[asdict(aim) for aim in aims],
        sizes=[{**asdict(each), "ratios": {name: each.ratio(name) for name in PEERS}} for each in results],
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
