"""Broyden's method against SciPy's, the secant method and the theory of linear problems."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.optimize
import torch

import fixpoint
from fixpoint import Broyden, Picard, Status
from fixpoint.problems import expansive


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 8])
def test_iterates_equal_scipys_good_broyden(contraction, steps):
    f = contraction(rows=1, dim=5, rho=0.9, squash=torch.sin)

    def g(z):
        return (f(torch.from_numpy(z)[None]) - torch.from_numpy(z))[0].numpy()

    expected = scipy.optimize.broyden1(g, np.zeros(5), alpha=1.0, iter=steps, line_search=None, f_tol=0.0)
    sol = fixpoint.solve(f, solver=Broyden(memory=10), depth=steps)
    np.testing.assert_allclose(sol.value[0], expected, rtol=1e-9, atol=1e-11)


def test_one_dimension_is_the_secant_method():
    z, previous = np.cos(0.5), 0.5
    for _ in range(3):
        slope = ((np.cos(z) - z) - (np.cos(previous) - previous)) / (z - previous)
        z, previous = z - (np.cos(z) - z) / slope, z
    sol = fixpoint.solve(torch.cos, torch.tensor(0.5, dtype=torch.float64), solver=Broyden(), depth=4)
    assert float(sol.value) == pytest.approx(z, rel=1e-12)


@pytest.mark.parametrize("dim", [1, 2, 4])
def test_a_linear_problem_of_dim_d_is_solved_in_2d_steps(contraction, dim):
    f = contraction(rows=3, dim=dim, rho=0.9)
    sol = fixpoint.solve(f, solver=Broyden(memory=2 * dim), rtol=1e-8)
    assert sol.nfev <= 2 * dim + 1  # Gay, SIAM J. Numer. Anal. 16 (1979): 2d steps, and one look


def test_an_expansive_map_is_solved_where_plain_iteration_diverges():
    problem = expansive(dim=40, dtype="float64")
    sol = fixpoint.solve(problem, solver=Broyden(), rtol=1e-10, max_evals=300)
    torch.testing.assert_close(sol.value, problem.solution, rtol=1e-8, atol=1e-8)
    picard = fixpoint.solve(problem, solver=Picard(), max_evals=1000, on_failure="ignore")
    assert (picard.status == Status.NON_FINITE).all()


def test_after_memory_updates_it_starts_over_with_the_newest_secant(contraction):
    f = contraction(rows=2, dim=6, rho=0.9, squash=torch.tanh)
    solver, z = Broyden(memory=2), f.z0
    state = solver.init(z)
    for _ in range(4):
        last = z, f(z)
        z, state = solver.step(z, last[1], state)
    assert state.held == 1
    # One secant pair (dz, dg) at (z, g), inverse Jacobian -I before it: the same step by the textbook formula.
    before = fixpoint.solve(f, solver=solver, depth=2).value
    dz = last[0] - before
    g = last[1] - last[0]
    dg = g - (f(before) - before)
    H = -torch.eye(6, dtype=torch.float64).expand(2, 6, 6)
    Hdg, dzH = torch.einsum("bij,bj->bi", H, dg), torch.einsum("bi,bij->bj", dz, H)
    H = H + torch.einsum("bi,bj->bij", dz - Hdg, dzH) / torch.einsum("bi,bi->b", dz, Hdg)[:, None, None]
    torch.testing.assert_close(z, fixpoint.solve(f, solver=solver, depth=4).value)
    three = fixpoint.solve(f, solver=solver, depth=3).value
    torch.testing.assert_close(three, last[0])
    torch.testing.assert_close(z, last[0] - torch.einsum("bij,bj->bi", H, g), rtol=1e-9, atol=1e-12)


def test_a_vanishing_denominator_leaves_the_update_out_for_its_row_alone():
    # Row 0 turns by a right angle about its own image, so dz . H dg = 0; row 1 is an ordinary contraction.
    z = torch.tensor([[0.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    solver = Broyden()
    state = solver.init(z)
    z1, state = solver.step(z, torch.tensor([[1.0, 0.0], [1.0, 0.5]], dtype=torch.float64), state)
    # g goes from (1, 0) to (1, 1): dg = (0, 1) is orthogonal to dz = (1, 0).
    z2, state = solver.step(z1, z1 + torch.tensor([[1.0, 1.0], [0.5, 0.1]], dtype=torch.float64), state)
    torch.testing.assert_close(z2[0], torch.tensor([2.0, 1.0], dtype=torch.float64))
    assert torch.isfinite(z2).all()
    assert state.u[0].abs().max() == 0
    assert state.u[1].abs().max() > 0


def test_history_is_kept_in_float32_at_least():
    assert Broyden(memory=2).init(torch.zeros(2, 3, dtype=torch.bfloat16)).u.dtype == torch.float32
