"""The solvers that are compared: ours, torchdeq's and SciPy's; jaxopt's where it is installed.

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
from torchdeq.solver import get_solver

import fixpoint
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


def _fixpoint(solver: fixpoint.Solver) -> Run:
    def run(f: Counted) -> bool:
        case = f.case
        solution = fixpoint.solve(
            f, case.z0, solver=solver, backward=None, rtol=case.rtol, max_evals=case.max_evals, on_failure="ignore"
        )
        return bool(solution.converged.all())

    return run


def _torchdeq(name: str, **options: int) -> Run:
    def run(f: Counted) -> bool:
        tolerance = own_tolerance(f.case)
        # One of its solvers hands the damping to f.
        _, _, info = get_solver(name)(
            lambda z, tau=1.0: f(z), f.case.z0, max_iter=f.case.max_evals, tol=tolerance, stop_mode="rel", **options
        )
        return bool((info["rel_lowest"] < f.case.rtol).all())

    return run


def _scipy(solver: Callable[..., np.ndarray], **options: object) -> Run:
    def run(f: Counted) -> bool:
        limit = f.case.max_evals + 1
        start = f.case.z0[0].numpy()
        # Raises NoConvergence where it fails.
        solver(lambda x: f.numpy(x) - x, start, f_tol=own_tolerance(f.case), maxiter=limit, **options)
        return True

    return run


OURS = (
    Runner("Picard", "fixpoint", _fixpoint(fixpoint.Picard())),
    Runner("Anderson", "fixpoint", _fixpoint(fixpoint.Anderson())),
    Runner("Anderson m=10", "fixpoint", _fixpoint(fixpoint.Anderson(memory=10))),
    Runner("Anderson m=50", "fixpoint", _fixpoint(fixpoint.Anderson(memory=50))),
    Runner("Anderson m=100", "fixpoint", _fixpoint(fixpoint.Anderson(memory=100))),
    Runner("Broyden", "fixpoint", _fixpoint(fixpoint.Broyden())),
    Runner("Broyden m=100", "fixpoint", _fixpoint(fixpoint.Broyden(memory=100))),
)

TORCHDEQ = (
    *(Runner(f"torchdeq Anderson m={m}", "torchdeq", _torchdeq("anderson", m=m)) for m in (5, 10, 20)),
    Runner("torchdeq Broyden", "torchdeq", _torchdeq("broyden")),
    Runner("torchdeq fixed_point_iter", "torchdeq", _torchdeq("fixed_point_iter")),
    Runner("torchdeq simple_fixed_point_iter", "torchdeq", _torchdeq("simple_fixed_point_iter")),
)

SCIPY = (
    Runner("SciPy anderson M=5", "scipy", _scipy(optimize.anderson)),
    Runner("SciPy anderson M=10", "scipy", _scipy(optimize.anderson, M=10)),
    Runner(
        "SciPy anderson M=10 alpha=1",
        "scipy",
        _scipy(optimize.anderson, M=10, alpha=1.0, line_search=None),
        by_hand=True,
    ),
    Runner("SciPy broyden1", "scipy", _scipy(optimize.broyden1)),
    Runner("SciPy broyden1 alpha=1", "scipy", _scipy(optimize.broyden1, alpha=1.0, line_search=None), by_hand=True),
    Runner("SciPy broyden2 alpha=1", "scipy", _scipy(optimize.broyden2, alpha=1.0, line_search=None), by_hand=True),
    Runner("SciPy newton_krylov", "scipy", _scipy(optimize.newton_krylov)),
)


def installed_runners() -> tuple[tuple[Runner, ...], tuple[str, ...]]:
    """Every solver that can be run here, and the libraries that are missing."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # jaxopt says that nobody maintains it
            from benchmarks.solvers.runners_jax import RUNNERS
    except ModuleNotFoundError as error:
        return (*OURS, *TORCHDEQ, *SCIPY), (f"jaxopt (no module {error.name}: pip install '.[peers]')",)
    return (*OURS, *TORCHDEQ, *SCIPY, *RUNNERS), ()
