"""Adjoints that fail, and what is known of one that was solved."""

from __future__ import annotations

import warnings
import weakref

import pytest
import torch
from scipy.sparse.linalg import LinearOperator, gmres

import fixpoint
from fixpoint import IFT, ConvergenceError, ConvergenceWarning, Picard, Status

D = torch.float64
TIGHT = {"rtol": 1e-12, "max_evals": 500}


def stiff(rows=3):
    """A linear map whose row r contracts by slope r, and the rows' slopes."""
    slopes = torch.tensor([0.5, 0.99, -3.0], dtype=D)[:rows]
    b = torch.ones(rows, 2, dtype=D, requires_grad=True)
    return (lambda z: slopes[:, None] * z + b), torch.zeros(rows, 2, dtype=D), b, slopes


@pytest.mark.parametrize("on_failure", ["jfb", "best"])
def test_only_rows_whose_adjoint_failed_are_replaced_with_one_warning(on_failure):
    f, z0, b, slopes = stiff()
    rule = IFT(solver=Picard(), max_evals=60, on_failure=on_failure)
    sol = fixpoint.solve(f, z0, backward=rule, **TIGHT)
    with pytest.warns(ConvergenceWarning, match="2 of 3 adjoint rows") as caught:
        sol.value.sum().backward()
    assert len(caught) == 1
    assert sol.adjoint.converged.tolist() == [True, False, False]
    torch.testing.assert_close(b.grad[0], torch.full((2,), 2.0, dtype=D), rtol=1e-5, atol=0)
    torch.testing.assert_close(b.grad[2], torch.ones(2, dtype=D))  # diverges: v is the best there is
    partly = sum(slopes[1] ** k for k in range(60))
    torch.testing.assert_close(b.grad[1], torch.ones(2, dtype=D) * (1 if on_failure == "jfb" else partly))


def test_the_warning_names_the_knob_of_the_rule_and_a_training_sees_it_once():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default", ConvergenceWarning)
        for rows in (2, 3, 3):
            f, z0, *_ = stiff(rows)
            fixpoint.solve(f, z0, backward=IFT(solver=Picard(), max_evals=60), **TIGHT).value.sum().backward()
            warnings.simplefilter("ignore", ImportWarning)  # as libraries do; Python then forgets what it has shown
    assert [w.filename for w in caught] == [__file__]
    (message,) = [str(w.message) for w in caught]
    assert "1 of 2 adjoint rows" in message
    assert "raise IFT(max_evals=...)" in message
    assert "raise max_evals" not in message


def test_a_failing_adjoint_raises_by_option_and_holds_what_was_found():
    f, z0, b, _ = stiff()
    sol = fixpoint.solve(f, z0, backward=IFT(solver=Picard(), max_evals=60, on_failure="raise"), **TIGHT)
    with pytest.raises(ConvergenceError, match="2 of 3 adjoint rows") as caught:
        sol.value.sum().backward()
    assert caught.value.solution.converged.tolist() == [True, False, False]
    assert b.grad is None


def test_an_adjoint_that_is_not_finite_leaves_no_nan():
    # The slope of f at the solution is 1e200: products overflow at once.
    b = torch.ones(2, 2, dtype=D, requires_grad=True)
    slope = torch.tensor([[0.5], [1e200]], dtype=D)
    sol = fixpoint.solve(
        lambda z: slope * (z - 2 * b) + 2 * b,
        2 * torch.ones(2, 2, dtype=D),
        backward=IFT(solver=Picard(), max_evals=50),
        **TIGHT,
    )
    with pytest.warns(ConvergenceWarning, match="1 of 2 adjoint rows"):
        sol.value.sum().backward()
    assert torch.isfinite(b.grad).all()
    torch.testing.assert_close(b.grad[0], torch.full((2,), 2.0, dtype=D), rtol=1e-5, atol=0)


