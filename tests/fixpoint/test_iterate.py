"""The loop: best verified state, per-row ends, looking seldom."""

from __future__ import annotations

import pytest
import torch

import fixpoint
from fixpoint import Anderson, Picard, Status
from fixpoint.convergence import Tolerance
from fixpoint.iterate import advance, iterate


def test_rows_end_at_their_own_evaluation_and_stay_where_they_ended():
    slope = torch.tensor([[0.0], [0.5], [0.9]], dtype=torch.float64)
    z0 = torch.zeros(3, 1, dtype=torch.float64)
    options = {"solver": Picard(), "rtol": 1e-6, "max_evals": 200}
    together = fixpoint.solve(lambda z: slope * z + 1, z0, **options)
    assert together.evals[0] == 2
    assert together.evals[0] < together.evals[1] < together.evals[2] == together.nfev
    for row in range(3):
        alone = fixpoint.solve(lambda z, row=row: slope[[row]] * z + 1, z0[[row]], **options)
        assert torch.equal(alone.value[0], together.value[row])
        assert alone.evals[0] == together.evals[row]


def test_ended_rows_are_no_longer_moved(counted):
    slope = torch.tensor([[0.0], [0.9]])
    f = counted(lambda z: slope * z + 1)
    fixpoint.solve(f, torch.zeros(2, 1), solver=Picard(), backward=None)
    assert {float(z[0]) for z in f.seen[1:]} == {1.0}


def test_the_best_verified_state_is_returned_not_the_last():
    # Doubling away from -1: every iterate is worse than the one before it.
    sol = fixpoint.solve(
        lambda z: 2 * z + 1, torch.zeros(1, 1), solver=Picard(), max_evals=6, on_failure="ignore", record=True
    )
    assert sol.trace[:, 0].tolist() == [1, 2, 4, 8, 16, 32]
    assert float(sol.residual) == 1
    assert float(sol.value) == 0


def test_one_evaluation_verifies_z0_and_returns_it():
    z0 = torch.full((1, 1), 3.0)
    sol = fixpoint.solve(lambda z: 0.5 * z, z0, max_evals=1, on_failure="ignore")
    assert torch.equal(sol.value, z0)
    assert float(sol.residual) == 1.5
    assert sol.nfev == 1


def test_a_start_at_the_solution_takes_one_evaluation(solver):
    sol = fixpoint.solve(lambda z: 0.5 * z + 1, torch.full((2, 6), 2.0), solver=solver)
    assert sol.nfev == 1
    assert sol.residual.tolist() == [0, 0]
    assert torch.equal(sol.value, torch.full((2, 6), 2.0))


@pytest.mark.parametrize("check_every", [2, 3, 7, 1000])
def test_looking_seldom_changes_no_figure_of_any_row(solver, contraction, check_every):
    f = contraction(rho=0.9, squash=torch.tanh)
    options = {"solver": solver, "rtol": 1e-8, "max_evals": 300}
    each, seldom = fixpoint.solve(f, **options), fixpoint.solve(f, check_every=check_every, **options)
    torch.testing.assert_close(seldom.value, each.value, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(seldom.residual, each.residual, rtol=1e-6, atol=0)
    assert seldom.evals.tolist() == each.evals.tolist()
    assert seldom.status.tolist() == each.status.tolist()
    assert seldom.nfev == min(-(-each.nfev // check_every) * check_every, 300)


def test_looking_seldom_still_stops_at_max_evals():
    sol = fixpoint.solve(
        lambda z: z + 1, torch.zeros(1, 1), check_every=4, max_evals=6, on_failure="ignore", solver=Picard()
    )
    assert sol.nfev == 6


class Spy(Picard):
    def step(self, z, fz, state):
        assert torch.isfinite(z).all()
        assert torch.isfinite(fz).all()
        return super().step(z, fz, state)


@pytest.mark.parametrize("check_every", [1, 3])
def test_a_solver_is_never_shown_nan_or_infinity(check_every):
    slope = torch.tensor([[torch.nan], [1e25], [0.9]])
    sol = fixpoint.solve(
        lambda z: slope * z + 1, torch.ones(3, 1), solver=Spy(), check_every=check_every, on_failure="ignore"
    )
    assert sol.status.tolist() == [Status.NON_FINITE, Status.NON_FINITE, Status.CONVERGED]


class Overflowing(Picard):
    """Proposes what no f could evaluate, in the first row alone."""

    def step(self, z, fz, state):
        return torch.where(torch.arange(len(z))[:, None] == 0, torch.inf, fz), state


@pytest.mark.parametrize("check_every", [1, 3])
def test_a_proposal_that_is_not_finite_ends_its_row_at_the_best_state_before(check_every):
    sol = fixpoint.solve(
        lambda z: 0.5 * z + 1, torch.zeros(2, 1), solver=Overflowing(), check_every=check_every, on_failure="ignore"
    )
    assert sol.status.tolist() == [Status.NON_FINITE, Status.CONVERGED]
    assert float(sol.value[0]) == 0
    assert float(sol.residual[0]) == 1


def test_a_row_that_met_the_tolerance_ends_there_even_if_an_earlier_residual_was_smaller():
    # The scale grows faster than the residual, so a larger residual can meet a relative tolerance.
    images = iter([1.0, 1001.5])
    outcome = iterate(
        lambda z: torch.full_like(z, next(images)) + z * 0,
        torch.zeros(1, 1, dtype=torch.float64),
        Jump(),
        Tolerance(rtol=1e-2, atol=0.0),
        max_evals=2,
    )
    assert outcome.status.tolist() == [Status.CONVERGED]
    assert float(outcome.z) == 1000
    assert float(outcome.residual) == 1.5


class Jump(Picard):
    def step(self, z, fz, state):
        return torch.full_like(z, 1000.0), state


def test_advance_hands_over_the_last_state_unverified(contraction):
    f = contraction(rho=0.5)
    outcome = advance(f, f.z0, Picard(), Tolerance(rtol=1e9, atol=0.0), depth=3)
    torch.testing.assert_close(outcome.z, f(f(f(f.z0))))
    assert outcome.residual.isnan().all()
    assert (outcome.status == Status.MAX_EVALS).all()  # not verified, so never CONVERGED
    measured = outcome.measured(f(outcome.z), Tolerance(rtol=1e9, atol=0.0))
    assert (measured.status == Status.CONVERGED).all()
    torch.testing.assert_close(measured.residual, torch.linalg.vector_norm(f(outcome.z) - outcome.z, dim=1))


def test_a_fixed_depth_run_flags_rows_that_broke():
    slope = torch.tensor([[torch.nan], [0.5]])
    sol = fixpoint.solve(lambda z: slope * z + 1, torch.ones(2, 1), solver=Anderson(), depth=2)
    assert sol.status.tolist() == [Status.NON_FINITE, Status.MAX_EVALS]
    assert sol.value[1].isfinite().all()
