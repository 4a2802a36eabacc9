"""What a training run reports: lines of loss and learning rate, as CSV and, where it is installed, for tensorboard."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fixpoint import FixedPointLayer, Layout, Picard, Solution
from fixpoint_diffusion.files import written_whole
from fixpoint_diffusion.training.layer_states import reached_state

LOG_FILE = "training_log.csv"
_ITERATIONS = 16
# A layer's own choice of these would change or stop the measurement.
_PLAIN: dict[str, Any] = {
    "solver": Picard(),
    "backward": None,
    "on_failure": "ignore",
    "callback": None,
    "keep_states": (),
    "return_solution": True,
}


@dataclass
class TrainingLog:
    """Lines ``(step, mean loss since the line before, learning rate, seconds so far, layer's residual)``.

    The residual is that of :class:`LayerResidual`; None for a model without a fixed point layer. ``pending`` is the
    sum of the losses of the next line.

    Example:
        See :class:`fixpoint_diffusion.training.TrainingRun`, whose ``run`` returns one.
    """

    lines: list[tuple[int, float, float, float, float | None]] = field(default_factory=list)
    pending: float = 0.0
    seconds: float = 0.0

    def __post_init__(self) -> None:
        # Lines of earlier versions have no residual.
        self.lines = [
            (int(step), loss, rate, seconds, residual[0] if residual else None)
            for step, loss, rate, seconds, *residual in self.lines
        ]
        self._began = time.perf_counter() - self.seconds

    def add(self, done: int, loss: float, rate: float, every: int, residual: float | None = None) -> bool:
        """Take in the loss of one step; returns whether that made a line."""
        self.pending += loss
        self.seconds = time.perf_counter() - self._began
        if done % every:
            return False
        self.lines.append((done, self.pending / every, rate, self.seconds, residual))
        self.pending = 0.0
        return True

    def write_csv(self, path: Path) -> None:
        """Write all lines so far to ``path``, whole or not at all."""
        names, measured = "step,loss,learning_rate,seconds", any(line[4] is not None for line in self.lines)
        rows = []
        for step, loss, rate, seconds, residual in self.lines:
            last = "" if residual is None else f"{residual:.4g}"
            rows.append(f"{step},{loss:.6g},{rate:.6g},{seconds:.1f}" + (f",{last}" if measured else ""))
        with written_whole(path) as file:
            file.write("\n".join([names + (",layer_residual" if measured else ""), *rows, ""]).encode())


class LayerResidual:
    """How well plain iteration solves a model's fixed point layer, on the batch of a training step.

    Args:
        model: the model; one without a fixed point layer, or with several, is not measured.

    Attributes:
        wanted: whether the next calls of the model are to be measured, at 16 evaluations of the layer's map each.
        latest: ``||f(z) - z|| / ||f(z)||`` after 16 iterations, mean over the images of the last such call; None before
            the first one. It does not depend on the number of iterations that training draws.
    """

    def __init__(self, model: nn.Module) -> None:
        self.wanted = False
        self.latest: float | None = None
        layers = [module for module in model.modules() if isinstance(module, FixedPointLayer)]
        self._hook = layers[0].register_forward_hook(self._measure, with_kwargs=True) if len(layers) == 1 else None

    @torch.no_grad()
    def _measure(self, layer: Any, inputs: tuple[Any, ...], options: dict[str, Any], output: Any) -> None:
        if not self.wanted:
            return

        def call(z0: Any, **how: Any) -> Solution:
            # Not layer(...): this hook would be called again. Both calls draw the same dropout, and training none less.
            with torch.random.fork_rng(devices, device_type=kind):
                return layer.forward(*inputs, **{**options, **_PLAIN, **how, "z0": z0})

        layout = Layout.of(reached_state(output), batch_dims=0)
        kind = "cuda" if layout.device.type == "cpu" else layout.device.type  # that of no device is not asked
        devices = [] if layout.device.type == "cpu" else [layout.device]
        z = call(options.get("z0"), depth=_ITERATIONS - 1).value
        # No solve starts where plain iteration of a layer that expands may have come to.
        finite = bool(torch.isfinite(layout.flatten(z)).all())
        left = call(z, depth=None, max_evals=1).relative_residual.mean() if finite else math.inf
        self.latest = math.inf if math.isnan(left) else float(left)  # not a number where f(z) is infinite

    def remove(self) -> None:
        """Take the hook off the layer."""
        if self._hook is not None:
            self._hook.remove()


def tensorboard_writer(folder: Path, *, first_step: int) -> Any | None:
    """A tensorboard writer into ``folder``, which replaces what is there from ``first_step`` on; None without one."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=first_step)
