"""Compare ways to invert a chain, ours and the peers'; say which targets are met.

    python -m benchmarks.inversion [--only QUESTION] [--out benchmarks/results] [--quick] [--ours-again] [--jobs 2]

Each question writes its own ``inversion-QUESTION.json`` and ``.txt``, and most a picture. An interrupted run goes on
where it stopped, as long as the commit is the same. With ``--ours-again``, only what has "ours" in its name is computed
and everything else is taken from the JSON in the folder: run it after a change of ours. Each question is answered by a
process of one thread, two of them at a time unless ``--jobs`` says otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Protocol

import torch

from benchmarks.inversion import cost, descent, gradients, guidance, latents, reversible, rounds, stochastic
from benchmarks.inversion.cells import Cell, Cells
from benchmarks.solvers.report import targets_text
from benchmarks.solvers.standings import Target
from fixpoint.bench import provenance


class Question(Protocol):
    """What a module of this folder answers: all of its cells, and what is made of them."""

    def measure(self, cells: Cells, quick: bool) -> Cell:
        """Every cell by name."""

    def text(self, document: Cell) -> str:
        """The tables."""

    def targets(self, document: Cell) -> list[Target]:
        """The targets."""

    def plot(self, document: Cell, folder: Path) -> None:
        """Write pictures."""


# Those that take longest come first.
QUESTIONS: dict[str, Question] = {
    "rounds": rounds,
    "guidance": guidance,
    "stochastic": stochastic,
    "latents": latents,
    "descent": descent,
    "gradients": gradients,
    "cost": cost,
    "reversible": reversible,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Answer the questions asked for, print and write what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=list(QUESTIONS), help="this one; may be given again")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder for the results")
    parser.add_argument("--quick", action="store_true", help="short chains, few digits: a look in passing")
    parser.add_argument("--ours-again", action="store_true", help="take all but ours from the results that are there")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    options = parser.parse_args(arguments)
    for name in options.only or QUESTIONS:
        if options.ours_again and not (path := options.out / f"inversion-{name}.json").exists():
            parser.error(f"--ours-again takes the others' cells from {path}, and there is no such file")
    options.out.mkdir(parents=True, exist_ok=True)
    names = list(dict.fromkeys(options.only or QUESTIONS))
    begun = time.perf_counter()
    if options.jobs == 1 or len(names) == 1:
        for name in names:
            answer(name, options.out, quick=options.quick, ours_again=options.ours_again)
    else:
        flags = [f"--{flag}" for flag in ("quick", "ours-again") if getattr(options, flag.replace("-", "_"))]
        with ThreadPoolExecutor(options.jobs) as pool:
            runs = [pool.submit(_printed, [*flags, "--out", str(options.out), "--only", name]) for name in names]
            for run in as_completed(runs):
                print(run.result(), end="", flush=True)
    if len(names) > 1:
        print(f"{time.perf_counter() - begun:.0f} s in all")
    return 0


def _printed(arguments: Sequence[str]) -> str:
    """By a process of its own, of one thread."""
    words = [sys.executable, "-m", "benchmarks.inversion", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout


def answer(name: str, folder: Path, *, quick: bool, ours_again: bool) -> None:
    """Answer one question: print and write what came out."""
    torch.set_num_threads(1)
    question, start = QUESTIONS[name], time.process_time()
    path = folder / f"inversion-{name}.json"
    earlier = json.loads(path.read_text()) if ours_again else {"cells": {}}
    others = {each: cell for each, cell in earlier["cells"].items() if "ours" not in each}
    cells = Cells(folder / f"inversion-{name}{'-quick' * quick}.partial", others)
    document, targets = (found := question.measure(cells, quick)), question.targets(found)
    text = "\n\n".join(filter(None, [question.text(document), targets_text(targets)]))
    print(text, f"({time.process_time() - start:.0f} s of the processor)", "", sep="\n", flush=True)
    (folder / f"inversion-{name}.txt").write_text(text + "\n")
    about = {"machine": provenance.machine(), "versions": provenance.versions(), "commit": provenance.commit()}
    if ours_again:
        about["others"] = earlier.get("others", {key: earlier[key] for key in about})
    aims = [{"name": aim.name, "met": aim.met, "measured": aim.measured} for aim in targets]
    path.write_text(json.dumps({**about, "targets": aims, "cells": document}) + "\n")
    question.plot(document, folder)
    cells.finish()


if __name__ == "__main__":
    sys.exit(main())
