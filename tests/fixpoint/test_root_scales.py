"""When a root is found: far starts, any units of g, roots at zero and multiple ones, and no root at all."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import fixpoint


def rosenbrock(x):
    y = x.reshape(-1, 2)
    return np.stack([10 * (y[:, 1] - y[:, 0] ** 2), 1 - y[:, 0]], 1).ravel()


def test_a_row_whose_steps_grow_beyond_all_bounds_stops_no_other(normal):
    """Rosenbrock's equations from about the origin: the steps grow to 1e20, and ratios of them vanish."""

    def g(x):
        return torch.stack([10 * (x[:, 1::2] - x[:, ::2] ** 2), 1 - x[:, ::2]], dim=2).flatten(1)

    x0 = 1e-15 * normal(50, 2).repeat(1, 5)
    x0[3] = 0.9
    sol = fixpoint.root(g, x0, on_failure="ignore")
    assert sol.converged[3]
    assert sol.value.isfinite().all()


def cubic(x):
    return x**3 + x - 5


CUBIC_ROOT = 1.5159802276928


@pytest.mark.parametrize(
    ("g", "x0", "expected"),
    [
        (lambda x: x**2 - 700, 1.0, 700**0.5),
        (lambda x: x**3 + x - 1010, 1.0, 10.0),
        (torch.atan, 3.0, 0.0),  # Newton's method diverges from here
        (lambda x: torch.exp(x) - 2, 5.0, np.log(2)),
        (lambda x: torch.exp(x) - 2, 20.0, np.log(2)),
        (lambda x: x - 1e9, 0.0, 1e9),
        (lambda x: x - 1e-9, 0.0, 1e-9),
        (lambda x: torch.exp(1e9 * x) - 2, 0.0, 1e-9 * np.log(2)),
        (lambda x: x**3 - 1e24, 1.0, 1e8),
    ],
)
def test_starts_in_other_regions_than_the_root(g, x0, expected):
    sol = fixpoint.root(g, torch.tensor([x0], dtype=torch.float64), rtol=1e-9, on_failure="raise")
    assert float(sol.value) == pytest.approx(expected, rel=1e-8, abs=1e-16)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("x0", [1e5, -1e5, 1e8])
def test_a_far_start_makes_no_success(x0, dtype):
    """At 1e5 the slope is 3e10: what is small beside that is not small at the root."""
    sol = fixpoint.root(cubic, torch.tensor([x0], dtype=dtype), on_failure="raise")
    assert float(sol.value) == pytest.approx(CUBIC_ROOT, rel=2e-6)
    assert float(sol.residual) <= 1e-6 * 20


@pytest.mark.parametrize("solver", [fixpoint.Broyden(), fixpoint.Anderson()], ids=repr)
@pytest.mark.parametrize("x0", [1e5, 1e8])
def test_a_system_with_a_far_start_is_solved_in_few_evaluations(normal, solver, x0):
    """The solver starts over with another scale, again and again, as the slope falls from 1e16 to 10."""
    A, c = normal(30, 30) / 30, torch.linspace(1, 20, 30, dtype=torch.float64)
    sol = fixpoint.root(lambda x: x**3 + x + A @ x - c, torch.full((30,), x0).double(), solver=solver, rtol=1e-10)
    assert sol.converged
    assert sol.residual <= 1e-6
    assert sol.nfev <= 150


@pytest.mark.parametrize("units", [1e-30, 1e-8, 1e8, 1e30])
def test_units_of_g_play_no_part(units):
    x0 = torch.tensor([[10.0], [1e5]], dtype=torch.float64)
    plain, scaled = fixpoint.root(cubic, x0), fixpoint.root(lambda x: units * cubic(x), x0)
    torch.testing.assert_close(scaled.value, torch.full_like(x0, CUBIC_ROOT), rtol=1e-6, atol=0)
    assert scaled.evals.tolist() == plain.evals.tolist()
    torch.testing.assert_close(scaled.residual, (units * cubic(scaled.value)).abs()[:, 0], rtol=1e-12, atol=0)


