"""The solvers that are compared: ours, torchdeq's and SciPy's; jaxopt's where it is installed."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
from scipy import optimize
from torchdeq.solver import get_solver

import fixpoint
from benchmarks.solvers.counting import Counted
from benchmarks.solvers.runners import Run, Runner, own_tolerance


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
    Runner("ACX", "fixpoint", _fixpoint(fixpoint.ACX())),
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
