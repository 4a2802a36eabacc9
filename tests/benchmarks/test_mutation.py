"""Which mutants are drawn, and what the report says of them."""

from __future__ import annotations

import sys

from benchmarks import mutation

NAMES = [
    f"fixpoint.{module}.x_f__mutmut_{i}" for module, count in (("a", 100), ("b", 40), ("c", 3)) for i in range(count)
]


def test_a_sample_is_the_same_each_time_and_no_file_is_left_out():
    drawn = mutation.draw(NAMES, 60, seed=0)
    assert drawn == mutation.draw(NAMES[::-1], 60, seed=0) != mutation.draw(NAMES, 60, seed=1)
    assert len(set(drawn)) == 60
    counts = {name: sum(mutation.module(mutant) == f"fixpoint.{name}" for mutant in drawn) for name in "abc"}
    assert counts["a"] >= 15
    assert counts["b"] >= 15
    assert counts["c"] == 3


def test_a_large_sample_takes_all_and_a_small_one_what_each_file_needs():
    assert sorted(mutation.draw(NAMES, 10**6, seed=0)) == sorted(NAMES)
    assert len(mutation.draw(NAMES, 1, seed=0)) == 15 + 15 + 3


def test_the_score_counts_what_was_drawn_and_names_the_survivors(monkeypatch, capsys):
    results = "".join(f"    {name}: {'survived' if i == 0 else 'killed'}\n" for i, name in enumerate(NAMES))
    monkeypatch.setattr(mutation, "mutmut", lambda *arguments, quiet=False: results)
    monkeypatch.setattr(sys, "argv", ["mutation", "--sample", "1000"])
    mutation.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == ["fixpoint.a: 99 of 100 killed", "fixpoint.b: 40 of 40 killed", "fixpoint.c: 3 of 3 killed"]
    assert lines[3:] == ["142 of 143 killed (99.3%), drawn from 143, seed 0", f"survived: {NAMES[0]}"]
