"""What a training run reports: lines of loss and learning rate, as CSV and, where it is installed, for tensorboard."""

from __future__ import annotations

import csv
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LOG_FILE = "training_log.csv"


@dataclass
class TrainingLog:
    """Lines ``(step, mean loss since the line before, learning rate, seconds so far)``, and the sum of the next one."""

    lines: list[tuple[int, float, float, float]] = field(default_factory=list)
    pending: float = 0.0
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self.lines = [(int(step), loss, rate, seconds) for step, loss, rate, seconds in self.lines]
        self._began = time.perf_counter() - self.seconds

    def add(self, done: int, loss: float, rate: float, every: int) -> bool:
        """Take in the loss of one step; returns whether that made a line."""
        self.pending += loss
        self.seconds = time.perf_counter() - self._began
        if done % every:
            return False
        self.lines.append((done, self.pending / every, rate, self.seconds))
        self.pending = 0.0
        return True

    def write_csv(self, path: Path) -> None:
        """Write all lines so far to ``path``, whole or not at all."""
        unfinished = path.with_name(f"{path.name}.{os.getpid()}.unfinished")
        with unfinished.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["step", "loss", "learning_rate", "seconds"])
            for step, loss, rate, seconds in self.lines:
                writer.writerow([step, f"{loss:.6g}", f"{rate:.6g}", f"{seconds:.1f}"])
        os.replace(unfinished, path)


def tensorboard_writer(folder: Path, *, first_step: int) -> Any | None:
    """A tensorboard writer into ``folder``, which replaces what is there from ``first_step`` on; None without one."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=first_step)
