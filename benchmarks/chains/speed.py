"""Seconds of one sample and of sixteen against the sequential sampler, and the peak memory of every method."""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial

import torch

from benchmarks.chains.cases import Setting, batch, chain
from benchmarks.chains.methods import METHODS, ours
from benchmarks.overhead import fastest
from benchmarks.solvers.standings import Target
from fixpoint import Progress
from fixpoint.memory import LiveBytes
from fixpoint_diffusion import DDIMChain

SEQUENTIAL, OURS = "sequential", "ours"
_MEMORY_ROUNDS = 6  # by then every history is full
Figures = dict[str, dict[str, float]]


def seconds(*, steps: int, counts: tuple[int, ...], repeats: int) -> Figures:
    """Least seconds of several runs in turn for batches of each count: sequential, ours, and ours in two windows."""
    forms: dict[str, dict[str, int]] = {
        OURS: {},
        "ours, full window": {"window": steps},
        "ours, window 100": {"window": 100},
    }
    figures = {}
    for count in counts:
        problem = batch("unet", steps, 0.0, range(count))
        tasks: dict[str, Callable[[], int]] = {SEQUENTIAL: partial(_sequential, problem)}
        tasks |= {name: partial(_ours, problem, **options) for name, options in forms.items()}
        with torch.no_grad():
            figures[str(count)] = fastest(tasks, repeats)
    return figures


def memory(*, steps: int) -> dict[str, float]:
    """MiB alive at most while one sample is made, the denoiser's own included: in full windows, nearly all is its."""
    found = {SEQUENTIAL: _peak(lambda: chain(_setting(10), 0).sequential())}
    for method in METHODS:
        if not method.dear:
            problem = chain(_setting(steps), 0)
            found[method.name] = _peak(partial(method.run, problem, _enough, _MEMORY_ROUNDS))
    return found


def targets(figures: Figures) -> list[Target]:
    """One sample at least 5 times as fast as sequential, sixteen at least 1.6 times."""
    aims = []
    for count, least in (("1", 5.0), ("16", 1.6)):
        if count in figures:
            sequential, mine = figures[count][SEQUENTIAL], figures[count][OURS]
            aims.append(
                Target(
                    f"{count} at a time: at least {least:.2g} times as fast as sequential",
                    sequential / mine >= least,
                    f"{sequential / mine:.2f} times, {mine:.2f} s against {sequential:.2f} s",
                )
            )
    return aims


def text(figures: Figures, peaks: dict[str, float], steps: int) -> str:
    """Both tables."""
    lines = [f"Seconds, U-Net, T={steps}, eta=0, to 1e-3; least of the runs"]
    for count, times in figures.items():
        lines += [f"  {name:24} {count:>3} at a time {each:>8.2f}" for name, each in times.items()]
    lines += ["", f"Peak memory of one sample in MiB, U-Net, T={steps}, eta=0, in the first {_MEMORY_ROUNDS} rounds"]
    lines += [f"  {name:24} {peak:>8.1f}" for name, peak in peaks.items()]
    return "\n".join(lines)


def _setting(steps: int) -> Setting:
    return Setting("unet", steps, 0.0, 1, 1)


def _sequential(problem: DDIMChain) -> int:
    problem.sequential()
    return 1


def _ours(problem: DDIMChain, **options: int) -> int:
    ours(**options)(problem, None, problem.steps * len(problem.x_T) + 1)
    return 1


def _enough(progress: Progress) -> bool:
    return progress.nfev >= _MEMORY_ROUNDS


def _peak(task: Callable[[], object]) -> float:
    gc.collect()
    with torch.no_grad(), LiveBytes() as live:
        task()
    return live.peak / 2**20
