"""Rows that fail leave the values and the gradients of the others as they would be alone."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fixpoint
from fixpoint import Broyden, Picard, Status

D = torch.float64
KEPT = [0, 2, 3]


def outside_the_domain(W, x):
    """NaN where the state is; the third term changes nothing else."""
    z0 = torch.full((4, 4), 0.5, dtype=D)
    z0[1] = -50.0
    return lambda z, x: torch.tanh(z @ W.T + x) + 0 * torch.sqrt(z + 40), z0, x


def broken_argument(W, x):
    x = x.clone()
    x[1] = torch.nan
    return lambda z, x: torch.tanh(z @ W.T + x), torch.zeros(4, 4, dtype=D), x


@pytest.mark.parametrize("make", [outside_the_domain, broken_argument])
def test_a_shared_parameter_gets_the_gradient_of_the_other_rows(rule, normal, make):
    W = (0.2 * normal(4, 4)).requires_grad_()
    f, z0, x = make(W, normal(4, 4, seed=1))
    options, shared = {"solver": Broyden(memory=40), "on_failure": "ignore"}, ()
    if isinstance(rule, fixpoint.Reversible):  # its f must not close over a parameter
        shared, f = (W,), lambda z, W, x: make(W, x)[0](z, x)
    solution = fixpoint.solve(f, z0, (*shared, x), backward=copy.deepcopy(rule), **options)
    (found,) = torch.autograd.grad(solution.value[KEPT].sum(), W)
    alone = fixpoint.solve(f, z0[KEPT], (*shared, x[KEPT]), backward=copy.deepcopy(rule), **options)
    (expected,) = torch.autograd.grad(alone.value.sum(), W)
    assert expected.all()
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("make", [outside_the_domain, broken_argument])
def test_it_gets_their_second_derivative_too(normal, make):
    W, x = (0.2 * normal(4, 4)).requires_grad_(), normal(4, 4, seed=1)

    def derivatives(rows):
        _, z0, given = make(W, x)
        args = W, given[rows].clone().requires_grad_()
        rule = fixpoint.IFT(rtol=1e-12)
        f = lambda z, W, x: make(W, x)[0](z, x)  # noqa: E731
        solution = fixpoint.solve(f, z0[rows], args, backward=rule, on_failure="ignore")
        total = (solution.value * solution.converged[:, None]).nan_to_num().square().sum()
        first = torch.autograd.grad(total, args, create_graph=True)
        return *first, *torch.autograd.grad(first[0].square().sum(), args)

    for found, expected in zip(derivatives([0, 1, 2, 3]), derivatives(KEPT), strict=True):
        found = found[KEPT] if len(found) > len(expected) else found
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


class Tanh(nn.Module):
    def __init__(self, W):
        super().__init__()
        self.W = nn.Parameter(W)

    def forward(self, z, x):
        return torch.tanh(z @ self.W.T + x)


@pytest.mark.parametrize("as_module", [False, True])
def test_a_parameter_with_as_many_rows_as_the_batch_is_no_argument_of_a_row(rule, normal, as_module):
    W, x = 0.2 * normal(4, 4), normal(4, 4, seed=1)
    x[1] = torch.nan

    def gradient(x):
        module, z0 = Tanh(W.clone()), torch.zeros(len(x), 4, dtype=D)
        f, args = (module, (x,)) if as_module else (lambda z, x, W: torch.tanh(z @ W.T + x), (x, module.W))
        sol = fixpoint.solve(f, z0, args, backward=copy.deepcopy(rule), solver=Broyden(memory=40), on_failure="ignore")
        return torch.autograd.grad((sol.value * sol.converged[:, None]).nan_to_num().sum(), module.W)[0]

    torch.testing.assert_close(gradient(x), gradient(x[KEPT]), rtol=1e-9, atol=1e-12)


def test_an_unmasked_gradient_of_a_failed_row_counts_for_nothing(normal):
    W = (0.2 * normal(4, 4)).requires_grad_()
    f, z0, x = broken_argument(W, normal(4, 4, seed=1))
    solution = fixpoint.solve(f, z0, (x,), on_failure="ignore")
    assert solution.status[1] == Status.NON_FINITE
    (found,) = torch.autograd.grad(solution.value.sum(), W)
    (expected,) = torch.autograd.grad(fixpoint.solve(f, z0[KEPT], (x[KEPT],)).value.sum(), W)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


def test_where_every_row_fails_nothing_flows(normal):
    W = (0.2 * normal(4, 4)).requires_grad_()
    value = fixpoint.solve(lambda z: torch.tanh(z @ W.T) * torch.nan, torch.zeros(2, 4, dtype=D), on_failure="ignore")
    (gradient,) = torch.autograd.grad(value.value.sum(), W, allow_unused=True)
    assert gradient is None or not gradient.any()


class Leaping(Picard):
    """Plain steps, but for one far outside, after so many."""

    def init(self, z):
        return 0

    def step(self, z, fz, state):
        return (fz if state != 2 else fz - 100), state + 1


@pytest.mark.parametrize("check_every", [1, 2])
def test_a_step_out_of_the_domain_is_taken_back(check_every):
    def f(z):
        return torch.sqrt(1 + 0.5 * z)

    found = fixpoint.solve(f, torch.ones(3, 2, dtype=D), solver=Leaping(), rtol=1e-10, check_every=check_every)
    assert found.converged.all()
    torch.testing.assert_close(found.value, f(found.value), rtol=1e-9, atol=0)


def test_where_plain_steps_leave_the_domain_too_the_row_has_failed():
    solution = fixpoint.solve(lambda z: torch.log(z), torch.full((1, 1), 0.5), on_failure="ignore", max_evals=50)
    assert solution.status.tolist() == [Status.NON_FINITE]
    assert solution.nfev < 10
    assert solution.value.isfinite().all()


def test_accelerated_solvers_converge_wherever_plain_iteration_does(normal):
    for seed in range(12):
        A, b = 0.8 * normal(6, 6, seed=seed) + 0.4, normal(4, 6, seed=100 + seed).abs() + 0.2

        def f(z, b, A=A):
            return b / torch.sqrt(0.1 + z @ A)

        z0, options = torch.ones(4, 6, dtype=D), {"max_evals": 300, "on_failure": "ignore", "backward": None}
        plain = fixpoint.solve(f, z0, (b,), solver=Picard(), **options)
        for solver in (fixpoint.Anderson(), Broyden()):
            found = fixpoint.solve(f, z0, (b,), solver=solver, **options)
            assert found.converged[plain.converged].all(), (seed, solver)


def test_states_on_the_way_keep_a_failed_row_out_of_the_gradients_of_others():
    a = torch.tensor([[0.5], [0.9], [0.3]], dtype=D, requires_grad=True)
    w = torch.tensor(1.0, dtype=D, requires_grad=True)

    def f(z, a):
        return w * torch.where(a > 0.8, torch.log(-z - 5), a * torch.cos(z))

    def loss(a, **options):
        found = fixpoint.solve(f, torch.zeros_like(a), (a,), keep_states=(1, 2), **options)
        return fixpoint.correction_loss(found, lambda z: z[: len(a) if len(a) < 3 else None][[0, -1]].sum())

    (with_it,) = torch.autograd.grad(loss(a, on_failure="ignore"), w)
    (without,) = torch.autograd.grad(loss(a[[0, 2]]), w)
    torch.testing.assert_close(with_it, without)
