"""Our counts beside those of an earlier ``solvers.json``: a change that costs evaluations is seen at once."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from benchmarks.solvers.runners import Runner
from benchmarks.solvers.standings import Result, geometric_mean

_WORSE = 1.1


def against_text(results: Sequence[Result], runners: Sequence[Runner], earlier: Path) -> str:
    """For each of our solvers, the ratio of evaluations now to those in ``earlier``, on what both solved.

    Named are the cases where the ratio is above 1.1, and those that only one of the two solved.

    Raises:
        ValueError: If the file is none of this benchmark's, or has no case in common.
    """
    try:
        document = json.loads(earlier.read_text())
        before = {case["name"]: case["evaluations"] for case in document["cases"]}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{earlier} is no solvers.json of this benchmark: {error!r}") from error
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
