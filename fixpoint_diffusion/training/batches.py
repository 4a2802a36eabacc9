"""What a training step draws: a function of (seed, step, place in the batch), for any number of processes or parts."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

from fixpoint_diffusion.extras import machine_memory
from fixpoint_diffusion.options.training import TrainingConfig
from fixpoint_diffusion.processes.noise import step_noise
from fixpoint_diffusion.training.data import EpochSampler, ImageDataset


@dataclass(frozen=True, kw_only=True)
class Share:
    """The part of each step's batch that one process takes, in ``accumulate`` pieces.

    Raises:
        ValueError: if the batch does not divide into pieces of one size.
    """

    config: TrainingConfig
    process: int = 0
    processes: int = 1

    def __post_init__(self) -> None:
        size, pieces = self.config.batch_size, self.processes * self.config.accumulate
        if size % pieces:
            raise ValueError(
                f"batch_size {size} must be a multiple of processes times accumulate, "
                f"{self.processes} x {self.config.accumulate}"
            )

    def rows(self, piece: int) -> range:
        """Which images of the whole batch this process takes in its piece ``0, ..., accumulate - 1``."""
        length = self.config.batch_size // (self.processes * self.config.accumulate)
        start = (self.process * self.config.accumulate + piece) * length
        return range(start, start + length)


class StepSampler(Sampler[list[tuple[int, int]]]):
    """``(index, draw)`` of the images of each piece of each step from ``start`` on, for a ``DataLoader``'s batches.

    The data set is gone through in one random order after another; each step takes the next ``batch_size`` of them.
    """

    def __init__(self, length: int, share: Share, *, start: int = 0) -> None:
        self.length, self.share, self.start = length, share, start

    def __len__(self) -> int:
        return (self.share.config.steps - self.start) * self.share.config.accumulate

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        config = self.share.config
        rows = iter(EpochSampler(self.length, seed=config.seed, start=self.start * config.batch_size))
        for _ in range(self.start, config.steps):
            batch = list(islice(rows, config.batch_size))
            for piece in range(config.accumulate):
                yield [batch[row] for row in self.share.rows(piece)]


def draw(share: Share, step: int, piece: int, shape: tuple[int, ...], timesteps: int, device: torch.device) -> Drawn:
    """What is drawn for one piece of one step: images of ``shape``, a schedule of ``timesteps``."""
    rows = share.rows(piece)
    generator = torch.Generator().manual_seed(seed_of(share.config.seed, step))
    t = torch.randint(timesteps, (share.config.batch_size,), generator=generator, device="cpu")
    dropped = torch.rand(share.config.batch_size, generator=generator, device="cpu") < share.config.class_dropout
    part = slice(rows.start, rows.stop)
    noise = step_noise(share.config.seed, rows, [step], shape, device=device)[:, 0]
    return Drawn(t=t[part].to(device), noise=noise, dropped=dropped[part].to(device))


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """Timesteps ``(B,)``, noise ``(B, *shape)``, and which labels are dropped, ``(B,)``."""

    t: Tensor
    noise: Tensor
    dropped: Tensor


def seed_of(*numbers: int) -> int:
    """One seed from several numbers; zeros at their end change nothing."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def check_batch(data: ImageDataset, config: TrainingConfig) -> None:
    """Refuse a batch that this machine cannot hold, before a network is built for such images."""
    count = max(config.batch_size // config.accumulate // int(os.environ.get("WORLD_SIZE", "1")), 1)
    need, have = 4 * count * math.prod(data.sample_shape), machine_memory()
    if need > have:
        shape = "x".join(map(str, data.sample_shape))
        raise ValueError(
            f"{count} samples of {shape} at once would take {need / 1e9:,.0f} GB, and this machine has "
            f"{have / 1e9:,.0f} GB: take a smaller --batch-size, more parts (--accumulate) or a smaller --size"
        )
