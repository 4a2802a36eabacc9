"""Measure the gradients of every rule, ours and torchdeq's, against float64; say which targets are met.

    python -m benchmarks.gradients [--out benchmarks/results] [--quick]

Three cells (a tanh layer, a convolutional one with group normalisation, a transformer block) are scaled until the
Jacobian at the fixed point has a spectral radius of 0.5, 0.9 and 0.99. The exact gradient comes from dense Jacobians
in float64, and a finite difference confirms it. Times are medians over rounds in which all take their turn. Writes
``gradients.json`` and ``gradients.txt`` to the folder.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.gradients import report
from benchmarks.gradients.cells import CELLS, RADII, setting
from benchmarks.gradients.experiments import (
    Outcome,
    at_setting,
    error_by_forward_rtol,
    recorded_steps_alone,
    saved_by_depth,
)
from benchmarks.gradients.reference import exact_gradient
from benchmarks.solvers.report import targets_text


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder for the results")
    parser.add_argument("--quick", action="store_true", help="one row, one radius, one round: a look in passing")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    radii, rows, rounds = (RADII[:1], 1, 1) if options.quick else (RADII, 8, 5)
    outcomes: list[Outcome] = []
    tolerances: dict[str, dict[str, list[float]]] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, radius in tqdm([(name, radius) for name in CELLS for radius in radii], unit="setting"):
            posed = setting(name, radius, rows=rows)
            outcomes.append(at_setting(posed, rounds))
            if name == next(iter(CELLS)):
                tolerances[outcomes[-1].name] = error_by_forward_rtol(posed, exact_gradient(posed))
        # In float64 near the edge of contraction, plain iteration is not done after a thousand evaluations.
        slow = setting(next(iter(CELLS)), RADII[-1], rows=1)
        saved, recorded = saved_by_depth(slow), recorded_steps_alone(slow)
    aims = report.targets(outcomes, saved, recorded)
    deviation = max(outcome.slope_error for outcome in outcomes)
    head = (
        f"float32, {rows} rows, one thread; forward solves at rtol 1e-6. Columns: cell and spectral radius.\n"
        f"The exact slope along a random direction and a central difference agree to {deviation:.0e}."
    )
    parts = [
        head,
        report.rule_tables(outcomes),
        report.matching_table(outcomes),
        report.depth_table(saved),
        report.tolerance_table(tolerances),
        targets_text(aims),
    ]
    text = "\n\n".join(parts)
    print(text)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "gradients.txt").write_text(text + "\n")
    document = report.as_json(outcomes, saved, tolerances, aims, options.quick)
    (options.out / "gradients.json").write_text(json.dumps(document, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
