"""Gradients of chains, against backpropagation through the sequential run."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import fixpoint
from fixpoint import CausalQuasiNewton, Recurrence
from tests.fixpoint.chains import gru, relative_errors, solve


class Cell(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(3, 3).double()

    def forward(self, x, u):
        return torch.tanh(self.inner(x) + u)


@pytest.mark.parametrize("solver", [CausalQuasiNewton(), CausalQuasiNewton(window=6)], ids=["all", "window"])
def test_gradients_are_those_of_the_sequential_run(solver):
    cell, inputs = Cell(), torch.randn(2, 20, 3, dtype=torch.float64)
    start = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    chain = Recurrence(cell, start, inputs=(inputs,))
    solution = fixpoint.solve(chain, solver=solver, rtol=1e-11, backward=fixpoint.IFT(rtol=1e-10))
    wanted = [start, *cell.parameters()]
    found = torch.autograd.grad(solution.value[:, -1].square().sum(), wanted)
    expected = torch.autograd.grad(chain.sequential()[:, -1].square().sum(), wanted)
    assert_close(found, expected, rtol=1e-7, atol=1e-10)
    assert solution.adjoint.converged.all()
    assert solution.adjoint.nfev <= 20


def test_the_adjoint_takes_the_problems_slopes_backwards():
    slopes = torch.linspace(0.2, 1.0, 30, dtype=torch.float64)
    push = torch.randn(1, 30, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    spread = slopes[None, :, None].expand_as(push)
    chain = Recurrence(lambda x, s, u: s * x + u, push[:, 0].detach(), inputs=(spread, push), slopes=slopes)
    solution = fixpoint.solve(chain, solver=CausalQuasiNewton(), rtol=1e-10, backward=fixpoint.IFT(rtol=1e-9))
    (found,) = torch.autograd.grad(solution.value[:, -1].sum(), push)
    assert solution.adjoint.nfev == 2
    expected = torch.cat((slopes[1:].flip(0).cumprod(0).flip(0), torch.ones(1, dtype=torch.float64)))
    assert_close(found[0], expected[:, None].expand(30, 2))


@pytest.mark.parametrize("backward", [fixpoint.JFB(), fixpoint.Phantom(steps=3), fixpoint.Unroll()], ids=repr)
def test_other_backward_rules_attach(backward):
    cell, inputs = Cell(), torch.randn(2, 6, 3, dtype=torch.float64)
    chain = Recurrence(cell, torch.zeros(2, 3, dtype=torch.float64), inputs=(inputs,))
    solution = fixpoint.solve(chain, solver=CausalQuasiNewton(), rtol=1e-8, backward=backward)
    assert_close(solution.value.detach(), chain.sequential().detach(), rtol=1e-5, atol=1e-6)
    solution.value.sum().backward()
    assert cell.inner.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("memory", [1, 2])
def test_rounds_recorded_for_gradients_are_the_same_rounds(memory):
    problem, solver = gru(steps=60), CausalQuasiNewton(memory=memory)
    plain = solve(problem, solver)
    problem.start.requires_grad_()
    recorded = solve(problem, solver, backward=fixpoint.Unroll())
    assert recorded.value.requires_grad
    assert recorded.nfev <= plain.nfev + 1
    assert float(relative_errors(recorded.value.detach(), plain.value).max()) < 1e-5
