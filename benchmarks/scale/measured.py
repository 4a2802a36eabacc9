"""What is measured here: rows of every round, the cost of calls, and one sample by one and by two processes."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing

from benchmarks.scale.prediction import Link, Network, Workload, predict
from fixpoint_diffusion import DDIMChain, NoiseSchedule, embedded, initial_noise, sample
from fixpoint_diffusion.denoisers import sharded
from fixpoint_diffusion.sampling.batch_cost import BatchCost

SIZES = (1, 2, 4, 16, 64, 256)
# Process time: on a busy machine the wall clock tells mostly of the others.
CLOCK = time.process_time


def run(denoiser: Callable[..., Tensor], steps: int, budget: int) -> None:
    """One sample of digits, with at most ``budget`` rows in a round; budget 1 is the ordinary sampler."""
    model = embedded("ddpm-digits")
    assert model.schedule_config is not None
    assert model.sample_shape is not None
    x_T = initial_noise(seed=0, samples=range(1), shape=model.sample_shape)
    chain = DDIMChain(denoiser, x_T, NoiseSchedule.from_diffusers(model.schedule_config), steps=steps)
    if budget == 1:
        chain.sequential(trajectory=False)
    else:
        sample(chain, rtol=1e-3, max_rows=budget)


def rows_of_rounds(steps: int, budgets: Sequence[int]) -> dict[int, list[int]]:
    """For each budget the rows of each call."""
    model, found = embedded("ddpm-digits"), dict[int, list[int]]()
    for budget in budgets:
        rows = found.setdefault(budget, [])

        def counting(x: Tensor, t: Tensor, rows: list[int] = rows) -> Tensor:
            rows.append(len(x))
            return model(x, t)

        run(counting, steps, budget)
        del rows[1]  # a call that sees whether the denoiser is a fixed function
    return found


def least(work: Callable[[], Any], times: int) -> float:
    """The least time of several."""
    found = math.inf
    for _ in range(times):
        began = CLOCK()
        work()
        found = min(found, CLOCK() - began)
    return found


def check(steps: int, budget: int, times: int) -> list[dict[str, float]]:
    """Process seconds of a sample by one and by two processes: predicted from parts, and measured."""
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        model = embedded("ddpm-digits")
        rounds, outputs = list[int](), list[Tensor]()

        def recording(x: Tensor, t: Tensor) -> Tensor:
            rounds.append(len(x))
            outputs.append(model(x, t))
            return outputs[-1]

        def repeated() -> None:  # the solver alone
            given = iter(outputs)
            run(lambda x, t: next(given).clone(), steps, budget)

        run(recording, steps, budget)
        x = torch.zeros(max(SIZES), 1, 8, 8)
        calls = [least(lambda n=n: model(x[:n], torch.full((n,), 500)), 10 * times) for n in SIZES]
        workload = Workload(
            name="digits",
            cost=BatchCost(SIZES, tuple(calls)),
            row_bytes=4 * 64,
            sweep=least(repeated, times) / len(rounds),
        )
        alone = least(lambda: run(model, steps, budget), times)
        multiprocessing.spawn(_one_of_two, (folder, steps, budget, times), nprocs=2)
        told = torch.load(Path(folder) / "told.pt")
        # The time of an exchange of one row and of many: two are made in a call.
        many, rate = told["many"], 2 * max((told["seconds of many"] - told["seconds"]) / told["many"], 1e-12)
        link = Link(latency=told["seconds"] / 2, bandwidth=workload.row_bytes / rate)
        network = Network(inside=link, between=link, per_machine=2)
        return [
            {
                "processes": n,
                "predicted": predict(rounds, workload, network, n, budget=budget).seconds,
                "measured": measured,
                "rounds": len(rounds),
                "rows": sum(rounds),
                "exchange_of_one_row": told["seconds"],
                f"exchange_of_{many}_rows": told["seconds of many"],
            }
            for n, measured in ((1, alone), (2, told["measured"]))
        ]


def _one_of_two(rank: int, folder: str, steps: int, budget: int, times: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    shared, empty = sharded(embedded("ddpm-digits")), sharded(lambda x, t: x)
    run(shared, steps, budget)
    few, many = torch.zeros(2, 1, 8, 8), torch.zeros(1024, 1, 8, 8)
    with torch.no_grad():
        told = {
            "measured": least(lambda: run(shared, steps, budget), times),
            "seconds": least(lambda: empty(few, torch.zeros(2)), 20 * times),
            "seconds of many": least(lambda: empty(many, torch.zeros(1024)), 20 * times),
            "many": 1024,
        }
    if rank == 0:
        torch.save(told, Path(folder) / "told.pt")
    dist.barrier()
    dist.destroy_process_group()
