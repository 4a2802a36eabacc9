"""Experiments: the default comparison of solvers on any problem, and the run of many with their results kept as data.

Only torch and the standard library are needed here; ``fixpoint.bench.report`` draws what comes out.
"""

from __future__ import annotations

import datetime
import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fixpoint.bench import provenance
from fixpoint.bench.problems import CLASSICAL
from fixpoint.bench.registry import Problem, check_keywords, find_problem, is_problem, load_object
from fixpoint.bench.results import Bars, Cell, Lines, Study, Table
from fixpoint.chains.causal import CausalQuasiNewton
from fixpoint.chains.recurrence import Chain
from fixpoint.engine.layout import Layout, leaves
from fixpoint.engine.norms import row_norm
from fixpoint.solution import Solution
from fixpoint.solve import solve
from fixpoint.solvers.base import Solver, require_count
from fixpoint.solvers.blockwise import Blockwise
from fixpoint_cli.names import SOLVERS, named, parse_spec, problem_entries

DEFAULT_SOLVERS = ("picard", "anderson", "anderson:memory=10", "broyden")
WHY_NOT = "Why rows did not converge"
_COLUMNS = ("solver", "rtol", "evaluations", "seconds", "worst relative residual", "worst error", "converged", "rows")


def make_solver(spec: str) -> Solver:
    """The solver that ``"name:key=value,..."`` names; ``blocks=T`` gives each of T parts of a row its own coefficients.

    In place of a name, ``"module:Solver"`` or ``"path/to/file.py:Solver"`` says where a class stands.

    Raises:
        LookupError: If there is no such solver.
        TypeError, ValueError: If an option is unknown or illegal.

    Example:
        >>> make_solver("broyden:memory=10")
        Broyden(memory=10, history_dtype=None)
    """
    name, options = parse_spec(spec)
    make = load_object(name if ":" in name else named("solver", name, SOLVERS))
    if not (isinstance(make, type) and issubclass(make, Solver)):
        raise TypeError(f"{name} must be a class of solvers (a fixpoint.Solver), found {make!r}")
    blocks = options.pop("blocks", None)
    check_keywords(f"solver {name!r}", make, options, also=("blocks",))
    solver = make(**options)
    return solver if blocks is None else Blockwise(solver, require_count("blocks", blocks))


def compare(
    problem: Problem,
    solvers: Mapping[str, Solver] | None = None,
    *,
    rtols: Sequence[float] = (1e-5,),
    max_evals: int = 300,
    name: str = "comparison",
    title: str = "",
) -> Study:
    """Solve one problem with each solver, side by side.

    The residual in the table is measured afresh at the returned state, apart from the solver's own figures; when the
    problem has a ``solution``, its distance is given too.

    Args:
        problem: An object with ``z0`` and ``__call__``.
        solvers: ``{label: solver}``; None takes those that ``DEFAULT_SOLVERS`` names.
        rtols: Relative tolerances; each is a solve of its own.
        max_evals: Evaluations granted to each solve.
        name, title: Of the study.

    Returns:
        Study: a table, the worst row's residual against evaluations, the seconds of each solve, and where rows did not
        converge a table that says why. ``print`` shows the tables, ``plot`` the curves.

    Raises:
        TypeError, ValueError: If the problem has no z0 or cannot be called; if z0 holds anything but tensors, or no
            rows; for a problem or a solver that ``solve`` refuses.

    Example:
        >>> import fixpoint
        >>> study = compare(fixpoint.load_problem("linear:dim=20"), {"Picard": fixpoint.Picard()}, rtols=[0.1])
        >>> study.main_table.columns[0], study.main_table.rows[0][0], study.main_table.rows[0][-2:]
        ('solver', 'Picard', (4, 4))
        >>> study.plot().get_ylabel()
        'residual ||f(z) - z||'
    """
    _check(problem)
    solvers = {spec: make_solver(spec) for spec in DEFAULT_SOLVERS} if solvers is None else solvers
    if not isinstance(solvers, Mapping):
        raise TypeError(f"solvers must be a dict {{label: solver}}, found a {type(solvers).__name__}")
    rows, reasons = [], []
    series, times = {}, {}
    for label, solver in solvers.items():
        # What is imported or compiled at first use is not this solver's time, and not the first one's alone.
        solve(problem, solver=solver, backward=None, max_evals=2, on_failure="ignore")
        for rtol in rtols:
            start = time.perf_counter()
            solution = solve(
                problem, solver=solver, backward=None, rtol=rtol, max_evals=max_evals, on_failure="ignore", record=True
            )
            seconds = time.perf_counter() - start
            share = (int(solution.converged.sum()), solution.converged.numel())
            left, residual, error = _verify(problem, solution.value)
            rows.append((label, rtol, solution.nfev, seconds, residual, error, *share))
            curve = label if len(rtols) == 1 else f"{label}, rtol {rtol:g}"
            series[curve] = _worst(solution, left)
            times[curve if share[0] == share[1] else f"{curve} (fails)"] = seconds
            if share[0] < share[1]:
                reasons.append((label, rtol, _reason(problem, solver, solution)))
    table = Table(
        "Solvers side by side",
        _COLUMNS,
        rows,
        "Evaluations of f until the last row ended. The residual ||f(z) - z|| / ||f(z)|| is measured afresh at the "
        "returned state; the error is the relative distance to the closed-form solution, where one is known.",
    )
    lines = Lines(
        "Residual of the worst row",
        series,
        "evaluations of f",
        "residual ||f(z) - z||",
        caption="Lower and further left is better. A curve ends where the last row met its tolerance, or at the limit. "
        "The causal solver measures no residual on the way: a dot shows that of its result.",
    )
    bars = Bars("Time until the last row ended", times, "seconds")
    why = [Table(WHY_NOT, ("solver", "rtol", "why"), reasons)] if reasons else []
    return Study(name, title or name, (table, lines, bars, *why))


