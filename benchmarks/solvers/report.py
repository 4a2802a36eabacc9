"""The suite's results as a table, a performance profile and JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib import metadata
from itertools import groupby
from pathlib import Path

import numpy as np

from benchmarks.solvers.runners import Runner
from benchmarks.solvers.standings import Result, Target, above_floor, geometric_mean, in_hindsight, performance_profile
from fixpoint.bench import provenance

_FACTORS = (1.0, 1.1, 1.25, 1.5, 2.0, 3.0, 5.0, 10.0, 20.0)
_PEERS = ("torchdeq", "jaxopt", "jax", "jaxlib")


def table(results: Sequence[Result], runners: Sequence[Runner]) -> str:
    """A row for each problem: geometric mean of the evaluations where a solver succeeded, and where it did not."""
    width = max(len(result.case.problem) for result in results)
    lines = [f"({number}) {runner.name}" for number, runner in enumerate(runners, 1)]
    lines += ["", " " * (width + 7) + "".join(f"{f'({number})':>7}" for number in range(1, len(runners) + 1))]
    for problem, group in groupby(results, key=lambda result: result.case.problem):
        rows = list(group)
        cells = "".join(f"{_cell(rows, runner.name):>7}" for runner in runners)
        lines.append(f"{problem.ljust(width)} {len(rows):>6}" + cells)
    solvable = [result for result in results if result.case.solvable]
    for label, figures in (
        ("solved", [_solved(solvable, runner.name) for runner in runners]),
        ("false claims", [sum(r.outcomes[runner.name].false_claim for r in results) for runner in runners]),
    ):
        size = len(solvable) if label == "solved" else len(results)
        lines.append(f"{label.ljust(width)} {size:>6}" + "".join(f"{figure:>7}" for figure in figures))
    return "\n".join(lines)


def _solved(results: Sequence[Result], name: str) -> int:
    return sum(result.evaluations(name) < math.inf for result in results)


def _cell(results: Sequence[Result], name: str) -> str:
    counts = [count for result in results if (count := result.evaluations(name)) < math.inf]
    if not counts:
        return "-"
    failed = len(results) - len(counts)
    return f"{geometric_mean(counts):.0f}" + (f"-{failed}" if failed else "")


def targets_text(targets: Sequence[Target], *, listed: int = 12) -> str:
    """PASS or FAIL, the aim, the figure, and the first cases that speak against it."""
    lines = []
    for target in targets:
        lines.append(f"{'PASS' if target.met else 'FAIL'}  {target.name}: {target.measured}")
        lines += [f"        {case}" for case in target.against[:listed]]
        if len(target.against) > listed:
            lines.append(f"        and {len(target.against) - listed} more, listed in the JSON")
    return "\n".join(lines)


def floor_text(results: Sequence[Result], runners: Sequence[Runner], floors: Mapping[str, int]) -> str:
    """How near ours and the peers come to what no solver can beat, and what the best choice of solvers would give."""
    ours = above_floor(results, floors, [runner.name for runner in runners if runner.ours])
    peers = above_floor(results, floors, [runner.name for runner in runners if not runner.ours])
    hindsight = in_hindsight(results, "torchdeq Anderson m=5")
    return (
        f"Floor: on {len(floors)} affine cases in float64 GMRES needs the fewest evaluations that there can be; the "
        f"best of ours, case by case, needs {ours:.2f} times as many, the best peer {peers:.2f} times.\n"
        f"Hindsight: who knew the fastest of these {len(runners)} solvers for each case would need "
        f"{hindsight:.3f} times the evaluations of torchdeq's Anderson (m=5), over what that solves."
    )


def _matrix(results: Sequence[Result], runners: Sequence[Runner]) -> np.ndarray:
    solvable = [result for result in results if result.case.solvable]
    return np.array([[result.evaluations(runner.name) for runner in runners] for result in solvable])


def plot_profile(results: Sequence[Result], runners: Sequence[Runner], path: Path) -> None:
    """Draw the performance profile of every solver: ours in full lines, peers in broken ones, a colour each."""
    factors = np.geomspace(1, 20, 400)
    shares = performance_profile(_matrix(results, runners), [float(factor) for factor in factors])
    order = np.argsort(-shares.mean(axis=0))
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.2), layout="constrained")
    axes = figure.add_subplot()
    for place, column in enumerate(order):
        ours = runners[column].ours
        axes.step(
            factors,
            shares[:, column],
            where="post",
            color=f"C{place % 10}",
            linestyle="-" if ours else ("--" if place < 10 else ":"),
            linewidth=2.2 if ours else 1.1,
            label=runners[column].name,
        )
    axes.set(xscale="log", xlim=(1, 20), ylim=(0, 1.01), ylabel="share of the cases solved")
    axes.set_xlabel("evaluations, as a multiple of the fastest solver's on the same case")
    axes.set_xticks([1, 2, 5, 10, 20], ["1", "2", "5", "10", "20"])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


def as_json(
    results: Sequence[Result],
    runners: Sequence[Runner],
    targets: Sequence[Target],
    floors: Mapping[str, int],
    missing: Sequence[str],
) -> dict[str, object]:
    """Everything that was counted, with machine, versions and commit."""
    shares = performance_profile(_matrix(results, runners), _FACTORS)
    return {
        "machine": provenance.machine(),
        "versions": {**provenance.versions(), **_peer_versions()},
        "commit": provenance.commit(),
        "missing": list(missing),
        "solvers": [runner.name for runner in runners],
        "targets": [
            {"name": target.name, "met": target.met, "measured": target.measured, "against": list(target.against)}
            for target in targets
        ],
        "profile": {
            "factors": list(_FACTORS),
            "shares": {runner.name: shares[:, k].round(4).tolist() for k, runner in enumerate(runners)},
        },
        "floors": dict(floors),
        "sources": {result.case.problem: result.case.source for result in results},
        "cases": [_case_json(result) for result in results],
    }


def _case_json(result: Result) -> dict[str, object]:
    case = result.case
    return {
        "name": case.name,
        "dim": case.z0.shape[1],
        "max_evals": case.max_evals,
        "solvable": case.solvable,
        "evaluations": {name: outcome.evaluations for name, outcome in result.outcomes.items()},
        "false_claims": [name for name, outcome in result.outcomes.items() if outcome.false_claim],
        "errors": {name: outcome.error for name, outcome in result.outcomes.items() if outcome.error},
    }


def _peer_versions() -> dict[str, str]:
    found = {}
    for name in _PEERS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
