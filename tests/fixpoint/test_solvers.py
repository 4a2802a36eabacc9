"""What comes out of the loop with every solver; what a solver alone owes to it is in the contract suite."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.optimize
import torch

import fixpoint
from fixpoint import Status
from fixpoint.solvers.base import require_count, small_dtype


def recomputed(f, z, dim=-1):
    return torch.linalg.vector_norm(f(z) - z, dim=dim)


@pytest.mark.parametrize("max_evals", [1, 2, 3, 7, 200])
def test_residual_is_that_of_the_returned_value_converged_or_not(solver, contraction, max_evals):
    f = contraction(rho=0.9, squash=torch.tanh)
    sol = fixpoint.solve(f, solver=solver, rtol=1e-9, max_evals=max_evals, on_failure="ignore")
    assert bool(sol.converged.all()) == (max_evals == 200)
    torch.testing.assert_close(sol.residual, recomputed(f, sol.value), rtol=1e-9, atol=0)
    scale = torch.linalg.vector_norm(f(sol.value), dim=1)
    torch.testing.assert_close(sol.relative_residual, sol.residual / scale, rtol=1e-9, atol=0)


@pytest.mark.parametrize("max_evals", [1, 2, 3, 7])
def test_every_solver_evaluates_f_exactly_as_often_as_it_says(solver, contraction, counted, max_evals):
    f = counted(contraction(rho=0.95, squash=torch.tanh))
    z0 = torch.zeros(4, 6, dtype=torch.float64)
    sol = fixpoint.solve(f, z0, solver=solver, rtol=1e-12, max_evals=max_evals, on_failure="ignore")
    assert f.calls == sol.nfev == max_evals
    assert sol.evals.tolist() == [max_evals] * 4
    assert sol.status.tolist() == [Status.MAX_EVALS] * 4


def test_nonlinear_systems_agree_with_scipy(solver, contraction):
    f = contraction(rows=3, rho=0.9, squash=lambda x: torch.sin(x) + 0.05 * torch.cos(3 * x))
    sol = fixpoint.solve(f, solver=solver, rtol=1e-12, max_evals=400)
    for row in range(3):
        alone = f.rows([row])

        def g(z, alone=alone):
            return (alone(torch.from_numpy(z)[None]) - torch.from_numpy(z))[0].numpy()

        start = np.zeros(6)
        hybrid = scipy.optimize.root(g, start, tol=1e-13)
        assert hybrid.success
        np.testing.assert_allclose(sol.value[row], hybrid.x, rtol=1e-9, atol=1e-10)
        krylov = scipy.optimize.newton_krylov(g, start, f_tol=1e-11)
        np.testing.assert_allclose(sol.value[row], krylov, rtol=1e-8, atol=1e-9)


def test_scalar_equation_agrees_with_scipys_fixed_point(solver):
    expected = scipy.optimize.fixed_point(np.cos, np.full(6, 0.5), xtol=1e-14)
    sol = fixpoint.solve(torch.cos, torch.full((1, 6), 0.5, dtype=torch.float64), solver=solver, rtol=1e-13)
    np.testing.assert_allclose(sol.value[0], expected, rtol=1e-12)


@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, 1e200])
def test_a_broken_row_ends_alone_and_spoils_no_other(solver, contraction, garbage):
    good = contraction(rows=3, rho=0.9, squash=torch.tanh)
    f = contraction(rows=4, rho=0.9, seed=1)
    f.W[[0, 1, 3]], f.b[[0, 1, 3]] = good.W, good.b
    f.W[2] = garbage
    both = dataclasses.replace(f, squash=lambda x: torch.where(torch.arange(4)[:, None] == 2, x, torch.tanh(x)))
    sol = fixpoint.solve(both, solver=solver, rtol=1e-9, max_evals=300, on_failure="ignore")
    clean = fixpoint.solve(good, solver=solver, rtol=1e-9, max_evals=300)
    torch.testing.assert_close(sol.value[[0, 1, 3]], clean.value, rtol=1e-12, atol=1e-12)
    assert sol.evals[[0, 1, 3]].tolist() == clean.evals.tolist()
    assert sol.status.tolist() == [Status.CONVERGED, Status.CONVERGED, Status.NON_FINITE, Status.CONVERGED]
    assert sol.evals[2] < 50, "a broken row must not run to the limit"
    assert torch.isfinite(sol.value).all()


@pytest.mark.parametrize("depth", [0, 1, 2, 5])
def test_fixed_depth_applies_so_many_updates_in_so_many_evaluations(solver, contraction, counted, depth):
    f = contraction(rho=0.9, squash=torch.tanh)
    counting = counted(f)
    sol = fixpoint.solve(counting, f.z0, solver=solver, depth=depth, backward=None)
    z, state = f.z0, solver.init(f.z0)
    for _ in range(depth):
        z, state = solver.step(z, f(z), state)
    assert counting.calls == sol.nfev == depth
    assert sol.evals.tolist() == [depth] * 4
    assert torch.equal(sol.value, z)
    assert sol.residual.isnan().all()


def test_undamped_picard_hands_on_what_f_gave_without_rounding():
    sol = fixpoint.solve(torch.ones_like, torch.full((1, 6), 1e20), solver=fixpoint.Picard(), depth=1)
    assert torch.equal(sol.value, torch.ones(1, 6))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_every_precision_keeps_its_dtype_and_meets_what_it_can(solver, contraction, dtype):
    f = contraction(rho=0.6, squash=torch.tanh, dtype=dtype)
    rtol = 16 * torch.finfo(dtype).eps
    sol = fixpoint.solve(f, solver=solver, rtol=rtol, max_evals=300)
    assert sol.value.dtype == dtype
    assert sol.residual.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    difference = (f(sol.value) - sol.value).to(sol.residual.dtype)
    torch.testing.assert_close(sol.residual, torch.linalg.vector_norm(difference, dim=1), rtol=1e-5, atol=0)
    assert (sol.relative_residual <= rtol).all()


@pytest.mark.parametrize("depth", [1, 2, 8])
def test_rows_without_motion_or_curvature_take_finite_plain_steps(solver, depth):
    # f(z) = z + 1: residuals never differ, so every secant condition is 0 = 0.
    f = fixpoint.solve(lambda z: z + 1, torch.zeros(2, 6), solver=solver, depth=depth)
    share = getattr(solver, "damping", 1.0)
    torch.testing.assert_close(f.value, torch.full((2, 6), share * depth), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "error", "found"),
    [
        (lambda: fixpoint.Picard(dampign=0.5), TypeError, "dampign"),
        (lambda: fixpoint.Anderson(mem=3), TypeError, "mem"),
        (lambda: fixpoint.Broyden(m=3), TypeError, "'m'"),
        (lambda: fixpoint.Picard(damping=0.0), ValueError, "found 0.0"),
        (lambda: fixpoint.Picard(damping=2.0), ValueError, "found 2.0"),
        (lambda: fixpoint.Picard(damping=float("nan")), ValueError, "found nan"),
        (lambda: fixpoint.Anderson(memory=0), ValueError, "memory must be at least 1, found 0"),
        (lambda: fixpoint.Anderson(memory=2.5), TypeError, "memory must be an integer, found 2.5"),
        (lambda: fixpoint.Anderson(memory=True), TypeError, "memory must be an integer, found True"),
        (lambda: fixpoint.Anderson(memory=np.int64(0)), ValueError, "memory must be at least 1, found 0"),
        (lambda: fixpoint.Anderson(damping=1.5), ValueError, "found 1.5"),
        (lambda: fixpoint.Anderson(ridge=-1.0), ValueError, "found -1.0"),
        (lambda: fixpoint.Broyden(memory=0), ValueError, "memory must be at least 1, found 0"),
        (lambda: fixpoint.Blockwise(fixpoint.Picard(), blocks=0), ValueError, "blocks must be at least 1, found 0"),
        (lambda: fixpoint.Blockwise("picard", blocks=2), TypeError, "found 'picard'"),
    ],
)
def test_unknown_and_illegal_options_raise_and_name_what_was_found(make, error, found):
    with pytest.raises(error, match=found):
        make()


def test_a_count_may_come_from_numpy_or_torch():
    for three in (3, np.int64(3), np.array(3), torch.tensor(3)):
        sol = fixpoint.solve(torch.cos, torch.ones(1, 2), solver=fixpoint.Anderson(memory=three), rtol=1e-5)
        assert sol.converged.all()
        assert require_count("memory", three) == 3
        assert type(require_count("memory", three)) is int


@pytest.mark.parametrize(("device", "dtype"), [("mps", torch.float32), ("cpu", torch.float64), ("cuda", torch.float64)])
def test_small_systems_are_in_float64_where_the_device_has_it(device, dtype):
    assert small_dtype(SimpleNamespace(device=torch.device(device))) == dtype


@pytest.mark.parametrize("solver", [fixpoint.Anderson(), fixpoint.Broyden(), fixpoint.Picard()], ids=repr)
def test_steps_recorded_past_the_solution_keep_their_gradients(solver):
    # There differences and residuals are exactly zero, and so must be what is multiplied with their infinite powers.
    weight = (0.1 * torch.eye(3, dtype=torch.float64)).requires_grad_()
    push = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    solution = fixpoint.solve(
        lambda z, w: z @ w + push,
        torch.zeros_like(push),
        (weight,),
        solver=solver,
        backward=fixpoint.Unroll(),
        depth=30,
    )
    (found,) = torch.autograd.grad(solution.value.sum(), weight)
    exact = torch.linalg.solve(torch.eye(3, dtype=torch.float64) - weight.T, push.T).sum()
    (expected,) = torch.autograd.grad(exact, weight)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    "solver", [fixpoint.Picard(), fixpoint.Anderson(), fixpoint.Broyden(), fixpoint.Broyden(memory=4)]
)
def test_a_row_that_forgets_takes_a_plain_step_and_no_other_row_does(contraction, solver):
    """Its map may have changed, as ``root`` changes it: nothing of what came before may count."""
    f = contraction(rows=3)
    rows = torch.tensor([False, True, False])

    def after_four_steps():
        z, state = f.z0, solver.init(f.z0)
        for _ in range(4):
            z, state = solver.step(z, f(z), state)
        return z, state

    z, state = after_four_steps()
    image = torch.where(rows[:, None], z + 100 * (f(z) - z), f(z))
    kept, _ = solver.step(z, image, state)
    z, state = after_four_steps()
    z_next, _ = solver.step(z, image, solver.forget(state, rows))
    torch.testing.assert_close(z_next[1], image[1])
    torch.testing.assert_close(z_next[[0, 2]], kept[[0, 2]])