def _reason(problem: Problem, solver: Solver, solution: Solution) -> str:
    """Why rows did not converge, in one sentence."""
    if isinstance(solver, CausalQuasiNewton) and not isinstance(problem, Chain):
        return f"{solution.failure_message()}. This solver is for chains, and the problem does not say that it is one"
    return solution.failure_message()


def _check(problem: Problem) -> None:
    """Refuse what is no problem, and what can be solved but not shown beside others."""
    if not is_problem(problem):
        raise TypeError(f"expected a problem, an object that can be called and has a start z0, found {problem!r}")
    for path, leaf in leaves(problem.z0):
        if not isinstance(leaf, torch.Tensor):
            raise TypeError(f"the problem's z0 must be made of tensors, found {type(leaf).__name__} at {path}")
    if not Layout.of(problem.z0, getattr(problem, "batch_dims", None)).rows:
        raise ValueError("the problem has no rows, so there is nothing to compare")


@torch.no_grad()
def _verify(problem: Problem, value: Any) -> tuple[float, float, float | None]:
    """At ``value``, of the worst row: residual and relative residual by a fresh evaluation; relative error if known."""
    layout = Layout.of(problem.z0, getattr(problem, "batch_dims", None))
    own = getattr(problem, "norm", None)

    def size(flat: torch.Tensor) -> torch.Tensor:
        return row_norm(flat) if own is None else own(layout.unflatten(flat)).reshape(-1)

    z, fz = layout.flatten(value), layout.flatten(problem(value))
    left = size(fz - z)
    residual, relative = float(left.max()), _largest_share(left, size(fz))
    exact = getattr(problem, "solution", None)
    if exact is None:
        return residual, relative, None
    expected = layout.flatten(exact).double()
    return residual, relative, _largest_share(row_norm(z.double() - expected), row_norm(expected))


def _largest_share(part: torch.Tensor, whole: torch.Tensor) -> float:
    """Of all rows; nothing of nothing is nothing."""
    return float(torch.where(part == 0, part, part / whole).max())


def _worst(solution: Solution, left: float) -> tuple[list[float], list[float | None]]:
    """Evaluations 1, 2, ... and the largest residual of any row after each; ``left`` alone where none was measured."""
    if solution.predicted_error is not None:
        return [float(solution.nfev)], [left]
    assert solution.trace is not None
    worst = solution.trace.reshape(solution.nfev, -1).amax(dim=1).tolist()
    return [float(count) for count in range(1, solution.nfev + 1)], worst


def check(names: Sequence[str] = (), solvers: Sequence[str] = ()) -> None:
    """Raise for an unknown name or option of a problem or a solver, before anything has run.

    A registered problem that cannot be imported passes here and fails as a study, so that it does not stop the others.

    Raises:
        LookupError, TypeError, ValueError: As ``run``.

    Example:
        >>> check(["linear:roh=0.5"])
        Traceback (most recent call last):
        TypeError: problem 'linear' has no option 'roh'. Did you mean 'rho'? Legal: dim, dtype, rho, rows, scale, seed.
    """
    for spec in solvers:
        make_solver(spec)
    for spec in names:
        name, options = parse_spec(spec)
        try:
            entry = find_problem(name)
        except Exception:
            if name not in problem_entries():
                raise
            continue
        entry.check(options, name)


