"""All problems of the suite. A new one is a function ``make(generator, dtype)`` and an entry in its module's list."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.solvers import (
    problems_grids,
    problems_linear,
    problems_networks,
    problems_optimisation,
    problems_physics,
    problems_probability,
    problems_unsolvable,
)
from benchmarks.solvers.cases import Case, SuiteProblem

PROBLEMS: tuple[SuiteProblem, ...] = (
    *problems_linear.PROBLEMS,
    *problems_networks.PROBLEMS,
    *problems_grids.PROBLEMS,
    *problems_probability.PROBLEMS,
    *problems_optimisation.PROBLEMS,
    *problems_physics.PROBLEMS,
    *problems_unsolvable.PROBLEMS,
)


def cases(seeds: Sequence[int] = (0, 1)) -> list[Case]:
    """Every problem at each seed, dtype and tolerance."""
    return [case for problem in PROBLEMS for case in problem.cases(seeds)]
