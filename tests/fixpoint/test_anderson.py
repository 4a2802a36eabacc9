"""Anderson acceleration against least squares, GMRES theory, its own failures and the promised evaluation counts."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.optimize
import torch

import fixpoint
from fixpoint import Anderson, Broyden, Picard, Status
from fixpoint.bench.problems import expansive, linear, tanh
from fixpoint.solvers.anderson import _Guard, _Split
from fixpoint.solvers.small import NUMPY, TORCH

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


def anderson_by_lstsq(f, z, steps, damping=1.0):
    """The iterates of Anderson by plain least squares in NumPy, with every difference kept."""
    zs, gs = [], []
    for _ in range(steps):
        g = f(z) - z
        zs.append(z)
        gs.append(g)
        dz, dg = np.diff(zs, axis=0).T, np.diff(gs, axis=0).T
        gamma = np.linalg.lstsq(dg, g, rcond=None)[0] if dg.size else np.zeros(0)
        z = z - (dz @ gamma if dg.size else 0) + damping * (g - (dg @ gamma if dg.size else 0))
    return z


def iterate_in_numpy(f):
    return lambda z: f(torch.from_numpy(z)[None])[0].numpy()


@pytest.mark.parametrize("memory", [3, 5])
@pytest.mark.parametrize("steps", [1, 2, 3, 5])
@pytest.mark.parametrize("damping", [1.0, 0.6])
def test_steps_equal_plain_least_squares(contraction, memory, steps, damping):
    f = contraction(rows=1, dim=8, rho=0.9, squash=torch.tanh)
    expected = anderson_by_lstsq(iterate_in_numpy(f), np.zeros(8), steps, damping)
    sol = fixpoint.solve(f, solver=Anderson(memory=memory, damping=damping), depth=steps)
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


def test_a_row_whose_residual_is_far_from_the_predicted_one_takes_a_plain_step_each_time():
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
    surprises = torch.arange(4, 40, 5)
    assert (plain[surprises, 0] | plain[surprises - 1, 0]).all(), "after a plain step nothing was predicted"
    assert plain[surprises, 0].sum() > 3
    runs = "".join("p" if each else "-" for each in plain[:, 0].tolist())
    assert "ppp" not in runs, "one each time, and one more where the next step would go backwards"
    assert not plain[1:4, 1].any(), "the other row goes on"


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
    trusted, guard = judge(guard_with(), 9000.0, 0.3)
    assert not trusted
    assert judge(guard, 1e9, 0.3)[0], "after a plain step nothing was promised"


@pytest.mark.parametrize("arrays", [True, False])
def test_a_row_that_has_ended_is_judged_afresh_should_it_go_on(arrays):
    xp, numbers = (NUMPY, np.array) if arrays else (TORCH, torch.tensor)
    solved, one = numbers([0.0, 0.0]), numbers([1.0, 1.0])
    with xp.quiet():
        guard = _Guard.start(xp, numbers([0.0, 1.0]), numbers([0.0, 0.5]))  # the first was solved from the start
        for _ in range(9):
            good, guard = guard.judge(xp, solved, solved)
            guard = guard.where(good)
        # The residual was 0: this is a surprise, which costs one plain step as any other.
        surprised, guard = guard.judge(xp, one, one / 2)
        good, _ = guard.where(surprised).judge(xp, one, one / 2)
    assert (surprised.tolist(), good.tolist()) == ([False, False], [True, True])


@pytest.mark.parametrize("size", [3, 70_000])  # whole states are arrays, and tensors
def test_a_row_that_forgets_takes_one_plain_step_for_its_map_is_another(size):
    rates, solver = torch.linspace(0.1, 0.9, size, dtype=torch.float64), Anderson(memory=5)
    z, shift = torch.zeros(2, size, dtype=torch.float64), torch.ones(2, 1, dtype=torch.float64)
    state = solver.init(z)
    for step in range(6):
        if step == 3:  # so little another that the residual is no surprise
            state, shift = solver.forget(state, torch.tensor([True, False])), torch.tensor([[1.01], [1.0]])
        fz = rates * z + shift
        z, state = solver.step(z, fz, state)
        plain = (z == fz).all(dim=1).tolist()
        assert plain == [step in (0, 3), step == 0]


def judge(guard, square, predicted):
    with NUMPY.quiet():
        follows, guard = guard.judge(NUMPY, np.array([square]), np.array([predicted]))
        return follows[0], guard.where(follows)


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


@pytest.mark.parametrize(("damping", "expected"), [(0.9, [0.9, 0.0]), (0.3, [2.5, 0.0])])
def test_a_step_that_damping_turns_backwards_is_not_taken(damping, expected):
    solver = Anderson(damping=damping)
    first, second = torch.tensor([[0.0, 0.0]]), torch.tensor([[1.5, -1.0]])
    _, state = solver.step(first, torch.tensor([[1.0, 0.0]]), solver.init(first))
    # g was (1, 0) and is (1, 1); without damping the step is (-0.5, 1), and what the model leaves of g is (1, 0).
    image = torch.tensor([[2.5, 0.0]])
    torch.testing.assert_close(solver.step(second, image, state)[0], torch.tensor([expected]))


def test_a_row_that_leaves_a_repelling_point_forgets_and_the_others_do_not():
    rate = torch.linspace(0.1, 0.8, 12, dtype=torch.float64).repeat(2, 1)
    start = torch.ones(2, 12, dtype=torch.float64)
    rate[0, 0], start[0] = 2.0, 0.05

    def iterates(rows, z):
        solver = Anderson(memory=5)
        state, found = solver.init(z), []
        for _ in range(8):
            fz = torch.tanh(rate[rows] * z)
            z, state = solver.step(z, fz, state)
            held = torch.isfinite(torch.as_tensor(state.lengths)).sum(dim=1)
            found.append((z, (z - fz).abs().amax(dim=1) == 0, held))
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
    assert (state.changes.shape, state.images.shape) == ((2, 4, 7), (2, 4, 7))


@pytest.mark.parametrize(
    ("rows", "dim", "dtype", "memory"),
    [
        (1, 512, torch.float64, 20),
        (1, 1024, torch.float64, 10),
        (1, 1024, torch.float32, 20),
        (64, 1024, torch.float32, 20),
        (1, 10**5, torch.float32, 5),
        (0, 8, torch.float32, 20),
    ],
)
def test_without_a_memory_it_takes_what_the_bytes_of_a_row_allow(rows, dim, dtype, memory):
    assert Anderson().init(torch.zeros(rows, dim, dtype=dtype)).changes.shape[1] == memory + 1


def rotating(rows, dim):
    """Maps of the rows, linear, none of them symmetric, and what is added to each."""
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(rows, dim, dim, generator=generator, dtype=torch.float64)
    return 0.95 * A / torch.linalg.eigvals(A).abs().amax(dim=1)[:, None, None], torch.ones(dim, dtype=torch.float64)


def test_a_row_alone_takes_the_same_course_as_among_many():
    A, b = rotating(40, 60)
    options = {"rtol": 1e-8, "max_evals": 300, "backward": None}
    together = fixpoint.solve(lambda z: torch.einsum("rij,rj->ri", A, z) + b, torch.zeros(40, 60).double(), **options)
    assert together.converged.all()
    assert together.evals.unique().numel() > 5
    for row in (0, 17, 39):
        alone = fixpoint.solve(lambda z, row=row: z @ A[row].T + b, torch.zeros(1, 60).double(), **options)
        assert alone.evals.item() == together.evals[row].item()
        torch.testing.assert_close(alone.value[0], together.value[row], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("sparing", [True, False])
def test_a_place_is_taken_again_once_it_is_not_needed_or_the_memory_is_full(monkeypatch, sparing):
    A, b = rotating(2, 30)
    A[1] = torch.diag(torch.linspace(0, 0.98, 30))  # symmetric: each change has to do with the last two alone
    monkeypatch.setattr("fixpoint.solvers.anderson._MOST", 4)
    solver, z = Anderson(memory=None if sparing else 4), torch.zeros(2, 30, dtype=torch.float64)
    state, held = solver.init(z), []
    for step in range(14):
        fz = torch.einsum("rij,rj->ri", A, z) + b
        before, lengths = state, torch.as_tensor(state.lengths).clone()
        changes = torch.as_tensor(state.changes).clone()[:, : lengths.shape[1]]
        z_next, state = solver.step(z, fz, state)
        if step > 1:
            change = fz - z - (torch.as_tensor(before.fz) - torch.as_tensor(before.z))
            share = (
                torch.einsum("rnd,rd->rn", changes, change).square() / lengths / change.square().sum(1, keepdim=True)
            )
            for row in (0, 1):
                needed = {int(place) for place in torch.nonzero(share[row] > 1e-4 * sparing)}
                needed |= {int(before.free[row]), int(before.newest[row])}
                place = int(state.free[row])
                if len(needed) == 5:
                    needed.discard(place)
                    rest = share[row].clone()
                    rest[[int(before.free[row]), int(before.newest[row])]] = torch.inf
                    assert place == int(rest.argmin()), "the least needed"
                assert place == min({*range(5)} - needed)
        held.append(torch.isfinite(torch.as_tensor(state.lengths)).sum(dim=1).tolist())
        z = z_next
    most_rotating, most_symmetric = (max(each) for each in zip(*held, strict=True))
    assert (most_rotating, most_symmetric < 4) == (4, sparing)


def test_a_change_that_the_others_nearly_hold_replaces_the_one_that_it_repeats_most():
    held = np.eye(4)[None, :2]  # of length 1
    changes = np.array([[[1.0, 2.0, 3.0, 4.0], [0.3, 0.9, 1e-3, 0.0]]])  # g and dg
    coordinates, squares = changes @ held.swapaxes(1, 2), changes @ changes.swapaxes(1, 2)
    split = _Split.of(NUMPY, coordinates, squares, np.ones((1, 2)), sparing=True)
    assert (split.lengths.tolist(), split.needed.tolist()) == ([[1, np.inf]], [[pytest.approx(0.09), 0]])
    np.testing.assert_allclose(split.along, [[[1, 0], [0.3, 0]]])
    g, dg = (changes * [0, 1, 1, 1])[0]
    np.testing.assert_allclose([split.outside[0], split.cross[0], split.fresh[0]], [g @ g, g @ dg, dg @ dg])
    changes[0, 1, 3] = 0.1
    squares = changes @ changes.swapaxes(1, 2)
    assert _Split.of(NUMPY, coordinates, squares, np.ones((1, 2)), sparing=True).lengths.tolist() == [[1, 1]], (
        "enough is new"
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", [{}, {"damping": 0.7}, {"ridge": 0.1}], ids=repr)
def test_small_states_take_the_same_steps_as_large_ones(contraction, monkeypatch, options, dtype):
    smooth = contraction(rows=3, dim=40, rho=0.97, squash=torch.tanh)

    def f(z):  # bends so much in places that rows lose trust in their models
        return (smooth(z.double()) + 0.02 * torch.sin(40 * z.double())).to(dtype)

    def solution():
        z0 = torch.zeros(3, 40, dtype=dtype)
        return fixpoint.solve(f, z0, solver=Anderson(memory=4, **options), depth=9).value

    in_numpy = solution()
    monkeypatch.setattr("fixpoint.solvers.states._SMALL", 0)
    torch.testing.assert_close(solution(), in_numpy, rtol=1e-2 if dtype == torch.float32 else 1e-9, atol=1e-6)


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
    states = solver.init(problem.z0)[0]
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


@pytest.mark.parametrize("solver", [Anderson(memory=10), Broyden(memory=10)], ids=repr)
def test_unrolled_it_saves_a_few_states_an_evaluation_and_no_copy_of_its_history(solver):
    rate = torch.linspace(0, 0.98, 3000).requires_grad_()

    def saved(depth):
        held = {}

        def note(x):
            held[x.untyped_storage().data_ptr()] = x.untyped_storage()
            return x

        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            z0, options = torch.zeros(1, 3000), {"solver": solver, "backward": fixpoint.Unroll(), "depth": depth}
            value = fixpoint.solve(lambda z: rate * z + 1, z0, **options).value
        assert value.requires_grad
        return sum(storage.nbytes() for storage in held.values()) / (4 * 3000)

    # The residual, its change and that of f; both orthogonal; the next state.
    assert (saved(18) - saved(12)) / 6 <= 8


@pytest.mark.parametrize("solver", [Anderson(memory=3), Broyden(memory=3), Broyden(memory=4)], ids=repr)
@pytest.mark.parametrize("recorded", [range(1, 5), range(4), range(2, 6)], ids=repr)
def test_autograd_may_come_and_go_between_steps(solver, recorded):
    rate = torch.linspace(0, 0.98, 50, dtype=torch.float64)

    def last(recorded):
        weight = rate.clone().requires_grad_()
        z = torch.zeros(2, 50, dtype=torch.float64)
        state = solver.init(z)
        for step in range(9):
            with torch.set_grad_enabled(step in recorded):
                z, state = solver.step(z.detach(), weight * z.detach() + 1, state)
        return z

    torch.testing.assert_close(last(recorded), last(()), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("solver", [Anderson(memory=3), Broyden(memory=3), Broyden(memory=4)], ids=repr)
@pytest.mark.parametrize("first", range(6))
def test_steps_can_be_differentiated_from_any_one_on(solver, first):
    rate = torch.linspace(0, 0.9, 5, dtype=torch.float64)

    def last(weight):
        z = torch.zeros(2, 5, dtype=torch.float64)
        state = solver.init(z)
        for step in range(first + 4):
            z, state = solver.step(z, torch.tanh((weight if step >= first else rate) * z) + 1, state)
        return z

    assert torch.autograd.gradcheck(last, (rate.clone().requires_grad_(),))


@pytest.mark.parametrize("solver", [Anderson(memory=3), Broyden(memory=3)], ids=repr)
@pytest.mark.parametrize("first", range(5))
def test_a_vmap_may_begin_at_any_step(solver, first):
    z, rate = torch.zeros(2, 5, dtype=torch.float64), torch.linspace(0, 0.9, 5, dtype=torch.float64)
    state = solver.init(z)
    for _ in range(first):
        z, state = solver.step(z, torch.tanh(rate * z) + 1, state)
    scales = torch.tensor([0.5, 1.0], dtype=torch.float64)
    together = torch.vmap(lambda scale: solver.step(z, torch.tanh(rate * z) + scale, state)[0])(scales)
    for found, scale in zip(together, scales, strict=True):
        torch.testing.assert_close(found, solver.step(z, torch.tanh(rate * z) + scale, state)[0])


@pytest.mark.parametrize(
    ("solver", "expected"),
    [
        (Anderson(memory=6), 3),  # without a change, with the first one, and with some
        (Anderson(memory=12), 3),
        (Broyden(memory=6), 5),  # with none, one and two steps held, with more, and with a full memory
        (Broyden(memory=12), 5),
    ],
    ids=repr,
)
def test_a_compiled_step_is_whole_and_has_as_many_versions_whatever_the_memory(solver, expected):
    versions = []

    def backend(graph, inputs):
        versions.append(graph)
        return graph.forward

    torch._dynamo.reset()
    rate = torch.linspace(0, 0.9, 50, dtype=torch.float64)
    step = torch.compile(solver.step, backend=backend, fullgraph=True)
    z, plain_z = torch.zeros(2, 2, 50, dtype=torch.float64)
    state, plain = solver.init(z), solver.init(z)
    with torch.no_grad():
        for _ in range(16):
            z, state = step(z, rate * z + 1, state)
            plain_z, plain = solver.step(plain_z, rate * plain_z + 1, plain)
    assert len(versions) == expected
    torch.testing.assert_close(z, plain_z, rtol=1e-6, atol=1e-6)


def test_gradients_are_finite_where_nothing_changes_any_more():
    c = torch.tensor([[1.0, -2.0]], requires_grad=True)
    sol = fixpoint.solve(lambda z: 0 * z + c, torch.zeros(1, 2), solver=Anderson(), backward=fixpoint.Unroll(), depth=5)
    sol.value.sum().backward()
    torch.testing.assert_close(c.grad, torch.ones(1, 2))