def test_rows_of_very_different_scales():
    c = torch.tensor([[1e-24], [1e-9], [1.0], [1e9], [1e24]], dtype=torch.float64)
    roots = fixpoint.root(lambda x, c: x**3 - c, torch.ones_like(c), (c,), on_failure="raise")
    torch.testing.assert_close(roots.value, c ** (1 / 3), rtol=1e-5, atol=0)
    units = fixpoint.root(lambda x, c: c * (x**3 - 2), torch.ones_like(c), (c,), on_failure="raise")
    torch.testing.assert_close(units.value, torch.full_like(c, 2 ** (1 / 3)), rtol=1e-6, atol=0)
    assert len(set(units.evals.tolist())) == 1


def test_roots_at_zero_are_told_from_the_start(normal):
    M = normal(6, 6, seed=1) / 3 + torch.eye(6, dtype=torch.float64)
    start = torch.full((1, 6), 0.5, dtype=torch.float64)
    for g in (torch.sin, lambda x: torch.tanh(x) @ M):
        sol = fixpoint.root(g, start, on_failure="raise")
        assert sol.value.norm() <= 1e-15


@pytest.mark.parametrize("power", [2, 3])
def test_multiple_roots_converge_slowly_and_honestly(power):
    """Where g and its slope vanish together, the distance by the slope is a share of the true one."""
    sol = fixpoint.root(lambda x: (x - 1) ** power, torch.tensor([3.0], dtype=torch.float64), on_failure="raise")
    assert abs(float(sol.value) - 1) <= 10e-6
    assert float(sol.relative_residual) <= 1e-6


def test_a_start_at_the_root_up_to_rounding_is_found_to_be_one():
    x0 = torch.tensor([[2**0.5], [2**0.5 + 1e-9]], dtype=torch.float64)
    sol = fixpoint.root(lambda x: x**2 - 2, x0, on_failure="raise")
    torch.testing.assert_close(sol.value, torch.full_like(x0, 2**0.5), rtol=1e-15, atol=0)
    assert sol.nfev == 3


@pytest.mark.parametrize(
    "g",
    [
        lambda x: x**2 + 1,
        lambda x: 1 / x,
        lambda x: 0 * x + 1,
        torch.exp,
        lambda x: torch.where((x > 1.2) & (x < 1e8), -1e9, -1.0).double(),
    ],
)
def test_no_success_where_there_is_no_root(g):
    sol = fixpoint.root(g, torch.tensor([1.0], dtype=torch.float64), max_evals=50, on_failure="ignore")
    assert not sol.converged


def test_no_success_where_a_long_state_hides_a_large_g():
    """Rosenbrock's function far out: a huge second entry would make any error of the first one small."""
    for solver in (fixpoint.Picard(), fixpoint.Anderson(), fixpoint.Broyden()):
        sol = fixpoint.root(rosenbrock, np.tile([-1.2, 1.0], 5), solver=solver, on_failure="ignore", max_evals=400)
        assert not sol.converged or np.abs(sol.value - 1).max() <= 1e-3


def test_a_row_without_a_root_fails_alone():
    b = torch.tensor([[0.5], [-2.0]], dtype=torch.float64)
    for dtype in (torch.float64, torch.float32):
        sol = fixpoint.root(
            lambda x, b: torch.atan(x) - b, torch.full((2, 1), 5.0, dtype=dtype), (b.to(dtype),), on_failure="ignore"
        )
        assert sol.converged.tolist() == [True, False]
        assert float(sol.value[0]) == pytest.approx(np.tan(0.5), rel=1e-6)
        assert float(sol.residual[1]) >= 2 - np.pi / 2 - 1e-6


def test_float32_meets_the_default_tolerance():
    c = torch.linspace(8, 27, 2000)[:, None]
    sol = fixpoint.root(lambda x: x**3 - c, torch.ones_like(c), compact=False)
    assert sol.converged.all()


