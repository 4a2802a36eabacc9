"""The script that runs the suite under other instruction sets: which cells there are, and what its table says."""

from __future__ import annotations

from tests import matrix

XML = """<testsuites><testsuite>
<testcase classname="tests.a" name="good"/>
<testcase classname="tests.a" name="left_out"><skipped/></testcase>
<testcase classname="tests.a" name="bad"><failure/></testcase>
<testcase classname="tests.b" name="bad"/><testcase classname="tests.b" name="bad"><error/></testcase>
</testsuite></testsuites>"""


def test_the_short_choice_holds_each_value_once():
    for name in ("instructions", "threads", "seed"):
        assert {getattr(cell, name) for cell in matrix.COVER} == {getattr(cell, name) for cell in matrix.CELLS}
    assert len({cell.name for cell in matrix.CELLS}) == 5 * 2 * 3
    assert set(matrix.COVER) <= set(matrix.CELLS)


def test_a_cell_sets_its_own_instructions_and_none_of_another(monkeypatch):
    monkeypatch.setenv("MKL_CBWR", "AVX2")
    monkeypatch.setenv("KEPT", "yes")
    environment = matrix.Cell("default", 2, 1).environment()
    assert environment["ATEN_CPU_CAPABILITY"] == "default"
    assert environment["OMP_NUM_THREADS"] == "2"
    assert environment["KEPT"] == "yes"
    assert "MKL_CBWR" not in environment


def test_the_table_counts_what_passed_and_names_what_did_not(tmp_path):
    (tmp_path / "a.xml").write_text(XML)
    passed, failed = matrix.read(tmp_path / "a.xml")
    assert passed == 2
    assert failed == ["tests.a::bad", "tests.b::bad"]
    results = [
        matrix.Result("own-1-seed1", "abc", [], passed, failed, 3.2, 1),
        matrix.Result("own-2-seed1", "abc", [], 0, [], 1.0, 4),
    ]
    assert matrix.table(results).splitlines()[2:] == [
        "| own-1-seed1 | 2 | 2 | 3 |",
        "| own-2-seed1 | 0 | 0, exit code 4 | 1 |",
        "- tests.a::bad: own-1-seed1",
        "- tests.b::bad: own-1-seed1",
    ]
