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
    """Evaluations until ``||x - root|| <= 1e-4 ||root||``, or the limit."""
    root, count = scipy.optimize.root(g, x0, tol=1e-13).x, 0

    def counted(x):
        nonlocal count
        count += 1
        if np.linalg.norm(x - root) <= 1e-4 * np.linalg.norm(root) or count == limit:
            raise ReachedError
        return g(x)

    with pytest.raises(ReachedError), np.errstate(all="ignore"):
        scipy.optimize.root(counted, x0, method=method, options={"fatol": 0, "maxiter": 10 * limit})
    return count


@pytest.mark.parametrize("units", [1.0, 1e8, 1e-8])
@pytest.mark.parametrize("name", CLASSICAL)
def test_classical_problems_equal_scipys_roots_in_any_units(name, units):
    g, x0 = CLASSICAL[name]
    expected = scipy.optimize.root(g, x0, tol=1e-13).x
    # Where the slopes of g differ much, those that were seen say less: the boundary value problem's by 170 times.
    for rtol, error in ((1e-6, 1e-4), (1e-10, 1e-7)):
        sol = fixpoint.root(lambda x: units * g(x), x0, rtol=rtol)
        assert sol.converged
        assert sol.relative_residual <= rtol
        np.testing.assert_allclose(np.linalg.norm(sol.value - expected) / np.linalg.norm(expected), 0, atol=error)


