"""Gradients of chains, against backpropagation through the sequential run."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import fixpoint
from fixpoint import Anderson, Blockwise, CausalQuasiNewton, Recurrence
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


@pytest.mark.parametrize("inputs", [(0.0, 1.0, 2.0, 3.0, 4.0), (1.0, 2.0, 3e4, 2.0, 1.0)], ids=["zero", "jump"])
def test_a_chain_whose_rounds_are_recorded_may_start_at_zero_or_jump(inputs):
    rate = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    inputs = torch.tensor(inputs, dtype=torch.float64)[None, :, None]
    chain = Recurrence(lambda x, u: rate * torch.sin(x) + u, torch.zeros(1, 1, dtype=torch.float64), inputs=(inputs,))
    solution = fixpoint.solve(chain, solver=CausalQuasiNewton(), rtol=1e-10, backward=fixpoint.Unroll())
    assert solution.nfev <= 6
    assert_close(solution.value, chain.sequential())
    found, expected = (torch.autograd.grad(x.sum(), rate) for x in (solution.value, chain.sequential()))
    assert_close(found, expected)


@pytest.mark.parametrize("memory", [1, 2])
def test_rounds_recorded_for_gradients_are_the_same_rounds(memory):
    problem, solver = gru(steps=60), CausalQuasiNewton(memory=memory)
    plain = solve(problem, solver)
    problem.start.requires_grad_()
    recorded = solve(problem, solver, backward=fixpoint.Unroll())
    assert recorded.value.requires_grad
    assert recorded.nfev <= plain.nfev + 1
    assert float(relative_errors(recorded.value.detach(), plain.value).max()) < 1e-5


def tanh_network(scale=1.0, samples=2, steps=60, dim=8):
    generator = torch.Generator().manual_seed(0)
    weight = scale * torch.randn(dim, dim, generator=generator, dtype=torch.float64) / dim**0.5
    inputs = torch.randn(samples, steps, dim, generator=generator, dtype=torch.float64)
    weight.requires_grad_()
    start = torch.zeros(samples, dim, dtype=torch.float64)
    return weight, Recurrence(lambda x, u: torch.tanh(x @ weight + u), start, inputs=(inputs,))


def slow_network(dim=20, steps=200):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(dim, dim, generator=generator, dtype=torch.float64) / dim**0.5
    start = torch.randn(2, dim, generator=generator, dtype=torch.float64)
    weight.requires_grad_()
    return weight, Recurrence(lambda x: x + 0.05 * torch.tanh(x @ weight), start, steps=steps)


@pytest.mark.parametrize("network", [tanh_network, slow_network])
@pytest.mark.parametrize("memory", [1, 2])
def test_the_gradient_of_recorded_sweeps_tends_to_that_of_the_sequential_run(network, memory):
    weight, chain = network()
    (expected,) = torch.autograd.grad(chain.sequential().square().sum(), weight)
    errors = []
    for rtol in (1e-4, 1e-8, 1e-12):
        solver = CausalQuasiNewton(memory=memory)
        solution = fixpoint.solve(chain, solver=solver, rtol=rtol, backward=fixpoint.Unroll())
        (found,) = torch.autograd.grad(solution.value.square().sum(), weight)
        errors.append(float((found - expected).norm() / expected.norm()))
    assert errors[1] < 1e-3 * errors[0]
    assert errors[2] < 1e-8


def test_recorded_sweeps_have_second_derivatives():
    weight, chain = tanh_network(steps=12, dim=3)
    seconds = []
    for value in (
        fixpoint.solve(chain, solver=CausalQuasiNewton(), rtol=1e-13, backward=fixpoint.Unroll()).value,
        chain.sequential(),
    ):
        (first,) = torch.autograd.grad(value.square().sum(), weight, create_graph=True)
        seconds.append(torch.autograd.grad(first.square().sum(), weight)[0])
    assert_close(*seconds, rtol=1e-6, atol=1e-8)


ADJOINTS = [
    CausalQuasiNewton(),
    CausalQuasiNewton(window=5, max_rows=7, certify=True),
    Blockwise(CausalQuasiNewton(), blocks=1),
    Blockwise(CausalQuasiNewton(), blocks=3),
]


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=repr)
@pytest.mark.parametrize("forward", [Anderson(), CausalQuasiNewton(max_rows=9)], ids=["anderson", "causal"])
def test_the_adjoint_can_be_told_to_sweep(forward, adjoint):
    weight, chain = tanh_network(steps=18, dim=3)
    chain.slopes = torch.full((18,), 0.3)  # fit no block, and are left out there
    rule = fixpoint.IFT(solver=adjoint, rtol=1e-10)
    solution = fixpoint.solve(chain, solver=forward, rtol=1e-12, max_evals=300, backward=rule)
    (found,) = torch.autograd.grad(solution.value.square().sum(), weight)
    (expected,) = torch.autograd.grad(chain.sequential().square().sum(), weight)
    assert_close(found, expected, rtol=1e-7, atol=1e-10)
    assert solution.adjoint.converged.all()
    assert solution.adjoint.nfev <= 20


def test_the_adjoint_of_a_solver_in_one_block_is_that_of_the_solver():
    weight, chain = tanh_network(steps=18, dim=3)
    found = []
    for solver in (
        CausalQuasiNewton(),
        Blockwise(CausalQuasiNewton(), blocks=1),
        Blockwise(CausalQuasiNewton(), blocks=6),
    ):
        solution = fixpoint.solve(chain, solver=solver, rtol=1e-11, backward=fixpoint.IFT(rtol=1e-10))
        found.append(torch.autograd.grad(solution.value.square().sum(), weight)[0])
    assert_close(found[1], found[0], rtol=0, atol=0)
    assert_close(found[2], found[0], rtol=1e-7, atol=1e-10)


def test_an_adjoint_that_sweeps_is_right_for_an_f_that_is_not_causal():
    a = torch.tensor(0.6, dtype=torch.float64, requires_grad=True)
    rule = fixpoint.IFT(solver=CausalQuasiNewton(), rtol=1e-10)
    start = torch.zeros(2, 3, dtype=torch.float64)
    solution = fixpoint.solve(lambda z: a * z.cos(), start, solver=Anderson(), rtol=1e-12, backward=rule)
    (found,) = torch.autograd.grad(solution.value.sum(), a)
    z = solution.value.detach()
    assert_close(found, (z.cos() / (1 + a.detach() * z.sin())).sum(), rtol=1e-8, atol=0)


def test_the_steps_of_an_adjoint_are_not_rationed():
    # A product with the transposed Jacobian is one of all steps, whatever the forward solve was told of rows.
    _, chain = tanh_network()
    products = []
    for solver in (CausalQuasiNewton(), CausalQuasiNewton(window=4), CausalQuasiNewton(max_rows=6)):
        rule = fixpoint.IFT(rtol=1e-9)
        solution = fixpoint.solve(chain, solver=solver, rtol=1e-12, max_evals=500, backward=rule)
        solution.value.sum().backward()
        assert solution.adjoint.converged.all()
        products.append(solution.adjoint.nfev)
    assert max(products) <= min(products) + 1


@pytest.mark.parametrize("rule", [fixpoint.IFT(), fixpoint.JFB(), fixpoint.Neumann(terms=2)], ids=repr)
@pytest.mark.parametrize(("samples", "steps"), [(0, 5), (2, 0), (0, 0)])
def test_gradients_of_an_empty_chain_are_zero(rule, samples, steps):
    weight, chain = tanh_network(samples=samples, steps=steps)
    solution = fixpoint.solve(chain, solver=CausalQuasiNewton(), backward=rule)
    assert solution.value.shape == (samples, steps, 8)
    solution.value.sum().backward()
    assert (weight.grad == 0).all()


def test_changes_and_second_derivatives_are_solved_in_the_direction_of_their_own_chain():
    generator = torch.Generator().manual_seed(0)
    sizes = (3, 3), (2, 40, 3), (2, 40, 3)
    weight, inputs, along = (torch.randn(*size, generator=generator).double() for size in sizes)
    weight *= 0.4

    def step(z, u):
        before = torch.cat((torch.zeros_like(z[:, :1]), z[:, :-1]), dim=1)
        return torch.tanh(before @ weight + u)

    def parallel(u):
        rule = fixpoint.IFT(rtol=1e-9)
        z0 = torch.zeros(2, 40, 3, dtype=torch.float64)
        return fixpoint.solve(step, z0, (u,), solver=CausalQuasiNewton(), rtol=1e-10, backward=rule).value

    def sequential(u):
        start = torch.zeros(2, 3, dtype=torch.float64)
        return Recurrence(lambda x, u: torch.tanh(x @ weight + u), start, inputs=(u,)).sequential()

    def change(solved):
        return torch.func.jvp(solved, (inputs,), (along,))[1]

    def second(solved):
        u = inputs.clone().requires_grad_()
        (first,) = torch.autograd.grad(solved(u).square().sum(), u, create_graph=True)
        return torch.autograd.grad((first * along).sum(), u)[0]

    for derivative in (change, second):
        assert_close(derivative(parallel), derivative(sequential), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_adjoint_that_fades_takes_no_more_rounds_in_a_longer_chain(dtype):
    generator = torch.Generator().manual_seed(0)
    weight = 0.4 * torch.randn(3, 3, generator=generator)
    inputs = torch.randn(2, 400, 3, generator=generator)
    weight, inputs = weight.to(dtype), inputs.to(dtype).requires_grad_()
    chain = Recurrence(lambda x, u: torch.tanh(x @ weight + u), torch.zeros(2, 3, dtype=dtype), inputs=(inputs,))
    solution = fixpoint.solve(chain, solver=CausalQuasiNewton(), rtol=1e-5)
    (found,) = torch.autograd.grad(solution.value[:, -1].square().sum(), inputs)
    (expected,) = torch.autograd.grad(chain.sequential()[:, -1].square().sum(), inputs)
    assert solution.adjoint.converged.all()
    assert solution.adjoint.nfev < 60
    # Where they are more than rounding, early adjoints are right to their own size.
    kept = expected.norm(dim=2) > torch.finfo(dtype).eps * expected.norm()
    assert kept.sum() > 20
    assert float(relative_errors(found, expected)[kept].max()) < 1e-3


@pytest.mark.parametrize("solver", [CausalQuasiNewton(), CausalQuasiNewton(window=4)], ids=["all", "window"])
def test_rows_of_a_mapped_batch_keep_their_own_tolerances(solver):
    inputs = torch.randn(3, 2, 12, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def step(z, u):
        return torch.tanh(0.5 * torch.cat((torch.zeros_like(z[:, :1]), z[:, :-1]), dim=1) + u)

    def solved(u):
        rtol = torch.tensor([0.1, 1e-12])
        return fixpoint.solve(step, torch.zeros(2, 12, 3, dtype=torch.float64), (u,), solver=solver, rtol=rtol).value

    found = torch.func.vmap(solved)(inputs)
    error = (found.flatten(0, 1) - step(found.flatten(0, 1), inputs.flatten(0, 1))).flatten(1).norm(dim=1)
    error = error.reshape(3, 2) / found.flatten(2).norm(dim=2)
    assert (error[:, 1] < 1e-12).all()
    assert (error[:, 0] < 0.1).all()
    assert (error[:, 0] > 1e-12).any()
