"""Broyden's method against SciPy's, the secant method and the theory of linear problems."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.optimize
import torch

import fixpoint
from fixpoint import Broyden, Picard, Status
from fixpoint.bench.problems import expansive
from fixpoint.solvers.small import NUMPY, TORCH


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
    assert sol.nfev <= 2 * dim + 1  # Gay, SIAM J. Numer. Anal. 16 (1979): 2d steps, and one check


def test_an_expansive_map_is_solved_where_plain_iteration_diverges():
    problem = expansive(dim=40, dtype="float64")
    sol = fixpoint.solve(problem, solver=Broyden(), rtol=1e-10, max_evals=300)
    torch.testing.assert_close(sol.value, problem.solution, rtol=1e-8, atol=1e-8)
    picard = fixpoint.solve(problem, solver=Picard(), max_evals=1000, on_failure="ignore")
    assert (picard.status == Status.NON_FINITE).all()


def test_when_the_memory_is_full_it_starts_over_with_the_newest_secant(contraction):
    f = contraction(rows=2, dim=6, rho=0.9, squash=torch.tanh)
    solver = Broyden(memory=4)
    zs = [fixpoint.solve(f, solver=solver, depth=depth).value for depth in (3, 4, 5, 6)]
    # Inverse Jacobian -I, updated with the newest secant pair (dz, dg) alone: the next step by the textbook formula.
    H = -torch.eye(6, dtype=torch.float64).expand(2, 6, 6)
    for before, here, then in pairwise_triples(zs):
        g = f(here) - here
        dz, dg = here - before, g - (f(before) - before)
        Hdg, dzH = torch.einsum("bij,bj->bi", H, dg), torch.einsum("bi,bij->bj", dz, H)
        H = H + torch.einsum("bi,bj->bij", dz - Hdg, dzH) / torch.einsum("bi,bi->b", dz, Hdg)[:, None, None]
        torch.testing.assert_close(then, here - torch.einsum("bij,bj->bi", H, g), rtol=1e-9, atol=1e-12)


def pairwise_triples(items):
    return list(zip(items, items[1:], items[2:], strict=False))


def test_float32_does_not_round_what_a_system_must_hold_exactly(contraction):
    # The entry before the diagonal is -s_j . s_j / |s_j|^2: what that is off from -1, a pivot is off by.
    f = contraction(rows=3, dim=12, rho=0.95, squash=torch.tanh)
    solver, z = Broyden(), f.z0.float()
    state = solver.init(z)
    for _ in range(10):
        z, state = solver.step(z, f(z.double()).float(), state)
    entries = torch.as_tensor(state.system)[:, :10, :10].diagonal(-1, 1, 2)
    torch.testing.assert_close(entries, torch.full_like(entries, -1.0), rtol=1e-14, atol=0)


@pytest.mark.parametrize("held", [1, 2, 3, 4])
def test_a_row_that_is_told_to_forget_takes_a_plain_step_next(contraction, held):
    f = contraction(rows=2, dim=6, rho=0.9, squash=torch.tanh)
    solver, z = Broyden(memory=4), f.z0
    state = solver.init(z)
    for _ in range(held):
        z, state = solver.step(z, f(z), state)
    z_next, _ = solver.step(z, f(z), solver.forget(state, torch.tensor([True, False])))
    plain = (z_next - f(z)).abs().amax(dim=1) < 1e-12
    assert plain.tolist() == [True, False]


@pytest.mark.parametrize("memory", [1, 2])
def test_too_short_a_memory_for_a_secant_starts_over_with_a_plain_step(contraction, memory):
    f = contraction(rows=2, dim=6, rho=0.9)
    z = fixpoint.solve(f, solver=Broyden(memory=memory), depth=memory).value
    torch.testing.assert_close(fixpoint.solve(f, solver=Broyden(memory=memory), depth=memory + 1).value, f(z))


@pytest.mark.parametrize("rounding", [0.0, 1e-12])
def test_a_singular_factor_starts_its_row_over_with_a_plain_step(rounding):
    # Row 0: g stays the same from z to z1, so no secant step exists; row 1 is an ordinary contraction.
    z = torch.zeros(2, 2, dtype=torch.float64)
    solver = Broyden()
    z1, state = solver.step(z, torch.tensor([[1.0, 0.0], [1.0, 0.5]], dtype=torch.float64), solver.init(z))
    g = torch.tensor([[1.0 + rounding, 0.0], [0.5, 0.1]], dtype=torch.float64)
    z2, state = solver.step(z1, z1 + g, state)
    torch.testing.assert_close(z2[0], z1[0] + g[0])
    assert (state.system.diagonal(0, 1, 2)[:, :2] != 0).tolist() == [[False, True], [True, True]]
    assert not torch.allclose(z2[1], z1[1] + g[1])


def about_a_turn(speed, dim=4):
    """``f`` turns the residual by right angles: ``I - J`` is skew, and no step changes g along itself."""
    turn = speed * torch.block_diag(*[torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)] * (dim // 2))
    return lambda z: z - (z - 1) @ turn.T


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("speed", [0.3, 1.0, 4.0])
def test_a_map_that_turns_about_its_solution_is_solved(speed, dtype):
    f, z0 = about_a_turn(speed), torch.tensor([[2.0, 0.0, 1.0, -1.0]], dtype=dtype)
    sol = fixpoint.solve(lambda z: f(z.double()).to(dtype), z0, solver=Broyden(), rtol=1e-5, backward=None)
    torch.testing.assert_close(sol.value, torch.ones_like(z0), rtol=1e-3, atol=1e-3)
    assert int(sol.nfev) < 30


def test_a_row_at_a_right_angle_changes_no_other(contraction):
    rows, turning = contraction(rows=2, dim=4, rho=0.9, squash=torch.tanh), about_a_turn(1.0)

    def together(z):
        return torch.cat((turning(z[:1]), rows(z[1:3]), z[3:] + 1))  # the last has no fixed point and no curvature

    z, alone = torch.zeros(4, 4, dtype=torch.float64), torch.zeros(2, 4, dtype=torch.float64)
    solver = Broyden()
    state, state_alone = solver.init(z), solver.init(alone)
    for step in range(8):
        z, state = solver.step(z, together(z), state)
        alone, state_alone = solver.step(alone, rows(alone), state_alone)
        torch.testing.assert_close(z[1:3], alone, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(z[3], torch.full((4,), step + 1.0, dtype=torch.float64))


def test_a_pivot_that_is_not_small_is_left_alone_beside_one_that_is():
    # Both residuals change by nearly a right angle, the first so much that its pivot is 0.05 all the same.
    z, solver = torch.zeros(2, 2, dtype=torch.float64), Broyden()
    z1, state = solver.step(z, torch.tensor([[1.0, 0.0], [1.0, 0.0]], dtype=torch.float64), solver.init(z))
    g = torch.tensor([[0.95, 10.0], [1.0, 1.0]], dtype=torch.float64)
    z2, _ = solver.step(z1, z1 + g, state)
    torch.testing.assert_close(z2[0] - z1[0], g[0] / 0.05)
    torch.testing.assert_close(z2[1] - z1[1], g[1] / 0.03)


@pytest.mark.parametrize("rounding", [0.0, 1e-12])
def test_a_secant_without_curvature_is_not_taken_into_the_new_start(rounding):
    # Steps s along x; in row 0 g changes along y alone at the restart, so s . dg = 0.
    solver = Broyden(memory=3)
    z = torch.zeros(2, 2, dtype=torch.float64)
    state = solver.init(z)
    for _ in range(3):
        z, state = solver.step(z, z + torch.tensor([[1.0, 0.0], [1.0, 0.0]], dtype=torch.float64), state)
    g = torch.tensor([[1.0 + rounding, 1.0], [0.5, 0.0]], dtype=torch.float64)
    z_next, state = solver.step(z, z + g, state)
    torch.testing.assert_close(z_next[0], z[0] + g[0])
    torch.testing.assert_close(z_next[1], z[1] + torch.tensor([1.0, 0.0], dtype=torch.float64))  # secant: slope -1/2


def test_history_costs_one_state_for_each_step():
    assert Broyden(memory=3).init(torch.zeros(2, 7)).steps.shape == (2, 3, 7)


@pytest.mark.parametrize("memory", [1, 2, 3, 4, 7, 20])
@pytest.mark.parametrize("recorded", [False, True])
def test_the_transposed_inverse_is_that_of_the_textbook_through_every_restart(contraction, memory, recorded):
    f = contraction(rows=3, dim=12, rho=0.95, squash=torch.tanh)
    solver, z = Broyden(memory=memory), f.z0.clone().requires_grad_(recorded)
    state, held = solver.init(z), 0
    eye = torch.eye(12, dtype=torch.float64)
    before = g_before = torch.zeros_like(f.z0)
    for _ in range(9):
        fz = f(z)
        z_next, state = solver.step(z, fz, state)
        here, g = z.detach(), (z - fz).detach()
        dz, dg = here - before, g - g_before
        # Good Broyden on z - f(z) from the identity; a restart keeps the newest pair alone, or none.
        full = held == memory
        if held == 0 or full:
            H = eye.expand(3, 12, 12)
        if held > 0 and not (full and memory < 3):
            Hdg, dzH = torch.einsum("bij,bj->bi", H, dg), torch.einsum("bi,bij->bj", dz, H)
            H = H + torch.einsum("bi,bj->bij", dz - Hdg, dzH) / (dz * Hdg).sum(1)[:, None, None]
        held = 1 if held == 0 or (full and memory < 3) else 3 if full else held + 1
        columns = [solver.transposed_inverse(state, e.expand(3, 12)) for e in eye]
        torch.testing.assert_close(torch.stack(columns, dim=1).detach(), H, rtol=1e-8, atol=1e-8)
        z, before, g_before = z_next, here, g


def test_steps_past_a_restart_can_be_differentiated(contraction):
    problem, shift = contraction(rows=2, dim=4, rho=0.9, squash=torch.tanh), torch.zeros(4, dtype=torch.float64)

    def last_state(shift):
        f, rule = (lambda z: problem(z) + shift), fixpoint.Unroll()
        return fixpoint.solve(f, problem.z0, solver=Broyden(memory=3), backward=rule, depth=6).value

    assert torch.autograd.gradcheck(last_state, (shift.requires_grad_(),))


def test_a_singular_system_is_its_rows_own_matter():
    # atan(x) = -2 has no solution: that row runs away until its steps are no longer finite numbers to divide by.
    x0, b = torch.full((2, 1), 5.0, dtype=torch.float64), torch.tensor([[0.5], [-2.0]], dtype=torch.float64)
    sol = fixpoint.root(lambda x, b: torch.atan(x) - b, x0, (b,), solver=Broyden(), on_failure="ignore")
    alone = fixpoint.root(lambda x, b: torch.atan(x) - b, x0[:1], (b[:1],), solver=Broyden())
    assert sol.converged.tolist() == [True, False]
    torch.testing.assert_close(sol.value[0], torch.tan(b[0]), rtol=1e-3, atol=1e-3)
    assert int(sol.evals[0]) == int(alone.evals[0])


@pytest.mark.parametrize("xp", [NUMPY, TORCH], ids=["numpy", "torch"])
def test_a_pivot_is_lost_where_it_is_small_or_no_finite_number(xp):
    pivots = torch.tensor([[0.5], [1.0], [2.0], [torch.inf], [torch.nan]])
    lost = xp.outside(pivots.numpy() if xp is NUMPY else pivots, 1.0, torch.finfo(torch.float32).max)
    assert lost.tolist() == [[True], [False], [False], [True], [True]]


@pytest.mark.parametrize("broken", [torch.inf, torch.nan])
def test_a_row_whose_system_breaks_starts_over_alone(contraction, broken):
    f = contraction(rows=3, dim=6, rho=0.9, squash=torch.tanh)
    solver, z = Broyden(), f.z0
    state = solver.init(z)
    for step in range(8):
        if step == 4:
            state.system[1, 2, 2] = broken
        fz = f(z)
        z, state = solver.step(z, fz, state)
        assert torch.isfinite(z).all()
        plain = (z - fz).abs().amax(dim=1) == 0
        assert plain.tolist() == [step == 0, step in (0, 4), step == 0]