@pytest.mark.parametrize("solver", [fixpoint.Anderson(), fixpoint.Anderson(memory=10), fixpoint.Broyden(memory=10)])
def test_other_solvers_find_the_same_roots(solver):
    for name in ("Broyden tridiagonal", "integral equation", "Chandrasekhar H", "Bratu"):
        g, x0 = CLASSICAL[name]
        sol = fixpoint.root(g, x0, solver=solver, rtol=1e-9, max_evals=400)
        np.testing.assert_allclose(sol.value, scipy.optimize.root(g, x0, tol=1e-13).x, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("memory", [10, 20, 30])
def test_a_row_whose_g_has_not_fallen_goes_on_until_it_has(memory):
    rng = np.random.default_rng(0)
    g, x0 = CLASSICAL["Bratu"]
    expected = scipy.optimize.root(g, x0, tol=1e-13).x
    for _ in range(10):  # roundings decide how many evaluations such a memory takes, and where it stands then
        start = x0 + 1e-14 * rng.standard_normal(N)
        sol = fixpoint.root(g, start, solver=fixpoint.Broyden(memory=memory), rtol=1e-9, max_evals=400)
        assert sol.converged
        np.testing.assert_allclose(sol.value, expected, rtol=1e-6, atol=1e-7)


def test_where_the_jacobian_is_singular_at_the_root_the_figures_stay_honest():
    sol = fixpoint.root(powell_singular, np.tile([3.0, -1, 0, 1], 3), on_failure="ignore")
    assert sol.residual == pytest.approx(np.linalg.norm(powell_singular(sol.value)), rel=1e-12)
    assert bool(sol.converged) == (sol.relative_residual <= 1e-6)


@pytest.mark.filterwarnings("ignore::scipy.linalg.LinAlgWarning")  # SciPy's own small system
@pytest.mark.parametrize("method", ["broyden1", "anderson"])
def test_takes_fewer_evaluations_than_scipys_solvers_of_the_same_kind(method):
    """Of all problems together; one that is not solved in 200 counts as 200."""
    theirs = [scipys_evaluations(g, x0, method, 200) for g, x0 in CLASSICAL.values()]
    ours = [fixpoint.root(g, x0).nfev for g, x0 in CLASSICAL.values()]
    assert sum(ours) < 0.5 * sum(theirs)


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


def turning(dim, seed):
    """A matrix whose products are at right angles to what it is multiplied with, and singular values of 0.4 to 1.4."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.float64))[0]
    blocks = [
        s * torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64) for s in torch.linspace(0.4, 1.4, dim // 2)
    ]
    return basis @ torch.block_diag(*blocks) @ basis.T


@pytest.mark.parametrize("dim", [2, 4, 8])
@pytest.mark.parametrize("units", [1.0, 1e5])
@pytest.mark.parametrize("seed", range(3))
def test_linear_systems_that_turn_by_right_angles_are_solved(dim, units, seed):
    a, b = turning(dim, seed), torch.linspace(1, 2, dim, dtype=torch.float64)
    sol = fixpoint.root(lambda x: units * (x @ a.T - b), torch.ones(1, dim, dtype=torch.float64), rtol=1e-10)
    torch.testing.assert_close(sol.value[0], torch.linalg.solve(a, b), rtol=1e-8, atol=1e-8)


def test_the_equilibrium_of_a_bilinear_game_is_found(normal):
    # min over x, max over y of x' A y - b' x + c' y: the gradients of both, one with the other sign.
    a, b, c = torch.eye(3, dtype=torch.float64) + 0.3 * normal(3, 3), normal(3), normal(3)

    def g(z):
        x, y = z.split(3, dim=1)
        return torch.cat((y @ a.T - b, -(x @ a + c)), dim=1)

    sol = fixpoint.root(g, torch.zeros(1, 6, dtype=torch.float64), rtol=1e-9)
    x, y = sol.value[0].split(3)
    torch.testing.assert_close(y, torch.linalg.solve(a, b), rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(x, torch.linalg.solve(a.T, -c), rtol=1e-7, atol=1e-7)


def test_complex_slopes_of_every_direction():
    slopes = 3 * torch.exp(1j * torch.linspace(0, 6.2, 32, dtype=torch.float64))[:, None]
    start = torch.full((32, 1), 0.3 - 0.4j, dtype=torch.complex128)
    sol = fixpoint.root(lambda w, a: a * w - (1 + 2j), start, (slopes,), rtol=1e-10, backward=None)
    torch.testing.assert_close(sol.value, (1 + 2j) / slopes, rtol=1e-8, atol=1e-8)
    assert sol.evals.max() < 20


def test_figures_are_those_of_g():
    def g(x):
        return 1e4 * (x**2 - torch.tensor([[2.0], [5.0], [700.0]], dtype=torch.float64))

    x0 = torch.ones(3, 2, dtype=torch.float64)
    sol = fixpoint.root(g, x0, record=True)
    torch.testing.assert_close(sol.residual, g(sol.value).norm(dim=1), rtol=1e-12, atol=0)
    torch.testing.assert_close(sol.trace[0], g(x0).norm(dim=1), rtol=1e-12, atol=0)
    assert len(sol.trace) == sol.nfev
    assert (sol.evals <= sol.nfev).all()
    slope = 2e4 * sol.value.norm(dim=1) / 2**0.5  # of both entries alike, at the root
    distance = sol.residual / slope / sol.value.norm(dim=1)
    torch.testing.assert_close(sol.relative_residual, distance, rtol=0.2, atol=0)


@pytest.mark.parametrize(("name", "value"), [("rtol", -1.0), ("atol", -1.0), ("rtol", float("nan")), ("rtol", "x")])
def test_tolerances_that_make_no_sense_are_refused_by_name(name, value):
    with pytest.raises((TypeError, ValueError), match=f"{name} must be"):
        fixpoint.root(torch.cos, torch.zeros(2), **{name: value})


def test_args_must_be_a_sequence():
    with pytest.raises(TypeError, match="args must be a tuple or list"):
        fixpoint.root(lambda x, b: x - b, torch.zeros(2), torch.zeros(2))


OF_BLOCKS = fixpoint.Blockwise(fixpoint.Broyden(), blocks=5)
OF_CHAINS = fixpoint.Blockwise(fixpoint.CausalQuasiNewton(), blocks=2)


@pytest.mark.parametrize(
    ("solver", "dtype"),
    [
        (OF_BLOCKS, torch.float64),
        (OF_BLOCKS, torch.complex128),
        (OF_CHAINS, torch.float64),
        (OF_CHAINS, torch.complex128),
        (fixpoint.CausalQuasiNewton(), torch.float64),  # a chain of complex states is refused
    ],
    ids=repr,
)
def test_a_solver_that_must_know_the_state_is_told_that_of_x(solver, dtype):
    first = torch.ones(2, 1, 3, dtype=dtype)

    def g(x, rate):
        return x - torch.cat((first, torch.cos(rate * x[:, :-1])), dim=1)

    rate = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    solution = fixpoint.root(g, torch.ones(2, 10, 3, dtype=dtype), (rate,), solver=solver, rtol=1e-10)
    expected = [first[:, 0]]
    for _ in range(9):
        expected.append(torch.cos(rate * expected[-1]))
    expected = torch.stack(expected, dim=1)
    torch.testing.assert_close(solution.value, expected, rtol=1e-8, atol=0)
    found, known = (torch.autograd.grad(x.abs().square().sum(), rate) for x in (solution.value, expected))
    torch.testing.assert_close(found, known, rtol=1e-6, atol=0)


def test_a_chain_of_complex_states_is_refused_and_x_is_named():
    x0 = torch.ones(2, 10, 3, dtype=torch.complex128)
    with pytest.raises(ValueError, match=r"needs a real tensor .* found shape \(2, 10, 3\)"):
        fixpoint.root(torch.cos, x0, solver=fixpoint.CausalQuasiNewton())


def test_the_solver_must_be_one():
    with pytest.raises(TypeError, match=r"solver must be a fixpoint.Solver such as Anderson\(\), found 'hybr'"):
        fixpoint.root(torch.cos, torch.zeros(2), solver="hybr")


def test_evaluations_are_counted_and_bounded(counted):
    g = counted(lambda x: torch.exp(x) - 2)
    for max_evals in (1, 2, 3, 5, 50):
        g.seen.clear()
        sol = fixpoint.root(g, torch.zeros(1), max_evals=max_evals, on_failure="ignore")
        assert sol.nfev == g.calls <= max_evals


def test_a_row_that_starts_at_its_root_stays_there():
    x0 = torch.tensor([[0.0], [2.0]], dtype=torch.float64)
    sol = fixpoint.root(torch.sin, x0)
    assert sol.converged.all()
    assert sol.evals[0] == 1
    assert sol.value[0] == 0
    assert sol.residual[0] == 0
    assert sol.relative_residual[0] == 0


def test_a_broken_row_says_so_and_harms_no_other():
    def g(x, c):
        return torch.where(c < 0, 1 / (c + 1) - 1 / (c + 2), x**2 - c)

    c = torch.tensor([[2.0], [-1.0], [3.0], [-2.0]], dtype=torch.float64)  # infinity at -1 and -2
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


def test_nested_and_complex_states():
    def g(x):
        return {"w": x["w"] ** 2 + 4, "v": x["v"] - x["w"][:, None]}

    # From farther off the course depends on every rounding, and so on the processor.
    start = {"v": torch.zeros(2, 3, dtype=torch.complex128), "w": torch.tensor([0.3 + 1.8j, -0.3 + 2.2j])}
    start["w"] = start["w"].to(torch.complex128)
    sol = fixpoint.root(g, start, rtol=1e-12)
    w, v = sol.value["w"], sol.value["v"]
    torch.testing.assert_close(w**2, torch.full((2,), -4, dtype=torch.complex128))
    torch.testing.assert_close(v, w[:, None].expand(2, 3))


def test_numpy_in_numpy_out_as_in_scipy():
    def g(x):
        return [x[0] + 0.5 * (x[0] - x[1]) ** 3 - 1.0, 0.5 * (x[1] - x[0]) ** 3 + x[1]]

    sol = fixpoint.root(g, np.zeros(2), rtol=1e-12)
    assert isinstance(sol.value, np.ndarray)
    np.testing.assert_allclose(sol.value, scipy.optimize.root(g, [0, 0], tol=1e-12).x, rtol=1e-9)


def test_a_callback_sees_x_and_the_residual_of_g():
    def g(x):
        return 1e3 * (x**2 - 2)

    seen = []
    fixpoint.root(g, torch.ones(2, 1, dtype=torch.float64), callback=seen.append)
    assert [progress.nfev for progress in seen] == list(range(1, 1 + len(seen)))
    for progress in seen:
        torch.testing.assert_close(progress.residual, g(progress.value)[:, 0].abs(), rtol=1e-9, atol=0)
        assert progress.max_evals == 198  # the last two are for a look at the components
    stopped = fixpoint.root(g, torch.ones(2, 1), callback=lambda progress: progress.nfev == 3, on_failure="ignore")
    assert (stopped.status == Status.STOPPED).all()


def test_failures_warn_or_raise_in_the_units_of_g():
    def g(x):
        return x**2 + 1

    with pytest.warns(fixpoint.ConvergenceWarning, match="1 of 1 rows did not converge") as caught:
        fixpoint.root(g, torch.ones(1), max_evals=20)
    assert caught[0].filename == __file__
    with pytest.raises(fixpoint.ConvergenceError) as raised:
        fixpoint.root(g, torch.ones(1), max_evals=20, on_failure="raise")
    assert raised.value.solution.residual >= 1


@pytest.mark.parametrize(
    ("g", "message"),
    [
        (lambda x: x[:1], "g must keep the shape of x0"),
        (lambda x: x[:, :1], "g must keep the shape of x0"),
        (lambda x: x.double(), "g must keep the dtype of x0"),
        (lambda x: (x, x), "structure"),
        (lambda x: x.sub_(1), "changed its input in place"),
    ],
)
def test_output_that_does_not_fit_is_refused_at_the_first_evaluation(g, message):
    with pytest.raises((ValueError, TypeError), match=message):
        fixpoint.root(g, torch.ones(3, 2))


def test_a_g_that_knows_its_batch_sees_all_of_it_with_compact_off():
    c = torch.tensor([[2.0]] * 7 + [[1e9]], dtype=torch.float64)
    seen = []

    def g(x, c):
        seen.append(len(x))
        return x**3 - c

    fixpoint.root(g, torch.ones_like(c), (c,))
    assert set(seen) != {8}
    seen.clear()
    fixpoint.root(g, torch.ones_like(c), (c,), compact=False)
    assert set(seen) == {8}
    seen.clear()
    fixpoint.root(lambda x: g(x, c), torch.ones_like(c))
    assert set(seen) == {8}, "no argument says that rows can be left out"


def test_an_auxiliary_output_is_that_of_the_solution():
    c = torch.tensor([[2.0], [3.0]], dtype=torch.float64)
    sol = fixpoint.root(lambda x: (x**2 - c, {"x": x}), torch.ones_like(c), has_aux=True)
    assert torch.equal(sol.aux["x"], sol.value)
    with pytest.raises(TypeError, match=r"with has_aux=True g must return \(g\(x\), aux\)"):
        fixpoint.root(lambda x: x**2 - c, torch.ones_like(c), has_aux=True)


def test_a_vector_is_one_system():
    target = torch.tensor([2.0, 5.0, 700.0], dtype=torch.float64)
    sol = fixpoint.root(lambda x: x**2 - target, torch.ones(3, dtype=torch.float64), rtol=1e-9)
    assert sol.converged.shape == ()
    torch.testing.assert_close(sol.value, target.sqrt(), rtol=1e-6, atol=0)


def test_what_a_raised_error_carries_is_x():
    def g(x):
        if float(x.max()) > 1.2:
            raise ArithmeticError
        return x**2 - 2

    with pytest.raises(ArithmeticError) as raised:
        fixpoint.root(g, torch.ones(1, 2, dtype=torch.float64))
    assert raised.value.solution.value.shape == (1, 2)
    torch.testing.assert_close(
        raised.value.solution.residual, (raised.value.solution.value**2 - 2).norm(dim=1), rtol=1e-12, atol=0
    )


def test_another_structure_is_named_in_the_words_of_root():
    with pytest.raises(TypeError, match="g must return the structure of x0: at x found tuple, not a Tensor"):
        fixpoint.root(lambda x: (x, x), torch.ones(2, 3))


def test_no_root_where_g_is_larger_than_at_the_start():
    # Slopes of e^x far out are so large that what g is there passed for rounding: 2.5e24 was taken for a root.
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        A = torch.randn(4, 4, generator=generator, dtype=torch.float64) + 2 * torch.eye(4, dtype=torch.float64)
        b = torch.randn(20, 4, generator=generator, dtype=torch.float64)
        x0 = 0.01 * torch.randn(20, 4, generator=generator, dtype=torch.float64)
        g = lambda x, A, b: torch.exp(0.3 * x) + x @ A - b - 1  # noqa: E731
        found = fixpoint.root(g, x0, (A, b), on_failure="ignore", backward=None)
        rounding = 64 * g(x0, A, b).norm(dim=1)
        assert (found.residual <= rounding)[found.converged].all()


@pytest.mark.parametrize("length", [1.0, 30.0])
def test_slopes_of_far_places_make_no_root(length):
    # exp is so steep far out that any g passed for small by the slopes seen there: 3 rows of 100 from 30 away.
    generator, wrong, converged = torch.Generator().manual_seed(0), 0, 0
    for _ in range(30):
        A = torch.randn(4, 4, generator=generator, dtype=torch.float64) + 2 * torch.eye(4, dtype=torch.float64)
        b = torch.randn(20, 4, generator=generator, dtype=torch.float64)
        x0 = length * torch.randn(20, 4, generator=generator, dtype=torch.float64)
        g = lambda x, A, b: torch.exp(0.3 * x) + x @ A - b - 1  # noqa: E731
        found = fixpoint.root(g, x0, (A, b), on_failure="ignore", backward=None)
        x = found.value
        jacobian = torch.diag_embed(0.3 * torch.exp(0.3 * x)) + A.T
        newton = torch.linalg.solve(jacobian, g(x, A, b)[..., None])[..., 0]
        off = newton.norm(dim=1) > 0.01 * x.norm(dim=1)
        wrong, converged = wrong + int((off & found.converged).sum()), converged + int(found.converged.sum())
    assert converged > 400
    assert wrong <= converged / 200


def beale(x):
    """Beale's valley, whose root is (3, 0.5); far out along the first coordinate slopes have no bound."""
    return torch.stack((1.5 - x[:, 0] * (1 - x[:, 1]), 2.25 - x[:, 0] * (1 - x[:, 1] ** 2)), 1)


@pytest.mark.parametrize("solver", [fixpoint.Anderson(), fixpoint.Broyden()], ids=repr)
@pytest.mark.parametrize("norm", [None, lambda x: x.abs().amax(dim=1)])
def test_far_out_where_slopes_are_steep_g_must_have_fallen_all_the_same(solver, norm):
    starts = 5 * torch.randn(300, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = fixpoint.root(beale, starts, solver=solver, rtol=1e-6, norm=norm, on_failure="ignore")
    root = torch.tensor([3, 0.5], dtype=torch.float64).expand_as(found.value)
    assert 20 < found.converged.sum() < 300
    torch.testing.assert_close(found.value[found.converged], root[found.converged], rtol=1e-3, atol=1e-3)


def test_near_the_root_g_need_not_fall_so_far():
    shifts = torch.randn(300, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for share in (1e-2, 1e-5):
        starts = torch.tensor([3, 0.5], dtype=torch.float64) * (1 + share * shifts)
        assert fixpoint.root(beale, starts, rtol=1e-6).converged.all()


def test_rows_of_a_mapped_batch_keep_their_own_tolerances():
    starts = 3 + torch.randn(3, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rtol = torch.tensor([1e-2, 1e-10])

    def solved(start):  # slopes differ more than tenfold, so components of g are looked at
        g = lambda x: x**3 - torch.tensor([1e-3, 8.0], dtype=torch.float64)  # noqa: E731
        return fixpoint.root(g, start, rtol=rtol, max_evals=400, on_failure="ignore").value

    found = torch.func.vmap(solved)(starts)
    torch.testing.assert_close(found, torch.stack([solved(start) for start in starts]))
    error = (found - torch.tensor([0.1, 2.0], dtype=torch.float64)).abs().amax(dim=2)
    assert (error[:, 1] < 1e-8).all()
    assert (error[:, 0] > 1e-8).any()
