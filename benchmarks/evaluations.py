"""Evaluations of f to a relative residual of 1e-5 on the seven classical problems, ours beside torchdeq's.

Every solver is counted in the same way, from outside: f records the residual of each point at which it is evaluated. A
row is done at the first evaluation whose point meets the tolerance; the worst row counts.

    python -m benchmarks.evaluations [--seeds 3] [--out benchmarks/results/evaluations.json]
"""

from __future__ import annotations

import argparse
import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchdeq.solver import get_solver

import fixpoint
from benchmarks.solvers.counting import solves
from fixpoint.bench import provenance
from fixpoint.bench.problems import CLASSICAL

RTOL = 1e-5
LIMIT = 300


class Counted:
    """f that notes, for each row, at which evaluation its point first met the tolerance."""

    def __init__(self, problem: fixpoint.Problem) -> None:
        self.problem, self.calls = problem, 0
        self.done_at = torch.full((len(problem.z0),), math.inf)

    def __call__(self, z: Tensor) -> Tensor:
        fz = self.problem(z)
        self.calls += 1
        met = torch.tensor([solves(*row, RTOL) for row in zip(z, fz, strict=True)])
        self.done_at = torch.where(met & (self.calls <= LIMIT), self.done_at.clamp(max=self.calls), self.done_at)
        return fz

    @property
    def evaluations(self) -> float:
        """Of the worst row; infinity if one never got there."""
        return float(self.done_at.max())


def ours(solver: fixpoint.Solver) -> Callable[[Counted], None]:
    """``fixpoint.solve`` with ``solver``."""

    def run(f: Counted) -> None:
        fixpoint.solve(f, f.problem.z0, solver=solver, rtol=RTOL, max_evals=LIMIT, on_failure="ignore")

    return run


def torchdeq(name: str, **options: int) -> Callable[[Counted], None]:
    """A solver of torchdeq, with its relative stopping rule and enough iterations to reach the limit."""

    def run(f: Counted) -> None:
        get_solver(name)(f, f.problem.z0, max_iter=LIMIT, tol=RTOL, stop_mode="rel", **options)

    return run


SOLVERS = {
    "Picard": ours(fixpoint.Picard()),
    "Anderson": ours(fixpoint.Anderson()),
    "Anderson m=10": ours(fixpoint.Anderson(memory=10)),
    "Broyden": ours(fixpoint.Broyden()),
    "torchdeq Anderson m=5": torchdeq("anderson", m=5),
    "torchdeq Anderson m=10": torchdeq("anderson", m=10),
    "torchdeq Broyden": torchdeq("broyden"),
}


def main() -> None:
    """Print the table of medians over seeds and write every figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/evaluations.json"))
    options = parser.parse_args()
    figures: dict[str, dict[str, list[float | None]]] = {}
    for spec in CLASSICAL:
        figures[spec] = {label: [] for label in SOLVERS}
        for seed in range(options.seeds):
            separator = "," if ":" in spec else ":"
            problem = fixpoint.load_problem(f"{spec}{separator}seed={seed}")
            for label, run in SOLVERS.items():
                f = Counted(problem)
                with torch.no_grad(), warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    run(f)
                figures[spec][label].append(f.evaluations if math.isfinite(f.evaluations) else None)
    width = max(map(len, SOLVERS))
    print(f"evaluations to {RTOL:g}, at most {LIMIT}; median of {options.seeds} seeds, '-' where one failed\n")
    for index, spec in enumerate(CLASSICAL):
        print(f"({index + 1}) {spec}")
    print("\n" + " " * width + "".join(f"{f'({i + 1})':>7}" for i in range(len(CLASSICAL))))
    for label in SOLVERS:
        cells = [figures[spec][label] for spec in CLASSICAL]
        shown = ["-" if None in cell else f"{np.median(cell):.0f}" for cell in cells]  # type: ignore[arg-type]
        print(label.ljust(width) + "".join(f"{cell:>7}" for cell in shown))
    for label in ("Anderson", "Broyden"):
        for peer in ("torchdeq Anderson m=5", "torchdeq Broyden"):
            print(f"{label} / {peer}, geometric mean where the peer succeeds: {_ratio(figures, label, peer):.2f}")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    about = {"machine": provenance.machine(), "versions": provenance.versions(), "commit": provenance.commit()}
    options.out.write_text(json.dumps({**about, "rtol": RTOL, "limit": LIMIT, "evaluations": figures}, indent=1))


def _ratio(figures: dict[str, dict[str, list[float | None]]], label: str, peer: str) -> float:
    pairs = [pair for cells in figures.values() for pair in zip(cells[label], cells[peer], strict=True)]
    return math.exp(np.mean([math.log((mine or math.inf) / theirs) for mine, theirs in pairs if theirs]))


if __name__ == "__main__":
    main()
