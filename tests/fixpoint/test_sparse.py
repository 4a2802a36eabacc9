"""Chains of which not all steps are evaluated in every round."""

import pytest
import torch
from torch.testing import assert_close

import fixpoint
from fixpoint import CausalQuasiNewton, SparseChain, Status
from tests.fixpoint.chains import Counted, pendulum, relative_errors, solve


class Interpolated(Counted):
    """A recurrence that interpolates what its steps add, and is off by ``off`` where it does."""

    off = 0.0

    def sparse_transition(self, x, sample, step, evaluated):
        rows = list(zip(sample.tolist(), step.tolist(), strict=True))
        assert rows == sorted(rows)
        assert evaluated.tolist() == sorted(set(evaluated.tolist()))
        for number in set(sample.tolist()):
            mine = [row for row, (other, _) in enumerate(rows) if other == number]
            assert {mine[0], mine[-1]} <= set(evaluated.tolist())
        added = self.transition(x[evaluated], sample[evaluated], step[evaluated]) - x[evaluated]
        number = torch.searchsorted(evaluated, torch.arange(len(step)), right=True) - 1
        after = (number + 1).clamp(max=len(evaluated) - 1)
        known = step[evaluated]
        share = (step - known[number]) / (known[after] - known[number]).clamp(min=1)
        every = x + torch.lerp(added[number], added[after], share[:, None].to(x.dtype)) + self.off
        every[evaluated] = x[evaluated] + added
        inner = (sample[evaluated][:-2] == sample[evaluated][2:]).nonzero()[:, 0] + 1
        guess = added[inner - 1] + (added[inner + 1] - added[inner - 1]) * (
            (known[inner] - known[inner - 1]) / (known[inner + 1] - known[inner - 1])
        )[:, None].to(x.dtype)
        missed = x.new_zeros(len(step))
        missed[evaluated[inner]] = (guess - added[inner]).norm(dim=1)
        return every, missed


class Off(Interpolated):
    off = 0.05


class Told(Off):
    """Knows by how much it is off."""

    def sparse_transition(self, x, sample, step, evaluated):
        states, missed = super().sparse_transition(x, sample, step, evaluated)
        missed[evaluated] += 3 * self.off
        return states, missed


class Broken(Interpolated):
    off = torch.nan


def rows(problem):
    return sum(map(len, problem.asked)) / (len(problem.start) * problem.steps)


def test_it_is_told_by_its_method():
    assert isinstance(pendulum(kind=Interpolated), SparseChain)
    assert not isinstance(pendulum(), SparseChain)


def test_a_subclass_with_steps_of_its_own_is_evaluated_whole():
    class Pushed(Interpolated):
        def transition(self, x, sample, step):
            return super().transition(x, sample, step) + 0.01

    class Knows(Pushed):
        def sparse_transition(self, x, sample, step, evaluated):
            return super().sparse_transition(x, sample, step, evaluated)

    replaced = pendulum(steps=100, kind=Interpolated)
    own = replaced.transition
    replaced.transition = lambda x, sample, step: own(x, sample, step) + 0.01
    chains = (pendulum(steps=100, kind=Pushed), True), (pendulum(steps=100, kind=Knows), False), (replaced, True)
    for problem, whole in chains:
        solution = solve(problem, rtol=1e-4)
        assert (len(problem.asked[0]) == 300) == whole
        assert float((problem(solution.value) - solution.value).norm(dim=2).max()) < 1e-4


@pytest.mark.parametrize("steps", [200, 800])
def test_early_rounds_evaluate_a_part_of_the_steps(steps):
    whole, some = (pendulum(steps=steps, kind=kind) for kind in (Counted, Interpolated))
    expected = whole.sequential()
    found = solve(whole, rtol=1e-4)
    whole_rows, solution = rows(whole), solve(some, rtol=1e-4)
    assert solution.converged.all()
    assert float(relative_errors(solution.value, expected).max()) < 2e-4
    assert rows(some) < 0.7 * whole_rows
    assert solution.nfev <= found.nfev + 3
    first = [step for sample, step in some.asked[0] if sample == 0]
    spacing = 8 if steps >= 512 else 4
    assert first == sorted({0, *range(spacing - 1, steps, spacing), steps - 1})


@pytest.mark.parametrize("kind", [Off, Broken])
@pytest.mark.parametrize(
    "solver", [CausalQuasiNewton(), CausalQuasiNewton(window=100), CausalQuasiNewton(certify=True)]
)
def test_no_state_is_done_by_interpolation(kind, solver):
    """What is interpolated is wrong everywhere: the result comes from evaluated steps alone, and is right."""
    problem = pendulum(steps=200, kind=kind)
    solution = solve(problem, solver, rtol=1e-4, max_evals=2000)
    assert solution.converged.all()
    assert float(relative_errors(solution.value, problem.sequential()).max()) < 2e-4


def test_a_state_that_stays_where_it_is_is_not_done_by_interpolation():
    """The slopes are exact, so the second round finds nothing to correct, at states that are wrong."""
    slopes = torch.full((200,), 0.98, dtype=torch.float64)
    problem = Off(lambda x: 0.98 * x, torch.ones(2, 3, dtype=torch.float64), steps=200, slopes=slopes)
    solution = solve(problem, rtol=1e-4)
    assert solution.converged.all()
    assert float(relative_errors(solution.value, problem.sequential()).max()) < 2e-4


