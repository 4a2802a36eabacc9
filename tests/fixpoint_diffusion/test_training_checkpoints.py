from __future__ import annotations

import json
import math
import subprocess
import sys
import threading
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fixpoint_diffusion.files import locked
from fixpoint_diffusion.models import FPDM, FPDMConfig
from fixpoint_diffusion.training.checkpoints import (
    TrainingState,
    load_state,
    optimizer_tensors,
    restore_optimizer,
    save_state,
)
from tests.fixpoint_diffusion.earlier import as_stored_earlier


def state(step: int = 3, value: float = 1.0) -> TrainingState:
    weights = {"w": torch.full((64, 64), value)}
    optimizer = {"exp_avg/w": torch.full((64, 64), value), "step/w": torch.tensor(float(step))}
    return TrainingState(
        model=weights, ema={"w": weights["w"].clone()}, optimizer=optimizer, record={"step": step, "value": value}
    )


def rewrite(path: Path, *, keep=lambda name: True, change=lambda tensor: tensor, record=None) -> None:
    """The file as someone else would leave it: tensors left out or changed, the header as it was."""
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if record is not None:
        header["record"] = json.dumps(record)
    save_file({name: change(tensor) for name, tensor in tensors.items() if keep(name)}, path, metadata=header)


def test_state_comes_back_to_the_bit(tmp_path: Path) -> None:
    save_state(tmp_path / "c", state(7, 0.1))
    found, wanted = load_state(tmp_path / "c"), state(7, 0.1)
    assert found.record == wanted.record
    for part in ("model", "ema", "optimizer"):
        one, other = getattr(found, part), getattr(wanted, part)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_state_of_an_fpdm_that_an_earlier_version_left_is_continued(tmp_path: Path) -> None:
    model = FPDM(FPDMConfig(width=16, heads=2))
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.rand_like(parameter)
    optimizer.step()
    now = TrainingState(
        model={f"network.{name}": tensor for name, tensor in model.state_dict().items()},
        ema={f"module.network.{name}": tensor for name, tensor in model.state_dict().items()},
        optimizer=optimizer_tensors(optimizer, model),
        record={"step": 1},
    )
    earlier = {part: as_stored_earlier(getattr(now, part)) for part in ("model", "ema", "optimizer")}
    assert len(earlier["optimizer"]) == len(now.optimizer) - 3
    save_state(tmp_path / "c", TrainingState(**earlier, record=now.record))
    found = load_state(tmp_path / "c")
    for part in ("model", "ema", "optimizer"):
        one, other = getattr(found, part), getattr(now, part)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one), part
    restore_optimizer(optimizer, model, found.optimizer)


