"""What the table of launches counts, by hand; and that no count has grown beyond the committed one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import fixpoint
from benchmarks import launches
from benchmarks.launches import DEVICE, Counts, Launches
from benchmarks.solvers.standings import Target

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def counts_of(work: Callable[[Tensor], object]) -> Counts:
    """Of ``work`` on a tensor of ones ``(3, 4)`` on the device."""
    with Launches() as mode, torch.no_grad():
        x = torch.ones(3, 4).to(DEVICE)
        before = mode.counts
        work(x)
        return mode.counts - before


@pytest.mark.parametrize(
    ("work", "expected"),
    [
        (lambda x: x.t()[None], Counts(2, 0, 0)),
        (lambda x: torch.empty(2, device=x.device), Counts(1, 0, 0)),
        (lambda x: torch.zeros(2, device=x.device), Counts(1, 1, 0)),
        (lambda x: torch.add(x, x, out=x).mul_(2), Counts(2, 2, 0)),
        (lambda x: torch.where(x > 0, x, x), Counts(2, 2, 0)),
        (lambda x: x * torch.tensor(2.0), Counts(1, 1, 0)),
        (lambda x: x.sum().item(), Counts(2, 2, 1)),
        (lambda x: bool(x.any()), Counts(2, 2, 1)),
        (lambda x: x.cpu(), Counts(1, 1, 1)),
        (lambda x: torch.ones(3, 4).copy_(x), Counts(1, 1, 1)),
        (lambda x: x.copy_(torch.ones(3, 4)), Counts(1, 1, 1)),
        (lambda x: x.nonzero(), Counts(1, 1, 1)),
        (lambda x: x[x > 0], Counts(2, 2, 1)),
        (lambda x: x[torch.tensor([0, 1])], Counts(1, 1, 1)),
        (lambda x: x.index_put_((x > 0,), x[0, 0]), Counts(4, 2, 1)),
        (lambda x: (x > 0).index_put_((torch.zeros(1, dtype=int, device=x.device),), x[:1] > 0), Counts(5, 4, 0)),
        (lambda x: torch.from_numpy(np.ones(3)).to(x.device), Counts(1, 1, 1)),
        (lambda x: torch.from_numpy(np.ones(3)).to(x.device, non_blocking=True), Counts(1, 1, 0)),
        (lambda x: torch.tensor([1.0, 2.0], device=x.device), Counts(1, 1, 1)),
        (lambda x: torch.linalg.solve(torch.eye(3, device=x.device), x), Counts(3, 3, 1)),
        (lambda x: torch.ones(3).add(1), Counts(0, 0, 0)),
    ],
)
def test_counts_by_hand(work: Callable[[Tensor], object], expected: Counts) -> None:
    assert counts_of(work) == expected


def test_numbers_are_those_of_the_host_and_branches_are_real() -> None:
    with Launches(), torch.no_grad():
        x = torch.arange(6.0).reshape(2, 3).to(DEVICE)
        assert (x.device, x.is_cpu) == (DEVICE, False)
        slots = x.unbind(0)
        torch.mul(slots[0], 2.0, out=slots[1])  # a view of x
        assert float(x.sum()) == 0 + 1 + 2 + 0 + 2 + 4
        back = x.cpu()
    assert type(back) is Tensor
    assert back.tolist() == [[0, 1, 2], [0, 2, 4]]


def test_a_step_counts_what_it_dispatches() -> None:
    class Halfway:
        def init(self, z: Tensor) -> None:
            return None

        def step(self, z: Tensor, fz: Tensor, state: None) -> tuple[Tensor, None]:
            return (z + fz) / 2 + float(z[0, 0] > 1e9), None

    # Sum, quotient, comparison, the number that is read, sum; two selections are views.
    assert launches.step(Halfway()) == Counts(7, 5, 1)


def test_nothing_costs_more_than_when_it_was_committed() -> None:
    committed = json.loads((RESULTS / "launches.json").read_text())["counts"]
    fresh = {name: asdict(each) for name, each in launches.measure().items()}
    assert fresh.keys() == {name for name in committed if "compiled" not in name}
    grown = {
        f"{name}: {what}": (committed[name][what], each[what])
        for name, each in fresh.items()
        for what in each
        if each[what] > committed[name][what] + 1e-9
    }
    assert not grown, "more than committed; if it must be, run python -m benchmarks.launches"


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_a_compiled_step_starts_what_is_not_fused() -> None:
    @dataclass(frozen=True)
    class Mixed(fixpoint.Solver):
        """A sum over rows, then one over columns with a quotient, two calls of libraries, and a sine: five starts."""

        def init(self, z: Tensor) -> Tensor:
            return torch.eye(z.shape[1])

        def step(self, z: Tensor, fz: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
            mean = (z - fz.sum(0)) / (1 + fz.square().sum(1))[:, None] @ state
            return torch.sin(torch.linalg.solve_triangular(state, mean.T, upper=True).T), state

    assert launches.compiled_step(Mixed()) == Counts(5, 5, 0)


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_a_compiled_step_starts_no_more_than_when_it_was_committed() -> None:
    committed = json.loads((RESULTS / "launches.json").read_text())["counts"]["Broyden, a compiled step"]
    assert 0 < launches.compiled_step(fixpoint.Broyden()).launches <= committed["launches"]


def test_targets_are_about_steps_checks_and_rounds() -> None:
    def met(**changed: Counts) -> list[bool]:
        limits = {
            "Anderson, a step": Counts(90, 25, 0),
            "Broyden, a step": Counts(90, 25, 0),
            "the loop, an evaluation": Counts(9, 9, 1),
            "the loop, an evaluation, check_every=8": Counts(9, 9, 1 / 8),
            "Anderson, between a wait and f": Counts(1, 0, 0),
            "CausalQuasiNewton, a round of windows": Counts(900, 900, 1),
            "CausalQuasiNewton, a round in part": Counts(900, 900, 1),
        }
        return [aim.met for aim in launches.targets(limits | changed)]

    assert met() == [True] * 7
    assert met(**{"Anderson, a compiled step": Counts(26, 26, 0)}) == [True] * 2 + [False] + [True] * 5
    assert met(**{"Broyden, a step": Counts(90, 26, 0)}) == [True, False] + [True] * 5
    assert met(**{"the loop, an evaluation, check_every=8": Counts(9, 9, 2 / 8)}) == [True] * 3 + [False] + [True] * 3
    assert met(**{"CausalQuasiNewton, a round of windows": Counts(9, 9, 2)}) == [True] * 5 + [False, True]
    assert met(**{"CausalQuasiNewton, a round in part": Counts(9, 9, 2)}) == [True] * 6 + [False]
    assert met(**{"Anderson, between a wait and f": Counts(1, 1, 0)}) == [True] * 4 + [False] + [True] * 2


def test_what_is_printed_is_what_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(launches, "measure", lambda: {"a step": Counts(3, 2, 0.5)})
    monkeypatch.setattr(launches, "measure_compiled", lambda: {"a compiled step": Counts(2, 2, 0)})
    monkeypatch.setattr(launches, "targets", lambda counts: [Target("a step: no launch", False, "2")])
    assert launches.main(["--out", str(tmp_path)]) == 0
    assert (tmp_path / "launches.txt").read_text() == capsys.readouterr().out
    document = json.loads((tmp_path / "launches.json").read_text())
    assert document["counts"] == {
        "a step": {"calls": 3, "launches": 2, "waits": 0.5},
        "a compiled step": {"calls": 2, "launches": 2, "waits": 0},
    }
    assert [(aim["name"], aim["met"]) for aim in document["targets"]] == [("a step: no launch", False)]
    assert {"machine", "versions", "commit"} <= set(document)
