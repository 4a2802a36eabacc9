"""When a row is done, and what it is called."""

from __future__ import annotations

import itertools
import math
import warnings

import numpy as np
import pytest
import torch

import fixpoint
from fixpoint import Picard, Status
from fixpoint.engine import norms
from fixpoint.engine.norms import row_norm
from fixpoint.engine.outcome import BestSoFar
from fixpoint.engine.tolerance import Figures, Tolerance, same_images


@pytest.mark.parametrize("status", list(Status))
def test_each_status_has_one_cause(status):
    eps = torch.finfo(torch.float64).eps
    maps = {
        Status.CONVERGED: lambda z: torch.full_like(z, 3.0),
        Status.MAX_EVALS: lambda z: z + 1,
        Status.STAGNATED: lambda z: 1 + eps * (z == 1).to(z),  # two neighbours that map to each other
        Status.NON_FINITE: lambda z: z * 1e200,
        Status.STOPPED: lambda z: z + 1,
    }
    callback = (lambda progress: progress.nfev == 5) if status == Status.STOPPED else None
    options = {"rtol": 0.0, "solver": Picard(), "on_failure": "ignore", "callback": callback}
    sol = fixpoint.solve(maps[status], torch.ones(1, 1, dtype=torch.float64), **options)
    assert sol.status.tolist() == [status]
    assert sol.converged.tolist() == [status == Status.CONVERGED]
    assert (sol.nfev == 100) == (status == Status.MAX_EVALS)
    assert torch.isfinite(sol.value).all()


def test_statuses_of_one_batch_are_independent():
    eps = torch.finfo(torch.float64).eps
    sol = fixpoint.solve(
        lambda z: torch.stack([z[0] * 0 + 3, z[1] + 1, 1 + eps * (z[2] == 1).to(z), z[3] * 1e200]),
        torch.ones(4, 1, dtype=torch.float64),
        rtol=0.0,
        solver=Picard(),
        on_failure="ignore",
    )
    assert sol.status.tolist() == [Status.CONVERGED, Status.MAX_EVALS, Status.STAGNATED, Status.NON_FINITE]


def test_a_tolerance_below_rounding_stagnates_long_before_the_limit(solver, contraction):
    f = contraction(rho=0.8, squash=lambda x: 1 + torch.tanh(x), dtype=torch.float32)
    sol = fixpoint.solve(f, solver=solver, rtol=0.0, max_evals=2000, on_failure="ignore")
    ended = (sol.status == Status.STAGNATED) | (sol.residual == 0)  # the fixed point may be hit exactly
    assert ended.all()
    assert sol.nfev < 500
    assert (sol.relative_residual < 50 * torch.finfo(torch.float32).eps).all()


@pytest.mark.parametrize(("gain", "status"), [(1e-3, Status.STAGNATED), (0.02, Status.MAX_EVALS)])
def test_a_residual_at_rounding_that_falls_by_next_to_nothing_has_stagnated(gain, status):
    """A hundredth of a rounding in ten evaluations is luck, a fifth is not."""
    eps, count = torch.finfo(torch.float32).eps, itertools.count()

    def f(z):
        return torch.stack((z[:, 0], z[:, 1] + eps * (20 - gain * next(count))), dim=1)

    sol = fixpoint.solve(f, torch.tensor([[1.0, 0.0]]), solver=Picard(), rtol=1e-8, max_evals=60, on_failure="ignore")
    assert sol.status.tolist() == [status]


def test_where_each_leaf_has_a_tolerance_its_share_of_it_tells_what_is_better():
    """The residual is now of the leaf around 1000, now of the one around 0.001."""
    tolerance = Tolerance(rtol=1e-3, atol=0.0, leaves=(1, 1))
    best, states = BestSoFar(torch.zeros(1, 2), 0.0), [torch.full((1, 2), float(k)) for k in range(3)]
    large, worse, better = (
        Figures(*(np.array([x]) for x in each)) for each in ((1.0, 1e3, 100.0), (0.1, 1e-3, 1e5), (2.0, 1e2, 20.0))
    )
    assert best.advances(states[0], large, tolerance)
    assert not best.advances(states[1], worse, tolerance)
    best.nfev = 2
    best.update(states[1], worse, tolerance)
    assert (best.z is states[0], best.improved_at) == (True, 0)
    best.nfev = 3
    best.update(states[2], better, tolerance)
    assert (best.z is states[2], best.improved_at) == (True, 3)


def test_a_slow_row_above_rounding_is_not_called_stagnated():
    # The best residual does not fall at all, but lies far above rounding: only the limit may end this row.
    sol = fixpoint.solve(lambda z: -z + 2.5, torch.zeros(1, 1), solver=Picard(), max_evals=60, on_failure="ignore")
    assert sol.status.tolist() == [Status.MAX_EVALS]


