"""root(): zeros of g, batched, in any units, with gradients."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.optimize
import torch

import fixpoint
from fixpoint import Status

N = 20
GRID = np.arange(1, N + 1) / (N + 1)


def rosenbrock(x):
    y = x.reshape(-1, 2)
    return np.stack([10 * (y[:, 1] - y[:, 0] ** 2), 1 - y[:, 0]], 1).ravel()


def powell_singular(x):
    a, b, c, d = x.reshape(-1, 4).T
    return np.stack([a + 10 * b, 5**0.5 * (c - d), (b - 2 * c) ** 2, 10**0.5 * (a - d) ** 2], 1).ravel()


def broyden_tridiagonal(x):
    p = np.pad(x, 1)
    return (3 - 2 * x) * x - p[:-2] - 2 * p[2:] + 1


def boundary_value(x):
    p, h = np.pad(x, 1), 1 / (N + 1)
    return 2 * x - p[:-2] - p[2:] + h * h * (x + GRID + 1) ** 3 / 2


def integral_equation(x):
    kernel = np.minimum(GRID[:, None], GRID) * (1 - np.maximum(GRID[:, None], GRID))
    return x + kernel @ (x + GRID + 1) ** 3 / (2 * (N + 1))


def chandrasekhar(x, c=0.999):
    mu = (np.arange(1, N + 1) - 0.5) / N
    return x - 1 / (1 - c / (2 * N) * (mu[:, None] / (mu[:, None] + mu)) @ x)


def bratu(x):
    p = np.pad(x, 1)
    return (2 * x - p[:-2] - p[2:]) * (N + 1) ** 2 - np.exp(x)


# Moré, Garbow, Hillstrom, ACM TOMS 7 (1981), numbers 21, 30, 28, 29; then the H-equation and Bratu's problem.
# From its classical start, (-1.2, 1), Rosenbrock's takes from 51 to 192 evaluations, as rounding has it.
CLASSICAL = {
    "Rosenbrock": (rosenbrock, np.tile([-1.2, 1.4], 5)),
    "Broyden tridiagonal": (broyden_tridiagonal, -np.ones(N)),
    "boundary value": (boundary_value, GRID * (GRID - 1)),
    "integral equation": (integral_equation, GRID * (GRID - 1)),
    "Chandrasekhar H": (chandrasekhar, np.ones(N)),
    "Bratu": (bratu, np.zeros(N)),
}


class ReachedError(Exception):
    pass


def scipys_evaluations(g, x0, method, limit):
    """Evaluations until ``||g(x)|| <= 1e-6 ||g(x0)||``, or the limit."""
    bound, count = 1e-6 * np.linalg.norm(g(x0)), 0

    def counted(x):
        nonlocal count
        count += 1
        gx = g(x)
        if np.linalg.norm(gx) <= bound or count == limit:
            raise ReachedError
        return gx

    with pytest.raises(ReachedError), np.errstate(all="ignore"):
        scipy.optimize.root(counted, x0, method=method, options={"fatol": 0, "maxiter": 10 * limit})
    return count


@pytest.mark.parametrize("units", [1.0, 1e8, 1e-8])
@pytest.mark.parametrize("name", CLASSICAL)
def test_classical_problems_equal_scipys_roots_in_any_units(name, units):
    g, x0 = CLASSICAL[name]
    sol = fixpoint.root(lambda x: units * g(x), x0, batch_dims=0)
    assert sol.converged
    assert np.linalg.norm(g(sol.value)) <= 1e-6 * np.linalg.norm(g(x0))
    sol = fixpoint.root(lambda x: units * g(x), x0, batch_dims=0, rtol=1e-10)
    np.testing.assert_allclose(sol.value, scipy.optimize.root(g, x0, tol=1e-12).x, rtol=1e-6, atol=1e-6)


def test_a_row_whose_steps_grow_beyond_all_bounds_stops_no_other(normal):
    """Rosenbrock's equations from about the origin: the steps grow to 1e20, and ratios of them vanish."""

    def g(x):
        return torch.stack([10 * (x[:, 1::2] - x[:, ::2] ** 2), 1 - x[:, ::2]], dim=2).flatten(1)

    x0 = 1e-15 * normal(50, 2).repeat(1, 5)
    x0[3] = 0.9
    sol = fixpoint.root(g, x0, on_failure="ignore")
    assert sol.converged[3]
    assert sol.value.isfinite().all()


