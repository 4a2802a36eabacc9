"""Gradients of root(): those of the implicit function, in any units, through modules, torch.func and nested solves."""

from __future__ import annotations

import pytest
import torch

import fixpoint

EXACT = fixpoint.IFT(rtol=1e-13)


@pytest.fixture(name="a")
def argument():
    return torch.tensor([[2.0, 0.5], [9.0, 3.0]], dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("units", [1.0, 1e8, 1e-8])
@pytest.mark.parametrize(
    "rule",
    [fixpoint.IFT(), fixpoint.Phantom(steps=400), fixpoint.Neumann(terms=400)],
    ids=lambda rule: type(rule).__name__,
)
def test_gradients_are_those_of_the_implicit_function(rule, units, a):
    def g(x, a):
        return units * (x**3 + x - a)

    sol = fixpoint.root(g, torch.ones_like(a), (a,), rtol=1e-12, backward=rule)
    plain = fixpoint.root(g, torch.ones_like(a), (a,), rtol=1e-12, backward=None)
    assert torch.equal(sol.value, plain.value), "the verified state, not what a relaxed step makes of it"
    (gradient,) = torch.autograd.grad(sol.value.sum(), a)
    torch.testing.assert_close(gradient, 1 / (3 * sol.value.detach() ** 2 + 1), rtol=1e-5, atol=0)


def test_a_far_start_leaves_no_trace_in_the_gradient():
    a = torch.tensor([[5.0]], dtype=torch.float64, requires_grad=True)
    for rule in (fixpoint.IFT(), fixpoint.Phantom(steps=200)):
        x = fixpoint.root(lambda x, a: x**3 + x - a, torch.full_like(a, 1e5), (a,), backward=rule).value
        (gradient,) = torch.autograd.grad(x.sum(), a)
        torch.testing.assert_close(gradient, 1 / (3 * x.detach() ** 2 + 1), rtol=1e-5, atol=0)


@pytest.mark.parametrize("units", [1.0, 1e8, 1e-8])
@pytest.mark.parametrize(("start", "atol"), [(0.0, 0.0), (1e-5, 1.0)], ids=["exact", "by atol"])
def test_rows_that_are_done_at_their_start_have_their_gradient(units, start, atol):
    """No slope of g has been seen yet, and the adjoint needs its size."""
    a = torch.tensor([[4.0, 9.0, 1.0, 25.0]] * 2, dtype=torch.float64, requires_grad=True)
    x0 = a.detach().sqrt() + start
    sol = fixpoint.root(lambda x, a: units * (x * x - a), x0, (a,), atol=atol * units)
    assert sol.nfev == 1
    (gradient,) = torch.autograd.grad(sol.value.sum(), a)
    torch.testing.assert_close(gradient, 0.5 / a.detach().sqrt(), rtol=1e-4, atol=0)
    assert sol.adjoint.nfev <= 8


class Equation(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(3, 3, dtype=torch.float64)

    def forward(self, x, b):
        return 3 * x - torch.tanh(self.layer(x)) - b


class Relaxed(torch.nn.Module):
    def __init__(self, g):
        super().__init__()
        self.g = g

    def forward(self, x, b):
        return x - 0.3 * self.g(x, b)


START = torch.zeros(2, 3, dtype=torch.float64)
B = torch.tensor([[1.0, 2.0, 3.0], [0.5, -1.0, 0.0]], dtype=torch.float64)


def by_root(g, b):
    return fixpoint.root(g, START, (b,), rtol=1e-13, backward=EXACT).value


def by_solve(g, b):
    return fixpoint.solve(Relaxed(g), START, (b,), rtol=1e-13, backward=EXACT).value


def test_second_derivatives_by_the_parameters_of_a_module():
    g = Equation()

    def second(solve):
        (gradient,) = torch.autograd.grad(solve(g, B).square().sum(), g.layer.weight, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), g.layer.weight)[0]

    torch.testing.assert_close(second(by_root), second(by_solve), rtol=1e-9, atol=1e-12)


class Layer(torch.nn.Module):
    def __init__(self, solve):
        super().__init__()
        self.g, self.solve = Equation(), solve

    def forward(self, b):
        return self.solve(self.g, b).square().sum()


@pytest.mark.parametrize("derivative", ["grad", "hessian", "jvp", "vmap"])
def test_functional_call_on_the_parameters_of_a_module(derivative):
    def of(solve):
        layer = Layer(solve)
        parameters = {name: p.detach() for name, p in layer.named_parameters()}

        def value(bias, b=B):
            return torch.func.functional_call(layer, {**parameters, "g.layer.bias": bias}, (b,))

        bias = parameters["g.layer.bias"]
        match derivative:
            case "grad":
                return torch.func.grad(value)(bias)
            case "hessian":
                return torch.func.hessian(value)(bias)
            case "jvp":
                return torch.func.jvp(value, (bias,), (torch.ones_like(bias),))[1]
        return torch.vmap(value, in_dims=(None, 0))(bias, torch.stack([B, B + 1]))

    torch.testing.assert_close(of(by_root), of(by_solve), rtol=1e-8, atol=1e-10)


def test_gradients_of_parameters_and_the_adjoints_figures():
    g = Equation()
    sol = fixpoint.root(g, START, (B,), rtol=1e-12, backward=fixpoint.IFT(rtol=1e-10))
    sol.value.square().sum().backward()
    x = sol.value.detach()
    J = torch.stack(
        [torch.autograd.functional.jacobian(lambda x, b=b: g(x, b), row) for row, b in zip(x, B, strict=True)]
    )
    adjoint = torch.linalg.solve(J.mT, 2 * x[..., None]).squeeze(-1)
    (expected,) = torch.autograd.grad(torch.tanh(g.layer(x)), g.layer.bias, adjoint)
    torch.testing.assert_close(g.layer.bias.grad, expected, rtol=1e-6, atol=1e-9)
    assert sol.adjoint.converged.all()
    assert sol.adjoint.value.shape == x.shape


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_the_adjoints_figures_where_several_gradients_come_at_once(dtype):
    a = torch.tensor([[2.0], [3.0]], dtype=dtype, requires_grad=True)
    sol = fixpoint.root(lambda x, a: x**3 - a, torch.ones(2, 4, dtype=dtype), (a,), rtol=1e-10)
    v = torch.arange(24.0, dtype=torch.float64).reshape(3, 2, 4).to(dtype)
    (found,) = torch.autograd.grad(sol.value, a, v, is_grads_batched=True)
    slope = 3 * sol.value.detach() ** 2
    torch.testing.assert_close(found, (v / slope.conj()).sum(dim=2, keepdim=True), rtol=1e-6, atol=1e-9)
    assert sol.adjoint.converged.shape == (6,)
    assert sol.adjoint.value.shape == (6, 8 if dtype.is_complex else 4)


def test_random_numbers_and_statistics_are_those_of_one_solve():
    """g is evaluated by one solve and nowhere beside it: one draw, one update."""
    torch.manual_seed(0)
    norm = torch.nn.BatchNorm1d(3, dtype=torch.float64)
    g = torch.nn.Sequential(torch.nn.Linear(3, 3, dtype=torch.float64), norm, torch.nn.Dropout(0.2))
    with pytest.warns(UserWarning, match="normalises"):
        sol = fixpoint.root(lambda x: 3 * x - torch.tanh(g(x)) - B, START, rtol=1e-9, compact=False)
    assert sol.converged.all()
    assert int(norm.num_batches_tracked) == 1


def inner(a):
    """A root inside; y^3 + y = a."""
    return fixpoint.root(lambda y, a: y**3 + y - a, torch.ones_like(a), (a,), rtol=1e-14, backward=EXACT).value


def root_of_an_argument(a):
    z0 = torch.zeros((), dtype=a.dtype)
    return fixpoint.solve(lambda z, a: 0.5 * torch.cos(z) * inner(a), z0, (a,), rtol=1e-14, backward=EXACT).value


def root_of_the_state(a):
    def f(z, a):
        return 0.5 * inner(a * torch.cos(z))

    return fixpoint.solve(f, torch.zeros((), dtype=a.dtype), (a,), rtol=1e-14, backward=EXACT).value


def root_of_a_root(a):
    def g(x, a):
        return x**3 - inner(a + x)

    return fixpoint.root(g, torch.ones_like(a), (a,), rtol=1e-14, backward=EXACT).value


@pytest.mark.parametrize("value", [inner, root_of_an_argument, root_of_the_state, root_of_a_root])
def test_a_root_inside_f_has_the_derivatives_of_finite_differences(value):
    a, h = torch.tensor(2.3, dtype=torch.float64), 1e-4
    first = (value(a + h) - value(a - h)) / (2 * h)
    second = (value(a + h) - 2 * value(a) + value(a - h)) / h**2
    torch.testing.assert_close(torch.func.grad(value)(a), first, rtol=1e-6, atol=0)
    torch.testing.assert_close(torch.func.jacfwd(value)(a), first, rtol=1e-6, atol=0)
    torch.testing.assert_close(torch.func.hessian(value)(a), second, rtol=1e-4, atol=1e-6)
    several = torch.stack([a, a + 1, a - 1])
    torch.testing.assert_close(torch.vmap(value)(several), torch.stack([value(x) for x in several]))
    assert torch.autograd.gradcheck(value, (a.clone().requires_grad_(),))
    assert torch.autograd.gradgradcheck(value, (a.clone().requires_grad_(),))


@pytest.mark.parametrize("rule", [fixpoint.Unroll(), fixpoint.SHINE()], ids=repr)
def test_a_rule_that_goes_through_the_forward_solve_is_refused(rule, a):
    with pytest.raises(TypeError, match="attaches gradients to the root that was found"):
        fixpoint.root(lambda x, a: x**3 - a, torch.ones_like(a), (a,), backward=rule)
