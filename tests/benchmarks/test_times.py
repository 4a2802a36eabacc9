"""What the table of times says: who solves what, and ratios over what both solve."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import fixpoint
from benchmarks import times
from benchmarks.overhead import Size
from benchmarks.solvers.problems import cases
from benchmarks.times import Alternating, Timed, summary, time_case

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
CASES = {case.name: case for case in cases(range(1))}


def test_alternating_takes_the_other_solvers_step_every_so_many_evaluations() -> None:
    f = torch.tanh
    z = torch.tensor([[0.3, 0.9]], dtype=torch.float64)
    anderson = fixpoint.Anderson()
    solver = Alternating(solver=anderson, every=3)
    state, inner = solver.init(z), anderson.init(z)
    for step in range(9):
        expected, inner = anderson.step(z, f(z), inner)
        found, state = solver.step(z, f(z), state)
        z = expected if step % 3 == 2 else f(z)
        assert torch.equal(found, z)


def test_the_least_time_counts_and_who_fails_is_not_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, asked = [0.0], []

    def solve(name: str, seconds: list[float], solved: bool) -> Callable[[times.Case], times.Solved]:
        def run(case: times.Case) -> times.Solved:
            asked.append(name)
            clock[0] += seconds.pop(0)
            return solved, 7

        return run

    monkeypatch.setattr(times.time, "perf_counter", lambda: clock[0])
    contestants = {"good": solve("good", [3.0, 1.0, 2.0], True), "bad": solve("bad", [1.0], False)}
    monkeypatch.setattr(times, "CONTESTANTS", contestants)
    assert time_case(CASES["poisson/f32/1e-03/s0"], 3) == {"good": Timed(7, 1.0)}
    assert asked == ["good", "bad", "good", "good"]


def test_every_contestant_solves_to_the_tolerance_of_the_case() -> None:
    case = CASES["deq-tanh/f64/1e-07/s0"]
    for solve in times.CONTESTANTS.values():
        seen = []

        def f(z: torch.Tensor, seen: list[float] = seen) -> torch.Tensor:
            fz = case.f(z)
            seen.append(float((fz - z).norm() / fz.norm()))
            return fz

        solved, evaluations = solve(replace(case, f=f))
        assert (solved, evaluations) == (True, len(seen))
        assert min(seen) <= case.rtol
        hopeless = replace(case, max_evals=3)
        assert solve(hopeless)[0] is False


def test_ratios_are_over_what_both_solve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(times, "CONTESTANTS", dict.fromkeys(("Anderson", "ACX")))
    found = [
        {"Anderson": Timed(10, 1.0), "ACX": Timed(20, 0.5)},
        {"Anderson": Timed(10, 1.0), "ACX": Timed(5, 2.0)},
        {"Anderson": Timed(10, 1.0)},
        {"ACX": Timed(99, 99.0)},
    ]
    acx = {"name": "ACX", "solved": 3, "evaluations": 1.0, "seconds": 1.0}
    assert summary(found) == [{"name": "Anderson", "solved": 3, "evaluations": 1.0, "seconds": 1.0}, acx]


def test_a_run_writes_both_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(times, "cases", lambda _: [CASES["deq-tanh/f32/1e-03/s0"]])
    monkeypatch.setattr(times, "LARGE", Size(rows=2, dim=300))
    threads = torch.get_num_threads()
    try:
        assert times.main(["--out", str(tmp_path), "--runs", "1"]) == 0
    finally:
        torch.set_num_threads(threads)
    document = json.loads((tmp_path / "times.json").read_text())
    assert [row["name"] for row in document["suite"]] == list(times.CONTESTANTS)
    text = (tmp_path / "times.txt").read_text()
    assert all(name in text for name in times.CONTESTANTS)


def test_the_committed_table_has_todays_contestants() -> None:
    document = json.loads((RESULTS / "times.json").read_text())
    assert [row["name"] for row in document["suite"]] == list(times.CONTESTANTS)
