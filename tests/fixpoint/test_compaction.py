"""Rows that have ended cost f nothing, and an f that couples rows is found out."""

from __future__ import annotations

import dataclasses
import itertools
import logging

import pytest
import torch

import fixpoint
from fixpoint import Picard, Status
from fixpoint.engine.compaction import Compaction
from fixpoint.engine.evaluation import RowMap
from fixpoint.engine.layout import Layout

ROWS = 80


@pytest.fixture
def unequal(normal):
    """Start and arguments of rows whose needs differ widely: many easy ones, some hard ones, in any order."""
    slopes = torch.cat([torch.linspace(0.01, 0.3, 40), torch.linspace(0.4, 0.97, 40)]).double()
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(0))
    return torch.zeros(ROWS, 6, dtype=torch.float64), (slopes[order, None], normal(ROWS, 6))


class Cell:
    """``tanh(slope z + b)``; keeps the batch sizes that it was shown."""

    def __init__(self):
        self.sizes = []

    def __call__(self, z, slope, b):
        self.sizes.append(len(z))
        return torch.tanh(slope * z + b)


def both_ways(f, z0, args, **options):
    """The solve with and without compaction."""
    options = {"solver": Picard(), "rtol": 1e-6, "max_evals": 600, "on_failure": "ignore", **options}
    compact = fixpoint.solve(f, z0, args, **options)
    return compact, fixpoint.solve(f, z0, args, compact=False, **options)