def test_where_interpolation_misses_much_all_is_evaluated_soon():
    rounds = {kind: solve(pendulum(steps=200, kind=kind), rtol=1e-6).nfev for kind in (Counted, Told, Off)}
    assert rounds[Told] <= rounds[Counted] + 2
    assert rounds[Told] < rounds[Off]


def test_steps_that_draw_are_evaluated_together():
    sizes = {}
    for draws in (False, True):

        def step(x, draws=draws):
            noise = torch.rand(()) if draws else 1
            return x + 0.02 * torch.stack((x[:, 1], -x[:, 0].sin()), dim=1) + 0 * noise

        problem = Interpolated(step, pendulum().start, steps=800)
        solution = solve(problem, rtol=1e-8)
        assert float(relative_errors(solution.value, problem.sequential()).max()) < 2e-8
        sizes[draws] = [len(asked) for asked in problem.asked]
    # That it draws is seen in the first round, which is evaluated twice beside other threads.
    assert sizes[False][2] < 3 * 800
    assert set(sizes[True][2:4]) == {3 * 800}


def test_each_state_that_is_done_was_evaluated_in_the_round_that_ended_it():
    problem = pendulum(steps=300, kind=Interpolated)
    solution = solve(problem, rtol=1e-4)
    last = {}
    for number, asked in enumerate(problem.asked):
        for sample, step in asked:
            last[sample, step] = number + 1
    for sample in range(3):
        ended = [last[sample, step] for step in range(300)]
        assert ended == sorted(ended)  # in the order of the chain
        assert ended[-1] == int(solution.evals[sample])


def test_a_budget_and_a_window_hold_for_what_is_evaluated():
    problem = pendulum(steps=400, kind=Interpolated)
    solution = solve(problem, CausalQuasiNewton(window=150, max_rows=300), rtol=1e-4)
    assert solution.converged.all()
    for asked in problem.asked:
        assert len(asked) <= 300
        for number in range(3):
            steps = [step for sample, step in asked if sample == number]
            assert not steps or steps[-1] - steps[0] < 150


def test_short_windows_are_evaluated_whole():
    problem = pendulum(steps=63, kind=Interpolated)
    solve(problem, rtol=1e-4)
    assert len(problem.asked[0]) == 3 * 63


@pytest.mark.parametrize(
    "solver", [CausalQuasiNewton(), CausalQuasiNewton(window=70), CausalQuasiNewton(window=100, certify=True)]
)
def test_rows_are_solved_as_by_themselves(solver):
    problem = pendulum(steps=200, kind=Interpolated)
    together = solve(problem, solver, rtol=1e-4)
    for row in range(3):
        alone = type(problem)(problem.step, problem.start[row : row + 1], steps=200)
        solution = solve(alone, solver, rtol=1e-4)
        assert solver.certify or int(solution.evals) == int(together.evals[row])  # all are certified together
        assert_close(solution.value, together.value[row : row + 1], rtol=1e-8, atol=1e-10)


def test_a_step_that_is_not_finite_is_told():
    class Failing(Interpolated):
        def transition(self, x, sample, step):
            return super().transition(x, sample, step).masked_fill((step == 150)[:, None], torch.nan)

        def sparse_transition(self, x, sample, step, evaluated):  # of this class, or all would be evaluated
            return super().sparse_transition(x, sample, step, evaluated)

    problem = pendulum(steps=200, kind=Failing)
    solution = solve(problem, rtol=1e-4, on_failure="ignore")
    assert len(problem.asked[0]) < 3 * 200
    assert solution.status.tolist() == [Status.NON_FINITE] * 3
    expected = pendulum(steps=200).sequential()[:, :150]
    assert float(relative_errors(solution.value[:, :150], expected).max()) < 2e-4


def test_a_wrong_shape_is_told():
    class Wrong(Interpolated):
        def sparse_transition(self, x, sample, step, evaluated):
            states, missed = super().sparse_transition(x, sample, step, evaluated)
            return states[:, :1], missed

    with pytest.raises(ValueError, match="must return the shape of its input"):
        solve(pendulum(steps=100, kind=Wrong))


def test_gradients_flow_through_the_solution():
    torch.manual_seed(0)
    rate = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    problem = Interpolated(lambda x: x - 0.02 * rate * x.sin(), torch.ones(2, 3, dtype=torch.float64), steps=100)
    value = fixpoint.solve(problem, solver=CausalQuasiNewton(), rtol=1e-8, backward=fixpoint.IFT(rtol=1e-8)).value
    (found,) = torch.autograd.grad(value[:, -1].sum(), rate)
    (expected,) = torch.autograd.grad(problem.sequential()[:, -1].sum(), rate)
    assert_close(found, expected, rtol=1e-5, atol=0)


def test_under_torch_func_all_is_evaluated():
    """What torch.func maps over is one map from states to states, which has no parts."""
    problem = pendulum(steps=100, kind=Broken)
    starts = torch.randn(2, 3, 100, 2, dtype=torch.float64)
    found = torch.func.vmap(lambda z: solve(problem, z0=z).value)(starts)
    assert_close(found, problem.sequential().expand_as(found), rtol=1e-5, atol=1e-5)
    assert {len(asked) for asked in problem.asked} == {300}
