"""Anderson acceleration against least squares, GMRES theory and the promised evaluation counts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import fixpoint
from fixpoint import Anderson, Picard, Status
from fixpoint.problems import expansive, linear, tanh

# Evaluations to a relative residual of 1e-5 in float32 that a scale-free sliding window of m = 5 and m = 10 differences
# needs, worst row; None where it fails. Ours may need 10% more.
TABLE = [
    ("linear 0.9", linear, {"rho": 0.9}, 34, 26),
    ("linear 0.99", linear, {"rho": 0.99}, 150, 72),
    ("linear 0.999", linear, {"rho": 0.999}, None, 158),
    ("tanh", tanh, {}, 24, 24),
    ("expansive", expansive, {}, 26, 20),
    ("linear 0.99 large", linear, {"rho": 0.99, "scale": 1e4}, 149, 72),
    ("linear 0.99 small", linear, {"rho": 0.99, "scale": 1e-4}, 148, 72),
]


def anderson_by_lstsq(f, z, steps, memory):
    """Anderson by plain least squares in NumPy, with a new set of differences once ``memory`` are held."""
    zs, gs = [], []
    for _ in range(steps):
        g = f(z) - z
        zs.append(z)
        gs.append(g)
        if len(gs) > memory + 1:
            zs, gs = zs[-2:], gs[-2:]
        dz, dg = np.diff(zs, axis=0).T, np.diff(gs, axis=0).T
        gamma = np.linalg.lstsq(dg, g, rcond=None)[0] if dg.size else np.zeros(0)
        z = z + g - ((dz + dg) @ gamma if dg.size else 0)
    return z


@pytest.mark.parametrize("memory", [1, 2, 3, 5])
@pytest.mark.parametrize("steps", [1, 2, 3, 6])
def test_steps_and_restarts_equal_plain_least_squares(contraction, memory, steps):
    f = contraction(rows=1, dim=8, rho=0.9, squash=torch.tanh)
    expected = anderson_by_lstsq(lambda z: f(torch.from_numpy(z)[None])[0].numpy(), np.zeros(8), steps, memory)
    sol = fixpoint.solve(f, solver=Anderson(memory=memory, ridge=0.0), depth=steps)
    np.testing.assert_allclose(sol.value[0], expected, rtol=1e-7, atol=1e-9)


def test_damping_mixes_the_accelerated_residual(contraction):
    f = contraction(rows=1, dim=5, rho=0.9)
    full, half = (
        fixpoint.solve(f, solver=Anderson(damping=damping, ridge=0.0), depth=1).value for damping in (1.0, 0.5)
    )
    torch.testing.assert_close(half, full / 2)
    # From the second step on damping changes the iterates, not the limit.
    sol = fixpoint.solve(f, solver=Anderson(damping=0.5), rtol=1e-12)
    torch.testing.assert_close(sol.value, f.solution, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("dim", [1, 2, 4, 7])
def test_a_linear_problem_of_dim_d_is_solved_in_d_plus_two_evaluations(contraction, dim):
    f = contraction(rows=3, dim=dim, rho=0.9)
    sol = fixpoint.solve(f, solver=Anderson(memory=dim, ridge=0.0), rtol=1e-8)
    assert sol.nfev <= dim + 2


def test_an_expansive_map_is_solved_where_plain_iteration_diverges():
    problem = expansive(dim=40, dtype="float64")
    sol = fixpoint.solve(problem, rtol=1e-10)
    torch.testing.assert_close(sol.value, problem.solution, rtol=1e-8, atol=1e-8)
    picard = fixpoint.solve(problem, solver=Picard(), max_evals=1000, on_failure="ignore")
    assert (picard.status == Status.NON_FINITE).all()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("name", "problem", "options", "five", "ten"), TABLE, ids=[row[0] for row in TABLE])
def test_evaluations_stay_within_the_promised_counts(name, problem, options, five, ten, seed):
    for memory, promised in ((5, five), (10, ten)):
        if promised is None:
            continue
        sol = fixpoint.solve(problem(seed=seed, **options), solver=Anderson(memory=memory), rtol=1e-5, max_evals=300)
        assert sol.nfev <= 1.1 * promised, f"{name}, memory {memory}: {sol.nfev} evaluations, promised {promised}"


def test_parallel_columns_without_ridge_fall_back_to_a_plain_step():
    # In one dimension all differences are parallel: the system is singular from the third step on.
    z0 = torch.tensor([[1.0], [0.3]], dtype=torch.float64)
    sol = fixpoint.solve(torch.cos, z0, solver=Anderson(memory=5, ridge=0.0), rtol=1e-12)
    torch.testing.assert_close(sol.value, torch.full_like(z0, 0.7390851332151607))


def test_a_singular_system_gives_zero_coefficients_to_its_row_alone():
    gram = torch.stack([torch.ones(2, 2), torch.tensor([[2.0, 1.0], [1.0, 2.0]])]).double()
    target = torch.tensor([[1.0, 1.0], [3.0, 3.0]]).double()
    gamma = Anderson(ridge=0.0)._solve(gram, target, torch.float64)
    torch.testing.assert_close(gamma, torch.tensor([[0.0, 0.0], [1.0, 1.0]]).double())


def test_an_empty_column_gets_zero_and_leaves_the_others_their_share():
    gram = torch.tensor([[[2.0, 0.0], [0.0, 0.0]]]).double()
    gamma = Anderson(ridge=0.0)._solve(gram, torch.tensor([[4.0, 0.0]]).double(), torch.float64)
    torch.testing.assert_close(gamma, torch.tensor([[2.0, 0.0]]).double())


def test_history_costs_two_states_for_each_difference():
    state = Anderson(memory=3).init(torch.zeros(2, 7))
    assert (state.dg.shape, state.df.shape) == ((2, 3, 7), (2, 3, 7))