@pytest.mark.parametrize("part", ["model", "ema", "optimizer"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_leave_the_last_good_state(tmp_path: Path, part: str, value: float) -> None:
    save_state(tmp_path / "c", state(3))
    bad = state(4)
    next(iter(getattr(bad, part).values()))[0, 5] = value
    with pytest.raises(FloatingPointError, match=f"{part}/.*not finite"):
        save_state(tmp_path / "c", bad)
    assert load_state(tmp_path / "c").record["step"] == 3


def test_failed_write_leaves_the_last_state_and_nothing_else(tmp_path: Path, monkeypatch) -> None:
    save_state(tmp_path / "c", state(1))

    def broken(_: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("fixpoint_diffusion.files.os.fsync", broken)
    with pytest.raises(OSError, match="no space"):
        save_state(tmp_path / "c", state(2))
    assert load_state(tmp_path / "c").record["step"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_writers_at_once_never_mix_two_states(tmp_path: Path) -> None:
    save_state(tmp_path / "c", state(1, 1.0))
    done, errors = threading.Event(), []

    def write(value: float) -> None:
        while not done.is_set():
            try:
                save_state(tmp_path / "c", state(1, value))
            except OSError as error:
                errors.append(error)

    writers = [threading.Thread(target=write, args=(value,)) for value in (1.0, 2.0)]
    for writer in writers:
        writer.start()
    try:
        for _ in range(100):
            found = load_state(tmp_path / "c")
            assert torch.equal(found.model["w"], torch.full((64, 64), found.record["value"]))
    finally:
        done.set()
        for writer in writers:
            writer.join()
    assert errors == []


def test_file_that_is_absent_cut_or_foreign_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no checkpoint to resume from"):
        load_state(tmp_path / "c")
    save_state(tmp_path / "c", state())
    whole = (tmp_path / "c").read_bytes()
    (tmp_path / "c").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        load_state(tmp_path / "c")
    save_file({"w": torch.ones(2)}, tmp_path / "c")
    with pytest.raises(ValueError, match="not a training checkpoint"):
        load_state(tmp_path / "c")
    torch.save({"w": torch.ones(2)}, tmp_path / "c")
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        load_state(tmp_path / "c")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keep": lambda name: not name.startswith("optimizer/")}, "no optimiser state"),
        ({"keep": lambda name: not name.startswith("optimizer/step")}, "step 3, its optimiser state of none"),
        ({"change": torch.zeros_like}, "all weights of its model are zero"),
        ({"record": {"step": -5}}, "step -5"),
        ({"record": {"step": 0}}, "step 0"),
        ({"record": {"step": "3"}}, "step '3'"),
        ({"record": {}}, "step None"),
        ({"record": {"step": 2}}, "step 2, its optimiser state of 3"),
        ({"change": lambda tensor: tensor * math.nan}, "step 3, its optimiser state of nan"),
        ({"change": lambda tensor: tensor * 1.5 if tensor.ndim else tensor}, "checksum"),
        ({"keep": lambda name: name != "optimizer/exp_avg/w"}, "checksum"),
    ],
)
def test_state_that_no_run_can_have_left_is_refused_by_name(tmp_path: Path, change: dict, message: str) -> None:
    save_state(tmp_path / "c", state(3))
    rewrite(tmp_path / "c", **change)
    with pytest.raises(ValueError, match=message):
        load_state(tmp_path / "c")


def test_optimizer_state_of_another_model_is_refused() -> None:
    model = nn.Linear(2, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    kept = optimizer_tensors(optimizer, model)
    for other in (nn.Linear(2, 4), nn.Sequential(nn.Linear(2, 3))):
        with pytest.raises(ValueError, match="of another model"):
            restore_optimizer(torch.optim.AdamW(other.parameters()), other, kept)


def test_folder_is_locked_for_one_run_and_free_afterwards(tmp_path: Path) -> None:
    with (
        locked(tmp_path / "run", work="training"),
        pytest.raises(BlockingIOError, match="another run is training"),
        locked(tmp_path / "run", work="training"),
    ):
        pass
    with locked(tmp_path / "run", work="training"):
        pass


def test_a_lock_that_is_taken_as_another_ends_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file of the lock was deleted after its release: who had it by then held what no other process could see."""
    release, second = FileLock.release, ExitStack()

    def release_to_a_second(lock: FileLock, **options: bool) -> None:
        release(lock, **options)
        monkeypatch.undo()
        second.enter_context(locked(tmp_path / "run", work="training"))

    monkeypatch.setattr(FileLock, "release", release_to_a_second)
    with locked(tmp_path / "run", work="training"):
        pass
    with second, pytest.raises(BlockingIOError), locked(tmp_path / "run", work="training"):
        pass


def test_parts_of_files_that_a_killed_process_left_are_deleted(tmp_path: Path) -> None:
    """A checkpoint that was cut short is as large as a whole one, and no run looked at it again."""
    killed = "import os; from fixpoint_diffusion.files import written_whole\n"
    killed += f"with written_whole({str(tmp_path / 'state')!r}) as file: os._exit(9)"
    subprocess.run([sys.executable, "-c", killed], check=False)
    assert len(list(tmp_path.iterdir())) == 1
    (tmp_path / ".video.mkv.part").touch()  # another program's
    with locked(tmp_path, work="training"):
        assert {path.name for path in tmp_path.iterdir()} == {".lock", ".video.mkv.part"}


def test_integers_and_halves_are_kept_as_they_are(tmp_path: Path) -> None:
    extra: dict[str, Tensor] = {"count": torch.tensor(5), "half": torch.ones(3, dtype=torch.bfloat16)}
    kept = state()
    kept.model.update(extra)
    save_state(tmp_path / "c", kept)
    found = load_state(tmp_path / "c").model
    assert all(torch.equal(found[name], value) and found[name].dtype == value.dtype for name, value in extra.items())