def test_where_the_jacobian_is_singular_at_the_root_the_figures_stay_honest():
    x0 = np.tile([3.0, -1, 0, 1], 3)
    sol = fixpoint.root(powell_singular, x0, batch_dims=0, on_failure="ignore")
    share = np.linalg.norm(powell_singular(sol.value)) / np.linalg.norm(powell_singular(x0))
    assert sol.relative_residual == pytest.approx(share, rel=1e-9)
    assert bool(sol.converged) == (share <= 1e-6)


@pytest.mark.filterwarnings("ignore::scipy.linalg.LinAlgWarning")  # SciPy's own small system
@pytest.mark.parametrize("method", ["broyden1", "anderson"])
def test_takes_fewer_evaluations_than_scipys_solvers_of_the_same_kind(method):
    """Of all problems together; one that is not solved in 200 counts as 200."""
    theirs = [scipys_evaluations(g, x0, method, 200) for g, x0 in CLASSICAL.values()]
    ours = [fixpoint.root(g, x0, batch_dims=0).nfev for g, x0 in CLASSICAL.values()]
    assert sum(ours) < 0.5 * sum(theirs)


@pytest.mark.parametrize(
    ("g", "x0", "expected"),
    [
        (lambda x: x**2 - 700, 1.0, 700**0.5),
        (lambda x: x**3 + x - 1010, 1.0, 10.0),
        (torch.atan, 3.0, 0.0),  # Newton's method diverges from here
        (lambda x: torch.exp(x) - 2, 5.0, np.log(2)),
    ],
    ids=["square", "cubic", "atan", "exp"],
)
def test_far_starts(g, x0, expected):
    sol = fixpoint.root(g, torch.tensor([x0], dtype=torch.float64), rtol=1e-9, max_evals=50)
    assert float(sol.value) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("sign", [1, -1])
def test_the_sign_of_the_jacobian_plays_no_part(normal, sign):
    M = normal(6, 6) / 6 + torch.eye(6, dtype=torch.float64)
    b = normal(3, 6, seed=1)
    sol = fixpoint.root(lambda x: sign * (x @ M.T - b), torch.zeros_like(b), rtol=1e-10)
    torch.testing.assert_close(sol.value, torch.linalg.solve(M, b.T).T, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("sign", [1, -1])
def test_the_first_step_knows_the_sign_and_the_size_of_the_jacobian(sign):
    """So that plain relaxation, which learns nothing, converges as well as on a well-scaled fixed point."""
    slopes = torch.tensor([0.8, 1.0, 1.2], dtype=torch.float64)
    sol = fixpoint.root(
        lambda x: sign * 1e5 * slopes * (x - 0.2), torch.zeros(2, 3).double(), solver=fixpoint.Picard(), max_evals=25
    )
    assert sol.converged.all()


def test_a_jacobian_that_turns_everything_by_a_right_angle_gives_no_step_of_zero():
    quarter = torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=torch.float64)
    start = torch.zeros(3, 2, dtype=torch.float64)
    b = torch.tensor([1.0, 0.0], dtype=torch.float64)
    sol = fixpoint.root(lambda x: x @ quarter.T - b, start, max_evals=6, on_failure="ignore")
    assert (sol.status != Status.NON_FINITE).all()
    assert sol.value.isfinite().all()


def test_rounding_does_not_turn_success_into_failure():
    """In float32 near its limit the solve's residual and that of g differ by some percent."""
    c = torch.linspace(8, 27, 2000)
    sol = fixpoint.root(lambda x: x**3 - c, torch.ones_like(c), rtol=5e-6)
    assert sol.converged.all()


def test_figures_are_those_of_g():
    def g(x):
        return 1e4 * (x**2 - torch.tensor([[2.0], [5.0], [700.0]], dtype=torch.float64))

    x0 = torch.ones(3, 2, dtype=torch.float64)
    sol = fixpoint.root(g, x0, record=True)
    residual, start = g(sol.value).norm(dim=1), g(x0).norm(dim=1)
    assert torch.equal(sol.residual, residual)
    torch.testing.assert_close(sol.relative_residual, residual / start, rtol=1e-12, atol=0)
    assert (sol.relative_residual <= 1e-6).all()
    torch.testing.assert_close(sol.trace[0], start)
    assert len(sol.trace) == sol.nfev - 3
    assert (sol.evals <= sol.nfev).all()


