"""Windows that slide along chains: what is evaluated, who waits, and what a certificate finds."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

import fixpoint
from fixpoint import CausalQuasiNewton, Recurrence, Status
from fixpoint.chains.error_control import after_sweep
from tests.fixpoint.chains import Counted, gru, pendulum, relative_errors, solve


@settings(max_examples=20)
@given(window=st.integers(1, 40), max_rows=st.integers(1, 60))
def test_windows_and_budgets_change_no_result(window, max_rows):
    problem = gru(samples=4, steps=30, kind=Counted)
    solution = solve(problem, CausalQuasiNewton(window=window, max_rows=max_rows), rtol=1e-8)
    assert solution.converged.all()
    assert float(relative_errors(solution.value, problem.sequential()).max()) < 2e-8
    for asked in problem.asked:
        assert len(asked) <= max_rows
        for sample in range(4):
            steps = [step for number, step in asked if number == sample]
            assert steps == list(range(steps[0], steps[0] + len(steps))) if steps else True
            assert len(steps) <= window


def test_what_is_done_is_not_evaluated_again():
    problem = pendulum(kind=Counted)
    solution = solve(problem)
    firsts = [min((step for sample, step in asked if sample == 0), default=400) for asked in problem.asked]
    assert firsts == sorted(firsts)
    assert firsts[0] == 0
    evaluated = sum(map(len, problem.asked))
    assert evaluated < 0.8 * solution.nfev * 3 * 400
    last = [
        max(number for number, asked in enumerate(problem.asked) if any(s == b for s, _ in asked)) for b in range(3)
    ]
    assert [number + 1 for number in last] == solution.evals.tolist()


def test_a_narrow_window_evaluates_fewer_steps():
    # With slopes, states that enter a window are moved along with those before them.
    totals = {}
    for window in (None, 40):
        problem = pendulum(kind=Counted, slopes=torch.ones(400, dtype=torch.float64))
        assert solve(problem, CausalQuasiNewton(window=window), rtol=1e-4).converged.all()
        totals[window] = sum(map(len, problem.asked)) / (3 * 400)
    assert totals[40] < 0.8 * totals[None]


def test_rows_wait_for_room_and_are_served_in_turn():
    problem = gru(samples=5, steps=20, kind=Counted)
    solution = solve(problem, CausalQuasiNewton(max_rows=2))
    assert solution.converged.all()
    assert {sample for sample, _ in problem.asked[0]} == {0, 1}
    assert {sample for sample, _ in problem.asked[-1]} == {4}


def test_rows_share_the_room_that_there_is():
    problem = gru(samples=4, steps=20, kind=Counted)
    solve(problem, CausalQuasiNewton(max_rows=12))
    assert sorted(problem.asked[0]) == [(sample, step) for sample in range(4) for step in range(3)]


def test_a_window_of_one_is_the_sequential_run():
    problem = gru()
    solution = solve(problem, CausalQuasiNewton(window=1), rtol=0.0)
    assert solution.nfev == problem.steps
    assert (solution.residual == 0).all()
    assert_close(solution.value, problem.sequential(), rtol=1e-12, atol=1e-15)


class Corrected(Counted):
    """Adds ``error`` to what some steps answer, for as many calls as told."""

    wrong_steps, wrong_calls, error = range(0), 0, 0.0

    def transition(self, x, sample, step):
        out = super().transition(x, sample, step)
        wrong = (step >= self.wrong_steps.start) & (step < self.wrong_steps.stop)
        return out + self.error * (len(self.asked) <= self.wrong_calls) * wrong[:, None]


class Forgetful(Recurrence):
    """Answers wrongly for the first rounds: what was accepted by then does not fit its final answers."""

    calls = 0

    def transition(self, x, sample, step):
        self.calls += 1
        out = super().transition(x, sample, step)
        return out if self.calls > 3 else out + 0.1 * (step < 10)[:, None]


def test_a_certificate_is_an_evaluation_of_everything():
    problem, counted = pendulum(), pendulum(kind=Counted)
    plain, certified = solve(problem), solve(counted, CausalQuasiNewton(certify=True))
    assert len(counted.asked) == certified.nfev
    assert len(counted.asked[plain.nfev]) == 3 * 400
    assert plain.nfev + 1 < certified.nfev <= plain.nfev + 1 + 6  # and a twin, to see what errors become
    assert (certified.evals == certified.nfev).all()
    defect = (problem(certified.value) - certified.value).flatten(1).norm(dim=1)
    assert_close(certified.residual, defect, rtol=1e-6, atol=1e-12)


def test_a_certificate_finds_out_what_was_accepted_wrongly():
    start = torch.ones(1, 2, dtype=torch.float64)
    expected = Recurrence(lambda x: 0.5 * x + 1, start, steps=30).sequential()
    for certify in (False, True):
        problem = Forgetful(lambda x: 0.5 * x + 1, start, steps=30)
        solution = solve(problem, CausalQuasiNewton(certify=certify))
        assert solution.converged.all()
        assert (float((solution.value - expected).abs().max()) < 1e-5) == certify


def test_what_a_callback_was_shown_stays_as_it_was():
    problem = pendulum()
    shown, copies = [], []

    def look(progress):
        shown.append(progress.value)
        copies.append(progress.value.clone())

    start = problem.z0
    fixpoint.solve(problem, start, solver=CausalQuasiNewton(), rtol=1e-6, backward=None, callback=look)
    assert_close(shown, copies, rtol=0, atol=0)
    assert_close(start, problem.z0, rtol=0, atol=0)


def test_a_window_reckons_with_growth_beyond_it():
    # A pendulum that starts near the top: errors grow long after the states they stem from have left the window.
    start = torch.tensor([[3.0, 0.0], [0.2, 0.0]], dtype=torch.float64)
    problem = Recurrence(lambda x: x + 0.02 * torch.stack((x[:, 1], -x[:, 0].sin()), dim=1), start, steps=800)
    solution = solve(problem, CausalQuasiNewton(window=100), rtol=1e-6)
    assert solution.converged.all()
    assert float(relative_errors(solution.value, problem.sequential()).max()) < 2e-6


def test_states_that_enter_a_window_are_moved_as_the_last_ones_were():
    # Each state is one unit farther from the guess than the state before it.
    chain = Recurrence(lambda x: x + 1, torch.zeros(2, 3, dtype=torch.float64), steps=61, slopes=torch.ones(61))
    assert solve(chain, CausalQuasiNewton(window=10), rtol=1e-9).nfev == 7  # 1 state, then 10 a round


def test_no_state_is_evaluated_far_from_all_before_it():
    problem = gru(samples=2, steps=40, kind=Counted)
    problem.slopes = torch.full((40,), 500.0, dtype=torch.float64)
    assert solve(problem, rtol=1e-9).converged.all()
    for asked, inputs in zip(problem.asked, problem.inputs_asked, strict=True):
        for sample in range(2):
            sizes = [float(x.norm()) for (row, _), x in zip(asked, inputs, strict=True) if row == sample]
            assert max(sizes, default=0.0) < 1e3
    stopped = solve(problem, rtol=1e-9, max_evals=3, on_failure="ignore")
    assert stopped.predicted_error.isinf().all()  # nothing is predicted of states that were taken back


@pytest.mark.parametrize(
    ("step", "shrink"),
    [(lambda x: 1.5 * x.sin(), 1.0), (lambda x: x + 0.2 * x.sin(), 0.85)],
    ids=["growing", "shrinking"],
)
def test_errors_that_later_steps_enlarge_are_not_left(step, shrink):
    # Displacements grow and the states do not, or displacements last and the states shrink to a five hundredth.
    states = torch.randn(20, 40, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    if shrink < 1:
        states = 30 * shrink ** torch.arange(40)[:, None] * nn.functional.normalize(states, dim=2)
    before = torch.cat((torch.zeros_like(states[:, :1]), states[:, :-1]), dim=1)
    chain = Recurrence(lambda x, u: step(x) + u, torch.zeros_like(states[:, 0]), inputs=(states - step(before),))
    solution = solve(chain, rtol=1e-3)
    assert solution.converged.all()
    assert float(relative_errors(solution.value, states).max()) < 2e-3


@pytest.mark.parametrize("window", [None, 15])
@pytest.mark.parametrize("wrong_step", [0, 20])
def test_after_a_failed_certificate_the_chain_goes_on_from_the_first_wrong_state(window, wrong_step):
    slopes = torch.linspace(0.6, 1.0, 60, dtype=torch.float64)
    push = torch.randn(1, 60, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    inputs = (slopes[None, :, None].expand_as(push), push)

    def chain():
        return Corrected(lambda x, s, u: s * x + u, push[:, 0], inputs=inputs, slopes=slopes)

    rounds = solve(chain(), CausalQuasiNewton(window=window)).nfev
    problem = chain()
    problem.wrong_steps, problem.wrong_calls, problem.error = range(wrong_step, wrong_step + 2), rounds, 0.01
    solution = solve(problem, CausalQuasiNewton(window=window, certify=True))
    assert_close(solution.value, problem.sequential())
    places = [[step for _, step in asked] for asked in problem.asked]
    assert places[rounds] == places[-1] == list(range(60))  # the certificates
    assert places[rounds + 1] == list(range(wrong_step, 60)[:window])
    assert solution.nfev <= 2 * rounds + 2
    # The states that the certificate saw are the guess from which they go on.
    assert_close(problem.inputs_asked[rounds + 1], problem.inputs_asked[rounds][places[rounds + 1]], rtol=0, atol=0)


def test_a_certificate_adds_up_what_the_slopes_hand_down():
    # Each state fits the one before it within the tolerance, the last is eight tolerances from where it should be.
    problem = Corrected(lambda x: x, torch.ones(1, 2, dtype=torch.float64), steps=40, slopes=torch.ones(40))
    problem.wrong_steps, problem.wrong_calls, problem.error = range(40), 2, 2e-3
    solution = solve(problem, CausalQuasiNewton(certify=True), rtol=1e-2)
    assert solution.converged.all()
    assert_close(solution.value, torch.ones_like(solution.value), rtol=1.1e-2, atol=0)


def test_a_certificate_that_is_not_finite_loses_the_row():
    rounds = solve(pendulum(50)).nfev
    problem = pendulum(50, kind=Counted)
    step = problem.step

    def lost_at_the_end(x):
        out = step(x)
        out[-1] += torch.nan if len(problem.asked) > rounds else 0.0
        return out

    problem.step = lost_at_the_end
    solution = solve(problem, CausalQuasiNewton(certify=True), on_failure="ignore")
    assert solution.nfev > rounds + 1  # the other two are measured
    assert solution.status.tolist() == [Status.CONVERGED, Status.CONVERGED, Status.NON_FINITE]


@pytest.mark.parametrize("slope", [1.0, 0.9, 0.5])
def test_states_that_enter_a_window_follow_their_slopes(slope):
    # A zero guess misses the same push in every step: seen once, it is reckoned with.
    slopes = torch.full((61,), slope, dtype=torch.float64)
    chain = Recurrence(lambda x: slope * x + 1, torch.zeros(1, 2, dtype=torch.float64), steps=61, slopes=slopes)
    assert solve(chain, CausalQuasiNewton(window=10), rtol=1e-9).nfev == 7  # 1 state, then 10 a round


def test_predicted_errors_count_half_once_they_fall_to_a_third():
    error, before = np.array([[1.0, 1.0, 1.0, 1.0, 0.0]]), np.array([[3.0, 2.9, np.inf, 0.5, 0.0]])
    assert after_sweep(error, before).tolist() == [[0.5, 1.0, 1.0, 1.0, 0.0]]


@pytest.mark.parametrize("rtol", [1e-2, 1e-4])
def test_chains_end_a_round_early_where_their_errors_fall_fast(rtol, monkeypatch):
    # Error of every sample at the end, and rounds, with the rule and without it.
    outcomes = {}
    for rule in (after_sweep, lambda error, error_before: error):
        monkeypatch.setattr("fixpoint.chains.error_control.after_sweep", rule)
        problem = gru(samples=40, steps=60)
        solution = solve(problem, rtol=rtol)
        errors = relative_errors(solution.value, problem.sequential())
        outcomes[rule] = float(solution.evals.double().mean()), float(errors.max())
    (early, error), (late, _) = outcomes.values()
    assert early < late
    assert error < rtol


def test_the_predicted_error_of_a_chain_that_ended_is_what_the_last_sweep_leaves(monkeypatch):
    seen = []

    def noting(error, error_before):
        seen.append((error, after_sweep(error, error_before)))
        return seen[-1][1]

    monkeypatch.setattr("fixpoint.chains.error_control.after_sweep", noting)
    inputs = torch.randn(200, 3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    chain = Recurrence(lambda x, u: x.sin() + u, torch.zeros_like(inputs[:, 0]), inputs=(inputs,))
    solution = solve(chain, rtol=1e-1)
    # Of three states, one is exact after a round and one after two: the third alone has an error then.
    ended = (solution.evals == 2).numpy()
    error, left = (figures[ended, 1] for figures in seen[1])
    assert (left < error).any()
    assert_close(solution.predicted_error[ended], torch.from_numpy(left))


@pytest.mark.parametrize("window", [None, 1, 5])
@pytest.mark.parametrize("shape", [(3, 30, 2), (4, 20, 2), (4, 70, 2), (4, 30, 5), (4, 30)], ids=str)
def test_a_start_that_is_not_of_the_chains_shape_is_refused(window, shape):
    chain = Recurrence(lambda x: 0.5 * x, torch.ones(4, 2, dtype=torch.float64), steps=30)
    with pytest.raises(ValueError, match=r"state has shape \(B, T, \*shape\) = \(4, 30, 2\), found"):
        fixpoint.solve(chain, torch.zeros(shape, dtype=torch.float64), solver=CausalQuasiNewton(window=window))


@pytest.mark.parametrize("batch_dims", [0, 2])
def test_rows_of_a_chain_that_are_not_its_samples_are_refused(batch_dims):
    with pytest.raises(ValueError, match=f"batch_dims must be 1, found {batch_dims}"):
        fixpoint.solve(gru(), solver=CausalQuasiNewton(window=4), batch_dims=batch_dims)


def test_a_basis_that_is_not_finite_is_refused():
    problem = gru()
    problem.basis = torch.full((6, 6), torch.nan, dtype=torch.float64)
    with pytest.raises(ValueError, match="basis must be finite"):
        solve(problem)


@pytest.mark.parametrize(
    ("window", "message"), [(None, "positional arguments"), (4, "args are for an f that is called")]
)
def test_arguments_that_a_chain_would_not_see_are_refused(window, message):
    with pytest.raises(TypeError, match=message):
        fixpoint.solve(gru(), None, (torch.ones(3),), solver=CausalQuasiNewton(window=window), backward=None)
