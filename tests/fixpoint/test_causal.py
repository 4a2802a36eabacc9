"""CausalQuasiNewton: exact after T rounds at the latest, honest about its error, and frugal with evaluations."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

import fixpoint
from fixpoint import CausalQuasiNewton, Recurrence, Status


class Counted(Recurrence):
    """A recurrence that notes which steps of which samples were asked for, round by round."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.asked: list[list[tuple[int, int]]] = []
        self.inputs_asked: list[torch.Tensor] = []

    def transition(self, x, sample, step):
        self.inputs_asked.append(x)
        self.asked.append(list(zip(sample.tolist(), step.tolist(), strict=True)))
        return super().transition(x, sample, step)


def gru(samples: int = 3, steps: int = 80, kind: type[Recurrence] = Recurrence) -> Recurrence:
    torch.manual_seed(0)
    cell = nn.GRUCell(4, 6).double().requires_grad_(False)
    inputs = torch.randn(samples, steps, 4, dtype=torch.float64)
    return kind(lambda x, u: cell(u, x), torch.zeros(samples, 6, dtype=torch.float64), inputs=(inputs,))


def pendulum(steps: int = 400, kind: type[Recurrence] = Recurrence, **options) -> Recurrence:
    start = torch.tensor([[1.0, 0.0], [0.3, 0.5], [-2.0, 0.1]], dtype=torch.float64)
    return kind(lambda x: x + 0.02 * torch.stack((x[:, 1], -x[:, 0].sin()), dim=1), start, steps=steps, **options)


def logistic(steps: int = 50) -> Recurrence:
    start = torch.tensor([[0.2], [0.7]], dtype=torch.float64)
    return Recurrence(lambda x: 3.9 * x * (1 - x), start, steps=steps)


def lorenz(steps: int = 300) -> Recurrence:
    def step(x):
        a, b, c = x.unbind(dim=1)
        return x + 0.01 * torch.stack((10 * (b - a), a * (28 - c) - b, a * b - 8 / 3 * c), dim=1)

    return Recurrence(step, torch.ones(1, 3, dtype=torch.float64), steps=steps)


def solve(problem, solver=None, **options):
    options = {"rtol": 1e-6, "backward": None, "max_evals": 400} | options
    return fixpoint.solve(problem, solver=solver or CausalQuasiNewton(), **options)


def relative_errors(value, reference):
    return (value - reference).flatten(2).norm(dim=2) / reference.flatten(2).norm(dim=2)


@pytest.mark.parametrize("solver", [CausalQuasiNewton(memory=m, window=w) for m in (1, 3) for w in (None, 25)])
@pytest.mark.parametrize("problem", [gru(), pendulum()], ids=["gru", "pendulum"])
def test_equals_the_sequential_run(problem, solver):
    solution = solve(problem, solver)
    assert solution.converged.all()
    assert float(relative_errors(solution.value, problem.sequential()).max()) < 2e-6
    assert solution.nfev < problem.steps


def test_takes_few_rounds_where_steps_are_smooth():
    assert solve(pendulum()).nfev <= 15  # for 400 steps
    assert solve(gru(steps=400)).nfev <= 20