def test_the_tolerance_is_absolute_in_g_plus_relative_in_x():
    x0 = torch.tensor([[2.0], [200.0]], dtype=torch.float64)

    def ends_at(**tolerance):
        return fixpoint.root(lambda x: 10 * (x - 1), x0, solver=fixpoint.Picard(damping=0.5), **tolerance).residual

    # g falls by half at each step, its slope is 10, and x tends to 1.
    for atol, rtol in ((0.0, 1e-3), (1e-3, 0.0), (1e-2, 1e-3)):
        residual = ends_at(atol=atol, rtol=rtol)
        target = atol + rtol * 10
        assert (residual <= target * 1.01).all()
        assert (residual > target / 4).all()


def test_tolerances_may_differ_from_row_to_row_and_be_numpys():
    c = torch.tensor([[2.0], [2.0]], dtype=torch.float64)
    sol = fixpoint.root(
        lambda x: x**3 - c,
        torch.ones_like(c),
        rtol=torch.tensor([1e-2, 1e-13]),
        atol=np.float64(0),
        max_evals=np.int64(50),
        check_every=np.int64(1),
    )
    assert sol.evals[0] < sol.evals[1]
    assert sol.relative_residual[1] <= 1e-13
    by_atol = fixpoint.root(lambda x: 5 + 1e-3 * x, torch.zeros(2, 1), atol=torch.tensor([10.0, 1e-6]))
    assert by_atol.evals[0] == 1
    assert by_atol.residual[1] <= 1e-6


def test_a_norm_of_ones_own():
    def largest(x):
        return x.abs().amax(dim=1)

    c = torch.tensor([[2.0, 5.0, 700.0]] * 2, dtype=torch.float64)
    sol = fixpoint.root(lambda x, c: x**2 - c, torch.ones_like(c), (c,), norm=largest, rtol=1e-9)
    torch.testing.assert_close(sol.value, c.sqrt(), rtol=1e-5, atol=0)
    torch.testing.assert_close(sol.residual, largest(sol.value**2 - c), rtol=1e-12, atol=0)
    with pytest.raises(ValueError, match="norm must be a function of a state or None, found 'leafwise'"):
        fixpoint.root(torch.cos, torch.zeros(2), norm="leafwise")


def exponentials(normal, seed, n):
    """100 systems ``exp(A x) = b``, and their roots."""
    A, b = normal(100, n, n, seed=seed) / n**0.5, torch.exp(0.3 * normal(100, n, seed=seed + 1))
    return (lambda x, A, b: torch.exp((A @ x[..., None])[..., 0]) - b), (A, b), torch.linalg.solve(A, b.log())


def test_what_is_flat_in_one_component_is_no_root_because_another_is_steep(normal):
    """Far out one exponential is steep, and beside its slope nothing is left of the others, which are far from zero.

    By one slope for all of g, 19 of the 132 rows that ended as roots were none.
    """
    found = false = 0
    for seed in range(3):
        for n in (2, 3):
            g, args, roots = exponentials(normal, 10 * seed + n, n)
            x0 = normal(100, n, seed=100 + seed)
            x0 = 30 * x0 / x0.norm(dim=1, keepdim=True)
            sol = fixpoint.root(g, x0, args, on_failure="ignore", backward=None)
            wrong = ~((sol.value - roots).norm(dim=1) <= 1e-3 * roots.norm(dim=1))
            found += int(sol.converged.sum())
            false += int((sol.converged & wrong).sum())
    assert found > 50
    assert false <= 0.01 * found


def test_confirming_a_root_is_counted_and_stays_within_the_evaluations_granted():
    calls = []

    def g(x):
        calls.append(x)
        return cubic(x)

    sol = fixpoint.root(g, torch.tensor([1e5], dtype=torch.float64), record=True)
    assert sol.converged
    assert sol.nfev == len(calls) == len(sol.trace)
    needed = sol.nfev
    for granted in (needed, needed - 1):
        calls.clear()
        sol = fixpoint.root(g, torch.tensor([1e5], dtype=torch.float64), max_evals=granted, on_failure="ignore")
        assert sol.nfev == len(calls) <= granted
        assert sol.converged == (granted == needed)