def assert_same(one, other):
    torch.testing.assert_close(one.value, other.value, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(one.residual, other.residual, rtol=1e-6, atol=1e-12)
    assert one.evals.tolist() == other.evals.tolist()
    assert one.status.tolist() == other.status.tolist()


def test_rows_evaluated_are_within_a_tenth_of_the_rows_own_needs(solver, unequal):
    f, whole = Cell(), Cell()
    z0, args = unequal
    options = {"solver": solver, "rtol": 1e-8, "max_evals": 1000}
    sol = fixpoint.solve(f, z0, args, **options)
    without = fixpoint.solve(whole, z0, args, compact=False, **options)
    assert_same(sol, without)
    assert sum(whole.sizes) == ROWS * without.nfev
    assert int(sol.evals.sum()) <= sum(f.sizes) <= 1.1 * int(sol.evals.sum())
    assert len(f.sizes) == sol.nfev


def test_rows_that_are_left_out_keep_their_final_residual_in_trace_and_callback(unequal):
    seen = []
    compact, whole = both_ways(Cell(), *unequal, record=True, callback=lambda progress: seen.append(progress.residual))
    torch.testing.assert_close(compact.trace, whole.trace, rtol=1e-6, atol=1e-12)
    assert torch.equal(torch.stack(seen[: compact.nfev]), compact.trace)
    assert torch.equal(compact.trace[-1], compact.residual)


@pytest.mark.parametrize("check_every", [2, 5])
def test_rows_are_left_out_after_the_look_that_ended_them(unequal, check_every):
    f = Cell()
    sol = fixpoint.solve(f, *unequal, rtol=1e-6, check_every=check_every, max_evals=300)
    assert sum(f.sizes) <= 1.1 * int(sol.evals.sum())


def test_arguments_are_cut_wherever_they_lie_and_others_passed_whole(unequal):
    z0, (slope, b) = unequal
    table, seen = torch.ones(ROWS + 1, 6, dtype=torch.float64), []

    def f(z, a, table_now, factor):
        seen.append((len(z), len(a["slope"]), len(a["more"][0]), table_now is table, factor))
        return torch.tanh(a["slope"] * z + a["more"][0]) * factor * table_now[0]

    compact, whole = both_ways(f, z0, ({"slope": slope, "more": (b,)}, table, 1.0))
    assert_same(compact, whole)
    assert len({size for size, *_ in seen}) > 3
    assert all(row == (row[0], row[0], row[0], True, 1.0) for row in seen)


def test_nested_and_complex_states_are_cut(normal):
    slope = torch.linspace(0.1, 0.9, 20, dtype=torch.float64)[:, None]
    b = torch.complex(normal(20, 4), normal(20, 4, seed=1))
    z0 = {"x": torch.zeros(20, 4, dtype=torch.complex128), "y": (torch.zeros(20, dtype=torch.complex128),)}
    sizes = []

    def f(z, slope, b):
        sizes.append(len(b))
        return {"x": slope * 1j * z["x"] + b, "y": (slope[:, 0] * z["y"][0] + b[:, 0],)}

    sol = fixpoint.solve(f, z0, (slope, b), rtol=1e-9, max_evals=600)
    torch.testing.assert_close(sol.value["x"], b / (1 - 1j * slope), rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(sol.value["y"][0], (b / (1 - slope))[:, 0], rtol=1e-7, atol=1e-7)
    assert sum(sizes) <= 1.1 * int(sol.evals.sum())


def test_gradients_are_those_of_the_whole_batch(unequal):
    z0, (slope, b) = unequal
    grads = []
    for compact in (True, False):
        leaf = b.clone().requires_grad_()
        f = Cell()
        fixpoint.solve(f, z0, (slope, leaf), rtol=1e-10, max_evals=600, compact=compact).value.sum().backward()
        assert (min(f.sizes) < ROWS) == compact
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads, rtol=1e-7, atol=1e-9)


# When all rows are shown to f


def no_args(f, args):
    return lambda z: f(z, *args), ()


@pytest.mark.parametrize(
    ("options", "reshape"),
    [
        ({"compact": False}, (ROWS, 6)),
        ({"batch_dims": 0}, (ROWS, 6)),
        ({"batch_dims": 2}, (ROWS, 1, 6)),
        ({"depth": 30}, (ROWS, 6)),
    ],
    ids=str,
)
def test_all_rows_are_shown_to_an_f_that_is_not_to_be_cut(unequal, options, reshape):
    z0, (slope, b) = unequal
    f = Cell()
    slope = slope.reshape(-1, *[1] * (len(reshape) - 1))
    fixpoint.solve(f, z0.reshape(reshape), (slope, b.reshape(reshape)), on_failure="ignore", **options)
    assert set(f.sizes) == {ROWS}


def test_all_rows_are_shown_to_an_f_without_aligned_arguments(unequal):
    z0, args = unequal
    f = Cell()
    fixpoint.solve(lambda z, one: f(z, *args) * one, z0, (torch.tensor(1.0),), on_failure="ignore")
    assert set(f.sizes) == {ROWS}


def test_all_rows_are_shown_to_an_f_whose_steps_are_recorded(unequal):
    z0, (slope, b) = unequal
    f = Cell()
    fixpoint.solve(f, z0, (slope, b.requires_grad_()), backward=fixpoint.Unroll(), on_failure="ignore")
    assert set(f.sizes) == {ROWS}


# An f that couples rows is found out


def neighbours(z, slope, b):
    """A ring: each row sees the one before it."""
    return slope * 0.5 * (z + z.roll(1, 0)) + b


def next_neighbours(z, slope, b):
    return slope * 0.5 * (z + z.roll(-1, 0)) + b


def batch_mean(z, slope, b):
    return slope * z + b + 0.01 * z.mean(dim=0)


def batch_norm(z, slope, b, norm=torch.nn.BatchNorm1d(6, dtype=torch.float64)):  # noqa: B008
    return slope * torch.nn.functional.batch_norm(z + b, None, None, training=True) + b


NOISE = torch.randn(ROWS, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def closes_over_the_batch(z, slope, b):
    return slope * z + b + NOISE


def looks_rows_up_by_place(z, slope, b):
    return slope * z + b + NOISE[: len(z)]


def looks_rows_up_by_number(z, slope, b):
    return slope * z + b + 0.1 * z[torch.arange(ROWS - 1, -1, -1)[: max(len(z), ROWS)]]


def asserts_its_batch(z, slope, b):
    assert len(z) == ROWS, "compiled for one batch size"
    return slope * z + b


def returns_another_shape(z, slope, b):
    return (slope * z + b)[: len(z) // ROWS * ROWS]


RAISING = [closes_over_the_batch, looks_rows_up_by_number, asserts_its_batch]
ANSWERING = [neighbours, next_neighbours, batch_mean, batch_norm, looks_rows_up_by_place, returns_another_shape]


@pytest.mark.parametrize("f", RAISING + ANSWERING, ids=lambda f: f.__name__)
def test_an_f_that_couples_rows_gives_what_it_gives_on_the_whole_batch(caplog, unequal, f):
    sizes = []

    def counting(z, *args):
        sizes.append(len(z))
        return f(z, *args)

    z0, args = unequal
    with caplog.at_level(logging.DEBUG, logger="fixpoint"):
        compact, whole = both_ways(counting, z0, args)
    torch.testing.assert_close(compact.value, whole.value, rtol=1e-9, atol=1e-10)
    (record,) = caplog.records
    assert "f does not take rows one by one" in record.getMessage()
    assert record.levelno == logging.DEBUG
    trials = [size for size in sizes if size != ROWS]
    assert len(trials) == 1
    assert compact.nfev == whole.nfev + (f not in RAISING)
    assert sizes.index(trials[0]) > 1


@pytest.mark.parametrize("hardest", ["first", "last"])
def test_coupling_is_found_out_though_all_but_the_hardest_rows_are_spared_it(unequal, hardest):
    z0, (slope, b) = unequal
    slope, sizes = slope.sort(dim=0, descending=hardest == "first").values, []

    def f(z, slope, b):
        sizes.append(len(z))
        plain = slope * z + b
        return torch.where(slope < 0.9, plain, plain + 0.1 * plain.mean(dim=0))

    fixpoint.solve(f, z0, (slope, b), solver=Picard(), max_evals=30, on_failure="ignore")
    assert len([size for size in sizes if size != ROWS]) == 1


def test_an_f_that_counts_places_is_found_out_whichever_rows_end(normal):
    # Where the witnesses stand depends on which rows have ended: none of these choices may leave both at home.
    place, b = 0.01 * torch.arange(5.0, dtype=torch.float64)[:, None], normal(5, 2)
    for slopes in itertools.product([0.0, 0.6, torch.nan], repeat=5):
        args = (torch.tensor(slopes, dtype=torch.float64)[:, None], b)
        compact, whole = both_ways(lambda z, s, b: s * z + b + place[: len(z)], torch.zeros_like(b), args)
        torch.testing.assert_close(compact.value, whole.value, rtol=1e-9, atol=1e-10)


def test_weights_as_long_as_the_batch_are_not_cut_for_rows(normal):
    # Six rows of length six: nothing tells W and the bias from batch-aligned arguments but what f makes of them.
    W, bias = 0.1 * normal(6, 6), normal(6, seed=1)
    slope = torch.tensor([[0.0], [0.1], [0.2], [0.5], [0.9], [0.97]], dtype=torch.float64)
    compact, whole = both_ways(lambda z, W, bias, s: s * torch.tanh(z @ W) + bias, 0 * normal(6, 6), (W, bias, slope))
    assert_same(compact, whole)


@pytest.mark.parametrize("max_evals", range(1, 12))
def test_a_repeated_evaluation_never_exceeds_the_budget(unequal, max_evals):
    calls = []

    def f(z, slope, b):
        calls.append(len(z))
        return looks_rows_up_by_place(z, slope, b)

    sol = fixpoint.solve(f, *unequal, solver=Picard(), max_evals=max_evals, record=True, on_failure="ignore")
    assert len(calls) == sol.nfev == max_evals == len(sol.trace) == int(sol.evals.max())


def test_rows_that_broke_are_left_out_too(unequal):
    z0, (slope, b) = unequal
    slope = torch.linspace(0.5, 0.97, ROWS, dtype=torch.float64)[:, None]
    slope[: ROWS // 8] = torch.nan  # these end first, before any other
    f = Cell()
    sol = fixpoint.solve(f, z0, (slope, b), rtol=1e-6, max_evals=600, on_failure="ignore")
    assert (sol.status[: ROWS // 8] == Status.NON_FINITE).all()
    assert sol.converged[ROWS // 8 :].all()
    assert f.sizes[1] < ROWS
    assert sum(f.sizes) <= 1.1 * int(sol.evals.sum())


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, ValueError])
def test_what_f_raises_in_a_batch_that_has_worked_before_comes_through(unequal, error):
    z0, (slope, b) = unequal
    slope = torch.where(slope < 0.5, 0.0, 0.97)  # one cut, then the same batch for long
    f, calls = Cell(), []

    def failing(z, *args):
        calls.append(len(z))
        if len(calls) == 9:
            raise error("by f")
        return f(z, *args)

    with pytest.raises(error, match="by f") as caught:
        fixpoint.solve(failing, z0, (slope, b), solver=Picard())
    assert caught.value.solution.nfev == 8
    assert len(calls) == 9
    assert calls[8] < ROWS


def test_away_from_the_cpu_a_batch_of_the_old_size_is_tried_first(unequal):
    # An index out of range is no exception there but the end of the device.
    z0, args = unequal
    f = Cell()
    elsewhere = dataclasses.replace(Layout.of(z0, 1), device=torch.device("cuda"))
    rows = RowMap(f, args, elsewhere, gradients=False)
    compaction = Compaction(rows)
    active = torch.arange(ROWS) % 2 == 0
    fz = rows(z0)
    compaction.select(active.numpy(), z0, fz)
    for _ in range(4):
        image, spent = compaction(z0, spare=1)
        assert spent == 1
        torch.testing.assert_close(image, torch.where(active[:, None], fz, z0))
    assert f.sizes == [ROWS, ROWS, ROWS // 2 + 2, ROWS // 2, ROWS // 2]
