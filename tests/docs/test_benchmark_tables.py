"""The tables of the pages on benchmarks hold what the committed results say."""

from __future__ import annotations

import pytest

from benchmarks.pages import __main__ as pages
from fixpoint.plotting import COLOURS


@pytest.mark.parametrize("name", list(pages.PAGES))
def test_a_table_is_made_from_the_committed_results(name):
    chart, table = pages.make(name)
    path = pages.DOCS / "tables" / f"{name}.md"
    assert (path.read_text(encoding="utf-8") if path.exists() else "") == table, "run: python -m benchmarks.pages"
    assert (chart is not None) == (pages.DOCS / "images" / f"benchmark-{name}.png").exists()


@pytest.mark.parametrize("name", list(pages.PAGES))
def test_a_page_shows_the_table_and_no_chart_needs_a_colour_twice(name):
    text = "".join(path.read_text(encoding="utf-8") for path in pages.DOCS.glob("*.md"))
    chart, table = pages.make(name)
    assert (f"tables/{name}.md" in text) == bool(table)
    if chart is not None:
        assert f"images/benchmark-{name}.png" in text
        curves = getattr(chart, "series", None) or chart.values
        assert len(curves) <= len(COLOURS)


def test_rounds_are_those_of_the_table_that_the_benchmark_printed():
    printed = (pages.RESULTS / "chains-rounds.txt").read_text(encoding="utf-8")
    block = printed.partition("unet T=100 eta=0\n")[2].partition("\n\n")[0].splitlines()[1:]
    expected = {line[:23].strip(): line[23:].split()[3].partition("/")[0] for line in block}
    rows = [line.strip("| \n").split(" | ") for line in pages.make("chain-rounds")[1].splitlines()[2:]]
    found = {row[0]: row[2] for row in rows}
    assert found["ours, full window"] == expected["ours, full window"]
    assert all(found[name] in (expected[name], "–") for name in found if name in expected)
    assert {name for name in found if name in expected and expected[name] == "-"} == {
        name for name in found if name in expected and found[name] == "–"
    }


def test_the_tables_of_the_readme_are_made_from_the_committed_results():
    readme = pages.README.read_text(encoding="utf-8")
    assert readme.count("<!-- table ") == 2
    assert pages.with_tables(readme) == readme, "run: python -m benchmarks.pages"
    assert pages.with_tables("<!-- table solvers -->\n\n| old |\n\nText") != "<!-- table solvers -->\n\n| old |\n\nText"
