"""Draw the charts and write the tables of the pages on benchmarks and of the README: ``python -m benchmarks.pages``.

Nothing is measured here: each question has a chart and a table from one JSON file of ``benchmarks/results``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

from benchmarks.pages import chains, inversion, solvers
from benchmarks.pages.solvers import Results
from fixpoint.bench import Bars, Lines, Table
from fixpoint.bench.pictures import draw_bars, draw_lines
from fixpoint.bench.results import shown

ROOT = Path(__file__).parents[2]
DOCS, RESULTS, README = ROOT / "docs", ROOT / "benchmarks" / "results", ROOT / "README.md"

Made = tuple[Lines | Bars | None, Table | None]
# By the name of the picture and the table: what makes them, and the results that they are made from.
PAGES: dict[str, tuple[Callable[[Results], Made], str]] = {
    "solvers": (solvers.solvers, "solvers.json"),
    "evaluations": (solvers.evaluations, "evaluations.json"),
    "overhead": (solvers.overhead, "overhead.json"),
    "gradients": (solvers.gradients, "gradients.json"),
    "gradient-radius": (solvers.radius, "gradients.json"),
    "gradient-tolerance": (solvers.tolerance, "gradients.json"),
    "chain-rounds": (chains.rounds, "chains-rounds.json"),
    "chain-speed": (chains.speed, "chains-speed.json"),
    "chain-quality": (chains.quality, "chains-quality.json"),
    **inversion.PAGES,
    "training-digits": (solvers.accuracy("digits", "Handwritten digits"), "training.json"),
    "training-sums": (solvers.accuracy("sums", "Sums of two numbers of six digits"), "training.json"),
}


def markdown(table: Table) -> str:
    """A table as these pages write it; numbers to the right."""
    rule = ["---:" if numeric else "---" for numeric in table.numeric]
    lines = [table.columns, rule, *([shown(cell) for cell in row] for row in table.rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def make(name: str) -> tuple[Lines | Bars | None, str]:
    """The chart of that name, if there is one, and the table, empty if there is none."""
    build, source = PAGES[name]
    chart, table = build(json.loads((RESULTS / source).read_text(encoding="utf-8")))
    return chart, "" if table is None else markdown(table)


def with_tables(page: str) -> str:
    """A page with each table behind a comment such as ``<!-- table solvers -->`` as it is made now."""
    behind = re.compile(r"(<!-- table (\S+) -->\n\n).*?\n\n", re.DOTALL)
    return behind.sub(lambda found: f"{found[1]}{make(found[2])[1]}\n", page)


def main() -> None:
    (DOCS / "tables").mkdir(exist_ok=True)
    for name in PAGES:
        chart, table = make(name)
        if table:
            (DOCS / "tables" / f"{name}.md").write_text(table, encoding="utf-8")
        path = DOCS / "images" / f"benchmark-{name}.png"
        if isinstance(chart, Lines):
            draw_lines(chart, path)
        elif isinstance(chart, Bars):
            draw_bars(chart, path)
    README.write_text(with_tables(README.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
