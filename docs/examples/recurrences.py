"""A recurrent network and a differential equation over 1000 steps, all steps at once, against one after another.

Run it as ``python docs/examples/recurrences.py``.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import fixpoint

RTOL = 1e-5
SOLVERS = {
    "Picard": fixpoint.Picard(),
    "causal": fixpoint.CausalQuasiNewton(),
    "causal, window of 100": fixpoint.CausalQuasiNewton(window=100),
}


def gru_cell(*, inputs: int = 8, width: int = 32, remembers: float = 55.0) -> nn.GRUCell:
    """A GRU cell that forgets a share of about ``1 / remembers`` in a step, as cells for long sequences begin.

    Source: Tallec and Ollivier, "Can recurrent neural networks warp time?", ICLR 2018 (chrono initialisation).
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        cell = nn.GRUCell(inputs, width)
    with torch.no_grad():
        cell.bias_hh[width : 2 * width] += math.log(remembers - 1)  # of the update gate
    return cell


def gru(steps: int = 1000) -> fixpoint.Recurrence:
    """Hidden states of a GRU that reads random inputs."""
    cell = gru_cell()
    sequence = torch.randn(1, steps, cell.input_size, generator=torch.Generator().manual_seed(1))
    return fixpoint.Recurrence(lambda hidden, x: cell(x, hidden), torch.zeros(1, cell.hidden_size), inputs=(sequence,))


def pendulum(steps: int = 1000, *, interval: float = 0.02, substeps: int = 20) -> fixpoint.Recurrence:
    """A pendulum with friction, ``angle'' = -sin(angle) - angle' / 10``; 20 Runge-Kutta steps make one of the chain."""
    h = interval / substeps

    def slope(x: Tensor) -> Tensor:
        angle, speed = x.unbind(dim=1)
        return torch.stack((speed, -angle.sin() - speed / 10), dim=1)

    def advance(x: Tensor) -> Tensor:
        for _ in range(substeps):
            k1 = slope(x)
            k2 = slope(x + h / 2 * k1)
            k3 = slope(x + h / 2 * k2)
            k4 = slope(x + h * k3)
            x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        return x

    return fixpoint.Recurrence(advance, torch.tensor([[2.0, 0.0]], dtype=torch.float64), steps=steps)


PROBLEMS: dict[str, Callable[..., fixpoint.Recurrence]] = {"GRU": gru, "pendulum": pendulum}


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Batched calls of the step, rows in them, seconds, and the worst state's relative distance from sequential."""

    rounds: int
    rows: int
    seconds: float
    error: float


def compare(problem: fixpoint.Recurrence) -> dict[str, Outcome]:
    """The states one after another, and by every solver all at once."""
    step, batches = problem.step, []

    def counted(x: Tensor, *inputs: Tensor) -> Tensor:
        batches.append(len(x))
        return step(x, *inputs)

    def run(states: Callable[[], Tensor], expected: Tensor | None) -> tuple[Outcome, Tensor]:
        batches.clear()
        start = time.perf_counter()
        value = states()
        seconds = time.perf_counter() - start
        expected = value if expected is None else expected
        size = expected.flatten(2).norm(dim=2)
        error = float(((value - expected).flatten(2).norm(dim=2) / size).max())
        return Outcome(rounds=len(batches), rows=sum(batches), seconds=seconds, error=error), value

    problem.step = counted
    options = {"rtol": RTOL, "max_evals": problem.steps + 1, "backward": None}
    with torch.no_grad():
        problem.sequential()  # warms up
        sequential, expected = run(problem.sequential, None)
        outcomes = {"one after another": sequential}
        for name, solver in SOLVERS.items():
            outcomes[name], _ = run(lambda s=solver: fixpoint.solve(problem, solver=s, **options).value, expected)
    problem.step = step
    return outcomes


def main() -> None:
    """Print the table of the page."""
    torch.set_num_threads(1)
    print(f"{'problem':10}{'method':24}{'rounds':>8}{'rows':>9}{'seconds':>9}{'worst state':>13}")
    for name, make in PROBLEMS.items():
        for method, o in compare(make()).items():
            print(f"{name:10}{method:24}{o.rounds:8}{o.rows:9}{o.seconds:9.2f}{o.error:13.0e}")


if __name__ == "__main__":
    main()