def run(
    names: Sequence[str] = (),
    solvers: Sequence[str] = (),
    *,
    rtols: Sequence[float] = (1e-5,),
    max_evals: int = 300,
    quick: bool = False,
    progress: Callable[[Sequence[str]], Iterable[str]] = iter,
) -> dict[str, Any]:
    """Run problems by name and collect their studies, with the machine and versions that they ran on.

    Args:
        names: ``"name:key=value,..."`` each; none runs the classical problems.
        solvers: Solver specs to compare. None given: a problem with a study of its own, named without options, runs
            that study, and any other is compared with the default solvers.
        rtols, max_evals: As in ``compare``.
        quick: Ask studies for their small version.
        progress: Wraps the names, as ``tqdm`` does.

    Returns:
        JSON-able results. A study that raises is listed under ``failures`` and does not touch the others; Ctrl-C ends
        the run with what has finished.

    Raises:
        LookupError, TypeError, ValueError: At once, if a name or option of a problem or solver is unknown.

    Example:
        >>> results = run(["linear:dim=20"], ["anderson"])
        >>> [study["name"] for study in results["studies"]], results["failures"]
        (['linear:dim=20'], [])
    """
    specs = list(dict.fromkeys(names or CLASSICAL))
    check(specs, solvers)
    chosen = {spec: make_solver(spec) for spec in solvers}
    start = time.perf_counter()
    studies: list[Study] = []
    failures = []
    for spec in progress(specs):
        try:
            studies.append(_study(spec, chosen, rtols, max_evals, quick))
        except Exception as error:
            logging.getLogger("fixpoint").exception("study %r failed", spec)
            failures.append({"name": spec, "error": f"{type(error).__name__}: {error}"})
        except KeyboardInterrupt:  # what has finished is worth keeping
            failures.append({"name": spec, "error": "interrupted"})
            break
    return document(_with_overview(studies), seconds=time.perf_counter() - start, quick=quick, failures=failures)


def document(
    studies: Sequence[Study],
    *,
    seconds: float,
    quick: bool = False,
    failures: Sequence[Mapping[str, str]] = (),
    title: str = "fixpoint bench",
) -> dict[str, Any]:
    """Studies as JSON-able results, with the machine, the versions and the commit: what ``write`` and ``render`` take.

    Args:
        studies: In the order of the report.
        seconds: How long they took.
        quick: Whether they are small versions.
        failures: ``name`` and ``error`` of each study that failed.
        title: Of the page.

    Example:
        >>> sorted(document([], seconds=0.0))[:4]
        ['commit', 'date', 'failures', 'format']
    """
    return {
        "format": 1,
        "title": title,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seconds": round(seconds, 2),
        "quick": quick,
        "machine": provenance.machine(),
        "versions": provenance.versions(),
        "commit": provenance.commit(),
        "studies": [study.to_json() for study in studies],
        "failures": list(failures),
    }


def write(results: Mapping[str, Any], out_dir: str | Path) -> Path:
    """Write ``results.json`` into ``out_dir``, which is made if need be, and return its path.

    Example:
        >>> import tempfile
        >>> from fixpoint import bench
        >>> bench.write(bench.run(["linear:dim=20"], ["picard"]), tempfile.mkdtemp()).name
        'results.json'
    """
    folder = Path(out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "results.json"
    path.write_text(json.dumps(results, indent=1, allow_nan=False), encoding="utf-8")
    return path


def _study(spec: str, solvers: Mapping[str, Solver], rtols: Sequence[float], max_evals: int, quick: bool) -> Study:
    name, options = parse_spec(spec)
    entry = find_problem(name)
    if entry.study is not None and not options and not solvers:
        return entry.study(quick)
    title = f"{spec}: {entry.summary}"
    return compare(entry(**options), solvers or None, rtols=rtols, max_evals=max_evals, name=spec, title=title)


def _with_overview(studies: Sequence[Study]) -> list[Study]:
    """``studies``, led by one table that sums the comparisons up when there are several."""
    compared = {s.name: s.main_table for s in studies if s.main_table and tuple(s.main_table.columns) == _COLUMNS}
    if len(compared) < 2:
        return list(studies)
    columns = list(dict.fromkeys((row[0], row[1]) for table in compared.values() for row in table.rows))
    rows = []
    for name, table in compared.items():
        cells = {(row[0], row[1]): _verdict(dict(zip(_COLUMNS, row, strict=True))) for row in table.rows}
        rows.append((name, *(cells.get(key) for key in columns)))
    one_rtol = len({rtol for _, rtol in columns}) == 1
    labels = [str(solver) if one_rtol else f"{solver} to {rtol:g}" for solver, rtol in columns]
    caption = "Evaluations of f until every row met its tolerance, or 'fails' with the worst relative residual reached."
    title = f"Evaluations to relative residual {columns[0][1]:g}" if one_rtol else "Evaluations"
    overview = Study("overview", "Overview", (Table(title, ("problem", *labels), rows, caption),))
    return [overview, *(replace(study, detail=study.name in compared) for study in studies)]


def _verdict(row: Mapping[str, Cell]) -> Cell:
    if row["converged"] == row["rows"]:
        return row["evaluations"]
    return f"fails ({row['worst relative residual']:.0e})"
