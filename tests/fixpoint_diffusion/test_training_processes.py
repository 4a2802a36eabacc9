"""Training by two processes, and what each step draws for whom."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import torch.distributed as dist

from fixpoint_diffusion.models.fpdm.config import Backpropagation
from fixpoint_diffusion.options.training import TrainingConfig
from fixpoint_diffusion.ranks import ending_group, is_first
from fixpoint_diffusion.training.batches import Share, StepSampler, draw
from fixpoint_diffusion.training.checkpoints import load_state
from fixpoint_diffusion.training.runs import TrainingRun
from tests.fixpoint_diffusion.processes import ROOT, ended, start_ranks, wait_for

RULES = get_args(Backpropagation)


def options(rule: str, steps: int = 2) -> dict[str, Any]:
    """A conditional FPDM: class dropout, and depths of stochastic JFB that must be the same everywhere."""
    return {
        "kind": "fpdm",
        "classes": True,
        "settings": {"width": 16, "heads": 2, "max_no_grad": 3, "max_grad": 3, "backward": rule},
        "training": {"steps": steps, "batch_size": 8, "class_dropout": 0.3, "checkpoint_every": 2},
    }


# By every rule; and at last once more, where the second process waits in its third step to be killed.
SCRIPT = """
import json, os, sys, time
from pathlib import Path
from fixpoint_diffusion.cli import main
from fixpoint_diffusion.ranks import ending_group
from fixpoint_diffusion.training import prepared
from fixpoint_diffusion.training.runs import TrainingRun
folder, runs = Path(sys.argv.pop(1)), json.loads(sys.argv.pop(1))
original = prepared.PreparedRun.step
def step(self, batches, number, interrupted):
    if number == 2 and os.environ["RANK"] == "1":
        (folder / "waiting").touch()
        time.sleep(600)
    return original(self, batches, number, interrupted)
with ending_group():
    for name, options in runs.items():
        TrainingRun.start(folder / name, **options).run(progress=False)
    prepared.PreparedRun.step = step
    main()
"""


def assert_same(folder: Path, other: Path) -> None:
    one, two = (load_state(each / "checkpoint" / "state.safetensors") for each in (folder, other))
    for name, value in one.model.items():
        torch.testing.assert_close(two.model[name], value, rtol=1e-3, atol=2e-5, msg=f"{folder.name}: {name}")
    assert two.record["log"]["pending"] == pytest.approx(one.record["log"]["pending"], rel=1e-4)
    assert two.record["config"] == one.record["config"]


def test_two_processes_train_what_one_does_with_the_same_batch(tmp_path: Path) -> None:
    runs, whole = {rule: options(rule) for rule in RULES}, options("sjfb", steps=4)
    (tmp_path / "settings.json").write_text(json.dumps(whole["settings"]))
    command = [
        "train",
        "fpdm",
        "--classes",
        "--settings",
        tmp_path / "settings.json",
        "--out",
        tmp_path / "two" / "killed",
    ]
    for name, value in whole["training"].items():
        command += ["--" + name.replace("_", "-"), value]
    ranks = start_ranks(2, "-c", SCRIPT, tmp_path / "two", json.dumps(runs), *command)
    for rule, each in runs.items():
        TrainingRun.start(tmp_path / "one" / rule, **each).run(progress=False)
    TrainingRun.start(tmp_path / "one" / "killed", **whole).run(progress=False)
    try:
        wait_for(tmp_path / "two" / "waiting")
    finally:
        ranks[1].kill()
        (code, _, error), _ = ended(ranks)
    assert code == 2
    assert error == (
        "Error: another process of this command has ended; training can be resumed from its last checkpoint, "
        "if it had come to one"
    )
    for rule in RULES:
        assert_same(tmp_path / "one" / rule, tmp_path / "two" / rule)
    resumed = TrainingRun.resume(tmp_path / "two" / "killed")
    assert resumed.steps_done == 2
    resumed.run(progress=False)  # by one process
    assert_same(tmp_path / "one" / "killed", tmp_path / "two" / "killed")


# Of several trainings, in the first the second process fails, and in the second it is interrupted.
IN_TURN = """
import json, os, signal, sys
from fixpoint_diffusion.training import prepared
from tests.fixpoint_diffusion.processes import run_in_turn
original = prepared.PreparedRun.step
def prepare(turn):
    def step(self, batches, number, interrupted):
        if os.environ["RANK"] == "1" and number == 0:
            if turn == 0:
                raise ValueError("of the second alone")
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, batches, number, interrupted)
    prepared.PreparedRun.step = step
