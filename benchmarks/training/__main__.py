"""Train by every backward rule for the same wall time, three seeds each, and say what each reached.

    python -m benchmarks.training [--out benchmarks/results] [--seconds 1.0] [--seeds 3]

A deep-equilibrium cell learns scikit-learn's digits (the model of the documentation's example), and an implicit
transformer learns to add two numbers of six digits, where a carry may run through all places. Runs take turns of a
quarter of a second on one thread. Writes ``training.json`` and ``training.txt`` to the folder.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch

from benchmarks.training.runs import RULES, Outcome, train_all
from benchmarks.training.tasks import TASKS, Task
from fixpoint.bench import provenance

Outcomes = Mapping[str, Outcome]


def table(task: Task, outcomes: Outcomes) -> str:
    """A line for each rule."""
    heads = ("mean", "by seed", "steps", "ms/step", "f/step", "adjoint", "kept KiB", "peak KiB")
    lines = [f"{task.name}: {task.seconds:g} s of training each", "", _line("test accuracy", heads)]
    for name, found in outcomes.items():
        steps = statistics.fmean(found.steps)
        cells = (
            f"{statistics.fmean(found.accuracies):.3f}",
            " ".join(f"{each:.2f}" for each in found.accuracies),
            f"{steps:.0f}",
            f"{1e3 * sum(found.seconds) / sum(found.steps):.1f}",
            f"{found.evaluations:.1f}",
            f"{found.products:.1f}",
            f"{found.saved / 1024:.0f}",
            f"{found.peak / 1024:.0f}",
        )
        lines.append(_line(name, cells))
    return "\n".join(lines)


def _line(name: str, cells: Sequence[str]) -> str:
    widths = (8, 18, 8, 9, 8, 9, 10, 10)
    return f"{name:20}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))


_LEGEND = """\
test accuracy: share of digits named, or of sums with every place right, at the end. f/step: evaluations of the forward
solve; those that a rule records come on top. adjoint: vector-Jacobian products of IFT's solve. kept: bytes saved for
backward. peak: the most bytes that tensors of one step had at once."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder for the results")
    parser.add_argument(
        "--seconds", type=float, default=1.0, help="factor on every run's time: 0.1 for a look in passing"
    )
    parser.add_argument("--seeds", type=int, default=3, help="runs of each rule")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    results: dict[str, tuple[Task, Outcomes]] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for task in (replace(task, seconds=task.seconds * options.seconds) for task in TASKS):
            results[task.name] = task, train_all(task, RULES, range(options.seeds))
    text = "\n\n".join([*(table(*each) for each in results.values()), _LEGEND])
    print(text)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "training.txt").write_text(text + "\n")
    document = {
        "machine": provenance.machine(),
        "versions": provenance.versions(),
        "commit": provenance.commit(),
        "tasks": {
            name: {"seconds": task.seconds, "rules": {rule: asdict(found) for rule, found in outcomes.items()}}
            for name, (task, outcomes) in results.items()
        },
    }
    (options.out / "training.json").write_text(json.dumps(document, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