@pytest.mark.parametrize("problem", [logistic(), gru(steps=30)], ids=["logistic", "gru"])
def test_exact_after_as_many_rounds_as_steps_whatever_the_tolerance(problem):
    solution = solve(problem, rtol=0.0)
    assert solution.converged.all()
    assert solution.nfev <= problem.steps
    # Up to what the size of a batch changes in the rounding of a product.
    assert_close(solution.value, problem.sequential(), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("slope", [-3.0, 0.0, 50.0])
def test_wrong_slopes_cost_rounds_and_nothing_else(slope):
    problem = gru(steps=40)
    problem.slopes = torch.full((40,), slope, dtype=torch.float64)
    solution = solve(problem)
    assert solution.converged.all()
    assert solution.nfev <= 40
    assert float(relative_errors(solution.value, problem.sequential()).max()) < 2e-6


def test_wild_predictions_are_taken_back():
    # Wrong models throw later states of this chain so far out that their images are not finite.
    problem = lorenz()
    solution = solve(problem, rtol=1e-9)
    assert solution.converged.all()
    assert float(relative_errors(solution.value, problem.sequential()).max()) < 1e-5


@pytest.mark.parametrize(("window", "rounds"), [(None, 2), (10, 12)])
def test_exact_slopes_take_two_rounds_a_window(window, rounds):
    # What was remembered of the steps that a window has left says nothing of those that it comes to.
    slopes = torch.linspace(0.5, 1.1, 60, dtype=torch.float64)
    inputs = torch.randn(2, 60, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    spread = slopes[None, :, None].expand_as(inputs)
    chain = Recurrence(lambda x, s, u: s * x + u, inputs[:, 0], inputs=(spread, inputs), slopes=slopes)
    solution = solve(chain, CausalQuasiNewton(window=window), rtol=1e-9)
    assert solution.nfev <= rounds
    assert_close(solution.value, chain.sequential())


def test_slopes_in_a_basis():
    generator = torch.Generator().manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(4, 4, generator=generator, dtype=torch.float64))
    slopes = torch.rand(30, 4, generator=generator, dtype=torch.float64)
    maps = basis @ torch.diag_embed(slopes) @ basis.T
    start = torch.randn(2, 4, generator=generator, dtype=torch.float64)
    pushed = torch.randn(2, 30, 4, generator=generator, dtype=torch.float64)
    steps = maps.expand(2, 30, 4, 4)
    chain = Recurrence(lambda x, a, u: (a @ x[..., None])[..., 0] + u, start, inputs=(steps, pushed), slopes=slopes)
    chain.basis = basis
    solution = solve(chain, rtol=1e-9)
    assert solution.nfev == 2
    assert_close(solution.value, chain.sequential())
    for window in (7,):
        assert_close(solve(chain, CausalQuasiNewton(window=window), rtol=1e-9).value, chain.sequential())


def test_any_strictly_causal_map_is_served():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(20, 20, generator=generator, dtype=torch.float64).tril(-1) / 5
    push = torch.randn(2, 20, 3, generator=generator, dtype=torch.float64)
    calls = []

    def f(z):  # each row depends on all earlier ones
        calls.append(z)
        return torch.tanh(weight @ z) + push

    solution = solve(f, z0=torch.zeros_like(push))
    row, expected = torch.zeros_like(push), torch.zeros_like(push)
    for k in range(20):
        row = torch.tanh(weight[k] @ expected) + push[:, k]
        expected[:, k] = row
    assert solution.converged.all()
    assert len(calls) == solution.nfev <= 20
    assert_close(solution.value, expected, rtol=1e-5, atol=1e-5)


@settings(max_examples=20, deadline=None)
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


@pytest.mark.parametrize("solver", [CausalQuasiNewton(), CausalQuasiNewton(window=20)], ids=["all", "window"])
def test_a_row_alone_is_what_it_is_in_a_batch(solver):
    problem = gru()
    together = solve(problem, solver)
    for row in range(3):
        one = Recurrence(problem.step, problem.start[row : row + 1], inputs=(problem.inputs[0][row : row + 1],))
        alone = solve(one, solver)
        assert alone.nfev == int(together.evals[row])
        assert_close(alone.value[0], together.value[row])


def test_a_row_that_is_lost_harms_no_other():
    problem = gru(steps=40)
    poisoned = problem.inputs[0].clone()
    poisoned[1, 17] = torch.nan
    problem.inputs = (poisoned,)
    solution = solve(problem, on_failure="ignore")
    assert solution.status.tolist() == [Status.CONVERGED, Status.NON_FINITE, Status.CONVERGED]
    assert solution.residual.isinf().tolist() == [False, True, False]
    expected = problem.sequential()
    assert_close(solution.value[[0, 2]], expected[[0, 2]], rtol=1e-5, atol=1e-5)
    assert_close(solution.value[1, :17], expected[1, :17], rtol=1e-5, atol=1e-5)  # what came before is kept


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
    problem = pendulum()
    plain, certified = solve(problem), solve(problem, CausalQuasiNewton(certify=True))
    assert certified.nfev == plain.nfev + 1
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


def test_predicted_errors_hold_on_many_chains():
    """Linear, mixture-like and expanding chains: the last state is as near as was asked, or nearer."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    rtol, samples, steps, dim = 1e-3, 60, 60, 4
    noise = 0.3 * normal(samples, steps, dim)
    tilt = normal(samples, 1, dim, dim).expand(-1, steps, -1, -1) / dim**0.5
    centres = normal(samples, 1, 5, dim).expand(-1, steps, -1, -1)

    def linear(x, u, a):
        return x + 0.1 * (a @ x[..., None])[..., 0] + u

    def expanding(x, u, a):  # errors grow more than tenfold
        return x + 0.15 * torch.tanh(2 * (a @ x[..., None])[..., 0]) + 0.03 * x + 0.2 * u

    def mixture(x, u, c):  # drawn towards the nearest of five centres
        weights = torch.softmax(-2 * (x[:, None] - c).square().sum(dim=2), dim=1)
        return x + 0.1 * ((weights[..., None] * c).sum(dim=1) - x) + 0.1 * u

    for step, given_ in ((linear, tilt), (expanding, tilt), (mixture, centres)):
        chain = Recurrence(step, normal(samples, dim), inputs=(noise, given_))
        for solver in (CausalQuasiNewton(), CausalQuasiNewton(window=20)):
            solution = solve(chain, solver, rtol=rtol)
            assert solution.converged.all()
            assert float(relative_errors(solution.value, chain.sequential())[:, -1].max()) < 2 * rtol


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision(dtype):
    chain = Recurrence(lambda x: 0.9 * x + 0.5, torch.ones(2, 3, dtype=dtype), steps=50)
    solution = solve(chain, rtol=1e-2)
    assert solution.value.dtype == dtype
    assert solution.converged.all()
    assert_close(solution.value.float(), chain.sequential().float(), rtol=3e-2, atol=3e-2)


def test_stopping_and_errors_hand_over_what_there_is():
    problem = pendulum()
    seen = []

    def callback(progress):
        seen.append(progress)
        return progress.nfev == 3

    solution = solve(problem, callback=callback, on_failure="ignore", record=True)
    assert solution.nfev == len(seen) == 3
    assert (solution.status == Status.MAX_EVALS).all()
    assert solution.trace.shape == (3, 3)
    assert seen[-1].value.shape == problem.z0.shape

    def fails(progress):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as info:
        solve(problem, callback=fails)
    assert info.value.solution.nfev == 1


@pytest.mark.parametrize("max_evals", [1, 2])
def test_one_round_and_two_are_legal(max_evals):
    solution = solve(pendulum(), max_evals=max_evals, on_failure="ignore")
    assert solution.nfev == max_evals
    assert not solution.converged.any()


def test_one_step():
    chain = Recurrence(lambda x: 2 * x, torch.ones(2, 3), steps=1)
    solution = solve(chain)
    assert solution.nfev == 1
    assert (solution.value == 2).all()


class Cell(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(3, 3).double()

    def forward(self, x, u):
        return torch.tanh(self.inner(x) + u)


@pytest.mark.parametrize("solver", [CausalQuasiNewton(), CausalQuasiNewton(window=6)], ids=["all", "window"])
def test_gradients_are_those_of_the_sequential_run(solver):
    cell, inputs = Cell(), torch.randn(2, 20, 3, dtype=torch.float64)
    start = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    chain = Recurrence(cell, start, inputs=(inputs,))
    solution = fixpoint.solve(chain, solver=solver, rtol=1e-11, backward=fixpoint.IFT(rtol=1e-10))
    wanted = [start, *cell.parameters()]
    found = torch.autograd.grad(solution.value[:, -1].square().sum(), wanted)
    expected = torch.autograd.grad(chain.sequential()[:, -1].square().sum(), wanted)
    assert_close(found, expected, rtol=1e-7, atol=1e-10)
    assert solution.adjoint.converged.all()
    assert solution.adjoint.nfev <= 20


def test_the_adjoint_takes_the_problems_slopes_backwards():
    slopes = torch.linspace(0.2, 1.0, 30, dtype=torch.float64)
    push = torch.randn(1, 30, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    spread = slopes[None, :, None].expand_as(push)
    chain = Recurrence(lambda x, s, u: s * x + u, push[:, 0].detach(), inputs=(spread, push), slopes=slopes)
    solution = fixpoint.solve(chain, solver=CausalQuasiNewton(), rtol=1e-10, backward=fixpoint.IFT(rtol=1e-9))
    (found,) = torch.autograd.grad(solution.value[:, -1].sum(), push)
    assert solution.adjoint.nfev == 2
    expected = torch.cat((slopes[1:].flip(0).cumprod(0).flip(0), torch.ones(1, dtype=torch.float64)))
    assert_close(found[0], expected[:, None].expand(30, 2))


@pytest.mark.parametrize("backward", [fixpoint.JFB(), fixpoint.Phantom(steps=3), fixpoint.Unroll()], ids=repr)
def test_other_backward_rules_attach(backward):
    cell, inputs = Cell(), torch.randn(2, 6, 3, dtype=torch.float64)
    chain = Recurrence(cell, torch.zeros(2, 3, dtype=torch.float64), inputs=(inputs,))
    solution = fixpoint.solve(chain, solver=CausalQuasiNewton(), rtol=1e-8, backward=backward)
    assert_close(solution.value.detach(), chain.sequential().detach(), rtol=1e-5, atol=1e-6)
    solution.value.sum().backward()
    assert cell.inner.weight.grad.abs().sum() > 0


def test_what_does_not_fit_is_refused_at_once():
    solver = CausalQuasiNewton()
    with pytest.raises(ValueError, match="a dimension for the steps"):
        fixpoint.solve(torch.cos, torch.zeros(3), solver=solver)
    with pytest.raises(ValueError, match="nested state"):
        fixpoint.solve(lambda z: z, (torch.zeros(3, 2),), solver=solver)
    chain = pendulum()
    chain.slopes = torch.ones(7)
    with pytest.raises(ValueError, match=r"\(T,\) = \(400,\).*found \(7,\)"):
        solve(chain)
    chain = pendulum()
    chain.basis = torch.eye(3)
    with pytest.raises(ValueError, match=r"basis.*\(2, 2\)"):
        solve(chain)
    with pytest.raises(TypeError, match="learns from solve"):
        solver.init(torch.zeros(1, 2))
    for option in ("memory", "window", "max_rows"):
        with pytest.raises(ValueError, match=option):
            CausalQuasiNewton(**{option: 0})
    with pytest.raises(TypeError):
        CausalQuasiNewton(windows=3)


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
    assert stopped.residual.isinf().all()  # nothing is predicted of states that were taken back


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
    assert solution.nfev == rounds + 1
    assert solution.status.tolist() == [Status.CONVERGED, Status.CONVERGED, Status.NON_FINITE]


@pytest.mark.parametrize("memory", [1, 2])
def test_rounds_recorded_for_gradients_are_the_same_rounds(memory):
    problem, solver = gru(steps=60), CausalQuasiNewton(memory=memory)
    plain = solve(problem, solver)
    problem.start.requires_grad_()
    recorded = solve(problem, solver, backward=fixpoint.Unroll())
    assert recorded.value.requires_grad
    assert recorded.nfev <= plain.nfev + 1
    assert float(relative_errors(recorded.value.detach(), plain.value).max()) < 1e-5


@pytest.mark.parametrize("slope", [1.0, 0.9, 0.5])
def test_states_that_enter_a_window_follow_their_slopes(slope):
    # A zero guess misses the same push in every step: seen once, it is reckoned with.
    slopes = torch.full((61,), slope, dtype=torch.float64)
    chain = Recurrence(lambda x: slope * x + 1, torch.zeros(1, 2, dtype=torch.float64), steps=61, slopes=slopes)
    assert solve(chain, CausalQuasiNewton(window=10), rtol=1e-9).nfev == 7  # 1 state, then 10 a round
