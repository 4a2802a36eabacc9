"""What a denoiser call costs by the number of its rows, and the budget of rows that follows from it."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import numpy as np
import torch

from fixpoint_diffusion.chains import SamplingChain

# Rounds that sweeps with windows of w states take on T steps, about: _ROUNDS + _SLIDES * T / w.
_ROUNDS = 10.0
_SLIDES = 1.5
# A larger batch is tried while it makes a row at least so much cheaper.
_WORTH = 0.9
# Measuring stops before a call that would take so much of what the ordinary sampler takes.
_SHARE = 0.03


@dataclass(frozen=True)
class BatchCost:
    """Seconds of a denoiser call by rows, measured at a few sizes and linear between and beyond them.

    Attributes:
        rows: sizes that were measured, ascending.
        seconds: what a call of each took.

    Example:
        >>> cost = BatchCost((1, 64), (0.004, 0.010))
        >>> cost(128) > cost(64), cost.best_rows(samples=1, steps=1000) > 1
        (True, True)
    """

    rows: tuple[int, ...]
    seconds: tuple[float, ...]

    @classmethod
    def measure(cls, chain: SamplingChain) -> BatchCost:
        """Time the chain's denoiser on growing batches, until a row gets no cheaper or a call too long.

        The chain does not count these calls.
        """
        samples, largest = len(chain.x_T), len(chain.x_T) * chain.steps
        sizes, seconds = [samples], [_seconds(chain, samples, calls=2 + min(2, chain.steps // 100))]
        while sizes[-1] < largest and 4 * seconds[-1] < _SHARE * chain.steps * seconds[0]:
            size = min(4 * sizes[-1], largest)
            took = _seconds(chain, size)
            cheaper = took / size < _WORTH * seconds[-1] / sizes[-1]
            sizes, seconds = [*sizes, size], [*seconds, took]
            if not cheaper:
                break
        return cls(tuple(sizes), tuple(seconds))

    def __call__(self, rows: float) -> float:
        """Seconds of a call of so many rows."""
        if rows >= self.rows[-1]:
            return self.seconds[-1] * rows / self.rows[-1]
        return float(np.interp(rows, self.rows, self.seconds))

    def best_rows(self, samples: int, steps: int) -> int:
        """Rows a round that are expected to take the least time for so many samples of so many steps.

        ``samples`` itself means windows of one state: the ordinary sampler.
        """
        windows = [2**n for n in range(steps.bit_length()) if 2**n < steps] + [steps]

        def expected(window: int) -> float:
            rounds = steps if window == 1 else min(steps, _ROUNDS + _SLIDES * steps / window)
            return rounds * self(samples * window)

        return samples * min(windows, key=expected)


def _seconds(chain: SamplingChain, rows: int, *, calls: int = 1) -> float:
    """The least time of so many calls: the first may have to warm up, and the machine may have been busy elsewhere."""
    sample = torch.arange(rows) % len(chain.x_T)
    step = torch.arange(rows) % chain.steps
    x = chain.x_T[sample.to(chain.x_T.device)]
    counted, least = (chain.rounds, chain.evals), math.inf
    with torch.no_grad():
        for _ in range(calls):
            _wait(x)
            start = time.perf_counter()
            chain.denoise(x, sample, step)
            _wait(x)
            least = min(least, time.perf_counter() - start)
    chain.rounds, chain.evals = counted
    return least


def _wait(x: torch.Tensor) -> None:
    if x.device.type == "cuda":
        torch.cuda.synchronize(x.device)
