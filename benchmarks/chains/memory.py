"""Trajectories that each method holds: what limits how long a chain, or how many samples, a device has room for."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.chains.methods import FULL_WINDOW, METHODS, Method, full_window
from benchmarks.solvers.standings import Target
from fixpoint import Progress
from fixpoint.memory import LiveBytes
from fixpoint_diffusion import DDIMChain, NoiseSchedule, initial_noise

SHAPE = (3, 32, 32)
STEPS, QUICK_STEPS = 1000, 40
_ROUNDS = 7  # by then every history is full
_MOST = 6
_ANDERSON, _PICARD, _ANDERSON_MOST = "Anderson, per sample", "Picard", 14  # 2 m + 4, where m is 5
_OF_ONE, _OF_TWO = (f"{FULL_WINDOW}, memory {count}" for count in (1, 2))
_FEWER = (Method(_OF_TWO, full_window(memory=2), ours=True), Method(_OF_ONE, full_window(memory=1), ours=True))
CONTESTANTS = (METHODS[0], *_FEWER, *(method for method in METHODS[1:] if not method.dear))


@dataclass(frozen=True, kw_only=True)
class Held:
    """What a method holds, in trajectories ``(T, *shape)`` of a sample.

    Attributes:
        method: its name.
        calls: at most while the network runs, beside what it is shown and what it makes.
        peak: at most at any moment, that and its output among it; the network here makes nothing else.
    """

    method: str
    calls: float
    peak: float


@torch.no_grad()
def measure(steps: int) -> list[Held]:
    """Every method on the same sample."""
    return [_held(method, steps) for method in tqdm(CONTESTANTS, unit="method")]


def table(found: Sequence[Held], steps: int) -> str:
    """A line for each method."""
    width = max(len(each.method) for each in found)
    lines = [
        f"Trajectories held for one sample of {' x '.join(map(str, SHAPE))}, T={steps}, eta=0, float32, at most in the",
        f"first {_ROUNDS} rounds: while the network runs, beside what it is shown and what it makes; and at any",
        "moment, in a step of the solver or a sweep too, with what the network is shown and its output.",
        "",
        f"{'':{width}} while it runs   at any moment",
    ]
    lines += [f"{each.method:{width}} {each.calls:>13.1f} {each.peak:>15.1f}" for each in found]
    return "\n".join(lines)


def targets(found: Sequence[Held]) -> list[Target]:
    """While the network runs: a full window at most 6; Anderson at most 2 m + 4 beyond what any solver is."""
    held = {each.method: each.calls for each in found}
    aims = [(f"{name}: at most {_MOST}", held[name], _MOST) for name in (FULL_WINDOW, _OF_TWO, _OF_ONE)]
    more = held[_ANDERSON] - held[_PICARD]
    aims.append((f"{_ANDERSON}: at most 2 m + 4 = {_ANDERSON_MOST} beyond {_PICARD}", more, _ANDERSON_MOST))
    return [Target(f"held while the network runs, {name}", round(x, 1) <= most, f"{x:.1f}") for name, x, most in aims]


def as_json(found: Sequence[Held], steps: int) -> dict[str, object]:
    """Every figure."""
    return {"steps": steps, "shape": SHAPE, "methods": [asdict(each) for each in found]}


def _held(method: Method, steps: int) -> Held:
    gc.collect()
    trajectory = 4 * steps * torch.Size(SHAPE).numel()
    x_T = initial_noise(0, range(1), SHAPE)
    with LiveBytes() as live:
        calls = 0

        def denoiser(x: Tensor, t: Tensor) -> Tensor:
            nonlocal calls
            calls = max(calls, live.now - x.untyped_storage().nbytes())
            return torch.tanh(x)

        chain = DDIMChain(denoiser, x_T, NoiseSchedule.linear(), steps=steps)
        method.run(chain, _enough, _ROUNDS)
    return Held(method=method.name, calls=calls / trajectory, peak=live.peak / trajectory)


def _enough(progress: Progress) -> bool:
    return progress.nfev >= _ROUNDS
