"""The overhead benchmark counts what it says."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fixpoint
from benchmarks import overhead
from benchmarks.overhead import PEERS, SIZES, SOLVERS, Figures, Measured, Size, histories

TINY = (Size(rows=1, dim=10, evals=6, rounds=2), Size(rows=3, dim=8, evals=5, rounds=2))


def test_operations_and_views_of_a_function_by_hand() -> None:
    def run(f: Callable[[Tensor], Tensor], z0: Tensor, evals: int) -> None:
        for _ in range(evals):
            fz = f(z0)
            fz.t()[None]  # two views
            (fz + z0).mul_(2).sum(dim=1)  # three operations

    z0 = torch.ones(2, 2)
    with overhead.Operations() as counted:
        run(lambda z: z, z0, 1)
    assert (counted.work, counted.views) == (3, 2)
    assert overhead.operations(run, lambda z: torch.cos(z + 1), z0, 4) == (4, 3, 2)


@dataclass(frozen=True)
class Halfway(fixpoint.Solver):
    """Two operations a step."""

    def init(self, z: Tensor) -> None:
        return None

    def step(self, z: Tensor, fz: Tensor, state: None) -> tuple[Tensor, None]:
        return (z + fz) / 2, None


def test_operations_of_a_step() -> None:
    assert overhead.step_operations(Halfway(), TINY[0]) == 2
    assert overhead.step_operations(fixpoint.Picard(), TINY[0]) == 0


@pytest.mark.parametrize("size", [*SIZES, *TINY], ids=str)
def test_the_floor_by_hand(size: Size) -> None:
    n = size.evals
    state = 4 * size.rows * size.dim
    # z and f(z) are read at each evaluation, and all but the last are followed by a step, which writes the next z.
    assert overhead.floor_bytes(fixpoint.Picard(), size) == 2 * state
    # Nothing is forgotten in fewer steps than the memory has slots.
    assert overhead.floor_bytes(fixpoint.Broyden(memory=99), size) * n == pytest.approx(
        (2 * n + (n - 1) + sum(range(n - 1)) + (n - 1)) * state
    )


@pytest.mark.parametrize("memory", [1, 2, 3, 5, 20])
def test_the_histories_are_as_full_as_the_floor_says(memory: int) -> None:
    size = Size(rows=1, dim=400, evals=31)
    f, z = overhead.affine(size)
    broyden = fixpoint.Broyden(memory=memory)
    state, expected = broyden.init(z), histories(broyden, size)
    for step in range(30):
        z, state = broyden.step(z, f(z), state)
        assert (state.held - 1, 1) == expected[step]
    # The first step of Anderson has no difference yet, the second makes the first one.
    anderson = histories(fixpoint.Anderson(memory=memory), size)
    assert anderson == [(2 * min(max(step - 1, 0), memory), 2 * (step > 0)) for step in range(30)]
    # The map is symmetric: without a memory it holds the few that are needed.
    assert [held for held, _ in histories(fixpoint.Anderson(), size)][:4] == [0, 0, 2, 4]
    assert max(held for held, _ in histories(fixpoint.Anderson(), size)) <= 10
    state = 4 * size.rows * size.dim
    moved = 2 * 31 + 30 + sum(held + written for held, written in anderson)
    assert overhead.floor_bytes(fixpoint.Anderson(memory=memory), size) * 31 == pytest.approx(moved * state)


def test_a_solver_of_unknown_histories_is_refused() -> None:
    with pytest.raises(TypeError, match="histories of Blockwise"):
        histories(fixpoint.Blockwise(fixpoint.Picard(), blocks=2), TINY[0])


@pytest.mark.parametrize("name", overhead.CONTESTANTS)
def test_every_contestant_makes_the_evaluations_that_are_asked_for(name: str) -> None:
    for size in (SIZES[0], *TINY):
        f, z0 = overhead.affine(size)
        extra = name == "torchdeq Broyden"
        assert overhead.timed(overhead.CONTESTANTS[name], f, z0, size.evals)() == size.evals + extra


def test_the_least_time_per_unit_counts_and_all_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, order = [0.0], []

    def task(name: str, durations: list[float], units: int) -> Callable[[], int]:
        def run() -> int:
            order.append(name)
            clock[0] += durations.pop(0)
            return units

        return run

    monkeypatch.setattr(overhead.time, "perf_counter", lambda: clock[0])
    tasks = {"a": task("a", [6, 2, 4], 2), "b": task("b", [3, 5, 9], 1)}
    assert overhead.fastest(tasks, 3) == {"a": 1, "b": 3}
    assert order == ["a", "b"] * 3


def test_a_copy_moves_half_of_the_bytes_each_way(monkeypatch: pytest.MonkeyPatch) -> None:
    copied = []
    monkeypatch.setattr(Tensor, "copy_", lambda target, source: copied.append((target.nbytes, source.nbytes)))
    assert overhead.copying(1000, 3)() == 3
    assert copied == [(500, 500)] * 3


def test_the_time_of_f_is_taken_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overhead, "fastest", lambda tasks, rounds: dict.fromkeys(tasks, 5.0) | {"f": 2.0})
    found = overhead.measure(TINY[0])
    assert found.f_seconds == 2
    assert {each.seconds for each in found.contestants.values()} == {3}
    assert found.contestants["Anderson"].floor_seconds == 5


def measured(anderson: float, broyden: float, size: Size = TINY[0], picard: float = 0.1) -> Measured:
    """Made-up figures: ours take these seconds, each peer takes one."""
    seconds = {"Picard": picard, "Anderson": anderson, "Broyden": broyden, **dict.fromkeys(PEERS.values(), 1.0)}
    plain = {name: Figures(seconds=each, calls=6, operations=7, views=8) for name, each in seconds.items()}
    ours = {"step_operations": 9.0, "floor_bytes": 100.0, "floor_seconds": 0.05, "states": 17.25}
    contestants = {name: replace(each, **ours) if name in SOLVERS else each for name, each in plain.items()}
    return Measured(size=size, f_seconds=0.002, contestants=contestants)


@pytest.mark.parametrize(
    ("figures", "verdicts"),
    [
        ([(0.5, 0.2), (0.4, 0.3)], "PPPPF"),
        ([(0.3, 0.2), (0.75, 0.2)], "PPPPF"),
        ([(0.3, 0.2), (0.8, 0.2)], "PFPPF"),
        ([(0.6, 0.2), (0.6, 0.2)], "FPPPF"),
        ([(0.4, 0.9), (0.4, 1.2)], "PPFFF"),
        ([(0.4, 0.2), (-0.1, 0.2)], "FFPPF"),
    ],
)
def test_targets_on_made_up_figures(figures: list[tuple[float, float]], verdicts: str) -> None:
    aims = overhead.targets([measured(*each, size=size) for each, size in zip(figures, TINY, strict=True)])
    assert "".join("P" if aim.met else "F" for aim in aims) == verdicts


@pytest.mark.parametrize(("seconds", "met"), [(15e-6, True), (16e-6, False)])
def test_the_time_of_picard_is_judged_at_the_first_size(seconds: float, met: bool) -> None:
    aim = overhead.targets([measured(0.1, 0.1, picard=seconds), measured(0.1, 0.1, size=TINY[1], picard=1.0)])[-1]
    assert (aim.met, aim.measured) == (met, f"{1e6 * seconds:.0f}")


def test_targets_name_the_sizes_that_speak_against_them() -> None:
    aims = overhead.targets([measured(0.3, 0.5), measured(1.2, 0.5, size=TINY[1])])
    assert (aims[0].measured, aims[1].measured, aims[1].against) == ("0.60", "0.30 to 1.20", ("3 x 8: 1.20",))


def test_a_time_that_f_drowns_has_no_ratio() -> None:
    assert math.isnan(measured(0.0, 0.5).ratio("Anderson"))
    assert measured(0.0, 0.5).ratio("Broyden") == 0.5


def test_the_table_on_made_up_figures() -> None:
    lines = overhead.table([measured(0.25, 0.5)]).splitlines()
    assert lines[2] == "1 x 10, 6 evaluations; f alone 2.0000 ms"
    cells = {re.split(r"\s{2,}", line.strip())[0]: re.split(r"\s{2,}", line.strip())[1:] for line in lines[3:]}
    assert cells["Anderson"] == ["250.0000", "0.25", "5.0", "7.0", "8.0", "9.0", "17.2"]
    assert cells["torchdeq Broyden"] == ["1000.0000", "-", "-", "7.0", "8.0", "-", "-"]
    assert cells["Picard"][:3] == ["100.0000", "-", "2.0"]


def test_the_command_prints_and_writes_what_it_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    threads = []
    monkeypatch.setattr(overhead, "QUICK", TINY)
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    assert overhead.main(["--quick", "--threads", "3", "--out", str(tmp_path / "new")]) == 0
    printed = capsys.readouterr().out
    assert threads == [3]
    assert (tmp_path / "new" / "overhead.txt").read_text() == printed
    assert len(re.findall(r"^(PASS|FAIL)  (Anderson|Broyden) / torchdeq", printed, re.MULTILINE)) == 4
    document = json.loads((tmp_path / "new" / "overhead.json").read_text())
    assert {"machine", "versions", "commit", "targets", "sizes"} <= set(document)
    assert "torchdeq" in document["versions"]
    assert [each["size"]["dim"] for each in document["sizes"]] == [10, 8]
    for each in document["sizes"]:
        found = each["contestants"]
        assert set(found) == set(overhead.CONTESTANTS)
        assert found["Anderson"]["calls"] == each["size"]["evals"]
        assert found["Anderson"]["operations"] < found["torchdeq Anderson m=5"]["operations"]
        assert found["Anderson"]["floor_seconds"] > 0
        assert found["torchdeq Broyden"]["floor_bytes"] is None


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=repr)
def test_a_step_off_the_host_meets_no_tensor_on_it(solver: fixpoint.Solver) -> None:
    """A transfer makes the host wait, and reading a number cannot be done on the meta device at all."""
    places = set()

    class Places(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            output = function(*args, **(kwargs or {}))
            places.update(x.device.type for x in (*args, output) if isinstance(x, Tensor))
            return output

    z = torch.empty(3, 7, device="meta")
    state = solver.init(z)
    with Places():
        for _ in range(45):
            z, state = solver.step(z, torch.empty_like(z), state)
    assert places == {"meta"}
