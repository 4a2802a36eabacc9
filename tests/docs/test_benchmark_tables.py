"""The tables of the pages on benchmarks hold what the committed results say."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from fixpoint.plotting import COLOURS

DOCS = Path(__file__).parents[2] / "docs"
_SPEC = importlib.util.spec_from_file_location("make_benchmarks", DOCS / "make_benchmarks.py")
assert _SPEC is not None
assert _SPEC.loader is not None
make_benchmarks = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(make_benchmarks)


@pytest.mark.parametrize("name", list(make_benchmarks.PAGES))
def test_a_table_is_made_from_the_committed_results(name):
    chart, table = make_benchmarks.make(name)
    path = DOCS / "tables" / f"{name}.md"
    assert (path.read_text(encoding="utf-8") if path.exists() else "") == table, "run: python docs/make_benchmarks.py"
    assert (chart is not None) == (DOCS / "images" / f"benchmark-{name}.png").exists()


@pytest.mark.parametrize("name", list(make_benchmarks.PAGES))
def test_a_page_shows_the_table_and_no_chart_needs_a_colour_twice(name):
    pages = "".join(path.read_text(encoding="utf-8") for path in DOCS.glob("*.md"))
    chart, table = make_benchmarks.make(name)
    assert (f"tables/{name}.md" in pages) == bool(table)
    if chart is not None:
        assert f"images/benchmark-{name}.png" in pages
        curves = getattr(chart, "series", None) or chart.values
        assert len(curves) <= len(COLOURS)


def test_rounds_are_those_of_the_table_that_the_benchmark_printed():
    printed = (make_benchmarks.RESULTS / "chains-rounds.txt").read_text(encoding="utf-8")
    block = printed.partition("unet T=100 eta=0\n")[2].partition("\n\n")[0].splitlines()[1:]
    expected = {line[:23].strip(): line[23:].split()[3].partition("/")[0] for line in block}
    rows = [line.strip("| \n").split(" | ") for line in make_benchmarks.make("chain-rounds")[1].splitlines()[2:]]
    found = {row[0]: row[2] for row in rows}
    assert found["ours, full window"] == expected["ours, full window"]
    assert all(found[name] in (expected[name], "–") for name in found if name in expected)
    assert {name for name in found if name in expected and expected[name] == "-"} == {
        name for name in found if name in expected and found[name] == "–"
    }
