"""Invariants of the loop and the solvers over random contractions, batches and solvers."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import fixpoint
from fixpoint import ACX, Anderson, Blockwise, Broyden, Picard, Status

SOLVERS = st.one_of(
    st.builds(Picard, damping=st.sampled_from([1.0, 0.9, 0.5])),
    st.just(ACX()),
    st.builds(Anderson, memory=st.integers(1, 8), damping=st.sampled_from([1.0, 0.8])),
    st.builds(Broyden, memory=st.integers(1, 10)),
    st.builds(Blockwise, solver=st.sampled_from([Picard(), Anderson(memory=2)]), blocks=st.just(2)),
)
ROWS = st.integers(1, 5)
DIMS = st.sampled_from([2, 4, 6])
RHOS = st.floats(0.1, 0.9)
SEEDS = st.integers(0, 10_000)
SQUASHES = st.sampled_from([torch.tanh, torch.sin, lambda x: x])
CLOSE = {"rtol": 1e-9, "atol": 1e-10}


@pytest.fixture(scope="session")
def make(contraction):
    return contraction


def solve(f, solver, **options):
    return fixpoint.solve(f, solver=solver, **{"rtol": 1e-7, "max_evals": 400, "on_failure": "ignore", **options})


@given(rows=ROWS, dim=DIMS, rho=RHOS, seed=SEEDS, squash=SQUASHES, solver=SOLVERS, max_evals=st.integers(1, 40))
def test_residuals_are_honest_and_statuses_follow_from_them(make, rows, dim, rho, seed, squash, solver, max_evals):
    f = make(rows, dim, rho, seed, squash=squash)
    sol = solve(f, solver, max_evals=max_evals, record=True)
    residual = torch.linalg.vector_norm(f(sol.value) - sol.value, dim=1)
    scale = torch.linalg.vector_norm(f(sol.value), dim=1)
    torch.testing.assert_close(sol.residual, residual, rtol=1e-9, atol=1e-15)
    assert torch.equal(sol.converged, sol.residual <= 1e-7 * scale)
    assert torch.equal(sol.converged, sol.status == Status.CONVERGED)
    assert sol.nfev == int(sol.evals.max()) <= max_evals
    assert torch.equal(sol.trace[-1][sol.converged], sol.residual[sol.converged])
    assert torch.equal(sol.trace.amin(0)[~sol.converged], sol.residual[~sol.converged])


@given(rows=ROWS, dim=DIMS, rho=RHOS, seed=SEEDS, solver=SOLVERS, max_evals=st.integers(1, 30))
def test_f_is_called_as_often_as_reported(make, counted, rows, dim, rho, seed, solver, max_evals):
    f = make(rows, dim, rho, seed, squash=torch.tanh)
    counting = counted(f)
    assert solve(counting, solver, z0=f.z0, max_evals=max_evals).nfev == counting.calls <= max_evals


@given(rows=ROWS, dim=DIMS, rho=RHOS, seed=SEEDS, squash=SQUASHES, solver=SOLVERS, data=st.data())
def test_any_choice_of_rows_gives_each_row_its_own_result(make, rows, dim, rho, seed, squash, solver, data):
    f = make(rows, dim, rho, seed, squash=squash)
    index = data.draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=7))
    whole, part = solve(f, solver), solve(f.rows(index), solver)
    torch.testing.assert_close(part.value, whole.value[index], **CLOSE)
    assert part.evals.tolist() == whole.evals[index].tolist()
    assert part.status.tolist() == whole.status[index].tolist()


@given(
    dim=DIMS,
    seed=SEEDS,
    solver=SOLVERS,
    place=st.integers(0, 3),
    garbage=st.sampled_from([float("nan"), float("inf"), -1e300, 1e-300]),
)
def test_a_row_of_garbage_changes_no_other(make, dim, seed, solver, place, garbage):
    f = make(4, dim, 0.8, seed)
    others = [row for row in range(4) if row != place]
    clean = solve(f.rows(others), solver)
    f.W[place] = garbage
    f.b[place] = 1.0
    sol = solve(f, solver)
    torch.testing.assert_close(sol.value[others], clean.value, **CLOSE)
    assert sol.evals[others].tolist() == clean.evals.tolist()
    assert torch.isfinite(sol.value).all()


@given(dim=DIMS, rho=RHOS, seed=SEEDS, solver=SOLVERS, exponent=st.integers(-6, 6))
def test_scale_changes_nothing_but_the_scale(make, dim, rho, seed, solver, exponent):
    f = make(3, dim, rho, seed)
    scale = 10.0**exponent
    plain, scaled = solve(f, solver), solve(dataclasses.replace(f, b=scale * f.b), solver)
    assert plain.evals.tolist() == scaled.evals.tolist()
    torch.testing.assert_close(scaled.value / scale, plain.value, rtol=1e-7, atol=1e-8)


@given(dim=DIMS, rho=RHOS, seed=SEEDS, solver=SOLVERS, check_every=st.integers(1, 50))
def test_rows_that_are_checked_seldom_meet_the_same_tolerance_and_never_end_sooner(
    make, dim, rho, seed, solver, check_every
):
    f = make(3, dim, rho, seed, squash=torch.tanh)
    each, seldom = solve(f, solver), solve(f, solver, check_every=check_every)
    assert seldom.converged.tolist() == each.converged.tolist()
    assert (seldom.evals >= each.evals).all()
    assert all(evals == 1 or evals % check_every == 0 or evals == 400 for evals in seldom.evals.tolist())


@given(rho=RHOS, seed=SEEDS, solver=SOLVERS, cut=st.integers(0, 6))
def test_splitting_a_state_into_leaves_changes_no_figure(make, rho, seed, solver, cut):
    f = make(3, 6, rho, seed, squash=torch.tanh)
    whole = solve(f, solver)

    def nested(z):
        image = f(torch.cat([z["a"], z["b"][0]], dim=1))
        return {"b": (image[:, cut:],), "a": image[:, :cut]}

    z0 = {"a": f.z0[:, :cut], "b": (f.z0[:, cut:],)}
    split = solve(nested, solver, z0=z0)
    torch.testing.assert_close(torch.cat([split.value["a"], split.value["b"][0]], dim=1), whole.value, **CLOSE)
    assert split.evals.tolist() == whole.evals.tolist()


@given(dim=DIMS, rho=RHOS, seed=SEEDS, solver=SOLVERS, depth=st.integers(0, 12))
def test_a_fixed_depth_is_a_prefix_of_the_solve(make, counted, dim, rho, seed, solver, depth):
    f = make(2, dim, rho, seed, squash=torch.tanh)
    counting = counted(f)
    sol = solve(counting, solver, z0=f.z0, rtol=0.0, max_evals=depth + 1)
    prefix = solve(f, solver, depth=depth, backward=None)
    # A row that rounding stopped earlier stays where it ended; with a fixed depth it goes on.
    going = sol.evals > depth
    assume(going.any())
    torch.testing.assert_close(prefix.value[going], counting.seen[depth][going], rtol=0, atol=0)


@given(dim=DIMS, rho=st.floats(0.1, 0.8), seed=SEEDS, solver=SOLVERS)
def test_implicit_gradients_meet_the_closed_form(make, dim, rho, seed, solver):
    f = make(2, dim, rho, seed)
    b = f.b.clone().requires_grad_()
    rule = fixpoint.IFT(solver=solver, rtol=1e-10, max_evals=400)
    if isinstance(solver, Blockwise):
        rule = fixpoint.IFT(rtol=1e-10)  # blocks need not contract under the transpose
    g = dataclasses.replace(f, b=b)
    value = solve(g, solver, z0=f.z0, rtol=1e-10, backward=rule).value
    value.sum().backward()
    ones = torch.ones_like(f.b)
    expected = torch.linalg.solve(torch.eye(dim, dtype=b.dtype) - f.W.transpose(1, 2), ones)
    torch.testing.assert_close(b.grad, expected, rtol=1e-6, atol=1e-7)