run_in_turn(json.loads(sys.argv[1]), prepare)
"""


def test_no_thread_of_the_process_group_is_left_to_meet_the_end_of_the_interpreter(tmp_path: Path) -> None:
    (tmp_path / "settings.json").write_text(json.dumps({"width": 16, "heads": 2}))
    command = ["train", "dit", "--steps", 2, "--batch-size", 8, "--settings", tmp_path / "settings.json"]
    resumed = ["train", "--resume", "--out", tmp_path / "b"]
    commands = [[*command, "--out", tmp_path / "a"], [*command, "--out", tmp_path / "b"], resumed]
    words = json.dumps([list(map(str, each)) for each in commands])
    (_, said, error), (_, other_said, other_error) = ended(start_ranks(2, "-c", IN_TURN, words))
    assert other_said.splitlines() == ["code 2", "code 130", "code 0"]  # no threads, and nothing said twice
    assert [line for line in said.splitlines() if line.startswith("code")] == other_said.splitlines()
    assert said.count("DiT with ") == 3
    assert said.count("Interrupted; checkpoint written") == said.count("Trained in ") == 1
    assert error.startswith("Error: another process of this command has ended")
    assert other_error == "Error: of the second alone"


def test_the_first_process_speaks_and_so_does_one_that_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for size, rank, first in ((None, None, True), ("2", "0", True), ("2", "1", False), (None, "1", True)):
        for name, value in (("WORLD_SIZE", size), ("RANK", rank)):
            if value is None:
                monkeypatch.delenv(name, raising=False)
            else:
                monkeypatch.setenv(name, value)
        assert is_first() is first


def test_one_that_is_alone_writes_its_model_whatever_rank_it_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("RANK", "1")
    TrainingRun.start(tmp_path, **options("jfb", steps=1)).run(progress=False)
    assert (tmp_path / "config.json").exists()


def test_a_process_group_of_the_caller_is_left_alone() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with ending_group():
            pass
        assert dist.is_initialized()
        with pytest.raises(ValueError, match="mine"), ending_group():
            raise ValueError("mine")
        assert dist.is_initialized()
    finally:
        dist.destroy_process_group()


# Each imports in its block what diffusers imports when it loads a model.
OWN = """
import torch.distributed as dist
from fixpoint_diffusion.ranks import ending_group
with ending_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    import torch.distributed.nn.functional
"""
OF_SHARDED = """
import torch.distributed as dist
from fixpoint_diffusion.denoisers import sharded
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
import torch.distributed.nn.functional
dist.destroy_process_group()
"""
LEFT = "\nfrom tests.fixpoint_diffusion.processes import threads_of_gloo\nprint(threads_of_gloo())"


@pytest.mark.parametrize("program", [OWN, OF_SHARDED], ids=["ending_group", "sharded"])
def test_what_is_imported_later_does_not_hold_the_process_group(program: str) -> None:
    run = subprocess.run([sys.executable, "-c", program + LEFT], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert (run.returncode, run.stdout) == (0, "[]\n"), run.stderr


CONFIG = TrainingConfig(steps=6, batch_size=8, accumulate=2, seed=3)
PARTS = [Share(config=CONFIG, process=process, processes=2) for process in range(2)]


def test_processes_and_pieces_share_each_batch_without_overlap() -> None:
    whole = list(StepSampler(10, Share(config=TrainingConfig(steps=6, batch_size=8, seed=3))))
    parts = [list(StepSampler(10, share)) for share in PARTS]
    for step, batch in enumerate(whole):
        assert batch == [row for part in parts for piece in part[2 * step : 2 * step + 2] for row in piece]


def test_an_epoch_takes_every_image_once() -> None:
    rows = [row for batch in StepSampler(12, Share(config=TrainingConfig(steps=6, batch_size=4))) for row in batch]
    assert Counter(index for index, _ in rows) == dict.fromkeys(range(12), 2)
    assert [epoch for _, epoch in rows] == [0] * 12 + [1] * 12
    assert [index for index, _ in rows[:12]] != [index for index, _ in rows[12:]]


def test_resumed_sampler_goes_on_where_the_first_stopped() -> None:
    whole = list(StepSampler(10, PARTS[1]))
    resumed = StepSampler(10, PARTS[1], start=2)
    assert list(resumed) == whole[4:]
    assert len(resumed) == len(whole) - 4


def test_what_a_row_draws_depends_on_its_place_in_the_batch_alone() -> None:
    config = TrainingConfig(steps=6, batch_size=8, seed=3, class_dropout=0.5)
    whole = draw(Share(config=config), 5, 0, (2, 3), 1000, torch.device("cpu"))
    parts = [
        draw(Share(config=TrainingConfig(**{**vars(config), "accumulate": 2}), process=process, processes=2), 5, piece,
             (2, 3), 1000, torch.device("cpu"))
        for process in range(2)
        for piece in range(2)
    ]  # fmt: skip
    for name in ("t", "noise", "dropped"):
        assert torch.equal(getattr(whole, name), torch.cat([getattr(part, name) for part in parts])), name
    other = draw(Share(config=config), 4, 0, (2, 3), 1000, torch.device("cpu"))
    assert not torch.equal(whole.noise, other.noise)
    assert len(set(whole.noise.flatten().tolist())) == whole.noise.numel()


def test_labels_are_dropped_as_often_as_told() -> None:
    share = Share(config=TrainingConfig(batch_size=10_000, class_dropout=0.2))
    dropped = draw(share, 0, 0, (1,), 10, torch.device("cpu")).dropped
    assert float(dropped.float().mean()) == pytest.approx(0.2, abs=0.02)  # five standard deviations


def test_batch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="batch_size 8 must be a multiple of processes times accumulate, 3 x 1"):
        Share(config=TrainingConfig(batch_size=8), processes=3)
