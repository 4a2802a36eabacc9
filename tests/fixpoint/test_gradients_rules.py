"""Every rule with every solver, and the rules that approximate."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from scipy.optimize import approx_fprime, fsolve
from scipy.sparse.linalg import LinearOperator, gmres

import fixpoint
from fixpoint import (
    IFT,
    JFB,
    SHINE,
    Anderson,
    Broyden,
    MultiStepJFB,
    Neumann,
    Phantom,
    Picard,
    Reversible,
    StochasticJFB,
    Unroll,
)

D = torch.float64
TIGHT = {"rtol": 1e-12, "max_evals": 500}


# Each rule's adjoint of a linear map z -> A z + b, as a matrix: u = M v


def series(J, terms):
    return sum(torch.linalg.matrix_power(J, k) for k in range(terms))


def damped_series(J, terms, damping):
    eye = torch.eye(len(J), dtype=D)
    return damping * series((1 - damping) * eye + damping * J, terms)


def coupled(J, steps, damping):
    """d z / d b of the coupled iteration, from its own recursion."""
    eye = torch.eye(len(J), dtype=D)
    y = z = torch.zeros_like(J)
    for _ in range(steps):
        y = (1 - damping) * y + damping * (J @ z + eye)
        z = (1 - damping) * z + damping * (J @ y + eye)
    return z.T


RULES = {
    IFT(rtol=1e-12, max_evals=500): lambda J: torch.linalg.inv(torch.eye(len(J), dtype=D) - J),
    JFB(): lambda J: torch.eye(len(J), dtype=D),
    Phantom(steps=4): lambda J: series(J, 4),
    Phantom(steps=3, damping=0.4): lambda J: damped_series(J, 3, 0.4),
    Neumann(terms=1): lambda J: torch.eye(len(J), dtype=D),
    Neumann(terms=5): lambda J: series(J, 5),
    MultiStepJFB(no_grad=7, grad=3): lambda J: series(J, 3),
    StochasticJFB(max_no_grad=0, max_grad=1): lambda J: torch.eye(len(J), dtype=D),
    Reversible(steps=6, damping=0.7): lambda J: coupled(J.T, 6, 0.7),
}


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_every_rule_with_every_solver_gives_its_own_adjoint(normal, linear_problem, solver, rule):
    A, b = linear_problem(dim=6)
    v = normal(3, 6, seed=9)
    z0 = torch.zeros(3, 6, dtype=D)
    value = fixpoint.solve(lambda z, A, b: z @ A.T + b, z0, (A, b), solver=solver, backward=rule, **TIGHT).value
    (found,) = torch.autograd.grad(value, b, v)
    torch.testing.assert_close(found, v @ RULES[rule](A.detach().T).T, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("rule", [*RULES, SHINE(), Unroll()], ids=repr)
def test_every_rule_adds_the_same_again_through_a_retained_graph(linear_problem, rule):
    A, b = linear_problem()
    f, z0 = (lambda z, A, b: torch.tanh(z @ A.T + b)), torch.zeros(3, 4, dtype=D)
    value = fixpoint.solve(f, z0, (A, b), solver=Broyden(memory=40), backward=rule, **TIGHT).value
    value.sum().backward(retain_graph=True)
    once = A.grad.clone()
    value.sum().backward()
    torch.testing.assert_close(A.grad, 2 * once)


def test_ift_equals_scipys_finite_differences_and_gmres(normal):
    W, x = (0.25 * normal(4, 4)).requires_grad_(), normal(1, 4)
    value = fixpoint.solve(
        lambda z: torch.tanh(z @ W.T + x), torch.zeros(1, 4, dtype=D), backward=IFT(rtol=1e-12), **TIGHT
    ).value
    (found,) = torch.autograd.grad(value.sum(), W)

    def sum_of_solution(flat):
        weight = flat.reshape(4, 4)
        return fsolve(lambda z: np.tanh(weight @ z + x.numpy()[0]) - z, np.zeros(4), xtol=1e-12).sum()

    differences = approx_fprime(W.detach().numpy().ravel(), sum_of_solution, 1e-7).reshape(4, 4)
    np.testing.assert_allclose(found.numpy(), differences, rtol=2e-5, atol=1e-6)
    slope = (1 - value.detach()[0] ** 2).numpy()
    adjoint = LinearOperator((4, 4), lambda u: u - W.detach().numpy().T @ (slope * u))
    u, failed = gmres(adjoint, np.ones(4), atol=1e-12)
    assert not failed
    np.testing.assert_allclose(found.numpy(), np.outer(slope * u, value.detach().numpy()[0]), rtol=1e-4, atol=1e-5)


# Neumann


def test_neumann_equals_phantom_at_the_solution_and_its_memory_does_not_grow(normal, linear_problem):
    A, b = linear_problem(rho=0.5)
    f, z0 = (lambda z: torch.tanh(z @ A.T + b)), torch.zeros(3, 4, dtype=D)

    def gradient(rule):
        return torch.autograd.grad(fixpoint.solve(f, z0, backward=rule, **TIGHT).value.square().sum(), (A, b))

    for terms in (1, 3, 6):
        for one, other in zip(gradient(Neumann(terms=terms)), gradient(Phantom(steps=terms)), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)

    def saved(rule):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
            fixpoint.solve(f, z0, backward=rule, **TIGHT)
        return sum(sizes)

    assert saved(Neumann(terms=9)) == saved(Neumann(terms=1)) == saved(IFT()) < saved(Phantom(steps=2))


def test_the_bias_of_each_truncation_is_the_tail_of_its_series(linear_problem):
    A, b = linear_problem(rho=0.8)
    v = torch.ones(3, 4, dtype=D)
    exact = v @ torch.linalg.inv(torch.eye(4, dtype=D) - A.detach())
    f, z0 = (lambda z: z @ A.T + b), torch.zeros(3, 4, dtype=D)
    for terms in (1, 2, 5, 10):
        (found,) = torch.autograd.grad(fixpoint.solve(f, z0, backward=Neumann(terms=terms), **TIGHT).value.sum(), b)
        torch.testing.assert_close(exact - found, exact @ torch.linalg.matrix_power(A.detach(), terms))


# SHINE


def shine_error(rule, *, rho=0.7, memory=60, dim=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(dim, dim, generator=generator, dtype=D)
    A = A * rho / torch.linalg.matrix_norm(A, ord=2)
    b = torch.randn(3, dim, generator=generator, dtype=D).requires_grad_()
    z0 = torch.zeros(3, dim, dtype=D)
    sol = fixpoint.solve(lambda z: z @ A.T + b, z0, solver=Broyden(memory=memory), backward=rule, **TIGHT)
    (found,) = torch.autograd.grad(sol.value.sum(), b)
    exact = torch.linalg.solve((torch.eye(dim, dtype=D) - A).T, torch.ones(dim, 3, dtype=D)).T
    return torch.linalg.vector_norm(found - exact, dim=1) / torch.linalg.vector_norm(exact, dim=1), sol


def test_the_inverse_that_shine_reuses_is_the_transpose_of_one_that_fulfils_the_secant_equation(contraction, normal):
    problem, solver = contraction(rows=3, dim=5), Broyden(memory=20)
    z, state, points = problem.z0, solver.init(problem.z0), []
    for _ in range(4):
        points.append((z, problem(z)))
        z, state = solver.step(*points[-1], state)
    (z0, f0), (z1, f1) = points[-2:]
    x = normal(3, 5, seed=6)
    transposed = solver.transposed_inverse(state, x)
    # <x, H (dz - df)> = <x, dz>, for every x
    torch.testing.assert_close((transposed * ((z1 - z0) - (f1 - f0))).sum(1), (x * (z1 - z0)).sum(1))


def test_shine_is_exact_where_broyden_knows_the_whole_inverse():
    error, sol = shine_error(SHINE(), dim=1)
    assert error.max() < 1e-6
    assert sol.adjoint.nfev == 2


@pytest.mark.parametrize("seed", range(5))
def test_shine_never_leaves_a_larger_residual_than_jfb_and_refinement_converges(seed):
    residuals = []
    for refine in (0, 2, 5, 30):
        error, sol = shine_error(SHINE(refine=refine), seed=seed)
        assert (sol.adjoint.residual <= 0.7 * 12**0.5).all()  # |J^T v| <= rho |v|
        assert sol.adjoint.nfev <= refine + 2
        residuals.append(sol.adjoint.residual)
    assert all((later <= earlier).all() for earlier, later in itertools.pairwise(residuals))
    assert error.max() < 1e-8


def test_rows_with_a_bad_inverse_keep_the_gradient_of_jfb(linear_problem):
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Misled(Broyden):
        def transposed_inverse(self, state, x):
            wrong = super().transposed_inverse(state, x)
            return torch.cat([wrong[:1], -1e3 * wrong[1:2], torch.full_like(wrong[2:], torch.nan)])

    A, b = linear_problem()
    f, z0 = (lambda z: z @ A.T + b), torch.zeros(3, 4, dtype=D)
    v = torch.ones(3, 4, dtype=D)
    options = {"solver": Misled(memory=40), "backward": SHINE(), **TIGHT}
    (found,) = torch.autograd.grad(fixpoint.solve(f, z0, **options).value, b, v)
    torch.testing.assert_close(found[1:], v[1:])
    (sound,) = torch.autograd.grad(fixpoint.solve(f, z0, **{**options, "solver": Broyden(memory=40)}).value, b, v)
    torch.testing.assert_close(found[0], sound[0])
    assert not torch.allclose(found[0], v[0])


@pytest.mark.parametrize("scale", [1.0, 1e-4, 1e-6, 1e-8, 1e-10])
@pytest.mark.parametrize(
    "solver", [Anderson(), Anderson(memory=2, damping=0.7), Broyden(), Broyden(memory=3), fixpoint.ACX()], ids=repr
)
def test_unrolled_gradients_are_right_at_small_states_and_beyond_their_rounding(solver, scale):
    # Changes of a state of 1e-6 have squares of 1e-25, whose inverse is in the range of float32; its square is not.
    rate = torch.tensor([0.5, 0.3, 0.1])
    for depth in (5, 12, 40):
        x = torch.full((2, 3), scale).requires_grad_()
        z0 = torch.tensor([[0.0], [1.0]]).expand(2, 3)
        value = fixpoint.solve(
            lambda z, x: rate * torch.sin(z) + x, z0, (x,), solver=solver, depth=depth, backward=Unroll()
        ).value
        value.sum().backward()
        assert torch.isfinite(x.grad).all()
        if depth == 40:
            torch.testing.assert_close(x.grad, 1 / (1 - rate * torch.cos(value.detach())), rtol=1e-4, atol=1e-4)


def test_shine_wants_broyden(linear_problem):
    A, b = linear_problem()
    with pytest.raises(TypeError, match="Broyden"):
        fixpoint.solve(lambda z: z @ A.T + b, torch.zeros(3, 4, dtype=D), solver=Picard(), backward=SHINE())


@pytest.mark.parametrize(
    ("make", "error", "found"),
    [
        (lambda: IFT(on_failure="warn"), ValueError, "'warn'"),
        (lambda: IFT(max_evals=2.0), TypeError, "2.0"),
        (lambda: Neumann(terms=0), ValueError, "0"),
        (lambda: Neumann(terms=1.5), TypeError, "1.5"),
        (lambda: Phantom(steps=1.5), TypeError, "1.5"),
        (lambda: SHINE(refine=-1), ValueError, "-1"),
        (lambda: SHINE(refine="2"), TypeError, "'2'"),
        (lambda: Reversible(steps=0), ValueError, "0"),
        (lambda: Reversible(damping=1.0), ValueError, "1.0"),
        (lambda: Reversible(damping=2.0), ValueError, "2.0"),
        (lambda: MultiStepJFB(no_grad=-1, grad=1), ValueError, "-1"),
        (lambda: MultiStepJFB(no_grad=1, grad=0), ValueError, "0"),
        (lambda: StochasticJFB(min_no_grad=3, max_no_grad=2, max_grad=1), ValueError, "2"),
        (lambda: StochasticJFB(max_no_grad=2.0, max_grad=1), TypeError, "2.0"),
        (lambda: StochasticJFB(max_no_grad=1, max_grad=1, seed=1, generator=torch.Generator()), ValueError, "seed=1"),
    ],
)
def test_illegal_options_raise_when_a_rule_is_made(make, error, found):
    with pytest.raises(error, match=f"found.*{found}"):
        make()


@pytest.mark.parametrize("rows", [2, 0])
def test_unrolled_where_nothing_was_left_to_do_the_gradient_is_zero(rows):
    a = torch.tensor(0.5, dtype=D, requires_grad=True)
    found = fixpoint.solve(
        lambda z, a: a * z + 1, torch.full((rows, 1), 2.0, dtype=D), (a,), backward=fixpoint.Unroll(), rtol=1e-6
    )
    assert found.nfev <= 1
    assert found.value.requires_grad
    found.value.sum().backward()
    assert a.grad == 0
