"""Anderson acceleration against least squares, GMRES theory, its own failures and the promised evaluation counts."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.optimize
import torch

import fixpoint
from fixpoint import Anderson, Broyden, Picard, Status
from fixpoint.bench.problems import expansive, linear, tanh
from fixpoint.solvers.anderson import _Guard
from fixpoint.solvers.small import NUMPY

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


def anderson_by_lstsq(f, z, steps):
    """The iterates of Anderson by plain least squares in NumPy, with every difference kept."""
    zs, gs = [], []
    for _ in range(steps):
        g = f(z) - z
        zs.append(z)
        gs.append(g)
        dz, dg = np.diff(zs, axis=0).T, np.diff(gs, axis=0).T
        gamma = np.linalg.lstsq(dg, g, rcond=None)[0] if dg.size else np.zeros(0)
        z = z + g - ((dz + dg) @ gamma if dg.size else 0)
    return z


def iterate_in_numpy(f):
    return lambda z: f(torch.from_numpy(z)[None])[0].numpy()


@pytest.mark.parametrize("memory", [3, 5])
@pytest.mark.parametrize("steps", [1, 2, 3, 5])
def test_steps_equal_plain_least_squares(contraction, memory, steps):
    f = contraction(rows=1, dim=8, rho=0.9, squash=torch.tanh)
    expected = anderson_by_lstsq(iterate_in_numpy(f), np.zeros(8), steps)
    sol = fixpoint.solve(f, solver=Anderson(memory=memory), depth=steps)
    np.testing.assert_allclose(sol.value[0], expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("memory", [2, 3, 5])
def test_on_a_symmetric_linear_map_a_short_memory_is_as_good_as_an_unlimited_one(memory):
    problem = linear(rho=0.95, dim=12, rows=1, dtype="float64")
    expected = anderson_by_lstsq(iterate_in_numpy(problem), np.zeros(12), 11)
    sol = fixpoint.solve(problem, solver=Anderson(memory=memory), depth=11)
    np.testing.assert_allclose(sol.value[0], expected, rtol=1e-5, atol=1e-7)


def follow(f, solver, steps):
    """The proposals of ``steps`` steps, and whether each was a plain one."""
    z, state = f.z0, solver.init(f.z0)
    plain = []
    for _ in range(steps):
        fz = f(z)
        z, state = solver.step(z, fz, state)
        plain.append((z - fz).abs().amax(dim=1) == 0)
    return torch.stack(plain)


def test_a_row_whose_residual_is_far_from_the_predicted_one_takes_plain_steps_and_more_each_time():
    class Erratic:
        """f(z) - z is small for a few steps, then large for one, whatever z is: no model can hold."""

        z0 = torch.zeros(2, 3, dtype=torch.float64)
        count = 0

        def __call__(self, z):
            generator = torch.Generator().manual_seed(self.count)
            g = torch.randn(2, 3, generator=generator, dtype=torch.float64) * (1000.0 if self.count % 5 == 4 else 1.0)
            g[1] = 1 - torch.tensor([0.9, 0.5, 0.1]) * z[1]  # an ordinary linear map, solved in a few steps
            self.count += 1
            return z + g

    plain = follow(Erratic(), Anderson(), 40)
    lengths = [len(run) for run in "".join("p" if p else "-" for p in plain[:, 0].tolist()).split("-") if run]
    assert [n for i, n in enumerate(lengths) if n > max(lengths[:i], default=0)][:4] == [1, 2, 4, 8], "the rests double"
    assert not plain[1:4, 1].any(), "the other row does not rest"


def test_judge_trusts_what_follows_the_prediction_alone():
    def guard_with(bound=1.0):
        return _Guard.start(NUMPY, np.array([200.0]), np.array([200.0]))._replace(bound=np.array([bound]))

    def trusts(square, predicted, **known):
        return judge(guard_with(**known), square, predicted)[0]

    assert trusts(2.0, 0.5)
    assert not trusts(2.0, 1.5), "a dropped difference was still needed"
    assert trusts(99.0, 0.5)
    assert not trusts(101.0, 0.5), "ten times the predicted residual"
    assert trusts(100.0, 1.0), "the bounds may be met"
    assert not trusts(np.inf, np.nan)
    # Rests of 1, 2, 4 plain steps until the residual has fallen to a tenth; then back to 1.
    guard = guard_with()
    for rest, fallen in ((1, 1.9), (2, None), (4, 0.02), (1, 0.018)):
        if fallen is not None:
            trusted, guard = judge(guard, fallen, 0.01)
            assert trusted
        trusted, guard = judge(guard, 9000.0, 0.3)
        length = 0
        while not trusted:
            length += 1
            trusted, guard = judge(guard, 250.0, 0.3)
        assert length == rest


def judge(guard, square, predicted):
    follows, guard = guard.judge(NUMPY, np.array([square]), np.array([predicted]))
    return follows[0], guard


def test_a_prediction_of_zero_is_not_taken_at_its_word():
    # With as many differences as dimensions every prediction is zero, up to rounding.
    _, guard = judge(_Guard.start(NUMPY, np.array([1.0]), np.array([1.0])), 1.0, 1e-18)
    assert judge(guard, 0.09, 1e-17)[0]
    assert not judge(guard, 0.2, 1e-17)[0]


@pytest.mark.parametrize(("share", "trusted"), [(0.012, True), (0.008, False)])
def test_a_difference_that_the_others_nearly_hold_is_not_trusted(share, trusted):
    # Second differences of the residual lie by a share of about so much outside the first.
    z = torch.tensor([[[0.0, 0.0]], [[1.0, 0.3]], [[1.7, 0.9]]], dtype=torch.float64)
    g = torch.tensor([[[4.0, 1.0]], [[3.0, 1.0]], [[2.0, 1.0 + share]]], dtype=torch.float64)
    solver = Anderson(memory=3)
    state = solver.init(z[0])
    for point, residual in zip(z, g, strict=True):
        proposed, state = solver.step(point, point + residual, state)
    accelerated = float((proposed - z[2] - g[2]).norm())
    assert (accelerated > 10) == trusted
    assert trusted or accelerated == 0


def test_the_first_plain_step_tells_how_much_growth_is_ordinary():
    guard = _Guard.start(NUMPY, np.array([1.0]), np.array([25.0]))._replace(bound=np.array([1.0]))
    assert judge(guard, 2499.0, 0.5)[0]
    assert not judge(guard, 2501.0, 0.5)[0]


def test_it_does_not_end_at_a_point_that_f_repels_from():
    # tanh(2 z) repels from 0 and attracts to both sides of it. A secant through the first two iterates points at 0.
    start = torch.tensor([0.05, -0.05, 1e-3, 2.0], dtype=torch.float64)[:, None]
    solution = fixpoint.solve(lambda z: torch.tanh(2 * z), start, rtol=1e-10)
    attracting = scipy.optimize.brentq(lambda z: np.tanh(2 * z) - z, 0.5, 2)
    np.testing.assert_allclose(solution.value[:, 0], attracting * start[:, 0].sign(), rtol=1e-9)


def test_a_row_that_leaves_a_repelling_point_forgets_and_the_others_do_not():
    rate = torch.linspace(0.1, 0.8, 12, dtype=torch.float64).repeat(2, 1)
    start = torch.ones(2, 12, dtype=torch.float64)
    rate[0, 0], start[0] = 2.0, 0.05

    def iterates(rows, z):
        solver = Anderson()
        state, found = solver.init(z), []
        for _ in range(8):
            fz = torch.tanh(rate[rows] * z)
            z, state = solver.step(z, fz, state)
            found.append((z, (z - fz).abs().amax(dim=1) == 0, torch.as_tensor(state.use).sum(dim=1)))
        return [torch.stack(each) for each in zip(*found, strict=True)]

    z, plain, held = iterates([0, 1], start)
    assert plain[2:5, 0].all()
    assert not plain[1:, 1].any()
    assert (held[1:, 0][plain[1:, 0]] == 0).all()
    assert held[-1, 1] == 5
    for row in (0, 1):
        torch.testing.assert_close(iterates([row], start[[row]])[0][:, 0], z[:, row], rtol=1e-12, atol=1e-14)
    afresh = iterates([0], z[3, [0]])[0]
    torch.testing.assert_close(afresh[:2, 0], z[4:6, 0], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("slope", [-20.0, -100.0])
def test_a_strongly_expansive_map_is_solved(slope):
    problem = expansive(low=slope, dim=60, dtype="float64")
    assert fixpoint.solve(problem, rtol=1e-6).converged.all()


@pytest.mark.parametrize("seed", range(4))
def test_on_a_map_far_from_normal_it_needs_little_more_than_plain_iteration(seed):
    generator = torch.Generator().manual_seed(seed)
    A = torch.triu(0.2 * torch.randn(80, 80, generator=generator, dtype=torch.float64), 1)
    A += torch.diag(0.7 * torch.rand(80, generator=generator, dtype=torch.float64))
    b = torch.randn(1, 80, generator=generator, dtype=torch.float64)

    def f(z):
        return z @ A.T + b

    plain, ours = (
        fixpoint.solve(f, torch.zeros_like(b), solver=solver, rtol=1e-6, max_evals=500).nfev
        for solver in (Picard(), Anderson())
    )
    assert ours <= 2 * plain


def test_damping_mixes_the_accelerated_residual(contraction):
    f = contraction(rows=1, dim=5, rho=0.9)
    full, half = (fixpoint.solve(f, solver=Anderson(damping=damping), depth=1).value for damping in (1.0, 0.5))
    torch.testing.assert_close(half, full / 2)
    # From the second step on damping changes the iterates, not the limit.
    sol = fixpoint.solve(f, solver=Anderson(damping=0.5), rtol=1e-12)
    torch.testing.assert_close(sol.value, f.solution, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("dim", [1, 2, 4, 7])
def test_a_linear_problem_of_dim_d_is_solved_in_d_plus_two_evaluations(contraction, dim):
    f = contraction(rows=3, dim=dim, rho=0.9)
    sol = fixpoint.solve(f, solver=Anderson(memory=dim), rtol=1e-8)
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


def test_in_one_dimension_it_is_the_secant_method():
    # All differences are parallel there: the newest alone is kept.
    z, previous = np.cos(0.5), 0.5
    for _ in range(3):
        slope = ((np.cos(z) - z) - (np.cos(previous) - previous)) / (z - previous)
        z, previous = z - (np.cos(z) - z) / slope, z
    sol = fixpoint.solve(torch.cos, torch.tensor(0.5, dtype=torch.float64), solver=Anderson(), depth=4)
    assert float(sol.value) == pytest.approx(z, rel=1e-12)


@pytest.mark.parametrize("steps", [2, 3, 5])
def test_ridge_shrinks_the_accelerated_part(contraction, steps):
    f = contraction(rows=2, dim=6, rho=0.9)
    full, half = Anderson(), Anderson(ridge=1.0)
    z = torch.zeros(2, 6, dtype=torch.float64)
    states = [full.init(z), half.init(z)]
    for _ in range(steps):  # both are shown plain iterates
        fz = f(z)
        (by_full, states[0]), (by_half, states[1]) = full.step(z, fz, states[0]), half.step(z, fz, states[1])
        z = fz
    assert not torch.allclose(by_full, fz)
    torch.testing.assert_close(by_half, (fz + by_full) / 2)


def test_history_costs_two_states_for_each_difference_and_one_to_come():
    state = Anderson(memory=3).init(torch.zeros(2, 7))
    assert (state.basis.states.shape, state.images.states.shape) == ((4, 2, 7), (4, 2, 7))


@pytest.mark.parametrize("solver", [Anderson(), Broyden()], ids=repr)
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_rows_whose_squares_leave_float32_are_solved_by_plain_steps_at_worst(solver, scale):
    b = scale * torch.tensor([[1.0, -2.0, 3.0]])
    sol = fixpoint.solve(lambda z: 0.5 * z + b, torch.zeros(1, 3), solver=solver, rtol=1e-5)
    torch.testing.assert_close(sol.value, 2 * b, rtol=1e-4, atol=0.0)
    assert sol.nfev <= fixpoint.solve(lambda z: 0.5 * z + b, torch.zeros(1, 3), solver=Picard(), rtol=1e-5).nfev


@pytest.mark.parametrize(
    "solver", [Anderson(history_dtype=torch.bfloat16), Broyden(history_dtype=torch.bfloat16)], ids=repr
)
def test_histories_in_bfloat16_take_half_the_memory_and_still_converge_to_1e_3(solver):
    problem = tanh(rows=3)
    states = solver.init(problem.z0)[0].states
    assert (states.dtype, states.element_size()) == (torch.bfloat16, 2)
    sol = fixpoint.solve(problem, solver=solver, rtol=1e-3)
    full = fixpoint.solve(problem, solver=type(solver)(), rtol=1e-3)
    assert sol.nfev <= 1.5 * full.nfev
    held, usual = (fixpoint.estimate_memory(problem.z0, solver=each).states for each in (solver, type(solver)()))
    assert held < 0.75 * usual


def test_a_history_dtype_that_is_no_dtype_is_refused():
    for kind in (Anderson, Broyden):
        with pytest.raises(
            TypeError, match=r"history_dtype must be a floating point torch\.dtype or None, found 'half'"
        ):
            kind(history_dtype="half")
