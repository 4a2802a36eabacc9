"""A denoiser whose rows are shared among processes: the same numbers, the same rounds, clear ends."""

from __future__ import annotations

import dataclasses
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from fixpoint_diffusion.denoisers import sharded
from fixpoint_diffusion.models import FPDMConfig
from tests.fixpoint_diffusion import sharded_worker as worker

ROOT = Path(__file__).parents[2]


def run_ranks(folder: Path, size: int, *extra: str) -> tuple[list[int], list[Any]]:
    """Exit codes and saved results of ``size`` processes."""
    outs = [folder / f"rank{rank}.pt" for rank in range(size)]
    command, store = [sys.executable, "-m", worker.__name__], folder / "store"
    # From this directory, so that the package beside these tests is used.
    processes = [
        subprocess.Popen([*command, str(rank), str(size), str(store), str(out), *extra], cwd=ROOT)
        for rank, out in enumerate(outs)
    ]
    try:
        codes = [process.wait(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return codes, [torch.load(out) if out.exists() else None for out in outs]


def test_several_processes_find_what_one_finds_in_the_same_rounds(tmp_path: Path) -> None:
    size = 3
    codes, results = run_ranks(tmp_path, size)
    assert codes == [0] * size
    alone = worker.everything(lambda denoiser: denoiser)
    for result in results:
        torch.testing.assert_close(result["found"], alone, rtol=1e-6, atol=1e-9)
    # Bit by bit the same on every rank.
    torch.testing.assert_close(results[0]["found"], results[1]["found"], rtol=0, atol=0)
    for rank, result in enumerate(results):
        said = result["faults"]
        assert said["steps"].startswith("RuntimeError: the ranks do not ask for the same:"), said
        assert "those of the ranks differ: give a number of rows" in said["auto"]
        assert "latents of rank 1 are not those of rank 0" in said["seed"]
        assert "dtype of the output torch.float32 on rank 0, torch.float64 on rank 1" in said["dtype"]
        assert said["a rank fails"] == (
            "ZeroDivisionError: no such row"
            if rank == 1
            else f"RuntimeError: the denoiser failed on rank 1 of {size}: ZeroDivisionError: no such row"
        )
        assert said["after all that"] == ""


def test_rows_are_shared_along_one_dimension_of_a_mesh_beside_samples_or_parts_of_the_network(tmp_path: Path) -> None:
    codes, results = run_ranks(tmp_path, 4, "mesh")
    assert codes == [0] * 4
    network = worker.Layers()
    for result in results:
        alone = worker.images_of(network, result["first"])
        torch.testing.assert_close(result["samples"], alone, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(result["fsdp"], worker.images_of(network, 0), rtol=1e-6, atol=1e-9)
        assert result["parameters here"] == sum(each.numel() for each in network.parameters()) // 2
        same = result["fsdp over the ranks that share rows"]
        torch.testing.assert_close(same, worker.images_of(network, 0), rtol=1e-6, atol=1e-9)
    assert [result["first"] for result in results] == [0, 0, 2, 2]
    alone = worker.training_step(None)
    untrained = worker.sharded_fpdm(None, width=16, heads=2).double().parameters()
    assert any(bool((one != other).any()) for one, other in zip(alone, untrained, strict=True))
    for result in results:
        torch.testing.assert_close(result["trained"], alone, rtol=1e-6, atol=1e-9)
    whole = worker.transformer()
    alone = worker.solved(whole, lambda denoiser: denoiser)
    for result in results:
        torch.testing.assert_close(result["tensor parallel"], alone, rtol=1e-6, atol=1e-9)
        parameters = whole.transformer_blocks[0].ff.net[2].weight.numel()
        assert result["parameters of tensor parallelism here"] == parameters // 2
        assert "divided by tensor parallelism over ranks [" in result["refused"]


def test_an_xl_model_is_sharded_without_memory_for_it() -> None:
    """FSDP2 over eight ranks, of which this is one, and the others need not be there: nothing is sent."""
    config = dataclasses.asdict(FPDMConfig.preset("XL/2"))
    dist.init_process_group("fake", store=dist.HashStore(), rank=0, world_size=8)
    try:
        with torch.device("meta"):
            whole = sum(each.numel() for each in worker.sharded_fpdm(None, **config).parameters())
            model = worker.sharded_fpdm(dist.init_device_mesh("cpu", (8,)), **config)
    finally:
        dist.destroy_process_group()
    here = sum(each.to_local().numel() for each in model.parameters())
    assert whole > 80_000_000
    assert whole / 8 <= here < whole / 7.9
    assert all(each.is_meta for each in model.parameters())


def test_a_killed_process_ends_the_others(tmp_path: Path) -> None:
    codes, results = run_ranks(tmp_path, 2, "die")
    assert codes == [0, -signal.SIGKILL]
    assert results == ["RuntimeError", None]


def test_without_a_process_group_the_error_says_how_to_start_one() -> None:
    assert not dist.is_initialized()
    with pytest.raises(RuntimeError, match="start with torchrun"):
        sharded(lambda x, t: x)
