"""What the table of times says: who solves what, and ratios over what both solve."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torchdeq.solver import get_solver

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


@pytest.mark.parametrize("name", times.CONTESTANTS)
def test_every_contestant_stops_at_the_first_evaluation_that_meets_the_tolerance(name: str) -> None:
    case, seen = CASES["deq-tanh/f64/1e-07/s0"], []

    def f(z: torch.Tensor) -> torch.Tensor:
        fz = case.f(z)
        seen.append(float((fz - z).norm() / fz.norm()))
        return fz

    solved, evaluations = times.CONTESTANTS[name](replace(case, f=f))
    assert (solved, evaluations) == (True, len(seen))
    assert [residual <= case.rtol for residual in seen] == [False] * (evaluations - 1) + [True]
    assert times.CONTESTANTS[name](replace(case, max_evals=3)) == (False, 3)


def test_the_peer_is_called_as_its_users_call_it() -> None:
    case, calls = CASES["deq-tanh/f64/1e-07/s0"], []

    def f(z: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return case.f(z)

    get_solver("anderson")(f, case.z0, m=5, max_iter=case.max_evals, tol=1e-7, stop_mode="rel")
    assert times.peer(case)[1] == len(calls)


def test_ratios_are_over_what_both_solve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(times, "CONTESTANTS", dict.fromkeys(("Anderson", "ACX")))
    found = [
        {"Anderson": Timed(10, 1.0), "ACX": Timed(20, 0.5)},
        {"Anderson": Timed(10, 1.0), "ACX": Timed(80, 0.5)},
        {"Anderson": Timed(10, 1.0)},
        {"ACX": Timed(99, 99.0)},
    ]
    anderson, acx = summary(found)
    assert anderson == {"name": "Anderson", "solved": 3, "evaluations": 1.0, "seconds": 1.0}
    assert acx == {"name": "ACX", "solved": 3, "evaluations": pytest.approx(4.0), "seconds": pytest.approx(0.5)}


def test_both_tables_line_by_line() -> None:
    rows = [{"name": "ACX", "solved": 12, "evaluations": 1.5, "seconds": 0.25}]
    one = {"name": "A", "evaluations": 34, "seconds": 0.125, "states": 8.2}
    sizes = {"2 x 3": [one, one | {"name": "B", "states": None}]}
    lines = [line.split() for line in times.table(rows, 56, sizes).splitlines()]
    assert lines[1] == ["ACX", "12", "1.50", "0.25"]
    assert lines[4:6] == [["A", "34", "0.1250", "8"], ["B", "34", "0.1250", "-"]]
    assert "56" in lines[7]


def test_states_are_those_of_the_contestant() -> None:
    size = Size(rows=2, dim=300)
    z0 = torch.zeros(2, 300, device="meta")
    assert times.held("ACX", size) == fixpoint.estimate_memory(z0, solver=fixpoint.ACX()).states
    assert times.held("Picard", size) < times.held("ACX", size) < times.held("Anderson m=1", size)
    assert times.held(times.PEER, size) is None


def test_a_run_times_what_can_be_solved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timed = []

    def time_case(case: times.Case, runs: int) -> dict[str, Timed]:
        timed.append((case.name, case.rtol, runs, torch.get_num_threads()))
        return {name: Timed(5, 0.5) for name in times.CONTESTANTS}

    monkeypatch.setattr(times, "time_case", time_case)
    hopeless = next(case for case in CASES.values() if not case.solvable)
    monkeypatch.setattr(times, "cases", lambda _: [CASES["deq-tanh/f32/1e-03/s0"], hopeless])
    monkeypatch.setattr(times, "SIZES", (Size(rows=2, dim=300),))
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert times.main(["--out", str(tmp_path), "--runs", "4"]) == 0
    finally:
        torch.set_num_threads(threads)
    assert timed == [("deq-tanh/f32/1e-03/s0", 1e-3, 4, 1), ("2 x 300", times.RTOL, 4, 1)]
    document = json.loads((tmp_path / "times.json").read_text())
    assert [row["name"] for row in document["suite"]] == list(times.CONTESTANTS)
    assert [row["name"] for row in document["sizes"]["2 x 300"]] == list(times.CONTESTANTS)
    assert " 1 cases of the suite" in (tmp_path / "times.txt").read_text()


def test_the_committed_table_has_todays_contestants() -> None:
    document = json.loads((RESULTS / "times.json").read_text())
    assert [row["name"] for row in document["suite"]] == list(times.CONTESTANTS)
