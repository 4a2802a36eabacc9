"""The training benchmark: its tasks, its clocks and turns, and what it writes."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fixpoint
from benchmarks.training import __main__ as cli
from benchmarks.training import runs
from benchmarks.training.runs import LOOKS, RULES, Run, train_all
from benchmarks.training.tasks import TASKS, Task, digit_batches, sums

BY_NAME = {task.name: task for task in TASKS}


def test_sums_are_those_of_the_numbers() -> None:
    tokens, digits = sums(50, torch.Generator().manual_seed(0))
    places = 10 ** torch.arange(6)
    total = ((tokens // 10 + tokens % 10) * places).sum(dim=1)
    torch.testing.assert_close((digits * places).sum(dim=1), total % 10**6)
    assert digits.min() >= 0
    assert digits.max() == 9


def test_digits_are_trained_on_once_an_epoch_and_never_tested_on() -> None:
    test, _ = BY_NAME["digits"].test(0)
    epoch = torch.cat([pixels for pixels, _ in itertools.islice(digit_batches(0), 12)])
    assert (len(epoch), len(test)) == (1437, 360)
    assert len(torch.unique(torch.cat([epoch, test]), dim=0)) == 1797


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
@pytest.mark.parametrize("rule", RULES)
def test_every_rule_takes_a_step_that_lowers_the_loss(task: Task, rule: str) -> None:
    run = Run(task, RULES[rule], seed=0)
    examples = next(run.batches)

    def loss() -> Tensor:
        with torch.no_grad():
            logits, _ = run.model(examples[0])
        return nn.functional.cross_entropy(logits.flatten(0, -2), examples[1].flatten())

    before = loss()
    for _ in range(3):
        run._step(examples)
    assert loss() < before


class Remembering(nn.Module):
    """Always names the first of two classes; solves something trivial."""

    def __init__(self, backward: fixpoint.Backward, solver: fixpoint.Solver) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.tensor([1.0, 0.0]))
        self.options = {"backward": backward, "solver": solver}

    def forward(self, x: Tensor) -> tuple[Tensor, fixpoint.Solution]:
        solution = fixpoint.solve(lambda z: 0.5 * z + self.bias, torch.zeros(len(x), 2), **self.options)
        return solution.value, solution


def trivial(seconds: float) -> Task:
    def batches(seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield torch.zeros(2, 1), torch.zeros(2, dtype=torch.int64)

    return Task(
        name="trivial",
        seconds=seconds,
        model=Remembering,
        batches=batches,
        test=lambda seed: (torch.zeros(4, 1), torch.tensor([0, 0, 0, 1])),
        learning_rate=0.1,
    )


def test_runs_take_turns_and_each_has_its_own_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, order = [0.0], []
    step = Run._step

    def slow(run: Run, examples: tuple[Tensor, Tensor]) -> fixpoint.Solution:
        order.append(run.seed)
        clock[0] += 0.1 * (run.seed + 1)
        return step(run, examples)

    monkeypatch.setattr(Run, "_step", slow)
    monkeypatch.setattr(runs.time, "perf_counter", lambda: clock[0])
    outcome = train_all(trivial(7.99), {"JFB()": RULES["JFB()"]}, range(2))["JFB()"]
    assert outcome.steps == [80, 40]
    assert outcome.seconds == pytest.approx([8.0, 8.0])
    assert order[:5] == [0, 0, 0, 1, 1]
    assert outcome.accuracies == [0.75, 0.75]
    assert [len(curve) for curve in outcome.curves] == [LOOKS, LOOKS]
    assert all(accuracy == 0.75 for curve in outcome.curves for _, accuracy in curve)


def test_the_command_prints_and_writes_what_it_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr(cli, "TASKS", (trivial(0.05), replace(BY_NAME["sums"], seconds=0.1)))
    monkeypatch.setattr(cli, "RULES", {name: RULES[name] for name in ("IFT(rtol=1e-2)", "JFB()")})
    assert cli.main(["--seeds", "2", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert (tmp_path / "training.txt").read_text() == printed
    assert "JFB()                  0.750         0.75 0.75" in printed
    document = json.loads((tmp_path / "training.json").read_text())
    found = document["tasks"]["sums"]["rules"]
    assert found["IFT(rtol=1e-2)"]["products"] > 0 == found["JFB()"]["products"]
    assert found["JFB()"]["peak"] > found["JFB()"]["saved"] > 0
    assert all(each >= 0.1 for each in found["JFB()"]["seconds"])