def test_tolerance_is_absolute_plus_relative_to_the_start():
    start = torch.tensor([1.0, 100.0], dtype=torch.float64)

    def ends_at(**tolerance):
        return fixpoint.root(lambda x: x, start, solver=fixpoint.Picard(), **tolerance).residual

    # g(x) = x, and the step of each row is half of x0: the residual halves, or x0 / (2 x0) = 1/2 for the short row.
    for atol, rtol in ((0.0, 1e-3), (1e-3, 0.0), (1e-2, 1e-3)):
        target = atol + rtol * start
        residual = ends_at(atol=atol, rtol=rtol)
        assert (residual <= target).all()
        assert (residual > target / 4).all()


@pytest.mark.parametrize("tolerance", [{"rtol": 0.0}, {"rtol": -1.0}, {"atol": -1.0}, {"rtol": float("nan")}])
def test_tolerances_that_nothing_meets_are_refused(tolerance):
    with pytest.raises(ValueError, match="rtol and atol must be at least 0 and one of them positive"):
        fixpoint.root(torch.cos, torch.zeros(2), **tolerance)


@pytest.mark.parametrize("max_evals", [3, 0, 10.0])
def test_max_evals_must_leave_something_to_solve_with(max_evals):
    with pytest.raises(ValueError, match="max_evals must be an integer of at least 4"):
        fixpoint.root(torch.cos, torch.zeros(2), max_evals=max_evals)


def test_the_solver_must_be_one():
    with pytest.raises(TypeError, match=r"solver must be a fixpoint.Solver such as Broyden\(\), found 'hybr'"):
        fixpoint.root(torch.cos, torch.zeros(2), solver="hybr")


def test_evaluations_are_counted_and_bounded(counted):
    g = counted(lambda x: torch.exp(x) - 2)
    for max_evals in (4, 5, 50):
        g.seen.clear()
        sol = fixpoint.root(g, torch.zeros(1), max_evals=max_evals, on_failure="ignore")
        assert sol.nfev == g.calls <= max_evals


def test_a_row_that_starts_at_its_root_stays_there():
    x0 = torch.tensor([0.0, 2.0], dtype=torch.float64)
    sol = fixpoint.root(torch.sin, x0)
    assert sol.converged.all()
    assert sol.value[0] == 0
    assert sol.residual[0] == 0
    assert sol.relative_residual[0] == 0


def test_a_broken_row_says_so_and_harms_no_other():
    def g(x, c):
        return torch.where(c < 0, 1 / (c + 1) - 1 / (c + 2), x**2 - c)

    c = torch.tensor([2.0, -1.0, 3.0, -2.0], dtype=torch.float64)  # infinity at -1 and -2
    sol = fixpoint.root(g, torch.ones_like(c), (c,), on_failure="ignore")
    assert sol.status.tolist() == [Status.CONVERGED, Status.NON_FINITE, Status.CONVERGED, Status.NON_FINITE]
    torch.testing.assert_close(sol.value[[0, 2]], c[[0, 2]].sqrt(), rtol=1e-5, atol=0)
    assert (sol.value[[1, 3]] == 1).all(), "the start, for want of anything better"


def test_rows_do_not_influence_each_other():
    def g(x, c):
        return x**3 + x - c

    c = torch.tensor([[1.0], [1e3], [1e-3]], dtype=torch.float64)
    together = fixpoint.root(g, torch.ones_like(c), (c,))
    for row in range(3):
        alone = fixpoint.root(g, torch.ones(1, 1, dtype=torch.float64), (c[row : row + 1],))
        assert alone.evals[0] == together.evals[row]
        torch.testing.assert_close(alone.value[0], together.value[row], rtol=1e-12, atol=0)


def test_no_success_is_claimed_where_rounding_swallows_the_step():
    def g(x):  # drives x from 1 to beyond 1e8, where float32 does not see a step of 0.5
        return torch.where((x > 1.2) & (x < 1e8), -1e9, -1.0)

    sol = fixpoint.root(g, torch.ones(1), solver=fixpoint.Picard(), on_failure="ignore")
    assert sol.value > 1e8
    assert sol.residual == 1
    assert sol.status == Status.STAGNATED
    assert not sol.converged


@pytest.mark.parametrize(
    "rule",
    [fixpoint.IFT(), fixpoint.Phantom(steps=400)],
    ids=lambda rule: type(rule).__name__,
)
def test_gradients_are_those_of_the_implicit_function(rule):
    a = torch.tensor([[2.0, 0.5], [9.0, 3.0]], dtype=torch.float64, requires_grad=True)
    sol = fixpoint.root(lambda x, a: 50 * (x**3 + x - a), torch.ones_like(a), (a,), rtol=1e-12, backward=rule)
    plain = fixpoint.root(lambda x, a: 50 * (x**3 + x - a), torch.ones_like(a), (a,), rtol=1e-12, backward=None)
    assert torch.equal(sol.value, plain.value), "the verified state, not what a relaxed step makes of it"
    (gradient,) = torch.autograd.grad(sol.value.sum(), a)
    torch.testing.assert_close(gradient, 1 / (3 * sol.value.detach() ** 2 + 1), rtol=1e-6, atol=0)


