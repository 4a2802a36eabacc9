"""GMRES against SciPy's, direct solves and what its theory promises."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import LinearOperator, gmres

import fixpoint
from fixpoint import GMRES, Anderson, Status
from fixpoint.solvers.small import TORCH

D = torch.float64


def affine(A, b):
    return lambda z: z @ A.T + b


def exact(A, b):
    return torch.linalg.solve(torch.eye(len(A), dtype=A.dtype) - A, b.T).T


def gaussian(dim, seed, rows=1):
    """A matrix with entries from N(0, 1), so that I - A has eigenvalues on all sides of zero; and right-hand sides."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(n, dim, generator=generator, dtype=D) for n in (dim, rows))


def contraction(rho, symmetric, seed=0, dim=80):
    A, b = gaussian(dim, seed)
    A = A + A.T if symmetric else A
    return A * rho / torch.linalg.eigvals(A).abs().max(), b


def products_of_scipy(A, b, atol):
    """How many products with I - A SciPy's GMRES of unlimited memory asks for."""
    count = 0

    def multiply(u):
        nonlocal count
        count += 1
        return u - A.numpy() @ u

    gmres(LinearOperator(A.shape, multiply, dtype=float), b[0].numpy(), rtol=0.0, atol=atol, restart=len(A), maxiter=1)
    return count


@pytest.mark.parametrize("dim", [1, 2, 3, 7, 12, 20, 35, 60])
def test_a_map_that_expands_is_solved_in_its_dimension_and_a_few_evaluations(dim):
    for seed in range(5):
        A, b = gaussian(dim, seed)
        sol = fixpoint.solve(affine(A, b), b, solver=GMRES(memory=dim), rtol=1e-8, max_evals=200, on_failure="raise")
        # d + 1 to learn all images, one for the solution, and one each time that the residual fell tenfold before.
        assert sol.nfev <= dim + 6
        torch.testing.assert_close(sol.value, exact(A, b), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [5, 12, 20, 40])
def test_in_a_coarse_precision_it_comes_near_to_rounding(dim, dtype):
    for seed in range(5):
        A, b = gaussian(dim, seed)
        rtol = dim * torch.finfo(dtype).eps  # |A| is about 2 sqrt(dim), so f is rounded by more than eps
        sol = fixpoint.solve(affine(A.to(dtype), b.to(dtype)), b.to(dtype), solver=GMRES(), rtol=rtol, max_evals=200)
        assert sol.converged.all()
        assert sol.nfev <= 2 * dim + 10


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("rho", [0.5, 0.9, 0.99])
def test_on_contractions_it_takes_as_many_evaluations_as_scipys_and_no_more_than_anderson(rho, symmetric):
    A, b = contraction(rho, symmetric)
    z = exact(A, b)
    options = {"rtol": 1e-6, "max_evals": 300, "on_failure": "raise"}
    ours, anderson = (
        fixpoint.solve(affine(A, b), b, solver=solver, **options) for solver in (GMRES(), Anderson(memory=10))
    )
    torch.testing.assert_close(ours.value, z, rtol=1e-3, atol=1e-3)
    assert ours.nfev <= products_of_scipy(A, b, 1e-6 * float(z.norm())) + 2
    assert ours.nfev <= anderson.nfev + 1


@pytest.mark.parametrize("steps", [1, 2, 3, 6, 10])
def test_the_best_point_is_scipys(steps):
    # A contraction's proposals are the best point and on along its residual r: f(best) = best + r.
    A, b = contraction(0.9, symmetric=False, dim=15)
    best, _ = gmres(np.eye(15) - A.numpy(), b[0].numpy(), x0=b[0].numpy(), rtol=0, atol=0, restart=steps, maxiter=1)
    best = torch.from_numpy(best)[None]
    z = fixpoint.solve(affine(A, b), b, solver=GMRES(), depth=steps + 1).value
    state, solver = b, GMRES()
    memory = None
    for _ in range(steps + 1):
        proposal, memory = solver.step(state, affine(A, b)(state), memory)
        state = proposal
    direction = affine(A, b)(best) - best
    along = (z - best) @ direction.T / (direction @ direction.T)
    assert 0.1 <= float(along) <= 1 + 1e-6
    # Along the newest vector the step may be longer than along the others.
    assert float((z - best - along * direction).norm()) <= 0.2 * float(direction.norm())


