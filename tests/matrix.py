"""The suite under other instruction sets, thread counts, seeds and orders; no part of continuous integration.

``python tests/matrix.py`` runs every cell in a process of its own and prints a table; ``--list`` names the cells.
``--only avx2-1`` takes the cells whose name holds that text, and may be repeated; ``--cover`` takes five of them with
each instruction set, thread count and seed at least once. A cell that has a result under ``--out`` for this commit is
not run again, so an interrupted run goes on where it was; ``--again`` runs it anyway, as do files changed since the
commit. What follows ``--`` goes to pytest: ``python tests/matrix.py --only default -- tests/fixpoint -k anderson``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import date
from itertools import product
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parents[1]
# What the CPU kernels of PyTorch and of MKL are told to use; "own" is what this machine has.
INSTRUCTIONS = {
    "own": {},
    "default": {"ATEN_CPU_CAPABILITY": "default"},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2"},
    "mkl-avx": {"MKL_ENABLE_INSTRUCTIONS": "AVX"},
    "mkl-compatible": {"MKL_CBWR": "COMPATIBLE"},
}
THREADS = (1, 2)
SEEDS = (1, 2, 3)


@dataclass(frozen=True)
class Cell:
    """One run of the suite: a seed gives the examples that hypothesis draws and the order of the tests."""

    instructions: str
    threads: int
    seed: int

    @property
    def name(self) -> str:
        return f"{self.instructions}-{self.threads}-seed{self.seed}"

    def environment(self) -> dict[str, str]:
        """Ours, less what another cell would set."""
        others = {name for setting in INSTRUCTIONS.values() for name in setting}
        ours = {name: value for name, value in os.environ.items() if name not in others}
        # Threads that wait for work sleep: they would take the cores from the other processes.
        threads = {"OMP_NUM_THREADS": str(self.threads), "OMP_WAIT_POLICY": "PASSIVE"}
        return {**ours, **INSTRUCTIONS[self.instructions], **threads}

    def command(self, processes: int, xml: Path, arguments: Iterable[str]) -> list[str]:
        workers = max(1, processes // self.threads)
        options = ["-n", str(workers if workers > 1 else 0), f"--hypothesis-seed={self.seed}"]
        options += ["--random-order-bucket=global", f"--random-order-seed={self.seed}", f"--junitxml={xml}"]
        return [sys.executable, "-m", "pytest", *options, *arguments]


@dataclass(frozen=True)
class Result:
    cell: str
    commit: str
    arguments: list[str]
    passed: int
    failed: list[str]
    seconds: float
    code: int  # of pytest: 0 all passed, 1 some failed, other the run itself broke


CELLS = [Cell(*values) for values in product(INSTRUCTIONS, THREADS, SEEDS)]
COVER = [
    Cell("own", 2, 1),
    Cell("default", 1, 2),
    Cell("avx2", 1, 3),
    Cell("mkl-avx", 2, 1),
    Cell("mkl-compatible", 1, 2),
]


def read(xml: Path) -> tuple[int, list[str]]:
    """How many tests of pytest's report passed, and the names of those that did not; skipped ones are neither."""
    cases = list(ElementTree.parse(xml).iter("testcase"))
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = [case for case in cases if case.find("skipped") is not None]
    names = sorted({f"{case.get('classname')}::{case.get('name')}" for case in failed})
    return len(cases) - len(failed) - len(skipped), names


def run(cell: Cell, out: Path, commit: str, processes: int, arguments: list[str]) -> Result:
    xml, start = out / f"{cell.name}.xml", time.monotonic()
    xml.unlink(missing_ok=True)
    with (out / f"{cell.name}.log").open("w") as log:
        command = cell.command(processes, xml, arguments)
        code = subprocess.run(command, cwd=ROOT, env=cell.environment(), stdout=log, stderr=log).returncode
    passed, failed = read(xml) if xml.exists() else (0, [])
    return Result(cell.name, commit, arguments, passed, failed, round(time.monotonic() - start, 1), code)


def table(results: Iterable[Result]) -> str:
    """One line a cell, and the names of what failed below it."""
    lines = ["| cell | passed | failed | seconds |", "| --- | ---: | ---: | ---: |"]
    names: dict[str, list[str]] = {}
    for result in results:
        failed = str(len(result.failed)) if result.code in (0, 1) else f"{len(result.failed)}, exit code {result.code}"
        lines.append(f"| {result.cell} | {result.passed} | {failed} | {result.seconds:.0f} |")
        for name in result.failed:
            names.setdefault(name, []).append(result.cell)
    return "\n".join([*lines, *(f"- {name}: {', '.join(cells)}" for name, cells in sorted(names.items()))])


def current_commit() -> str:
    """The commit, marked if files that git tracks have changed since."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*", "--abbrev=12"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", default=[], metavar="TEXT", help="cells whose name holds TEXT")
    parser.add_argument("--cover", action="store_true", help="five cells that hold each value at least once")
    parser.add_argument("--list", action="store_true", help="name the cells and stop")
    parser.add_argument("--again", action="store_true", help="run cells that have a result as well")
    parser.add_argument("--processes", type=int, default=2, help="cores to use; threads are taken off (default 2)")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "matrix")
    parser.add_argument("arguments", nargs="*", help="for pytest, after --")
    options = parser.parse_args()
    chosen = COVER if options.cover else CELLS
    if options.only:
        chosen = [cell for cell in chosen if any(text in cell.name for text in options.only)]
    if options.list:
        print(*(cell.name for cell in chosen), sep="\n")
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    commit, results = current_commit(), []
    for cell in chosen:
        path = options.out / f"{cell.name}.json"
        known = Result(**json.loads(path.read_text())) if path.exists() else None
        same = known and (known.commit, known.arguments) == (commit, options.arguments) and known.code in (0, 1)
        if known and same and not (options.again or commit.endswith("dirty")):
            result = known
        else:
            result = run(cell, options.out, commit, options.processes, options.arguments)
            path.write_text(json.dumps(asdict(result)))
        results.append(result)
        print(f"{cell.name}: {result.passed} passed, {len(result.failed)} failed", file=sys.stderr, flush=True)
    print(f"{date.today()}, commit {commit}\n\n{table(results)}")
    return int(any(result.code for result in results))


if __name__ == "__main__":
    sys.exit(main())
