"""IFT in higher orders under plain autograd: against finite differences, closed forms and differentiated iteration."""

from __future__ import annotations

import gc
import math
import weakref

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.func import vmap

import fixpoint
from fixpoint import Picard
from tests.fixpoint.differentiated import EXACT, TIGHT, Z0, D, f, iterated, solved, squared

# torch.func's own rules for some products still use a deprecated part of PyTorch.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")


def test_both_orders_equal_finite_differences(A, b):
    A, b = A.requires_grad_(), b.requires_grad_()
    assert gradcheck(solved, (A, b), check_forward_ad=True)
    assert gradgradcheck(solved, (A, b), check_fwd_over_rev=True)


def test_four_orders_equal_the_closed_form():
    a = torch.tensor(0.3, dtype=D, requires_grad=True)
    derivative = fixpoint.solve(lambda z, a: a * z + 1, torch.zeros((), dtype=D), (a,), backward=EXACT, **TIGHT).value
    for order in range(1, 5):  # of 1 / (1 - a)
        (derivative,) = torch.autograd.grad(derivative, a, create_graph=True)
        expected = math.factorial(order) / (1 - 0.3) ** (order + 1)
        assert float(derivative.detach()) == pytest.approx(expected, rel=1e-8), order


def test_a_gradient_penalty_on_a_module_reaches_its_parameters(normal, cell_class):
    cell, x = cell_class(dim=3), normal(2, 3).requires_grad_()

    def penalty(value):
        (first,) = torch.autograd.grad(value.square().sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), (cell.W, x))

    layer = fixpoint.FixedPointLayer(cell, backward=EXACT, **TIGHT)
    z = Z0
    for _ in range(120):
        z = cell(z, x)
    for found, wanted in zip(penalty(layer(x)), penalty(z), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-9)


def test_create_graph_changes_no_first_derivative(A, b):
    A, b = A.requires_grad_(), b.requires_grad_()
    loose = solved(A, b, rtol=1e-2, solver=Picard())
    plain = torch.autograd.grad(loose.square().sum(), (A, b), retain_graph=True)
    recorded = torch.autograd.grad(loose.square().sum(), (A, b), create_graph=True)
    for one, other in zip(plain, recorded, strict=True):
        torch.testing.assert_close(one, other.detach(), rtol=1e-10, atol=1e-12)