@pytest.mark.parametrize(("rtol", "atol"), [(1e-3, 0.0), (0.0, 1e-3), (1e-3, 1e-1), (1.0, 0.0)])
def test_a_row_is_done_at_the_first_evaluation_that_meets_the_stated_criterion(rtol, atol):
    sol = fixpoint.solve(
        lambda z: 0.7 * z + 5, torch.zeros(1, 1, dtype=torch.float64), solver=Picard(), rtol=rtol, atol=atol
    )
    z, evaluations = 0.0, 1
    while abs((fz := 0.7 * z + 5) - z) > atol + rtol * abs(fz):
        z, evaluations = fz, evaluations + 1
    assert sol.evals.tolist() == [evaluations]


def test_tolerance_is_met_with_equality_and_never_by_nan_or_infinity():
    tolerance = Tolerance(rtol=0.5, atol=0.0)
    residual = np.array([1.0, 1.0001, math.nan, math.inf])
    scale = np.array([2.0, 2.0, 1.0, math.inf])
    assert tolerance.done(Figures(residual, scale, residual)).tolist() == [True, False, False, False]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_older_versions_of_numpy_have_the_same_products(dtype):
    x, y = (np.random.default_rng(seed).standard_normal((2, 3, 5)).astype(dtype) for seed in (0, 1))
    found = norms._einsum_vecdot(x[:, :, None], y[:, None])
    assert found.dtype == dtype
    np.testing.assert_allclose(found, x @ y.swapaxes(1, 2), rtol=1e-5)


RANGES = [
    (torch.float16, 1e-6, 2e4),
    (torch.bfloat16, 1e-30, 1e30),
    (torch.float32, 1e-30, 1e30),
    (torch.float64, 1e-200, 1e200),
]


@pytest.mark.parametrize(("dtype", "tiny", "huge"), RANGES, ids=str)
def test_norms_are_right_where_squares_leave_the_range_of_the_dtype(normal, dtype, tiny, huge):
    scales = torch.tensor([[tiny], [1.0], [huge], [0.0]], dtype=torch.float64)
    z, fz = (normal(4, 50, seed=seed) * scales for seed in (0, 1))
    z, fz = z.to(dtype), fz.to(dtype)
    residual, scale, merit = Tolerance(rtol=0.0, atol=0.0).measure(z, fz)
    assert (merit == residual).all()
    close = {"rtol": 4 * torch.finfo(dtype).eps}
    np.testing.assert_allclose(scale, [math.hypot(*row) for row in fz.tolist()], **close)
    np.testing.assert_allclose(
        residual, [math.dist(*pair) for pair in zip(fz.tolist(), z.tolist(), strict=True)], **close
    )


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_tiny_rows_do_not_pass_for_converged_nor_huge_ones_for_broken(normal, scale):
    b = normal(3, 6).float()
    plain = fixpoint.solve(lambda z: 0.5 * z + b, torch.zeros(3, 6), solver=Picard())
    b[1] *= scale
    sol = fixpoint.solve(lambda z: 0.5 * z + b, torch.zeros(3, 6), solver=Picard())
    assert sol.evals.tolist() == plain.evals.tolist()
    torch.testing.assert_close(sol.relative_residual, plain.relative_residual)
    torch.testing.assert_close(sol.value / b, plain.value / b * torch.tensor([[1], [scale], [1]]))


def test_rows_that_have_ended_are_not_measured_again(monkeypatch):
    tolerance = Tolerance(rtol=0.0, atol=0.0)
    monkeypatch.setattr(norms, "_FEW", 0)
    z, fz = torch.zeros(2, 3), torch.full((2, 3), 1e-30)
    with monkeypatch.context() as patched:
        patched.setattr(torch.Tensor, "index_select", None)
        figures = tolerance.measure(z, fz, np.array([False, False]))
        assert [x.tolist() for x in figures] == [[0, 0]] * 3
    figures = tolerance.measure(z, fz, np.array([True, False]))
    np.testing.assert_allclose(figures, [[3**0.5 * 1e-30, 0]] * 3, rtol=1e-6)


