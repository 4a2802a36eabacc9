"""The solver suite: the count, what is made of the counts, and that ours claim nothing false."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import fixpoint
from benchmarks.solvers import __main__ as cli
from benchmarks.solvers.against import against_text
from benchmarks.solvers.cases import Case, SuiteProblem, grouped
from benchmarks.solvers.contestants import OURS, installed_runners
from benchmarks.solvers.counting import Counted, EndedError, solves
from benchmarks.solvers.floor import floor
from benchmarks.solvers.problems import PROBLEMS
from benchmarks.solvers.runners import Outcome, Runner, own_tolerance, run_cases
from benchmarks.solvers.standings import Result, Target, geometric_mean, in_hindsight, performance_profile, targets

BY_NAME = {problem.name: problem for problem in PROBLEMS}
UNSOLVABLE = [problem for problem in PROBLEMS if not problem.solvable]


def tanh(dtype: torch.dtype) -> Case:
    """The tanh cell at its tightest tolerance in ``dtype``."""
    return [case for case in BY_NAME["deq-tanh"].cases([0]) if case.z0.dtype == dtype][-1]


@pytest.mark.parametrize("memory", [None, 5])
def test_anderson_solves_a_map_that_plain_iteration_leads_away_from_by_any_rounding(memory: int | None) -> None:
    """Plain steps from near the fixed point end in a cycle of two. Runs that took more than one stayed there."""
    case = next(case for case in BY_NAME["self-consistent-field"].cases([0]) if case.z0.dtype == torch.float64)
    for seed in range(40):
        change = torch.randn(case.z0.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        solver = fixpoint.Anderson(memory=memory)
        solution = fixpoint.solve(case.f, case.z0 * (1 + 1e-6 * change), solver=solver, rtol=case.rtol, max_evals=100)
        assert solution.converged.all()


@pytest.mark.parametrize("problem", UNSOLVABLE, ids=lambda problem: problem.name)
@pytest.mark.parametrize("runner", OURS, ids=lambda runner: runner.name)
def test_ours_claim_no_success_where_nothing_can_be_solved(problem: SuiteProblem, runner: Runner) -> None:
    loosest = next(iter(problem.cases([0])))
    assert run_cases(runner, [loosest]) == [Outcome(None, False)]


def halving(*tolerances: float, limit: int = 20, solvable: bool = True) -> list[Case]:
    """``z -> z / 2 + 1`` from 0: at the k-th point the residual is ``2^(1-k)`` and the image ``2 - 2^(1-k)``."""
    problem = SuiteProblem(
        name="halving",
        make=lambda _, dtype: ((lambda z: z / 2 + 1), torch.zeros(1, 2, dtype=dtype)),
        source="by hand",
        levels=tuple((torch.float64, rtol) for rtol in tolerances),
        max_evals=limit,
        solvable=solvable,
        seeded=False,
        affine=True,
    )
    return list(problem.cases([0]))


def plain(steps: int, claim: bool) -> Runner:
    """Plain iteration of a given length, which then claims or does not."""

    def run(f: Counted) -> bool:
        z = f.case.z0
        for _ in range(steps):
            z = f(z)
        return claim

    return Runner("plain", "peer", run)


def test_the_count_is_that_of_the_first_point_that_solves() -> None:
    # 2^(1-k) <= rtol (2 - 2^(1-k)): 1/7 at k = 3, 1/1023 at k = 10.
    assert [o.evaluations for o in run_cases(plain(15, True), halving(0.15, 1 / 7, 0.001))] == [3, 3, 10]
    assert [o.evaluations for o in run_cases(plain(9, True), halving(0.15, 1 / 7, 0.001))] == [3, 3, None]


def test_the_count_ends_a_solver_that_goes_on() -> None:
    f = Counted(halving(0.15))
    z = f.case.z0
    for _ in range(3):
        z = f(z)
    with pytest.raises(EndedError):
        f(z)
    assert (f.calls, f.solved_at) == (3, [3])
    f = Counted(halving(1e-12, limit=4))
    for _ in range(4):
        f(f.case.z0)
    with pytest.raises(EndedError):
        f(f.case.z0)
    assert (f.calls, f.solved_at) == (4, [])


def test_numpy_solvers_are_counted_in_the_dtype_of_the_case() -> None:
    f = Counted([tanh(torch.float32)])
    image = f.numpy(np.zeros(256))
    assert (image.dtype, image.shape, f.calls) == (np.float32, (256,), 1)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_solves_nothing(bad: float) -> None:
    assert not solves(torch.zeros(1, 2), torch.tensor([[1.0, bad]]), 1.0)
    assert not solves(torch.tensor([[1.0, bad]]), torch.ones(1, 2), 1.0)


def test_large_states_are_measured_without_overflow() -> None:
    z = torch.full((1, 2), 1e30)
    assert not solves(z, 2 * z, 0.1)
    assert solves(z, z, 0.1)


def test_a_claim_without_a_point_to_show_is_false() -> None:
    [outcome] = run_cases(plain(2, True), halving(1e-6))
    assert outcome.false_claim
    [outcome] = run_cases(plain(2, False), halving(1e-6))
    assert not outcome.false_claim
    [outcome] = run_cases(plain(15, True), halving(1e-3))
    assert not outcome.false_claim


def test_a_peer_may_break_down_and_ours_may_not() -> None:
    def run(f: Counted) -> bool:
        raise ValueError("singular")

    assert run_cases(Runner("broken", "peer", run), halving(1e-6)) == [Outcome(None, False, "ValueError")]
    with pytest.raises(ValueError, match="singular"):
        run_cases(Runner("broken", "fixpoint", run), halving(1e-6))


def test_only_the_count_ends_a_peer_on_what_can_be_solved() -> None:
    assert own_tolerance(halving(1e-3)[0]) == 0
    assert own_tolerance(halving(1e-3, solvable=False)[0]) == 1e-3


def test_one_run_answers_the_cases_that_differ_in_tolerance_alone() -> None:
    groups = grouped([*reversed(halving(1e-1, 1e-3)), *halving(1e-1, 1e-3, solvable=False)])
    assert [[case.rtol for case in group] for group in groups] == [[1e-1, 1e-3], [1e-1], [1e-3]]


@pytest.mark.parametrize("runner", installed_runners()[0], ids=lambda runner: runner.name)
def test_every_solver_solves_the_h_equation(runner: Runner) -> None:
    loosest = next(iter(BY_NAME["h-equation-0.9"].cases([0])))
    [outcome] = run_cases(runner, [loosest])
    assert outcome.evaluations is not None
    assert outcome.evaluations > 1
    assert outcome.error is None


def test_a_library_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jaxopt", None)
    monkeypatch.delitem(sys.modules, "benchmarks.solvers.runners_jax", raising=False)
    monkeypatch.delattr("benchmarks.solvers.runners_jax", raising=False)
    runners, missing = installed_runners()
    assert {runner.library for runner in runners} == {"fixpoint", "torchdeq", "scipy"}
    assert [named.split(":")[0] in ("jaxopt (no module jaxopt", "jaxopt (no module jax") for named in missing] == [True]


def test_ours_are_counted_as_they_count_themselves() -> None:
    case = tanh(torch.float64)
    for runner, solver in zip(OURS[:2], (fixpoint.Picard(), fixpoint.Anderson()), strict=True):
        own = fixpoint.solve(case.f, case.z0, solver=solver, rtol=case.rtol, backward=None).nfev
        assert run_cases(runner, [case]) == [Outcome(own, True)]


def test_floor_is_the_number_of_distinct_eigenvalues_and_one() -> None:
    eigenvalues = torch.tensor([0.9, 0.9, 0.5, 0.5, -2.0], dtype=torch.float64)
    problem = SuiteProblem(
        name="three",
        make=lambda _, dtype: ((lambda z: eigenvalues * z + 1), torch.zeros(1, 5, dtype=dtype)),
        source="by hand",
        levels=((torch.float64, 1e-10),),
        affine=True,
    )
    assert floor(next(iter(problem.cases([0])))) == 4
    assert floor(halving(1e-10, limit=2)[0]) == 2
    assert floor(halving(1e-10, limit=1)[0]) is None
    with pytest.raises(ValueError, match="affine case in float64, found deq-tanh"):
        floor(tanh(torch.float64))


def test_profile_of_a_matrix_by_hand() -> None:
    inf = math.inf
    counts = np.array([[10, 20, inf], [30, 10, inf], [inf, inf, inf], [5, 5, 6]])
    assert performance_profile(counts, [1, 2, 3]).tolist() == [
        pytest.approx([2 / 3, 2 / 3, 0]),
        pytest.approx([2 / 3, 1, 1 / 3]),
        pytest.approx([1, 1, 1 / 3]),
    ]
    assert geometric_mean([1, 4]) == pytest.approx(2)
    assert math.isnan(geometric_mean([]))


def verdicts(
    *rows: tuple[int | None, int | None, int | None, int | None], false: bool = False, by_hand: bool = False
) -> str:
    """P or F for (a), (b) twice, (c), (d) twice, (e), the last three again with peers set by hand, (f).

    Columns: Picard, Anderson, torchdeq's Anderson, another, which is set by hand or not.
    """
    names = ("Picard", "Anderson", "torchdeq Anderson m=5", "other")
    runners = [
        Runner(name, library, bool, by_hand and name == "other")
        for name, library in zip(names, ["fixpoint"] * 2 + ["peer"] * 2, strict=True)
    ]
    case = halving(1e-3, limit=300)[0]
    results = [
        Result(case, {name: Outcome(count, false, None) for name, count in zip(names, row, strict=True)})
        for row in rows
    ]
    return "".join("P" if target.met else "F" for target in targets(results, runners))


def test_hindsight_takes_the_fastest_of_all_on_what_the_named_one_solves() -> None:
    case = halving(1e-3, limit=300)[0]
    counts = ({"a": 40, "b": 10}, {"a": 40, "b": None}, {"a": None, "b": 5}, {"b": 5})
    results = [Result(case, {name: Outcome(n, False, None) for name, n in row.items()}) for row in counts]
    assert in_hindsight(results, "a") == pytest.approx(0.5)  # of 1/4 and 1


def test_targets_pass_and_fail_one_by_one() -> None:
    good = (15, 10, 40, 20)
    assert verdicts(good, good) == "PPPPPPPPPPP"
    assert verdicts(good, good, (None, None, None, 9)) == "PPPPPPFPPFP"
    assert verdicts(good, good, (None, None, None, 9), by_hand=True) == "PPPPPPPPPFP"
    assert verdicts(good, *[(None, None, None, 9)] * 2)[0] == "F"
    assert verdicts((15, 13, 40, 20))[1:3] == "FF"
    assert verdicts((5, 10, 40, 20))[3] == "P"
    assert verdicts((4, 10, 40, 20))[3] == "F"
    assert verdicts((20, 17, 60, 20))[4:6] == "FF"
    assert verdicts(good, (None, 12, 40, 10))[6] == "P"
    assert verdicts(good, (None, 13, 40, 10))[6] == "F"
    assert verdicts((None, 55, 200, 50))[6] == "P"
    assert verdicts((None, 56, 200, 50))[6] == "F"
    assert verdicts((None, None, 40, 20), false=True)[10] == "F"


def test_the_command_prints_and_writes_what_it_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = [case for name in ("pagerank", "none-relay") for case in BY_NAME[name].cases([0])]
    runners, _ = installed_runners()
    kept = [runner for runner in runners if runner.name in ("Picard", "Anderson", "torchdeq Anderson m=5")]
    monkeypatch.setattr(cli, "cases", lambda seeds: chosen)
    monkeypatch.setattr(cli, "installed_runners", lambda: (kept, ("another library",)))
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    assert cli.main(["--quick", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "2 problems, 4 cases, 3 solvers" in printed
    assert "not run: another library" in printed
    assert (tmp_path / "solvers.txt").read_text() == printed
    assert (tmp_path / "solvers.png").stat().st_size > 10_000
    document = json.loads((tmp_path / "solvers.json").read_text())
    assert {"machine", "versions", "commit", "targets", "profile", "floors", "cases"} <= set(document)
    found = {case["name"]: case["evaluations"]["Picard"] for case in document["cases"]}
    assert found["none-relay/f64/1e-10/s0"] is None
    assert found["pagerank/f64/1e-10/s0"] > 100


@pytest.mark.parametrize(
    ("met", "flags", "status"), [(False, ["--strict"], 1), (True, ["--strict"], 0), (False, [], 0)]
)
def test_the_exit_status_tells_of_missed_targets_if_asked(
    met: bool, flags: list[str], status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "cases", lambda seeds: halving(1e-3))
    monkeypatch.setattr(cli, "installed_runners", lambda: ((plain(15, True),), ()))
    monkeypatch.setattr(cli, "targets", lambda results, runners: [Target("an aim", met, "a figure")])
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    assert cli.main([*flags, "--out", str(tmp_path)]) == status


def test_counts_are_compared_with_an_earlier_file(tmp_path: Path) -> None:
    runner = Runner("Picard", "fixpoint", lambda f: True)
    cases = halving(1e-1, 1e-2, 1e-3, 1e-4)
    now = [Result(case, {"Picard": Outcome(count, True)}) for case, count in zip(cases, (10, 12, None, 4), strict=True)]
    earlier = [
        {"name": case.name, "evaluations": {"Picard": n}} for case, n in zip(cases, (10, 10, 7, None), strict=True)
    ]
    file = tmp_path / "solvers.json"
    file.write_text(json.dumps({"commit": "abc", "cases": earlier}))
    text = against_text(now, [runner], file)
    assert "2 cases, median 1.100, geometric mean 1.095, largest 1.200" in text
    assert f"above 1.1: {cases[1].name} (10, now 12)" in text
    assert f"solved no more: {cases[2].name}" in text
    assert f"solved now: {cases[3].name}" in text
    file.write_text("[]")
    with pytest.raises(ValueError, match=r"is no solvers.json of this benchmark"):
        against_text(now, [runner], file)


def test_counts_of_peers_are_taken_from_an_earlier_file_ours_from_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(f: Counted) -> bool:
        raise AssertionError("a peer was run")

    peer = Runner("torchdeq Anderson m=5", "torchdeq", never)
    cases = halving(1e-1, 1e-2)
    earlier = [
        {
            "name": case.name,
            "evaluations": {peer.name: count, "Anderson": 99, "Picard": 99},
            "false_claims": [] if count else [peer.name],
            "errors": {},
        }
        for case, count in zip(cases, (7, None), strict=True)
    ]
    file = tmp_path / "earlier.json"
    file.write_text(json.dumps({"commit": "abc", "cases": earlier}))
    own = [Runner(name, "fixpoint", plain(15, True).run) for name in ("Anderson", "Picard")]
    monkeypatch.setattr(cli, "cases", lambda seeds: cases)
    monkeypatch.setattr(cli, "installed_runners", lambda: ((*own, peer), ()))
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    assert cli.main(["--peers-from", str(file), "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "solvers.json").read_text())["cases"]
    assert [case["evaluations"][peer.name] for case in found] == [7, None]
    assert [peer.name in case["false_claims"] for case in found] == [False, True]
    assert [case["evaluations"]["Anderson"] for case in found] == [4, 7]
    earlier.pop()
    file.write_text(json.dumps({"cases": earlier}))
    monkeypatch.setattr(cli, "run_suite", never)  # a file that will not do is told before anything is run
    with pytest.raises(ValueError, match=r"has no count of torchdeq Anderson m=5 on .*: run all solvers"):
        cli.main(["--peers-from", str(file), "--out", str(tmp_path)])
