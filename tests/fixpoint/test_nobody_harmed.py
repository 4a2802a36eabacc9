"""One bad row harms nobody: every row gets what it would get alone, whatever stands beside it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fixpoint
from fixpoint import Anderson, Blockwise, Broyden, Picard, Status

SOLVERS = st.sampled_from([Picard(), Picard(damping=0.8), Anderson(), Broyden(), Blockwise(Anderson(), blocks=2)])
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128]


def cell(z, slope, b):
    return slope * torch.tanh(z) + b


def solve(rows, solver, **options):
    """Solve for ``rows = (slope, b)`` ``(rows, 6)`` as arguments, so that ended rows are left out of the batch."""
    options = {"rtol": 1e-7, "max_evals": 300, "on_failure": "ignore", **options}
    return fixpoint.solve(cell, torch.zeros_like(rows[1]), rows, solver=solver, **options)


# Per-row status with one cause each


def test_a_batch_holds_rows_of_every_status_each_for_its_own_cause(solver):
    eps = torch.finfo(torch.float64).eps

    def f(z):
        still, marching, jittering, broken = z
        return torch.stack([still * 0 + 3, marching + 1, 1 + eps * (jittering == 1).to(z), broken * 1e200])

    sol = fixpoint.solve(
        f, torch.ones(4, 6, dtype=torch.float64), rtol=0.0, solver=solver, max_evals=60, on_failure="ignore"
    )
    assert sol.status.tolist() == [Status.CONVERGED, Status.MAX_EVALS, Status.STAGNATED, Status.NON_FINITE]
    assert sol.converged.tolist() == [True, False, False, False]
    assert sol.evals.tolist() == [sol.evals[0], 60, sol.evals[2], sol.evals[3]]
    assert (sol.evals[[0, 2, 3]] < 30).all()
    assert sol.value.isfinite().all()


# Alone as in a batch

NEIGHBOURS = {
    "NaN": (torch.nan, 1.0),
    "infinite": (torch.inf, 1.0),
    "an infinite constant": (0.5, torch.inf),
    "exploding": (1e120, 1.0),
    "huge": (0.5, 1e100),
    "tiny": (0.5, 1e-100),
    "chaotic": (-9.0, 2.0),
    "solved": (0.0, 0.0),
    "easy": (0.01, 1.0),
}


@given(
    seed=st.integers(0, 10_000),
    solver=SOLVERS,
    neighbours=st.lists(st.sampled_from(sorted(NEIGHBOURS)), min_size=1, max_size=6),
    data=st.data(),
)
def test_any_row_alone_gives_what_it_gives_beside_any_others(normal, seed, solver, neighbours, data):
    good = 3
    slope, b = normal(good, 6, seed=seed).clamp(-0.95, 0.95), normal(good, 6, seed=seed + 1)
    others = torch.tensor([NEIGHBOURS[name] for name in neighbours], dtype=torch.float64)[:, :, None].expand(-1, 2, 6)
    order = data.draw(st.permutations(range(good + len(neighbours))))
    rows = torch.cat([torch.stack([slope, b], dim=1), others])[order].unbind(1)
    batch = solve(rows, solver)
    for row in range(len(order)):
        if order[row] >= good and neighbours[order[row] - good] == "chaotic":
            continue  # rounding is all that decides where it goes, and when it ends
        alone = solve([x[[row]] for x in rows], solver)
        assert alone.evals[0] == batch.evals[row]
        assert alone.status[0] == batch.status[row]
        scale = float(alone.value.abs().max()) or 1.0
        torch.testing.assert_close(batch.value[row] / scale, alone.value[0] / scale, rtol=1e-9, atol=1e-10)
    assert batch.value.isfinite().all()


# The same work at any scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_a_problem_in_other_units_takes_the_same_evaluations(solver, normal, dtype, scale):
    slope, b = (0.8 * torch.tanh(normal(5, 6))).to(dtype), normal(5, 6, seed=1).to(dtype)
    scales = torch.tensor([[1.0], [scale], [1.0], [scale], [1.0]], dtype=dtype)

    def f(z, slope, b):
        return slope * z + b

    options = {"solver": solver, "rtol": 1e-4, "max_evals": 200}
    plain = fixpoint.solve(f, torch.zeros_like(b), (slope, b), **options)
    mixed = fixpoint.solve(f, torch.zeros_like(b), (slope, scales * b), **options)
    assert plain.evals.tolist() == mixed.evals.tolist()
    torch.testing.assert_close(mixed.value / scales, plain.value, rtol=2e-3, atol=2e-3)


# Every dtype


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_is_solved_to_what_it_can_tell_apart(solver, normal, dtype):
    slope = 0.6 * torch.tanh(normal(5, 6)).to(dtype)
    b = torch.complex(normal(5, 6, seed=1), normal(5, 6, seed=2)) if dtype.is_complex else normal(5, 6, seed=1)
    b = b.to(dtype)
    rtol = 16 * torch.finfo(dtype).eps
    sol = fixpoint.solve(
        lambda z, slope, b: slope * z + b, torch.zeros_like(b), (slope, b), solver=solver, rtol=rtol, max_evals=300
    )
    assert sol.value.dtype == dtype
    assert sol.converged.all()
    wide = torch.complex128 if dtype.is_complex else torch.float64
    exact = b.to(wide) / (1 - slope.to(wide))
    torch.testing.assert_close(sol.value.to(wide), exact, rtol=10 * rtol, atol=10 * rtol)
    residual = torch.linalg.vector_norm((slope * sol.value + b - sol.value).to(wide), dim=1)
    torch.testing.assert_close(sol.residual.double(), residual, rtol=1e-4, atol=1e-12)


# Hardly any evaluations


@pytest.mark.parametrize("max_evals", [1, 2])
def test_one_and_two_evaluations_give_honest_figures(solver, normal, max_evals):
    rows = 0.5 * torch.tanh(normal(3, 6)), normal(3, 6, seed=1)
    sol = solve(rows, solver, max_evals=max_evals, record=True)
    assert sol.nfev == max_evals == len(sol.trace)
    assert sol.evals.tolist() == [max_evals] * 3
    assert sol.status.tolist() == [Status.MAX_EVALS] * 3
    torch.testing.assert_close(sol.residual, torch.linalg.vector_norm(cell(sol.value, *rows) - sol.value, dim=1))
    assert torch.equal(sol.residual, sol.trace.amin(dim=0))
    assert torch.equal(sol.trace[0], torch.linalg.vector_norm(rows[1], dim=1))


def test_a_half_precision_start_whose_sum_overflows_is_finite_all_the_same():
    z0 = torch.full((2, 6), 6e4, dtype=torch.float16)
    assert fixpoint.solve(lambda z: z, z0).converged.all()
    with pytest.raises(ValueError, match="z0 must be finite"):
        fixpoint.solve(lambda z: z, torch.tensor([[torch.inf, -torch.inf]]))
