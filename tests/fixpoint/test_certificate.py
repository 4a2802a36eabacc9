"""What is called converged: measured where a certificate was asked for, or where nobody promises that f is causal."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

import fixpoint
from fixpoint import CausalQuasiNewton, Recurrence, Status
from fixpoint.chains.certificate import Certificate
from fixpoint.engine.layout import Layout
from tests.fixpoint.chains import Counted, gru, pendulum, relative_errors, solve

D = torch.float64


def residual(f, value):
    return (f(value) - value).flatten(1).norm(dim=1)


def test_a_certificate_keeps_to_the_budget_of_rows_and_every_part_of_it_is_counted():
    problem = gru(samples=2, steps=50, kind=Counted)
    seen = []
    solver = CausalQuasiNewton(max_rows=8, certify=True)
    solution = solve(problem, solver, callback=lambda progress: seen.append(progress.nfev))
    sizes = [len(asked) for asked in problem.asked]
    assert solution.converged.all()
    assert max(sizes) <= 8
    assert len(sizes) == solution.nfev
    assert seen == list(range(1, solution.nfev + 1))
    rounds = solve(gru(samples=2, steps=50), replace(solver, certify=False)).nfev
    certificate = [pair for asked in problem.asked[rounds : rounds + 13] for pair in asked]
    assert certificate == [(sample, step) for sample in range(2) for step in range(50)]
    assert_close(solution.residual, residual(problem, solution.value), rtol=1e-6, atol=1e-12)


def test_a_certificate_that_the_budget_cuts_short_says_nothing():
    solver = CausalQuasiNewton(max_rows=8, certify=True)
    whole = solve(gru(samples=2, steps=50), solver).nfev
    solution = solve(gru(samples=2, steps=50), solver, max_evals=whole - 1, on_failure="ignore")
    assert (solution.status == Status.MAX_EVALS).all()
    assert solution.residual.isnan().all()
    assert solution.predicted_error.isfinite().all()


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    steps=st.integers(1, 40),
    window=st.sampled_from([None, 1, 5]),
    max_rows=st.sampled_from([None, 7]),
    slope=st.sampled_from([None, -2.0, 0.0, 1.0, 30.0]),
    rtol=st.sampled_from([1e-1, 1e-3, 1e-6]),
    atol=st.sampled_from([0.0, 1e-3]),
    growth=st.floats(0.2, 1.6),
)
def test_a_certified_row_never_misses_the_tolerance(seed, steps, window, max_rows, slope, rtol, atol, growth):
    generator = torch.Generator().manual_seed(seed)
    matrix = growth * torch.linalg.qr(torch.randn(3, 3, generator=generator, dtype=D))[0]
    push = torch.randn(4, steps, 3, generator=generator, dtype=D)
    chain = Recurrence(
        lambda x, u: torch.sin(x @ matrix) + 0.3 * x @ matrix + u,
        torch.randn(4, 3, generator=generator, dtype=D),
        inputs=(push,),
        slopes=None if slope is None else torch.full((steps,), slope),
    )
    solver = CausalQuasiNewton(window=window, max_rows=max_rows, certify=True)
    solution = solve(chain, solver, rtol=rtol, atol=atol, max_evals=1000, on_failure="ignore")
    done, image, slack = solution.converged, chain(solution.value)[solution.converged], 1 + 1e-6
    difference = image - solution.value[done]
    assert (difference.norm(dim=2) <= slack * (atol + rtol * image.norm(dim=2)) + 1e-14).all()
    row = difference.flatten(1).norm(dim=1)
    assert (row <= slack * (atol + rtol * image.flatten(1).norm(dim=1)) + 1e-14).all()
    assert_close(solution.residual[done], row, rtol=1e-6, atol=1e-12)
    assert done.all()  # no chain is left going round in circles


@pytest.mark.parametrize("window", [None, 5, 1])
def test_what_f_rounds_otherwise_in_another_batch_is_no_error_that_is_inherited(window):
    """By a slope that is far too large it would be, and the chain would go back for ever; on some processors it did."""
    generator = torch.Generator().manual_seed(0)
    matrix, push = (
        torch.randn(3, 3, generator=generator, dtype=D) / 2,
        torch.randn(4, 13, 3, generator=generator, dtype=D),
    )

    def f(x, u):
        return (torch.sin(x @ matrix) + u) * (1 + torch.finfo(D).eps * len(x))

    chain = Recurrence(
        f, torch.randn(4, 3, generator=generator, dtype=D), inputs=(push,), slopes=torch.full((13,), 30.0)
    )
    solver = CausalQuasiNewton(window=window, max_rows=7, certify=True)
    solution = solve(chain, solver, rtol=1e-3, max_evals=1000)
    assert solution.converged.all()
    assert float(residual(chain, solution.value).max()) < 1e-12


def bound(chain, **options):
    layout = Layout.of(chain.z0, 1)
    return CausalQuasiNewton(**options).bind(chain, layout)[1]


def findings(defects, slope, rtol=1e-2):
    """The certificate of one chain of ones whose images are off by so much."""
    count = len(defects)
    chain = Recurrence(lambda x: x, torch.ones(1, 1, dtype=D), steps=count, slopes=torch.full((count,), slope))
    states = torch.cat((torch.ones(count, 1, dtype=D), torch.zeros(1, 1, dtype=D)))
    certificate = Certificate.empty(states, np.array([0]), count)
    certificate.take(certificate.pending(None), states[:-1] + torch.tensor(defects, dtype=D)[:, None])
    return certificate.judge(bound(chain), states, (np.zeros(1), np.full(1, rtol)))


@pytest.mark.parametrize(
    ("defects", "slope", "first_wrong"),
    [
        ([0.0, 0.005, 0.02, 0.0], 0.5, 2),  # too large by itself
        (
            [0.009, 0.018, 0.018, 0.018],
            -1.0,
            1,
        ),  # hidden by what it inherits
        ([0.0, 0.0, 0.006, 0.006], 1.0, 2),  # the last one inherits too much: from where the first error is
    ],
)
def test_a_chain_goes_on_from_the_first_state_that_is_wrong(defects, slope, first_wrong):
    found = findings(defects, slope)
    assert found.passed.tolist() == [False]
    assert found.first_wrong.tolist() == [first_wrong]


def test_a_chain_passes_when_no_state_is_off_by_itself_or_by_what_it_inherits():
    assert findings([0.004, 0.004, 0.004], 0.5).passed.tolist() == [True]


def test_the_states_of_a_certified_row_share_atol():
    # Each state may be off by 1e-2 where states are judged alone; a hundred of them are off by 1e-1 then.
    chain = Recurrence(lambda x, u: x.sin() + u, torch.zeros(1, 1, dtype=D), inputs=(torch.ones(1, 100, 1, dtype=D),))
    guess = chain.sequential() + 5e-3 * (-1) ** torch.arange(100)[None, :, None]
    solution = solve(chain, CausalQuasiNewton(certify=True), z0=guess, rtol=0.0, atol=1e-2)
    assert solution.converged.all()
    assert (residual(chain, solution.value) <= 1e-2).all()


def test_a_lost_image_says_nothing_to_the_states_before_it():
    chain = gru(samples=1, steps=6)
    sweeper = bound(chain)
    z = chain.z0.flatten(1)
    state = sweeper.init(z)
    for _ in range(2):
        z, state = sweeper.step(z, chain(z.reshape(1, 6, 6)).flatten(1), state)
    images = chain(z.reshape(1, 6, 6)).flatten(1)
    expected, _ = sweeper.step(z, images, state)
    lost = images.clone()
    lost[:, 4 * 6] = torch.nan
    found, _ = sweeper.step(z, lost, state)
    assert torch.isfinite(found).all()
    assert_close(found[:, : 3 * 6], expected[:, : 3 * 6], rtol=0.1, atol=0.01)
    assert_close(found[:, 4 * 6 : 5 * 6], found[:, 3 * 6 : 4 * 6])  # held back to the state before


def test_without_a_certificate_errors_are_predicted_and_called_so():
    problem, shown = pendulum(), []
    solution = solve(problem, callback=shown.append, record=True)
    assert solution.residual.isnan().all()
    assert solution.relative_residual.isnan().all()
    assert (solution.predicted_error < 1e-4).all()
    assert_close(solution.trace[-1], solution.predicted_error)
    assert "worst predicted error" in repr(solution)
    assert shown[0].residual.isnan().all()
    assert_close(shown[-1].predicted_error, solution.predicted_error)
    with pytest.warns(fixpoint.ConvergenceWarning, match="worst predicted error"):
        solve(problem, max_evals=3)
    measured = solve(problem, CausalQuasiNewton(certify=True))
    assert "worst relative residual" in repr(measured)
    assert measured.predicted_error.shape == (3,)
    assert solve(problem, fixpoint.Picard(), rtol=1e-1).predicted_error is None


def test_a_window_of_one_measures_as_it_goes():
    solution = solve(gru(), CausalQuasiNewton(window=1), rtol=0.0)
    assert (solution.residual == 0).all()
    stopped = solve(gru(), CausalQuasiNewton(window=1), max_evals=3, on_failure="ignore")
    assert stopped.residual.isnan().all()


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    steps=st.integers(1, 6),
    own=st.sampled_from([0.0, 0.5]),
    later=st.sampled_from([0.0, 0.4]),
    window=st.sampled_from([None, 2]),
)
def test_an_f_that_is_not_causal_is_never_wrong_and_called_converged(seed, steps, own, later, window):
    push = torch.randn(3, steps, 2, generator=torch.Generator().manual_seed(seed), dtype=D)

    def f(z):
        earlier = torch.cat((torch.zeros_like(z[:, :1]), z[:, :-1]), dim=1)
        after = torch.cat((z[:, 1:], torch.zeros_like(z[:, :1])), dim=1)
        return own * z.cos() + later * after.sin() + 0.5 * earlier.tanh() + push

    rtol = 1e-5
    solution = fixpoint.solve(
        f, torch.zeros_like(push), solver=CausalQuasiNewton(window=window), rtol=rtol, on_failure="ignore"
    )
    done = solution.converged
    measured = residual(f, solution.value)
    assert (measured[done] <= (1 + 1e-6) * rtol * f(solution.value).flatten(1).norm(dim=1)[done]).all()
    assert_close(solution.residual[done], measured[done], rtol=1e-6, atol=1e-14)
    if own == later == 0:
        assert done.all()
        assert solution.nfev <= steps + 1


def test_what_depends_on_itself_gets_its_own_fixed_point():
    solution = fixpoint.solve(lambda z: 0.5 * z.cos(), torch.zeros(1, 3), solver=CausalQuasiNewton(), rtol=1e-6)
    assert solution.converged.all()
    assert_close(solution.value, torch.full((1, 3), 0.450183611), rtol=1e-5, atol=0)


def test_a_plain_causal_f_takes_one_evaluation_more_than_it_has_states_at_most():
    # Wrong models throw later states of Lorenz's equations so far out that their images are not finite.
    def step(x):
        a, b, c = x.unbind(dim=1)
        return x + 0.01 * torch.stack((10 * (b - a), a * (28 - c) - b, a * b - 8 / 3 * c), dim=1)

    chain = Recurrence(step, torch.ones(1, 3, dtype=D), steps=300)
    solution = fixpoint.solve(
        lambda z: chain(z), chain.z0, solver=CausalQuasiNewton(), rtol=1e-9, max_evals=301, backward=None
    )
    assert solution.converged.all()
    assert float(relative_errors(solution.value, chain.sequential()).max()) < 1e-5


@pytest.mark.parametrize("slope", [20.0, None])
@pytest.mark.parametrize("options", [{}, {"window": 10}, {"max_rows": 40}, {"certify": True}], ids=str)
def test_states_that_leave_the_domain_of_f_are_taken_back(options, slope):
    # The roots are of negative numbers where a guess is -5, and wherever slopes of 20 lead.
    inputs = torch.rand(4, 40, 2, generator=torch.Generator().manual_seed(0), dtype=D)
    lost = []

    def step(x, u):
        out = (1.2 + 0.5 * x - u).sqrt()
        lost.append(int(out.isnan().sum()))
        return out

    slopes = None if slope is None else torch.full((40,), slope)
    chain = Recurrence(step, torch.ones(4, 2, dtype=D), inputs=(inputs,), slopes=slopes)
    guess = chain.z0
    guess[:, 5::4] = -5
    solution = solve(chain, CausalQuasiNewton(**options), z0=guess, rtol=1e-8)
    assert sum(lost) > 0
    assert solution.converged.all()
    assert_close(solution.value, chain.sequential(), rtol=1e-6, atol=1e-8)


def test_nothing_is_believed_of_a_state_whose_image_is_not_finite():
    # The third step is lost until its input is exact to 1e-3: it must not be taken for done before.
    def step(x, u):
        return torch.where((u > 0) & ((x - 1).abs() > 1e-3), torch.nan, 0.5 * x + 0.5)

    inputs = torch.zeros(1, 12, 1, dtype=D)
    inputs[:, 8] = 1
    chain = Recurrence(step, torch.full((1, 1), 1.1, dtype=D), inputs=(inputs,))
    solution = solve(chain, rtol=1e-1, max_evals=2, on_failure="ignore")
    assert not solution.converged.any()
    assert solution.predicted_error.isinf().all()