def test_gradients_of_parameters_and_the_adjoints_figures():
    torch.manual_seed(0)
    layer = torch.nn.Linear(3, 3, dtype=torch.float64)
    z0, rule = torch.zeros(2, 3, dtype=torch.float64), fixpoint.IFT(rtol=1e-10)
    sol = fixpoint.root(lambda x: 3 * x - torch.tanh(layer(x)) - 1, z0, rtol=1e-12, backward=rule)
    sol.value.square().sum().backward()
    x = sol.value.detach()
    J = torch.stack([torch.autograd.functional.jacobian(lambda x: 3 * x - torch.tanh(layer(x)) - 1, row) for row in x])
    adjoint = torch.linalg.solve(J.mT, 2 * x[..., None]).squeeze(-1)
    expected = torch.autograd.grad(torch.tanh(layer(x)), layer.bias, adjoint)[0]
    torch.testing.assert_close(layer.bias.grad, expected, rtol=1e-6, atol=1e-9)
    assert sol.adjoint.converged.all()


def test_nested_and_complex_states():
    def g(x):
        return {"w": x["w"] ** 2 + 4, "v": x["v"] - x["w"][:, None]}

    start = {"v": torch.zeros(2, 3, dtype=torch.complex128), "w": torch.tensor([1 + 1j, 2 + 1j])}
    start["w"] = start["w"].to(torch.complex128)
    sol = fixpoint.root(g, start, rtol=1e-12)
    w, v = sol.value["w"], sol.value["v"]
    torch.testing.assert_close(w**2, torch.full((2,), -4, dtype=torch.complex128))
    torch.testing.assert_close(v, w[:, None].expand(2, 3))


def test_numpy_in_numpy_out_as_in_scipy():
    def g(x):
        return [x[0] + 0.5 * (x[0] - x[1]) ** 3 - 1.0, 0.5 * (x[1] - x[0]) ** 3 + x[1]]

    sol = fixpoint.root(g, np.zeros(2), batch_dims=0, rtol=1e-12)
    assert isinstance(sol.value, np.ndarray)
    np.testing.assert_allclose(sol.value, scipy.optimize.root(g, [0, 0], tol=1e-12).x, rtol=1e-9)


def test_a_callback_sees_x_and_the_residual_of_g():
    def g(x):
        return 1e3 * (x**2 - 2)

    seen = []
    fixpoint.root(g, torch.ones(2, dtype=torch.float64), callback=seen.append)
    assert [progress.nfev for progress in seen] == list(range(3, 3 + len(seen)))
    for progress in seen:
        torch.testing.assert_close(progress.residual, g(progress.value).abs(), rtol=1e-6, atol=1e-9)
        assert progress.max_evals == 200


def test_failures_warn_or_raise_in_the_units_of_g():
    def g(x):
        return x**2 + 1

    with pytest.warns(fixpoint.ConvergenceWarning, match="1 of 1 rows did not converge") as caught:
        fixpoint.root(g, torch.ones(1), max_evals=20)
    assert caught[0].filename == __file__
    with pytest.raises(fixpoint.ConvergenceError) as raised:
        fixpoint.root(g, torch.ones(1), max_evals=20, on_failure="raise")
    assert raised.value.solution.residual[0] >= 1


@pytest.mark.parametrize(
    ("g", "message"),
    [(lambda x: x[:1], "keep the shape"), (lambda x: x.double(), "keep the dtype"), (lambda x: x.sum(), "shape")],
)
def test_output_that_does_not_fit_is_refused_at_the_first_evaluation(g, message):
    with pytest.raises(ValueError, match=message):
        fixpoint.root(g, torch.ones(3, 2))


def test_x0_is_left_alone_even_by_a_g_that_works_in_place():
    x0 = torch.ones(2, dtype=torch.float64)
    sol = fixpoint.root(lambda x: x.mul_(x).sub_(2), x0)
    assert (x0 == 1).all()
    torch.testing.assert_close(sol.value, torch.full_like(x0, 2**0.5), rtol=1e-5, atol=0)
