"""What an earlier ``solvers.json`` serves for: a costly change is seen at once, and peers need not run again."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.solvers.cases import Case
from benchmarks.solvers.runners import Outcome, Runner
from benchmarks.solvers.standings import Result, geometric_mean

_WORSE = 1.1


def against_text(results: Sequence[Result], runners: Sequence[Runner], earlier: Path) -> str:
    """For each of our solvers, the ratio of evaluations now to those in ``earlier``, on what both solved.

    Named are the cases where the ratio is above 1.1, and those that only one of the two solved.

    Raises:
        ValueError: If the file is none of this benchmark's, or has no case in common.
    """
    document, cases = _read(earlier)
    before = {name: case["evaluations"] for name, case in cases.items()}
    lines = [f"Evaluations against {earlier} (commit {document.get('commit')})"]
    for runner in (runner for runner in runners if runner.ours):
        counts = {
            result.case.name: (before[result.case.name][runner.name], result.evaluations(runner.name))
            for result in results
            if runner.name in before.get(result.case.name, {})
        }
        if not counts:
            raise ValueError(f"{earlier} has none of the cases of {runner.name}")
        counts = {name: (old or math.inf, new) for name, (old, new) in counts.items()}
        ratios = {name: new / old for name, (old, new) in counts.items() if math.isfinite(old) and math.isfinite(new)}
        lines.append(
            f"{runner.name:16} {len(ratios)} cases, median {statistics.median(ratios.values()):.3f}, "
            f"geometric mean {geometric_mean(ratios.values()):.3f}, largest {max(ratios.values()):.3f}"
        )
        named = {
            f"above {_WORSE}": [
                f"{name} ({counts[name][0]}, now {counts[name][1]})" for name in ratios if ratios[name] > _WORSE
            ],
            "solved no more": [name for name, (old, new) in counts.items() if math.isfinite(old) and math.isinf(new)],
            "solved now": [name for name, (old, new) in counts.items() if math.isinf(old) and math.isfinite(new)],
        }
        lines += [f"  {what}: {', '.join(cases)}" for what, cases in named.items() if cases]
    return "\n".join(lines)


def counted_before(chosen: Sequence[Case], runners: Sequence[Runner], earlier: Path) -> list[dict[str, Outcome]]:
    """The outcomes of ``runners``, by name, for each case, as they were counted in ``earlier``.

    Raises:
        ValueError: If the file is none of this benchmark's, or lacks a case or a runner.
    """
    _, cases = _read(earlier)
    return [{runner.name: _outcome(cases, case.name, runner.name, earlier) for runner in runners} for case in chosen]


def _outcome(cases: dict[str, Any], case: str, runner: str, earlier: Path) -> Outcome:
    found = cases.get(case)
    if found is None or runner not in found["evaluations"]:
        raise ValueError(f"{earlier} has no count of {runner} on {case}: run all solvers, without --peers-from")
    return Outcome(found["evaluations"][runner], runner in found["false_claims"], found["errors"].get(runner))


def _read(earlier: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """An earlier document, and its cases by name."""
    try:
        document = json.loads(earlier.read_text())
        cases = {case["name"]: case for case in document["cases"]}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{earlier} is no solvers.json of this benchmark: {error!r}") from error
    return document, cases
