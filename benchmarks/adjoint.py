"""Evaluations that an adjoint equation takes: GMRES beside Anderson and SciPy's GMRES, on contractions and beyond.

    python -m benchmarks.adjoint [--out benchmarks/results/adjoint.txt]

The equation is ``u = v + A u`` with one row, started at v as IFT does, solved to a relative residual of 1e-6 with at
most 100 evaluations. SciPy's keeps every vector and stops at the same absolute residual; its evaluations are the
products with ``I - A`` that it asks for. Each figure is the median of the seeds; '-' where one of them failed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, gmres

import fixpoint
from fixpoint.solvers.base import Solver

RTOL = 1e-6
LIMIT = 100
Matrix = np.ndarray
Generator = np.random.Generator

SOLVERS: dict[str, Solver] = {
    "GMRES": fixpoint.GMRES(),
    "GMRES m=20": fixpoint.GMRES(memory=20),
    "Anderson m=10": fixpoint.Anderson(memory=10),
}


def symmetric(radius: float) -> Callable[[Generator], Matrix]:
    """A symmetric matrix of 200 dimensions with this spectral radius."""

    def make(generator: Generator) -> Matrix:
        matrix = generator.standard_normal((200, 200))
        matrix += matrix.T
        return matrix * radius / np.abs(np.linalg.eigvalsh(matrix)).max()

    return make


def general(radius: float) -> Callable[[Generator], Matrix]:
    """A matrix of 200 dimensions with eigenvalues all over the disc of this radius."""

    def make(generator: Generator) -> Matrix:
        matrix = generator.standard_normal((200, 200))
        return matrix * radius / np.abs(np.linalg.eigvals(matrix)).max()

    return make


def expansive(low: float) -> Callable[[Generator], Matrix]:
    """A symmetric matrix of 200 dimensions with eigenvalues from ``low`` to 0.5."""

    def make(generator: Generator) -> Matrix:
        basis, _ = np.linalg.qr(generator.standard_normal((200, 200)))
        return (basis * np.linspace(low, 0.5, 200)) @ basis.T

    return make


def gaussian(dim: int) -> Callable[[Generator], Matrix]:
    """Entries from N(0, 1): expands, and the eigenvalues of I - A lie on all sides of zero."""
    return lambda generator: generator.standard_normal((dim, dim))


def far_from_normal(generator: Generator) -> Matrix:
    """Upper triangular, of 80 dimensions: eigenvalues below 0.7, and far larger entries beside them."""
    upper = np.triu(0.2 * generator.standard_normal((80, 80)), 1)
    return upper + np.diag(0.7 * generator.random(80))


MAPS: dict[str, Callable[[Generator], Matrix]] = {
    **{f"contraction, symmetric, {radius}": symmetric(radius) for radius in (0.5, 0.9, 0.99)},
    **{f"contraction, general, {radius}": general(radius) for radius in (0.5, 0.9, 0.99)},
    "far from normal": far_from_normal,
    "expansive, -3 to 0.5": expansive(-3.0),
    "expansive, -20 to 0.5": expansive(-20.0),
    "z -> 2 z": lambda _: np.full((1, 1), 2.0),
    **{f"N(0, 1), {dim} dimensions": gaussian(dim) for dim in (10, 20, 45, 60)},
}


def evaluations(matrix: Matrix, v: Matrix, solver: Solver, dtype: torch.dtype = torch.float64) -> float:
    """Evaluations until the row is done; infinity if that took more than the limit."""
    A, rhs = torch.from_numpy(matrix).to(dtype), torch.from_numpy(v).to(dtype)[None]
    solution = fixpoint.solve(
        lambda u: u @ A.T + rhs, rhs, solver=solver, rtol=RTOL, max_evals=LIMIT, backward=None, on_failure="ignore"
    )
    return solution.nfev if bool(solution.converged) else np.inf


def scipys(matrix: Matrix, v: Matrix) -> float:
    """Products that SciPy's GMRES of unlimited memory asks for."""
    count = 0

    def multiply(u: Matrix) -> Matrix:
        nonlocal count
        count += 1
        return u - matrix @ u

    exact = np.linalg.solve(np.eye(len(v)) - matrix, v)
    operator = LinearOperator(matrix.shape, multiply, dtype=float)
    gmres(operator, v, rtol=0.0, atol=RTOL * np.linalg.norm(exact), restart=len(v), maxiter=1)
    return count if count <= LIMIT + 1 else np.inf


def table(seeds: int) -> str:
    """Medians over the seeds, a line a map."""
    width = max(map(len, MAPS))
    heads = [*SOLVERS, "SciPy"]
    lines = [" " * width + "".join(f"{head:>15}" for head in heads)]
    for name, make in MAPS.items():
        counts = []
        for seed in range(seeds):
            generator = np.random.default_rng(seed)
            matrix = make(generator)
            v = generator.standard_normal(len(matrix))
            counts.append([*(evaluations(matrix, v, solver) for solver in SOLVERS.values()), scipys(matrix, v)])
        cells = ["-" if np.isinf(column).any() else f"{np.median(column):.0f}" for column in np.array(counts).T]
        lines.append(name.ljust(width) + "".join(f"{cell:>15}" for cell in cells))
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/adjoint.txt"))
    options = parser.parse_args(arguments)
    text = (
        f"evaluations to {RTOL:g} in float64, at most {LIMIT}; median of {options.seeds} seeds, '-' where one failed"
        "\n\n" + table(options.seeds)
    )
    print(text)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
