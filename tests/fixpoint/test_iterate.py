"""The loop: best verified state, per-row ends, checking seldom."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fixpoint
from fixpoint import Anderson, Picard, Status
from fixpoint.engine.loop import iterate, run_steps
from fixpoint.engine.tolerance import Tolerance

EXACT = Tolerance(rtol=0.0, atol=0.0)


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
    # Doubling away from -1: every state is worse than the one before it.
    sol = fixpoint.solve(
        lambda z: 2 * z + 1, torch.zeros(1, 1), solver=Picard(), max_evals=6, on_failure="ignore", record=True
    )
    assert sol.trace[:, 0].tolist() == [1, 2, 4, 8, 16, 32]
    assert float(sol.residual) == 1
    assert float(sol.value) == 0


class Scripted(Picard):
    """Proposes rows of a table, whatever it is shown."""

    table: torch.Tensor

    def init(self, z):
        return 0

    def step(self, z, fz, state):
        return Scripted.table[state + 1].clone(), state + 1


@given(data=st.data(), rows=st.integers(1, 4), count=st.integers(1, 8))
def test_each_row_keeps_the_state_of_its_smallest_residual(data, rows, count):
    one_row = st.lists(st.integers(1, 50), min_size=count, max_size=count, unique=True)
    residuals = torch.tensor([data.draw(one_row) for _ in range(rows)], dtype=torch.float64).T  # (count, rows)
    Scripted.table = 100.0 * torch.arange(1, count + 1)[:, None, None] + torch.arange(float(rows))[:, None]
    images = iter(Scripted.table + residuals[..., None])
    outcome = iterate(lambda z: next(images), Scripted.table[0], Scripted(), EXACT, max_evals=count)
    best = residuals.argmin(dim=0)
    assert outcome.residual.tolist() == residuals.amin(dim=0).tolist()
    assert torch.equal(outcome.z, Scripted.table[best, torch.arange(rows)])


def test_gradients_reach_the_state_that_each_row_keeps(normal):
    # z_k = w table[k]: which k is best differs from row to row, and not only the last.
    table, w = normal(9, 4, 3), torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    images = iter(w * table[1:])
    outcome = iterate(lambda z: next(images), w * table[0], Picard(), EXACT, max_evals=8, record=True)
    best = outcome.trace.argmin(dim=0)
    assert len(set(best.tolist())) > 1
    (grad,) = torch.autograd.grad(outcome.z.sum(), w)
    torch.testing.assert_close(grad, table[best, torch.arange(4)].sum())


def test_a_state_that_is_better_in_every_row_is_kept_without_a_copy():
    shown = []
    outcome = iterate(lambda z: (shown.append(z), 0.5 * z)[1], torch.ones(3, 2), Picard(), EXACT, max_evals=4)
    assert outcome.z is shown[-1]


def test_states_once_shown_are_never_written_to_however_their_rows_fare():
    # The first row breaks at once, the second gets better, the third worse.
    slope, shown = torch.tensor([[torch.nan], [0.5], [2.0]]), []

    def f(z):
        shown.append((z, z.clone()))
        return slope * z

    outcome = iterate(f, torch.ones(3, 1), Picard(), EXACT, max_evals=4)
    assert all(torch.equal(now, before) for now, before in shown)
    assert outcome.z.tolist() == [[1], [0.125], [1]]


def test_a_row_whose_scale_cannot_be_said_has_ended_though_its_residual_can():
    z0 = torch.full((1, 6), 1e308, dtype=torch.float64)  # its norm lies beyond float64
    sol = fixpoint.solve(lambda z: 0.99 * z, z0, solver=Picard(), rtol=0.0, on_failure="ignore")
    assert sol.status.tolist() == [Status.NON_FINITE]
    assert sol.nfev == 1


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
def test_checking_seldom_ends_each_row_at_the_first_check_that_finds_it_done(solver, contraction, check_every):
    # Sixty dimensions: after twenty evaluations no solver is near rounding, where rows end by themselves.
    f, max_evals, rtol = contraction(dim=60, rho=0.9, squash=torch.tanh), 20, 1e-3
    states = []
    watch = {"rtol": 0.0, "callback": lambda progress: states.append(progress.value), "on_failure": "ignore"}
    fixpoint.solve(f, solver=solver, max_evals=max_evals, **watch)
    sol = fixpoint.solve(f, solver=solver, rtol=rtol, max_evals=max_evals, check_every=check_every, on_failure="ignore")
    assert len(states) == max_evals
    checks = sorted({1, *range(check_every, max_evals, check_every), max_evals})
    for row in range(4):
        images = {check: f(states[check - 1])[row] for check in checks}
        residuals = {check: torch.linalg.vector_norm(images[check] - states[check - 1][row]) for check in checks}
        end = next(
            (check for check in checks if residuals[check] <= rtol * torch.linalg.vector_norm(images[check])), None
        )
        assert bool(sol.converged[row]) == (end is not None)
        best = end or min(checks, key=residuals.__getitem__)
        assert sol.evals[row] == (end or sol.nfev)
        torch.testing.assert_close(sol.value[row], states[best - 1][row], rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(sol.residual[row], residuals[best], rtol=1e-6, atol=1e-15)


@pytest.mark.parametrize(("check_every", "checks"), [(1, 10), (3, 5), (4, 4), (10, 2), (99, 2)])
def test_nothing_is_measured_and_nobody_waits_between_two_checks(monkeypatch, check_every, checks):
    monkeypatch.setattr("fixpoint.engine.norms._FEW", 0)  # as on a device
    waits = []
    for name in ("cpu", "item", "tolist", "nonzero", "__bool__", "__int__", "__float__"):
        method = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda *a, name=name, method=method, **k: (waits.append(name), method(*a, **k))[1]
        )
    norms = []
    tolerance = Tolerance(rtol=0.0, atol=0.0, norm=lambda x: (norms.append(x), x.abs().amax(dim=1))[1])
    for counted_tolerance in (tolerance, Tolerance(rtol=0.0, atol=0.0)):
        waits.clear()
        iterate(lambda z: z + 1, torch.zeros(2, 3), Picard(), counted_tolerance, max_evals=10, check_every=check_every)
        assert waits == ["cpu"] * checks
    assert len(norms) == 2 * checks


@pytest.mark.parametrize("check_every", [2, 3, 50])
def test_a_start_at_the_solution_is_seen_at_once_however_seldom_the_loop_checks(check_every):
    assert fixpoint.solve(lambda z: z, torch.ones(2, 3), check_every=check_every).nfev == 1


def test_checking_seldom_still_stops_at_max_evals():
    sol = fixpoint.solve(
        lambda z: z + 1, torch.zeros(1, 1), check_every=4, max_evals=6, on_failure="ignore", solver=Picard()
    )
    assert sol.nfev == 6


class Spy(Picard):
    def step(self, z, fz, state):
        assert torch.isfinite(z).all()
        assert torch.isfinite(fz).all()
        return super().step(z, fz, state)


BROKEN = torch.tensor([[torch.nan], [1e25], [0.9]])


def test_a_solver_is_never_shown_nan_or_infinity():
    sol = fixpoint.solve(lambda z: BROKEN * z + 1, torch.ones(3, 1), solver=Spy(), on_failure="ignore")
    assert sol.status.tolist() == [Status.NON_FINITE, Status.NON_FINITE, Status.CONVERGED]


@pytest.mark.parametrize("check_every", [3, 7])
def test_rows_that_break_between_two_checks_end_at_the_next_and_harm_no_other(solver, check_every):
    slope = BROKEN * torch.ones(6)
    options = {"solver": solver, "check_every": check_every, "on_failure": "ignore"}
    sol = fixpoint.solve(lambda z: slope * z + 1, torch.ones(3, 6), **options)
    assert sol.status.tolist() == [Status.NON_FINITE, Status.NON_FINITE, Status.CONVERGED]
    assert sol.value.isfinite().all()
    alone = fixpoint.solve(lambda z: slope[2:] * z + 1, torch.ones(1, 6), **options)
    assert alone.evals[0] == sol.evals[2]
    torch.testing.assert_close(alone.value[0], sol.value[2])


class Overflowing(Picard):
    """Proposes what no f could evaluate, in the first row alone."""

    def step(self, z, fz, state):
        return torch.where(torch.arange(len(z))[:, None] == 0, torch.inf, fz), state


@pytest.mark.parametrize("check_every", [1, 3])
def test_a_proposal_that_is_not_finite_is_answered_by_plain_steps(check_every):
    sol = fixpoint.solve(lambda z: 0.5 * z + 1, torch.zeros(2, 1), solver=Overflowing(), check_every=check_every)
    assert sol.converged.all()
    torch.testing.assert_close(sol.value, torch.full((2, 1), 2.0), rtol=2e-4, atol=0)


@pytest.mark.parametrize("check_every", [1, 3])
def test_a_row_that_plain_steps_break_too_ends_at_the_best_state_before(check_every):
    def f(z):
        image = 0.5 * z + 1
        return torch.where((torch.arange(2)[:, None] == 0) & (z > 0.5), torch.nan, image)

    sol = fixpoint.solve(f, torch.zeros(2, 1), solver=Overflowing(), check_every=check_every, on_failure="ignore")
    assert sol.status.tolist() == [Status.NON_FINITE, Status.CONVERGED]
    assert float(sol.value[0]) == 0
    assert float(sol.residual[0]) == 1


def test_a_proposal_that_is_not_finite_is_not_shown_to_the_solver_again():
    class Watchful(Overflowing):
        def step(self, z, fz, state):
            assert z.isfinite().all()
            return super().step(z, fz, state)

    fixpoint.solve(lambda z: 0.5 * z + 1, torch.zeros(2, 1), solver=Watchful(), on_failure="ignore")


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


def test_run_steps_hands_over_the_last_state_unverified(contraction):
    f = contraction(rho=0.5)
    outcome = run_steps(f, f.z0, Picard(), Tolerance(rtol=1e9, atol=0.0), depth=3)
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


def test_a_row_far_from_solved_has_not_stagnated_whatever_the_rounding():
    def f(z):  # plain iteration goes to and fro, by a fifth in the first row and by a hundredth in the second
        return torch.tensor([[2.2], [2.01]], dtype=z.dtype) - z

    z0 = torch.ones(2, 4, dtype=torch.bfloat16)
    solution = fixpoint.solve(f, z0, solver=fixpoint.Picard(), rtol=1e-3, max_evals=30, on_failure="ignore")
    assert solution.status.tolist() == [Status.MAX_EVALS, Status.STAGNATED]
