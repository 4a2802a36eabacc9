"""Seconds from the start to the solution: on the problems of the suite, and on one cheap map at four sizes.

    python -m benchmarks.times [--out benchmarks/results] [--runs 3]

Every solver stops by its own rule at the case's tolerance. torchdeq stops when all rows meet it at the same evaluation;
a case counts as solved where each row has met it once. What a solver sets up, and the lists that torchdeq fills up to
``max_iter``, are part of its time. Beside ours and torchdeq's stands ``Alternating``, which takes plain steps between
those of another solver. It is not in the library; this says what it would be worth. Writes ``times.json`` and
``times.txt`` to the folder.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchdeq.solver import get_solver
from tqdm import tqdm

import fixpoint
from benchmarks.overhead import Size, affine
from benchmarks.solvers.cases import Case
from benchmarks.solvers.problems import cases
from benchmarks.solvers.standings import geometric_mean
from benchmarks.written import write

Solved = tuple[bool, int]  # whether every row has converged, and evaluations
Solve = Callable[[Case], Solved]


@dataclass(frozen=True, kw_only=True)
class Alternating(fixpoint.Solver):
    """Every so many steps one of ``solver``, which sees all evaluations, and plain steps between."""

    solver: fixpoint.Solver
    every: int = 2

    def init(self, z: Tensor) -> Any:
        return 0, self.solver.init(z)

    def step(self, z: Tensor, fz: Tensor, state: Any) -> tuple[Tensor, Any]:
        count, inner = state
        z_next, inner = self.solver.step(z, fz, inner)
        return z_next if (count + 1) % self.every == 0 else fz.clone(), (count + 1, inner)


SOLVERS: dict[str, fixpoint.Solver] = {
    "Anderson": fixpoint.Anderson(),
    "Anderson m=5": fixpoint.Anderson(memory=5),
    "Anderson m=1": fixpoint.Anderson(memory=1),
    "ACX": fixpoint.ACX(),
    "Picard": fixpoint.Picard(),
    "Alternating, every 2nd": Alternating(solver=fixpoint.Anderson()),
    "Alternating, every 3rd": Alternating(solver=fixpoint.Anderson(), every=3),
}
PEER = "torchdeq Anderson m=5"
SIZES = tuple(Size(rows=rows, dim=dim) for rows, dim in ((32, 256), (64, 4096), (16, 65536), (8, 1048576)))
RTOL = 1e-4


def ours(solver: fixpoint.Solver) -> Solve:
    def solve(case: Case) -> Solved:
        options: dict[str, Any] = {"rtol": case.rtol, "max_evals": case.max_evals, "on_failure": "ignore"}
        solution = fixpoint.solve(case.f, case.z0, solver=solver, backward=None, **options)
        return bool(solution.converged.all()), solution.nfev

    return solve


def peer(case: Case) -> Solved:
    calls = 0

    def f(z: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return case.f(z)

    solver = get_solver("anderson")
    _, _, info = solver(f, case.z0, m=5, max_iter=case.max_evals, tol=case.rtol, stop_mode="rel")
    return bool((info["rel_lowest"] < case.rtol).all()), calls


CONTESTANTS: Mapping[str, Solve] = {**{name: ours(solver) for name, solver in SOLVERS.items()}, PEER: peer}


@dataclass(frozen=True)
class Timed:
    """One contestant on one case: evaluations and the least seconds over the runs."""

    evaluations: int
    seconds: float


def time_case(case: Case, runs: int) -> dict[str, Timed]:
    """Those that solve the case; in each run all take their turn. One that fails is not run again."""
    found: dict[str, Timed] = {}
    failed: set[str] = set()
    for _ in range(runs):
        for name, solve in CONTESTANTS.items():
            if name in failed:
                continue
            start = time.perf_counter()
            solved, evaluations = solve(case)
            seconds = time.perf_counter() - start
            if not solved:
                failed.add(name)
            elif name not in found or seconds < found[name].seconds:
                found[name] = Timed(evaluations, seconds)
    return found


def cheap(size: Size) -> Case:
    """A diagonal affine map."""
    f, z0 = affine(size)
    return Case(
        name=str(size),
        problem="cheap",
        seed=0,
        f=f,
        z0=z0,
        rtol=RTOL,
        max_evals=200,
        solvable=True,
        affine=True,
        source="",
    )


def summary(found: Sequence[Mapping[str, Timed]]) -> list[dict[str, Any]]:
    """For each contestant the cases that it solves, and its evaluations and seconds by Anderson's where both do."""
    rows = []
    for name in CONTESTANTS:
        both = [(case[name], case["Anderson"]) for case in found if name in case and "Anderson" in case]
        ratios = {
            what: geometric_mean(getattr(one, what) / getattr(other, what) for one, other in both)
            for what in ("evaluations", "seconds")
        }
        rows.append({"name": name, "solved": sum(name in case for case in found), **ratios})
    return rows


def held(name: str, size: Size) -> float | None:
    """States that a contestant of ours holds while f runs; None for a peer's."""
    z0 = torch.empty(size.rows, size.dim, device="meta")
    return fixpoint.estimate_memory(z0, solver=SOLVERS[name]).states if name in SOLVERS else None


def table(rows: Sequence[Mapping[str, Any]], count: int, by_size: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """The suite, and each size."""
    lines = [f"{'':26}{'solved':>8}{'evaluations':>14}{'seconds':>10}"]
    lines += [f"{r['name']:26}{r['solved']:>8}{r['evaluations']:>14.2f}{r['seconds']:>10.2f}" for r in rows]
    for size, found in by_size.items():
        lines += ["", f"{size:26}{'evaluations':>14}{'seconds':>12}{'states':>8}"]
        for r in found:
            states = "-" if r["states"] is None else f"{r['states']:.0f}"
            lines.append(f"  {r['name']:24}{r['evaluations']:>14}{r['seconds']:>12.4f}{states:>8}")
    lines += [
        "",
        f"One thread. First table: {count} cases of the suite; evaluations and seconds divided by Anderson's,",
        "geometric mean over what both solve: one that fails on hard cases looks better than it is. Others: a diagonal",
        f"affine map to {RTOL:g}; who is missing did not solve it. states: held while f runs, the loop's own too.",
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Time, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder for the results")
    parser.add_argument("--runs", type=int, default=3, help="the least time of so many counts")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    chosen = [case for case in cases(range(1)) if case.solvable]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = [time_case(case, options.runs) for case in tqdm(chosen, unit="case", mininterval=1)]
        by_size = {
            str(size): [
                {"name": name, **asdict(one), "states": held(name, size)}
                for name, one in time_case(cheap(size), options.runs).items()
            ]
            for size in tqdm(SIZES, unit="size", mininterval=1)
        }
    rows = summary(found)
    text = table(rows, len(chosen), by_size)
    print(text)
    write(options.out, "times", text, suite=rows, sizes=by_size)
    return 0


if __name__ == "__main__":
    sys.exit(main())