def test_an_adjoint_at_the_rounding_of_its_dtype_counts_as_solved(normal):
    # v - 20 u cancels all but a twentieth: what is left is rounded twenty times as coarsely as the tolerance allows.
    b, v = torch.zeros(3, 64, requires_grad=True), normal(3, 64).float()
    sol = fixpoint.solve(lambda z: b - 20 * z, torch.zeros(3, 64), backward=IFT(rtol=0.0), rtol=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sol.value.backward(v)
    assert (sol.adjoint.status == Status.STAGNATED).all()
    torch.testing.assert_close(b.grad, v / 21, rtol=1e-5, atol=1e-7)


def test_the_trace_of_the_adjoint_is_kept_where_that_of_the_solve_is(linear_problem):
    A, b = linear_problem()
    for record in (True, False):
        sol = fixpoint.solve(lambda z: z @ A.T + b, torch.zeros(3, 4, dtype=D), record=record)
        sol.value.sum().backward()
        if record:
            assert sol.adjoint.trace.shape == (sol.adjoint.nfev, 3)
            torch.testing.assert_close(sol.adjoint.trace[-1], sol.adjoint.residual)
        else:
            assert sol.adjoint.trace is None


@pytest.mark.parametrize("rule", [IFT(), fixpoint.Neumann(terms=3), fixpoint.JFB()], ids=repr)
def test_what_the_solver_remembered_does_not_wait_for_backward(rule):
    class Memory:
        pass

    class Remembering(fixpoint.Picard):
        def init(self, z):
            memory = Memory()
            memories.append(weakref.ref(memory))
            return memory

    memories: list[weakref.ref[Memory]] = []
    w = torch.tensor(0.5, requires_grad=True)
    sol = fixpoint.solve(lambda z, w: w * torch.cos(z), torch.zeros(3), (w,), solver=Remembering(), backward=rule)
    assert sol.value.requires_grad
    assert [memory() for memory in memories] == [None]


@pytest.mark.parametrize(("symmetric", "share"), [(True, 1.0), (False, 1.5)])
@pytest.mark.parametrize("rho", [0.5, 0.9])
def test_the_default_adjoint_takes_about_as_many_products_as_gmres(normal, rho, symmetric, share):
    A, v = normal(60, 60), normal(60, seed=1)
    A = A + A.T if symmetric else A
    A = rho * A / torch.linalg.eigvals(A).abs().max()
    b, products = torch.ones(1, 60, dtype=D, requires_grad=True), []
    solution = fixpoint.solve(lambda z: z @ A.T + b, torch.zeros(1, 60, dtype=D), rtol=1e-8)
    solution.value.backward(v[None])
    exact = torch.linalg.solve(torch.eye(60, dtype=D) - A.T, v)

    def multiply(u):
        products.append(u)
        return u - A.T.numpy() @ u

    # Of full memory, to a residual as small: IFT's tolerance is relative to u.
    rtol = 1e-6 * float(exact.norm() / v.norm())
    gmres(LinearOperator((60, 60), multiply, dtype=float), v.numpy(), rtol=rtol, restart=60)
    torch.testing.assert_close(b.grad[0], exact, rtol=0, atol=1e-4)
    assert solution.adjoint.converged.all()
    assert solution.adjoint.nfev <= share * len(products)


def gradient_of_affine(A, b, v, **options):
    """dL/db for z = z A^T + b, from the adjoint; z itself is given, as the adjoint is what is tested."""
    b = b.clone().requires_grad_()
    eye = torch.eye(len(A), dtype=A.dtype)
    start = torch.linalg.solve(eye - A, b.detach().T).T
    rule = IFT(**options)
    value = fixpoint.solve(lambda z: z @ A.T + b, start, backward=rule, rtol=1e-6).value
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConvergenceWarning)
        (gradient,) = torch.autograd.grad(value, b, v)
    return gradient, torch.linalg.solve((eye - A).T, v.T).T


def test_the_adjoint_of_a_map_that_expands_is_right():
    b = torch.ones(1, 1, dtype=D, requires_grad=True)
    rule = IFT()
    sol = fixpoint.solve(lambda z: 2 * z + b, torch.zeros(1, 1, dtype=D), solver=fixpoint.Broyden(), backward=rule)
    sol.value.sum().backward()
    torch.testing.assert_close(b.grad, -torch.ones(1, 1, dtype=D))  # z = -b
    assert sol.adjoint.converged.all()


@pytest.mark.parametrize(("dims", "count"), [((10, 20), 100), ((30, 60), 20)])
def test_the_adjoint_needs_i_minus_j_to_be_invertible_and_nothing_else(dims, count):
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        dim = int(torch.randint(*dims, (), generator=generator))
        A, b, v = (torch.randn(n, dim, generator=generator, dtype=D) for n in (dim, 1, 1))
        found, exact = gradient_of_affine(A, b, v)
        error = float((found - exact).norm() / exact.norm())
        smallest = float(torch.linalg.svdvals(torch.eye(dim, dtype=D) - A).min())
        assert error <= 10 * 1e-6 / smallest, f"seed {seed}, dimension {dim}: {error:.1e}"