def test_few_different_eigenvalues_take_few_evaluations():
    b = torch.randn(1, 30, generator=torch.Generator().manual_seed(0), dtype=D)
    slopes = torch.tensor([2.0, -1.0, 0.5], dtype=D).repeat(10)
    sol = fixpoint.solve(lambda z: slopes * z + b, b, solver=GMRES(), rtol=1e-10)
    assert sol.nfev <= 3 + 3
    torch.testing.assert_close(sol.value, b / (1 - slopes), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("memory", [1, 2, 5, 20])
def test_a_short_memory_starts_over_and_converges_on_contractions(memory):
    A, b = contraction(0.8, symmetric=False, dim=30)
    sol = fixpoint.solve(affine(A, b), b, solver=GMRES(memory=memory), rtol=1e-9, max_evals=300, on_failure="raise")
    torch.testing.assert_close(sol.value, exact(A, b), rtol=1e-6, atol=1e-7)


def test_rows_of_any_scale_are_solved_alike():
    A, b = gaussian(8, 0)
    A, b = A.float(), b.float()
    scales = torch.tensor([1.0, 1e-30, 1e30, 1e-12, 1e10, 0.0])[:, None]
    sol = fixpoint.solve(affine(A, scales * b), scales * b, solver=GMRES(), rtol=1e-5, on_failure="raise")
    alone = fixpoint.solve(affine(A, b), b, solver=GMRES(), rtol=1e-5, on_failure="raise")
    torch.testing.assert_close(sol.value[:-1] / scales[:-1], alone.value.expand(5, 8), rtol=1e-3, atol=1e-4)
    assert torch.equal(sol.value[-1], torch.zeros(8))
    assert sol.evals[-1] == 1


def test_a_row_that_is_broken_ends_alone_and_leaves_the_others_as_they_are():
    A, b = gaussian(6, 1, rows=3)
    options = {"solver": GMRES(), "rtol": 1e-9, "on_failure": "ignore"}
    alone = fixpoint.solve(affine(A, b[:2]), b[:2], **options)
    for broken in (torch.nan, torch.inf, 1e300):
        factor = torch.tensor([1.0, 1.0, broken], dtype=D)[:, None]
        sol = fixpoint.solve(lambda z, factor=factor: factor * (z @ A.T) + b, b, **options)
        assert sol.evals[:2].tolist() == alone.evals.tolist()
        torch.testing.assert_close(sol.value[:2], alone.value, rtol=1e-9, atol=1e-10)
        assert torch.isfinite(sol.value).all()


def test_a_row_that_met_nan_goes_on_from_where_it_is_measured_next():
    A, b = gaussian(6, 1)
    f, solver = affine(A, b), GMRES()
    z, state, errors = b, None, []
    for step in range(16):
        fz = f(z) if step != 4 else torch.full_like(b, torch.nan)
        z, state = solver.step(z, fz, state)
        assert torch.isfinite(z).all()
        errors.append(float((z - exact(A, b)).norm()))
    assert min(errors) <= 1e-8


def test_a_row_that_was_moved_starts_over_from_there():
    A, b = gaussian(6, 2, rows=2)
    f, solver = affine(A, b), GMRES()
    z, state, errors = b, None, []
    for step in range(20):
        if step == 5:
            z = torch.stack((z[0], torch.ones(6, dtype=D)))  # as the loop does when a row has ended, or stepped back
        z, state = solver.step(z, f(z), state)
        errors.append((z - exact(A, b)).norm(dim=1))
    assert float(torch.stack(errors).amin(dim=0).max()) <= 1e-8


def test_a_map_without_a_fixed_point_ends_unsolved_and_finite():
    slopes, b = torch.tensor([1.0, 0.5, -2.0], dtype=D), torch.ones(1, 3, dtype=D)
    sol = fixpoint.solve(lambda z: slopes * z + b, b, solver=GMRES(), max_evals=40, on_failure="ignore")
    assert sol.status.tolist() == [Status.MAX_EVALS]
    assert torch.isfinite(sol.value).all()


def test_on_a_device_it_does_what_it_does_on_the_host(monkeypatch):
    A, b = gaussian(9, 3, rows=4)
    b[2] = 0
    host = fixpoint.solve(affine(A, b), b, solver=GMRES(), rtol=1e-9)
    monkeypatch.setattr("fixpoint.solvers.gmres.arithmetic", lambda *xs, kept=None: TORCH)
    device = fixpoint.solve(affine(A, b), b, solver=GMRES(), rtol=1e-9)
    assert host.converged.all()
    assert device.evals.tolist() == host.evals.tolist()
    torch.testing.assert_close(device.value, host.value, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("memory", [1, 4, 5, 15])
def test_it_holds_a_state_for_each_evaluation_and_at_most_its_memory_and_six(memory):
    A, b = contraction(0.999, symmetric=False, dim=90)
    solver, z, state = GMRES(memory=memory), b, None
    held = []
    for _ in range(60):
        z, state = solver.step(z, affine(A, b)(z), state)
        held.append(sum(block.shape[1] for block in state.basis))
    assert all(count <= 10 * (1 + step // 10) for step, count in enumerate(held))
    assert max(held) == memory + 6


@pytest.mark.parametrize("memory", [0, -1, 2.5, "5"])
def test_memory_must_be_a_count(memory):
    with pytest.raises((TypeError, ValueError), match="memory must be"):
        GMRES(memory=memory)


@pytest.mark.parametrize("rho", [0.3, 0.5])
def test_an_f_that_is_coarser_than_its_dtype_is_solved_to_its_rounding(rho):
    # As under autocast. Anderson's best is the measure: where rounding rules, neither can be sure of more.
    for seed in range(5):
        A, b = contraction(rho, symmetric=False, seed=seed, dim=30)
        A, b = A.bfloat16(), b.bfloat16()

        def f(z, A=A, b=b):
            return (z.bfloat16() @ A.T + b).float()

        sol = fixpoint.solve(f, b.float(), solver=GMRES(), rtol=1e-6, max_evals=100, on_failure="ignore")
        assert float(sol.relative_residual) <= 0.5 * torch.finfo(torch.bfloat16).eps


def test_rows_without_entries():
    assert fixpoint.solve(lambda z: z / 2, torch.zeros(3, 0), solver=GMRES(), depth=2).value.shape == (3, 0)


def test_maps_near_the_identity_are_solved_though_the_first_step_seems_to_contract():
    generator = torch.Generator().manual_seed(5)
    M = torch.randn(100, 20, 20, generator=generator, dtype=D) / 20**0.5 * 0.2  # I - J
    b = torch.randn(100, 20, generator=generator, dtype=D, requires_grad=True)
    J = torch.eye(20, dtype=D) - M
    z = torch.linalg.solve(M, b.detach())
    found = fixpoint.solve(lambda z, b, J: (J @ z[..., None])[..., 0] + b, z, (b, J), depth=0, solver=fixpoint.Picard())
    (gradient,) = torch.autograd.grad(found.value.sum(), b)
    exact = torch.linalg.solve(M.mT, torch.ones(100, 20, dtype=D))
    assert found.adjoint.converged.all()
    assert ((gradient - exact).norm(dim=1) <= 1e-3 * exact.norm(dim=1)).all()


def test_unrolled_rows_that_end_at_other_evaluations_have_their_gradients():
    b = torch.ones(2, 3, dtype=D, requires_grad=True)
    A = torch.tensor([[2.0, 5, 0], [0, -3, 1], [1, 0, 0.5]], dtype=D)

    def f(z, b):
        return torch.stack((0.5 * z[0], z[1] @ A.T)) + b

    found = fixpoint.solve(f, torch.zeros_like(b), (b,), solver=GMRES(), backward=fixpoint.Unroll(), rtol=1e-10)
    (gradient,) = torch.autograd.grad(found.value.sum(), b)
    exact = torch.stack((torch.full((3,), 2.0, dtype=D), torch.linalg.solve((torch.eye(3) - A).T, torch.ones(3).to(D))))
    torch.testing.assert_close(gradient, exact, rtol=1e-6, atol=1e-6)
