"""A solve inside f, differentiated to any order; finite differences are the oracle."""

from __future__ import annotations

import pytest
import torch

import fixpoint

D = torch.float64
TIGHT = {"rtol": 1e-13}
START = torch.zeros(1, 1, dtype=D)


def through_root(z, a):  # w^3 + a w = z + 1
    return fixpoint.root(lambda w, z, a: w**3 + a * w - z - 1, START + 1, (z, a), **TIGHT).value


def through_solve(z, a):  # w = 0.3 a sin(w) + z
    return fixpoint.solve(lambda w, z, a: 0.3 * torch.sin(w) * a + z, START, (z, a), **TIGHT).value


@pytest.fixture(params=[through_root, through_solve], ids=lambda inner: inner.__name__)
def outer(request):
    def value(a):
        return fixpoint.solve(lambda z, a: 0.3 * request.param(z, a) + 0.1, START, (a,), **TIGHT).value.sum()

    return value


A = torch.tensor(1.3, dtype=D)
STEP = 1e-3


def first(f):
    return (f(A + STEP) - f(A - STEP)) / (2 * STEP)


def second(f):
    return (f(A + STEP) - 2 * f(A) + f(A - STEP)) / STEP**2


@pytest.mark.parametrize("derivative", [torch.func.grad, torch.func.jacrev, torch.func.jacfwd])
def test_first_derivatives(outer, derivative):
    torch.testing.assert_close(derivative(outer)(A), first(outer), rtol=1e-5, atol=0)


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_hessian(outer):
    torch.testing.assert_close(torch.func.hessian(outer)(A), second(outer), rtol=1e-4, atol=0)


def test_double_backward(outer):
    a = A.clone().requires_grad_()
    assert torch.autograd.gradgradcheck(outer, (a,))
    (gradient,) = torch.autograd.grad(outer(a), a, create_graph=True)
    torch.testing.assert_close(torch.autograd.grad(gradient, a)[0], second(outer), rtol=1e-4, atol=0)


def test_a_batch_of_problems(outer):
    batch = torch.tensor([1.0, 1.3, 1.7], dtype=D)
    torch.testing.assert_close(torch.vmap(outer)(batch), torch.stack([outer(a) for a in batch]), rtol=1e-9, atol=0)
