"""Compare ways to invert a chain, ours and the peers'; say which targets are met.

    python -m benchmarks.inversion [--only QUESTION] [--out benchmarks/results] [--quick] [--ours-again]

Each question writes its own ``inversion-QUESTION.json`` and ``.txt``, and most a picture. An interrupted run goes on
where it stopped, as long as the commit is the same. With ``--ours-again``, only what has "ours" in its name is computed
and everything else is taken from the JSON in the folder: run it after a change of ours. Everything is on one thread.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
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


QUESTIONS: dict[str, Question] = {
    "rounds": rounds,
    "latents": latents,
    "guidance": guidance,
    "stochastic": stochastic,
    "reversible": reversible,
    "gradients": gradients,
    "descent": descent,
    "cost": cost,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Answer the questions asked for, print and write what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=list(QUESTIONS), help="this one; may be given again")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder for the results")
    parser.add_argument("--quick", action="store_true", help="short chains, few digits: a look in passing")
    parser.add_argument("--ours-again", action="store_true", help="take all but ours from the results that are there")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    begun = time.process_time()
    for name in options.only or QUESTIONS:
        question, start = QUESTIONS[name], time.process_time()
        path = options.out / f"inversion-{name}.json"
        if options.ours_again and not path.exists():
            parser.error(f"--ours-again takes the others' cells from {path}, and there is no such file")
        earlier = json.loads(path.read_text()) if options.ours_again else {"cells": {}}
        others = {each: cell for each, cell in earlier["cells"].items() if "ours" not in each}
        cells = Cells(options.out / f"inversion-{name}{'-quick' * options.quick}.partial", others)
        document, targets = (found := question.measure(cells, options.quick)), question.targets(found)
        text = "\n\n".join(filter(None, [question.text(document), targets_text(targets)]))
        print(text, f"({time.process_time() - start:.0f} s of the processor)", "", sep="\n", flush=True)
        (options.out / f"inversion-{name}.txt").write_text(text + "\n")
        about = {"machine": provenance.machine(), "versions": provenance.versions(), "commit": provenance.commit()}
        if options.ours_again:
            about["others"] = earlier.get("others", {key: earlier[key] for key in about})
        aims = [{"name": aim.name, "met": aim.met, "measured": aim.measured} for aim in targets]
        path.write_text(json.dumps({**about, "targets": aims, "cells": document}) + "\n")
        question.plot(document, options.out)
        cells.finish()
    print(f"{time.process_time() - begun:.0f} s of the processor in all")
    return 0


if __name__ == "__main__":
    sys.exit(main())
