"""What a solver of any library is here, and how it is run on the cases.

Peers run with no tolerance of their own on what can be solved: the count ends them at the first point that solves the
case, so none is harmed by a stopping rule of another kind. Where no point solves it, they get the case's tolerance, and
whether they then report success is noted. Ours get the case's tolerance everywhere.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import optimize

from benchmarks.solvers.cases import Case
from benchmarks.solvers.counting import Counted, EndedError

Run = Callable[[Counted], bool]

# What peers raise when an iterate or a small system breaks down. Ours are to raise nothing.
_BREAKDOWNS = (ArithmeticError, RuntimeError, ValueError, optimize.NoConvergence)


@dataclass(frozen=True)
class Runner:
    """A solver under a name. ``run(f)`` solves ``f.case`` by calling f and returns whether it reports success.

    ``by_hand``: given settings that suit this suite, which its users would have to find themselves.
    """

    name: str
    library: str
    run: Run
    by_hand: bool = False

    @property
    def ours(self) -> bool:
        """Whether the solver is this project's."""
        return self.library == "fixpoint"


@dataclass(frozen=True)
class Outcome:
    """How a solver did on a case: evaluations to the first point that solves it, or None.

    ``claimed``: it reported success. ``error``: the name of the exception that ended it.
    """

    evaluations: int | None
    claimed: bool
    error: str | None = None

    @property
    def false_claim(self) -> bool:
        """Success was reported, and no evaluated point meets the tolerance."""
        return self.claimed and self.evaluations is None


def own_tolerance(case: Case) -> float:
    """The tolerance that a peer is given; see the head of this module."""
    return 0.0 if case.solvable else case.rtol


def run_cases(runner: Runner, cases: Sequence[Case]) -> list[Outcome]:
    """Let ``runner`` solve cases that differ in tolerance alone, loosest first: one run, at the tightest."""
    f = Counted(cases)
    claimed, error = False, None
    try:
        with torch.no_grad(), warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            claimed = runner.run(f)
    except EndedError:
        pass
    except _BREAKDOWNS as broken:
        if runner.ours:
            raise
        error = type(broken).__name__
    solved = [*f.solved_at, *[None] * (len(cases) - len(f.solved_at))]
    return [Outcome(evaluations, claimed, error) for evaluations in solved]
