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
# Entries of latents in a round, all rows together, up to which more rows are taken to cost little, by type of device.
_ENTRIES = {"cpu": 2**15}
_ENTRIES_ELSEWHERE = 2**22
# A CPU takes as long for a row of a larger batch, however small the rows are; and wide windows evaluate more of them.
_MOST_ROWS = {"cpu": 128}


def usual_rows(chain: SamplingChain, *, enlarged: int = 1) -> int:
    """Rows a round by a rule that needs no clock: so many that their latents have 2^15 entries on a CPU, or 2^22.

    On a CPU at most 128. At least one for each sample, which makes the ordinary sampler. The same chain gets the same
    budget on every machine with the same type of device.

    Args:
        chain: whose latents count.
        enlarged: by how many times more entries a row counts, such as those of the image that is decoded from it.

    Example:
        >>> from fixpoint_diffusion import DDIMChain, NoiseSchedule
        >>> def budget(*shape):
        ...     return usual_rows(DDIMChain(lambda x, t: x, torch.zeros(shape), NoiseSchedule.linear(), steps=50))
        >>> budget(2, 1, 8, 8), budget(2, 3, 256, 256)
        (128, 2)
    """
    device, samples = chain.x_T.device.type, max(len(chain.x_T), 1)
    rows = _ENTRIES.get(device, _ENTRIES_ELSEWHERE) // max(enlarged * (chain.x_T.numel() // samples), 1)
    return max(min(rows, _MOST_ROWS.get(device, rows)), samples)


@dataclass(frozen=True)
class BatchCost:
    """Seconds of a denoiser call by rows, measured at a few sizes and linear between and beyond them.

    Attributes:
        rows: sizes that were measured, ascending.
        seconds: what a call of each took.
        limit: most rows that a call may have, where the device had no memory for more; None: not met.

    Example:
        >>> cost = BatchCost((1, 64), (0.004, 0.010))
        >>> cost(128) > cost(64), cost.best_rows(samples=1, steps=1000) > 1
        (True, True)
    """

    rows: tuple[int, ...]
    seconds: tuple[float, ...]
    limit: int | None = None

    @classmethod
    def measure(cls, chain: SamplingChain) -> BatchCost:
        """Time the chain's denoiser on growing batches, until a row gets no cheaper, a call too long, or memory short.

        The chain counts these calls as rounds.

        Raises:
            torch.OutOfMemoryError: not even one row a sample fits.
        """
        samples, largest = len(chain.x_T), len(chain.x_T) * chain.steps
        sizes, seconds = [samples], [seconds_of_call(chain, samples, calls=2 + min(2, chain.steps // 100))]
        while sizes[-1] < largest and 4 * seconds[-1] < _SHARE * chain.steps * seconds[0]:
            size = min(4 * sizes[-1], largest)
            try:
                took = seconds_of_call(chain, size)
            except (torch.OutOfMemoryError, MemoryError):
                return cls(tuple(sizes), tuple(seconds), limit=sizes[-1])
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
        windows = [w for w in windows if w == 1 or self.limit is None or samples * w <= self.limit]

        def expected(window: int) -> float:
            rounds = steps if window == 1 else min(steps, _ROUNDS + _SLIDES * steps / window)
            return rounds * self(samples * window)

        return samples * min(windows, key=expected)


def seconds_of_call(chain: SamplingChain, rows: int, *, calls: int = 1) -> float:
    """The least time of so many calls of the chain's denoiser, which the chain counts as rounds.

    The first may have to warm up, and the machine may have been busy elsewhere.
    """
    row = torch.arange(rows, device=chain.x_T.device)
    sample, step = row % len(chain.x_T), row % chain.steps
    x, least = chain.x_T[sample], math.inf
    with torch.no_grad():
        for _ in range(calls):
            _wait(x)
            start = time.perf_counter()
            chain.denoise(x, sample, step)
            _wait(x)
            least = min(least, time.perf_counter() - start)
    return least


def _wait(x: torch.Tensor) -> None:
    if x.device.type == "cuda":
        torch.cuda.synchronize(x.device)