def test_a_closure_beside_the_arguments_keeps_its_gradient(A, b):
    A, b = A.requires_grad_(), b.requires_grad_()
    value = fixpoint.solve(lambda z, b: f(z, A, b), Z0, (b,), backward=EXACT, **TIGHT).value
    found = torch.autograd.grad(value.square().sum(), (A, b))
    for one, other in zip(found, torch.autograd.grad(squared(iterated)(A, b), (A, b)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)


def close_over_all(A, b):
    return fixpoint.solve(lambda z: f(z, A, b), Z0, backward=EXACT, **TIGHT).value


def close_over_one(A, b):
    return fixpoint.solve(lambda z, b: f(z, A, b), Z0, (b,), backward=EXACT, **TIGHT).value


def truncated(A, b):
    return solved(A, b, backward=fixpoint.Neumann(terms=3))


def reversed_(A, b):
    return solved(A, b, backward=fixpoint.Reversible(steps=5))


@pytest.mark.parametrize("value", [close_over_all, close_over_one, truncated, reversed_])
@pytest.mark.parametrize("way", ["backward", "grad", "grad to another input"])
@pytest.mark.parametrize("loss", [torch.sum, lambda z: z.square().sum()], ids=["linear loss", "square loss"])
def test_a_second_derivative_that_would_be_wrong_is_refused(A, b, value, way, loss):
    A, b = A.requires_grad_(), b.requires_grad_()
    first = torch.autograd.grad(loss(value(A, b)), (A, b), create_graph=True)
    differentiate = {
        "backward": lambda: first[1].sum().backward(),
        "grad": lambda: torch.autograd.grad(first[0].sum(), A),
        "grad to another input": lambda: torch.autograd.grad(first[1].sum(), A),
    }
    with pytest.raises(RuntimeError, match="first derivatives only"):
        differentiate[way]()


def test_a_graph_of_the_gradient_that_nobody_differentiates_does_no_harm(A, b):
    A, b = A.requires_grad_(), b.requires_grad_()
    value = close_over_all(A, b)
    one = torch.autograd.grad(value.square().sum(), b, create_graph=True)[0]
    torch.testing.assert_close(one.detach(), torch.autograd.grad(squared(iterated)(A, b), b)[0], rtol=1e-8, atol=1e-10)


def test_an_argument_changed_since_the_solve_is_refused_in_second_order(A, b):
    A, b = A.requires_grad_(), b.requires_grad_()
    value = fixpoint.solve(lambda z, b: f(z, A.detach(), b), Z0, (b,), backward=EXACT, **TIGHT).value
    with torch.no_grad():
        b += 1
    with pytest.raises(RuntimeError, match="changed in place"):
        torch.autograd.grad(value.sum(), b, create_graph=True)


def test_several_incoming_gradients_at_once(A, b, normal):
    A, b = A.requires_grad_(), b.requires_grad_()
    v = normal(4, 2, 3, seed=8)
    for value in (solved(A, b), close_over_all(A, b)):
        together = vmap(lambda v, value=value: torch.autograd.grad(value, b, v, retain_graph=True)[0])(v)
        one_by_one = [torch.autograd.grad(value, b, one, retain_graph=True)[0] for one in v]
        torch.testing.assert_close(together, torch.stack(one_by_one), rtol=1e-10, atol=1e-12)


def test_nothing_outlives_a_second_derivative_with_the_garbage_collector_off(A, b):
    A, b = A.requires_grad_(), b.requires_grad_()

    def references():
        value = solved(A, b)
        (first,) = torch.autograd.grad(value.square().sum(), A, create_graph=True)
        torch.autograd.grad(first.sum(), b, retain_graph=True)
        return [weakref.ref(value), weakref.ref(first)]

    references()  # PyTorch imports parts of itself in the first call, with the caller's frames in the tracebacks
    gc.collect()
    gc.disable()
    try:
        assert [ref() for ref in references()] == [None, None]
    finally:
        gc.enable()


class Remembering(torch.nn.Module):
    """Is told its input before a solve, as an attribute: ``tanh(W z / 2 + input)``."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(3, 3, dtype=D)

    def forward(self, z):
        return torch.tanh(0.5 * self.inner(z) + self.input)


def test_a_map_that_was_set_for_another_solve_keeps_its_first_gradient_and_refuses_a_second(normal):
    cell = Remembering()
    weight = cell.inner.weight

    def solve(x):
        cell.input = x
        return fixpoint.solve(cell, torch.zeros_like(x), backward=EXACT, **TIGHT).value.square().sum()

    first, second = solve(normal(4, 3, seed=1)), solve(normal(4, 3, seed=2))
    for loss in (first, second):
        (plain,) = torch.autograd.grad(loss, weight, retain_graph=True)
        (graphed,) = torch.autograd.grad(loss, weight, create_graph=True, retain_graph=True)
        torch.testing.assert_close(graphed, plain)
    (of_first,) = torch.autograd.grad(first, weight, create_graph=True)
    with pytest.raises(RuntimeError, match="still the map that was solved"):
        torch.autograd.grad(of_first.sum(), weight)
    (of_second,) = torch.autograd.grad(second, weight, create_graph=True)
    assert torch.autograd.grad(of_second.sum(), weight)[0].abs().sum() > 0


def test_second_derivatives_through_a_scripted_module_are_refused(normal):
    class Cell(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = torch.nn.Linear(3, 3, dtype=torch.float64)

        def forward(self, z, x):
            return torch.tanh(0.5 * self.inner(z) + x)

    x = normal(2, 3).requires_grad_()
    cell = Cell()
    (plain,) = torch.autograd.grad(fixpoint.solve(cell, 0 * x, (x,), backward=EXACT, **TIGHT).value.sum(), x)
    scripted = torch.jit.script(cell)
    for _ in range(3):  # torch.jit optimises after some calls
        value = fixpoint.solve(scripted, 0 * x, (x,), backward=EXACT, **TIGHT).value
        (gradient,) = torch.autograd.grad(value.sum(), x, create_graph=True)
        torch.testing.assert_close(gradient, plain)
        with pytest.raises(RuntimeError, match="no TorchScript"):
            torch.autograd.grad(gradient.sum(), x)


def test_batched_gradients_of_second_order_and_of_a_solve_within_f():
    def value(a):
        return fixpoint.solve(lambda z, a: a * torch.cos(z), torch.zeros_like(a), (a,), backward=EXACT, **TIGHT).value

    def nested(a):
        def f(z, a):
            inner = fixpoint.solve(lambda y, a, z: 0.3 * torch.sin(y) + a * z, torch.zeros_like(z), (a, z), **TIGHT)
            return 0.4 * torch.cos(inner.value) + a

        return fixpoint.solve(f, torch.zeros_like(a), (a,), backward=EXACT, **TIGHT).value

    a = torch.tensor([0.5, 0.9], dtype=D)
    functional = torch.autograd.functional
    one_by_one = functional.hessian(lambda a: value(a).square().sum(), a)
    torch.testing.assert_close(functional.hessian(lambda a: value(a).square().sum(), a, vectorize=True), one_by_one)
    torch.testing.assert_close(functional.jacobian(nested, a, vectorize=True), functional.jacobian(nested, a))
