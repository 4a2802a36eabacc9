"""IFT, phantom gradients and JFB against closed forms, finite differences and unrolling."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch.autograd import gradcheck

import fixpoint
from fixpoint import (
    IFT,
    JFB,
    SHINE,
    Anderson,
    Broyden,
    ConvergenceWarning,
    Neumann,
    Phantom,
    Picard,
    StochasticJFB,
    Unroll,
)

D = torch.float64
TIGHT = {"rtol": 1e-13, "max_evals": 500}
EXACT = IFT(rtol=1e-13, max_evals=500)


# IFT


def test_ift_equals_the_closed_form_of_a_linear_problem(normal, linear_problem):
    A, b = linear_problem()
    v = normal(3, 4, seed=9)
    sol = fixpoint.solve(lambda z: z @ A.T + b, torch.zeros(3, 4, dtype=D), backward=EXACT, **TIGHT)
    sol.value.backward(v)
    u = torch.linalg.solve((torch.eye(4, dtype=D) - A.detach()).T, v.T).T
    torch.testing.assert_close(b.grad, u, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(A.grad, u.T @ sol.value.detach(), rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("way", ["closure", "arguments"])
def test_ift_equals_finite_differences(linear_problem, way):
    A, b = linear_problem(dim=3, rows=2)
    z0 = torch.zeros(2, 3, dtype=D)

    def by_closure(A, b):
        hidden = torch.sin(b)  # an activation, not a leaf
        return fixpoint.solve(lambda z: torch.tanh(z @ A.T + hidden), z0, backward=EXACT, **TIGHT).value

    def by_arguments(A, b):
        arguments = ({"A": A}, [torch.sin(b)])
        f = lambda z, p, q: torch.tanh(z @ p["A"].T + q[0])  # noqa: E731
        return fixpoint.solve(f, z0, arguments, backward=EXACT, **TIGHT).value

    assert gradcheck(by_closure if way == "closure" else by_arguments, (A, b))


def test_ift_equals_finite_differences_in_complex_states_and_scalars():
    a = torch.tensor([0.3 + 0.4j, -0.2 + 0.5j], dtype=torch.complex128, requires_grad=True)

    def solve_complex(a):
        z0 = torch.zeros(2, dtype=torch.complex128)
        return fixpoint.solve(lambda z: a * z.conj() + 0.2 * a, z0, backward=EXACT, **TIGHT).value

    assert gradcheck(solve_complex, (a,))
    s = torch.tensor(0.7, dtype=D, requires_grad=True)

    def solve_scalar(s):
        return fixpoint.solve(lambda z: s * torch.cos(z), torch.tensor(0.0, dtype=D), backward=EXACT, **TIGHT).value

    assert gradcheck(solve_scalar, (s,))


def test_ift_equals_unrolling_with_every_solver_in_both_directions(normal, cell_class, solver):
    cell, x = cell_class(dim=6), normal(3, 6).requires_grad_()
    z0 = torch.zeros(3, 6, dtype=D)
    v = normal(3, 6, seed=4)
    reference = fixpoint.solve(cell, z0, (x,), solver=Picard(), backward=Unroll(), **TIGHT).value
    expected = torch.autograd.grad(reference, (x, cell.W), v)
    rule = IFT(solver=solver, rtol=1e-12, max_evals=500)
    value = fixpoint.solve(cell, z0, (x,), solver=solver, backward=rule, **TIGHT).value
    for found, wanted in zip(torch.autograd.grad(value, (x, cell.W), v), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-9)


# What is reported is what is handed over


@pytest.mark.parametrize(
    "rule", [IFT(), JFB(), Phantom(steps=3, damping=0.6), Neumann(terms=3), SHINE(refine=1), Unroll()], ids=repr
)
def test_the_value_is_the_state_whose_residual_is_reported(normal, rule):
    # f(z*) lies up to 200 times as far from its image as z* does from f(z*).
    slope = -torch.logspace(math.log10(0.5), math.log10(200), 40, dtype=D)
    b = normal(3, 40).requires_grad_()
    f, z0 = (lambda z, b: z * slope + b), torch.zeros(3, 40, dtype=D)
    options = {"solver": Broyden(memory=100), "rtol": 1e-3, "max_evals": 200}
    attached = fixpoint.solve(f, z0, (b,), backward=rule, **options)
    assert attached.converged.all()
    z = attached.value.detach()
    measured = torch.linalg.vector_norm(f(z, b) - z, dim=1).detach()
    torch.testing.assert_close(attached.residual, measured, rtol=1e-8, atol=0)
    plain = fixpoint.solve(f, z0, (b,), backward=None, **options)
    torch.testing.assert_close(z, plain.value, rtol=1e-6, atol=1e-9)
    fz = f(z, b).detach()
    assert (torch.linalg.vector_norm(f(fz, b) - fz, dim=1) > 10 * measured).all(), "one more application is far worse"
    assert attached.value.requires_grad


def test_the_value_is_the_state_that_a_fixed_depth_ends_in_for_every_rule(normal, cell_class, rule):
    if isinstance(rule, fixpoint.StochasticJFB | fixpoint.Reversible):
        return  # these run forward in their own way
    solver = Broyden() if isinstance(rule, SHINE) else Anderson()
    cell, x = cell_class(), normal(3, 4).requires_grad_()
    options = {"solver": solver, "depth": 3}
    value = fixpoint.solve(cell, torch.zeros(3, 4, dtype=D), (x,), backward=rule, **options).value
    plain = fixpoint.solve(cell, torch.zeros(3, 4, dtype=D), (x,), backward=None, **options).value
    torch.testing.assert_close(value.detach(), plain, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("closure", [True, False])
@pytest.mark.parametrize(("rule", "extra"), [(IFT(), 1), (Phantom(steps=3), 3), (Unroll(), 0)], ids=repr)
def test_attaching_costs_no_evaluations_beyond_the_rules_own(normal, cell_class, rule, extra, closure):
    cell, x = cell_class(), normal(3, 4).requires_grad_()
    f = (lambda z: cell(z, x)) if closure else cell
    sol = fixpoint.solve(f, torch.zeros(3, 4, dtype=D), () if closure else (x,), backward=rule)
    assert cell.calls == sol.nfev + extra
    before = cell.calls
    sol.value.sum().backward()
    assert cell.calls == before, "backward must not evaluate f again"


def test_adjoint_figures_appear_when_backward_has_run(linear_problem):
    A, b = linear_problem()
    sol = fixpoint.solve(lambda z: z @ A.T + b, torch.zeros(3, 4, dtype=D), backward=EXACT, **TIGHT)
    assert sol.adjoint is None
    sol.value.sum().backward()
    assert sol.adjoint.converged.tolist() == [True] * 3
    torch.testing.assert_close(sol.adjoint.value, b.grad)
    u = sol.adjoint.value
    residual = torch.linalg.vector_norm(torch.ones_like(u) + u @ A.detach() - u, dim=1)
    torch.testing.assert_close(sol.adjoint.residual, residual, rtol=1e-2, atol=1e-14)


@pytest.mark.parametrize("rule", [Phantom(steps=2), Unroll(), StochasticJFB(max_no_grad=2, max_grad=2)], ids=repr)
def test_rules_without_a_backward_solve_have_no_adjoint_figures(linear_problem, rule):
    A, b = linear_problem()
    sol = fixpoint.solve(lambda z: z @ A.T + b, torch.zeros(3, 4, dtype=D), backward=rule)
    sol.value.sum().backward()
    assert sol.adjoint is None


def test_an_adjoint_that_does_not_converge_warns_and_stays_finite():
    # Spectrum beyond the unit circle: Anderson solves it forward, plain iteration of the adjoint diverges.
    slope = torch.linspace(-3, 0.5, 5, dtype=D).requires_grad_()
    rule = IFT(solver=Picard(), max_evals=2000)
    z0 = torch.zeros(2, 5, dtype=D)
    sol = fixpoint.solve(lambda z: slope * z + 1, z0, backward=rule, solver=Anderson(memory=8), rtol=1e-10)
    with pytest.warns(ConvergenceWarning, match=r"2 of 2 adjoint rows did not converge .* NON_FINITE"):
        sol.value.sum().backward()
    assert torch.isfinite(slope.grad).all()
    assert not sol.adjoint.converged.any()
    # u = v is the best state that was verified: the gradient of JFB.
    torch.testing.assert_close(slope.grad, 2 / (1 - slope.detach()), rtol=1e-6, atol=0)


def test_an_adjoint_cut_after_one_product_is_jfb(linear_problem):
    A, b = linear_problem()
    f, z0 = (lambda z: z @ A.T + b), torch.zeros(3, 4, dtype=D)
    value = fixpoint.solve(f, z0, backward=IFT(max_evals=1), **TIGHT).value
    with pytest.warns(ConvergenceWarning):
        cut = torch.autograd.grad(value.square().sum(), (A, b))
    jfb = torch.autograd.grad(fixpoint.solve(f, z0, backward=JFB(), **TIGHT).value.square().sum(), (A, b))
    for found, wanted in zip(cut, jfb, strict=True):
        torch.testing.assert_close(found, wanted)


def test_a_non_finite_incoming_gradient_spoils_its_row_alone(normal, linear_problem):
    A, b = linear_problem()
    A = A.detach()
    f, z0 = (lambda z: torch.tanh(z @ A.T + b)), torch.zeros(3, 4, dtype=D)
    v = normal(3, 4, seed=3)
    (clean,) = torch.autograd.grad(fixpoint.solve(f, z0, backward=EXACT, **TIGHT).value, b, v)
    v[1, 2] = math.nan
    sol = fixpoint.solve(f, z0, backward=EXACT, **TIGHT)
    with pytest.warns(ConvergenceWarning, match="1 of 3 adjoint rows"):
        (spoilt,) = torch.autograd.grad(sol.value, b, v)
    torch.testing.assert_close(spoilt[[0, 2]], clean[[0, 2]], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_ift_in_low_precision_warns_of_nothing_and_is_as_right_as_it_can_be(linear_problem, dtype):
    A, b = linear_problem()
    exact = torch.linalg.solve((torch.eye(4, dtype=D) - A.detach()).T, torch.ones(4, dtype=D))
    low_A, low_b = A.detach().to(dtype), b.detach().to(dtype).requires_grad_()
    z0 = torch.zeros(3, 4, dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fixpoint.solve(lambda z: z @ low_A.T + low_b, z0, rtol=5 * torch.finfo(dtype).eps).value.sum().backward()
    torch.testing.assert_close(
        low_b.grad.double(), exact.expand(3, 4), rtol=20 * torch.finfo(dtype).eps, atol=20 * torch.finfo(dtype).eps
    )


@pytest.mark.parametrize(
    ("options", "error"),
    [({"solver": "anderson"}, TypeError), ({"rtol": -1.0}, ValueError), ({"max_evals": 0}, ValueError)],
)
def test_illegal_options_of_ift_raise_when_it_is_made(options, error):
    with pytest.raises(error, match="found"):
        IFT(**options)
    with pytest.raises(TypeError, match="unexpected keyword"):
        IFT(tol=1e-3)


def test_the_solution_may_be_changed_in_place(linear_problem):
    A, b = linear_problem()
    value = fixpoint.solve(lambda z: z @ A.T + b, torch.zeros(3, 4, dtype=D), backward=EXACT, **TIGHT).value
    torch.relu_(value).sum().backward()
    z = torch.linalg.solve(torch.eye(4, dtype=D) - A.detach(), b.detach().T).T
    u = torch.linalg.solve((torch.eye(4, dtype=D) - A.detach()).T, (z > 0).double().T).T
    torch.testing.assert_close(b.grad, u, rtol=1e-9, atol=1e-10)


# Phantom and JFB


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("damping", [1.0, 0.5])
def test_phantom_is_the_neumann_series_cut_after_its_steps(normal, linear_problem, steps, damping):
    A, b = linear_problem()
    v = normal(3, 4, seed=9)
    rule = Phantom(steps=steps, damping=damping)
    sol = fixpoint.solve(lambda z: z @ A.T + b, torch.zeros(3, 4, dtype=D), backward=rule, **TIGHT)
    sol.value.backward(v)
    B = (1 - damping) * torch.eye(4, dtype=D) + damping * A.detach()
    u = damping * sum(v @ torch.linalg.matrix_power(B, k) for k in range(steps))
    torch.testing.assert_close(b.grad, u, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(A.grad, u.T @ sol.value.detach(), rtol=1e-9, atol=1e-11)


def test_phantom_tends_to_ift(linear_problem):
    A, b = linear_problem(rho=0.5)
    f, z0 = (lambda z: torch.tanh(z @ A.T + b)), torch.zeros(3, 4, dtype=D)
    many, exact = (
        torch.autograd.grad(fixpoint.solve(f, z0, backward=rule, **TIGHT).value.sum(), A)[0]
        for rule in (Phantom(steps=60), EXACT)
    )
    torch.testing.assert_close(many, exact, rtol=1e-10, atol=1e-11)


def test_jfb_is_one_undamped_phantom_step_and_damping_scales_it(linear_problem):
    assert JFB() == Phantom(steps=1, damping=1.0)
    A, b = linear_problem()
    f, z0 = (lambda z: torch.tanh(z @ A.T + b)), torch.zeros(3, 4, dtype=D)
    jfb, damped = (
        torch.autograd.grad(fixpoint.solve(f, z0, backward=rule, **TIGHT).value.sum(), A)[0]
        for rule in (JFB(), Phantom(damping=0.3))
    )
    torch.testing.assert_close(damped, 0.3 * jfb)


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (lambda: Phantom(steps=0), "found 0"),
        (lambda: Phantom(damping=0.0), "found 0.0"),
        (lambda: Phantom(damping=1.5), "found 1.5"),
        (lambda: StochasticJFB(max_no_grad=-1, max_grad=1), "found -1"),
        (lambda: StochasticJFB(max_no_grad=1, max_grad=0), "found 0"),
    ],
)
def test_illegal_options_raise_and_name_what_was_found(make, found):
    with pytest.raises(ValueError, match=found):
        make()


# Fixed depth


@pytest.mark.parametrize("depth", [0, 1, 4])
@pytest.mark.parametrize("rule", [IFT(), JFB()], ids=repr)
def test_fixed_depth_attaches_at_the_last_state_and_measures_it(normal, cell_class, depth, rule):
    cell, x = cell_class(), normal(3, 4)
    z0 = normal(3, 4, seed=2).requires_grad_()
    sol = fixpoint.solve(cell, z0, (x,), solver=Picard(), backward=rule, depth=depth)
    z = z0.detach()
    for _ in range(depth):
        z = cell(z, x).detach()
    torch.testing.assert_close(sol.value.detach(), z)
    torch.testing.assert_close(sol.residual, torch.linalg.vector_norm(cell(z, x) - z, dim=1).detach())
    assert sol.nfev == depth
    sol.value.sum().backward()
    assert z0.grad is None, "only Unroll and S-JFB without steps let gradients into z0"


def test_what_neumann_cannot_do_without_needs_no_name():
    assert Neumann(5) == Neumann(terms=5)