@pytest.mark.parametrize("offset", [1.0, torch.tensor([[0.0], [1.0]])], ids=["all", "zero"])
def test_the_loop_measures_closely_only_rows_that_have_not_ended(monkeypatch, offset):
    monkeypatch.setattr(norms, "_FEW", 0)  # of few entries in float32 no square is lost
    measured, scaled_norm = [], norms._norm_of_scaled
    monkeypatch.setattr(norms, "_norm_of_scaled", lambda x: (measured.append(len(x)), scaled_norm(x))[1])
    slope = torch.tensor([[0.0], [0.9]])
    fixpoint.solve(lambda z: slope * z + offset, torch.zeros(2, 6), solver=Picard())
    assert measured == [1, 1]  # residual and scale of the row whose residual is zero, when it ends


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1.0, 1e30])
def test_rows_of_any_size_are_seen_to_depend_on_others_and_only_then(scale):
    slope = torch.tensor([[0.1], [0.9]])

    def f(z, coupling):
        return slope * z + scale + coupling * z.flip(0)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fixpoint.solve(lambda z: f(z, 0.0), torch.zeros(2, 6), solver=Picard(), max_evals=300)
    with pytest.warns(UserWarning, match="f couples rows"):
        sol = fixpoint.solve(lambda z: f(z, 0.05), torch.zeros(2, 6), solver=Picard(), max_evals=300)
    expected = torch.linalg.solve(torch.tensor([[0.9, -0.05], [-0.05, 0.1]]), torch.ones(2, 1)).expand(2, 6)
    torch.testing.assert_close(sol.value / scale, expected, rtol=2e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_states_of_few_entries_are_measured_like_larger_ones(normal, monkeypatch, dtype, scale):
    z, fz = (scale * normal(3, 5, seed=seed).to(dtype) for seed in (0, 1))
    fz[1], z[2] = 0, torch.inf
    tolerance = Tolerance(rtol=0.0, atol=0.0)
    few = np.stack(tolerance.measure(z, fz))
    monkeypatch.setattr(norms, "_FEW", 0)
    like_larger = np.stack(tolerance.measure(z, fz))
    rtol = 1e-6 if dtype == torch.float32 else 1e-14
    np.testing.assert_allclose(few[:, :2], like_larger[:, :2], rtol=rtol)
    assert not np.isfinite(few[0, 2])
    assert not np.isfinite(like_larger[0, 2])


@pytest.mark.parametrize("shape", [(3, (1 << 18) + 5), (700, 1000), (1, 1 << 19), (2, 1 << 18), ((1 << 18) + 3, 1)])
def test_big_states_are_measured_in_blocks_all_of_them(normal, shape):
    z, fz = normal(*shape).float(), normal(*shape, seed=1).float()
    residual, scale, _ = Tolerance(rtol=0.0, atol=0.0).measure(z, fz)
    expected = torch.stack((fz - z, fz)).double().square().sum(dim=2).sqrt()
    np.testing.assert_allclose((residual, scale), expected, rtol=1e-4)
    other = z.clone()
    other[-1, -1] = torch.nan
    changed, _, _ = Tolerance(rtol=0.0, atol=0.0).measure(other, fz)
    assert np.isnan(changed).tolist() == [False] * (shape[0] - 1) + [True]


def test_row_norm_sums_half_precision_in_float32():
    x = torch.full((1, 10_000), 30.0, dtype=torch.float16)  # the sum of squares overflows half precision
    assert row_norm(x).dtype == torch.float32
    assert float(row_norm(x)) == pytest.approx(3000.0, rel=1e-4)


def test_every_status_advises():
    for status in Status:
        assert status.advice


def test_images_are_the_same_but_for_the_rounding_of_f():
    ours = torch.tensor([[1.0, 2.0], [1.0, 2.0], [0.0, 0.0], [1.0, torch.nan]])
    theirs = ours + torch.tensor([[1e-6, 0.0], [1e-2, 0.0], [0.0, 0.0], [0.0, 0.0]])
    assert same_images(theirs, ours, 0.0).tolist() == [True, False, True, False]
    assert same_images(theirs, ours, torch.finfo(torch.bfloat16).eps).tolist() == [True, True, True, False]


@pytest.mark.parametrize("rtol", [0.0, torch.zeros(2, dtype=torch.float64)], ids=["number", "each row"])
def test_leafwise_with_a_tolerance_of_zero_keeps_the_best_state(rtol):
    # Every state passed for infinitely bad, so z0 came back.
    z0 = torch.full((2, 1), 5.0, dtype=torch.float64)
    options = {"solver": fixpoint.Picard(), "max_evals": 4, "on_failure": "ignore"}
    found = fixpoint.solve(lambda z: 1 - 0.5 * z, z0, rtol=rtol, norm="leafwise", **options)
    plain = fixpoint.solve(lambda z: 1 - 0.5 * z, z0, rtol=rtol, **options)
    torch.testing.assert_close(found.value, plain.value)
    torch.testing.assert_close(found.residual, plain.residual)


@pytest.mark.parametrize("norm", [None, "leafwise"])
def test_an_infinite_tolerance_is_met_at_once(norm):
    inf = float("inf")
    assert fixpoint.solve(lambda z: 0.5 * z + 1, torch.zeros(3, 2), rtol=inf, norm=norm).nfev == 1
    rtol = torch.tensor([inf, 1e-4, 1e-4])
    found = fixpoint.solve(lambda z: 0.5 * z + 1, torch.zeros(3, 2), rtol=rtol, norm=norm)
    assert found.converged.all()
    assert found.evals[0] == 1


def test_leaves_of_next_to_nothing_meet_no_tolerance_that_they_miss():
    def f(z):
        return 0.9 * torch.tanh(z) + 2e-201

    z0 = torch.full((1, 2), 1e-200, dtype=torch.float64)
    found = fixpoint.solve(
        f, z0, norm="leafwise", rtol=0.0, solver=Picard(), max_evals=5, on_failure="ignore", backward=None
    )
    assert found.status == Status.MAX_EVALS
    assert found.residual > 1e-202
