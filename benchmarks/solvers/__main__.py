"""Count evaluations of our solvers and the peers' on every problem of the suite; say which targets are met.

    python -m benchmarks.solvers [--seeds 2] [--out benchmarks/results] [--quick] [--strict]
    python -m benchmarks.solvers --peers-from benchmarks/results/solvers.json
    python -m benchmarks.solvers --against benchmarks/results/solvers.json

Writes ``solvers.json``, ``solvers.txt`` and ``solvers.png`` to the folder. After a change of our solvers, the peers'
counts can be taken from an earlier file. With ``--against``, runs our solvers alone, prints their counts beside those
of that file, and writes nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.solvers import report
from benchmarks.solvers.against import against_text, counted_before
from benchmarks.solvers.cases import Case, grouped
from benchmarks.solvers.contestants import installed_runners
from benchmarks.solvers.floor import floor
from benchmarks.solvers.problems import cases
from benchmarks.solvers.runners import Runner, run_cases
from benchmarks.solvers.standings import Result, targets


def run_suite(chosen: Sequence[Case], runners: Sequence[Runner]) -> list[Result]:
    """Every runner on every case, in the order of the cases."""
    found = {}
    groups = grouped(chosen)
    with tqdm(total=len(groups) * len(runners), unit="run", mininterval=1) as bar:
        for group in groups:
            outcomes = {}
            for runner in runners:
                bar.set_postfix_str(f"{group[0].problem}, {runner.name}", refresh=False)
                outcomes[runner.name] = run_cases(runner, group)
                bar.update()
            for place, case in enumerate(group):
                found[case.name] = Result(case, {name: each[place] for name, each in outcomes.items()})
    return [found[case.name] for case in chosen]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the suite, print and write what came out; the exit status is 1 if ``--strict`` and a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2, help="seeds of each problem that draws numbers")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder for the results")
    parser.add_argument("--quick", action="store_true", help="one seed, float64 only: a look in passing")
    parser.add_argument("--strict", action="store_true", help="exit with status 1 if a target is missed")
    parser.add_argument("--against", type=Path, help="an earlier solvers.json to compare our solvers with")
    parser.add_argument("--peers-from", type=Path, help="an earlier solvers.json that the peers' counts are taken from")
    options = parser.parse_args(arguments)
    # More threads than one only wait for one another on states this small.
    torch.set_num_threads(1)
    chosen = cases(range(1 if options.quick else options.seeds))
    if options.quick:
        chosen = [case for case in chosen if case.z0.dtype == torch.float64]
    runners, missing = installed_runners()
    if options.against:
        runners = [runner for runner in runners if runner.ours]
        print(against_text(run_suite(chosen, runners), runners, options.against))
        return 0
    if options.peers_from:
        ours, peers = ([runner for runner in runners if runner.ours == wanted] for wanted in (True, False))
        before = counted_before(chosen, peers, options.peers_from)  # first: a file that will not do is told at once
        results = [
            Result(found.case, {**found.outcomes, **others})
            for found, others in zip(run_suite(chosen, ours), before, strict=True)
        ]
    else:
        results = run_suite(chosen, runners)
    standings = targets(results, runners)
    affine = [case for case in chosen if case.affine and case.z0.dtype == torch.float64]
    floors = {case.name: least for case in affine if (least := floor(case)) is not None}
    text = "\n".join(
        [
            f"{len({case.problem for case in chosen})} problems, {len(chosen)} cases, {len(runners)} solvers",
            *(f"not run: {name}" for name in missing),
            "Evaluations where solved (geometric mean), -n: n cases not solved, -: none solved",
            "",
            report.table(results, runners),
            "",
            report.targets_text(standings),
            report.floor_text(results, runners, floors),
        ]
    )
    print(text)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "solvers.txt").write_text(text + "\n")
    document = report.as_json(results, runners, standings, floors, missing)
    (options.out / "solvers.json").write_text(json.dumps(document, indent=1) + "\n")
    report.plot_profile(results, runners, options.out / "solvers.png")
    return int(options.strict and not all(target.met for target in standings))


if __name__ == "__main__":
    sys.exit(main())
