"""Chains that the tests of causal sweeps share."""

import torch
from torch import nn

import fixpoint
from fixpoint import CausalQuasiNewton, Recurrence


class Counted(Recurrence):
    """A recurrence that notes which steps of which samples were asked for, round by round."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.asked: list[list[tuple[int, int]]] = []
        self.inputs_asked: list[torch.Tensor] = []

    def transition(self, x, sample, step):
        self.inputs_asked.append(x)
        self.asked.append(list(zip(sample.tolist(), step.tolist(), strict=True)))
        return super().transition(x, sample, step)


def gru(samples: int = 3, steps: int = 80, kind: type[Recurrence] = Recurrence) -> Recurrence:
    torch.manual_seed(0)
    cell = nn.GRUCell(4, 6).double().requires_grad_(False)
    inputs = torch.randn(samples, steps, 4, dtype=torch.float64)
    return kind(lambda x, u: cell(u, x), torch.zeros(samples, 6, dtype=torch.float64), inputs=(inputs,))


def pendulum(steps: int = 400, kind: type[Recurrence] = Recurrence, **options) -> Recurrence:
    start = torch.tensor([[1.0, 0.0], [0.3, 0.5], [-2.0, 0.1]], dtype=torch.float64)
    return kind(lambda x: x + 0.02 * torch.stack((x[:, 1], -x[:, 0].sin()), dim=1), start, steps=steps, **options)


def solve(problem, solver=None, **options):
    options = {"rtol": 1e-6, "backward": None, "max_evals": 400} | options
    return fixpoint.solve(problem, solver=solver or CausalQuasiNewton(), **options)


def relative_errors(value, reference):
    return (value - reference).flatten(2).norm(dim=2) / reference.flatten(2).norm(dim=2)
