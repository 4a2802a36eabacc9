"""Rows that have ended cost f nothing, and no guess about f decides a value."""

from __future__ import annotations

import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fixpoint
from fixpoint import Anderson, Picard, Status

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


def cost_by_the_rule(evals, nfev, batch):
    """Rows evaluated when the batch is cut once those that ended have cost one, and half of it at most are left.

    Those that are left go twice at first, and the last evaluation, which confirms, is of all rows.
    """
    total, wasted, width = 0, 0, batch
    for evaluation in range(1, nfev):
        left = int((evals >= evaluation).sum())
        wasted += width - left
        if wasted >= width and 2 * left <= width:
            width, wasted = left, 0
            total += left
        total += width
    return total + batch


@pytest.mark.parametrize("check_every", [1, 2, 5])
def test_rows_that_ended_are_left_out_as_the_rule_says(solver, unequal, check_every):
    f, whole = Cell(), Cell()
    z0, args = unequal
    options = {"solver": solver, "rtol": 1e-8, "max_evals": 1000, "check_every": check_every}
    sol = fixpoint.solve(f, z0, args, **options)
    without = fixpoint.solve(whole, z0, args, compact=False, **options)
    assert_same(sol, without)
    assert sum(whole.sizes) == ROWS * without.nfev
    assert sol.nfev == len(f.sizes) == without.nfev + 1
    assert sum(f.sizes) == cost_by_the_rule(sol.evals, sol.nfev, ROWS) < sum(whole.sizes)


def test_a_solve_that_gains_nothing_costs_no_further_evaluation(unequal):
    # Two of three rows end early, but the last has not cost a batch by then.
    f = Cell()
    slope = torch.tensor([[0.0], [0.0], [0.01]], dtype=torch.float64)
    sol = fixpoint.solve(f, unequal[0][:3], (slope, unequal[1][1][:3]), solver=Picard(), rtol=1e-3)
    assert f.sizes == [3] * sol.nfev


def test_rows_that_are_left_out_keep_their_final_residual_in_trace_and_callback(unequal):
    seen = []
    compact, whole = both_ways(Cell(), *unequal, record=True, callback=lambda progress: seen.append(progress.residual))
    torch.testing.assert_close(compact.trace[:-1], whole.trace, rtol=1e-6, atol=1e-12)
    assert torch.equal(torch.stack(seen[: compact.nfev]), compact.trace)
    torch.testing.assert_close(compact.trace[-1], compact.residual, rtol=1e-6, atol=1e-12)


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

    sol = fixpoint.solve(f, z0, (slope, b), solver=Picard(), rtol=1e-9, max_evals=600)
    torch.testing.assert_close(sol.value["x"], b / (1 - 1j * slope), rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(sol.value["y"][0], (b / (1 - slope))[:, 0], rtol=1e-7, atol=1e-7)
    assert min(sizes) < 20
    assert sol.converged.all()


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


# No guess decides a value


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
    return slope * z + b + 0.02 * z[torch.arange(ROWS - 1, -1, -1)[: max(len(z), ROWS)]]


def asserts_its_batch(z, slope, b):
    assert len(z) == ROWS, "compiled for one batch size"
    return slope * z + b


def returns_another_shape(z, slope, b):
    return (slope * z + b)[: len(z) // ROWS * ROWS]


def treats_halves_differently(z, slope, b):
    first = torch.arange(len(z)) < len(z) // 2
    return slope * z + torch.where(first[:, None], b, -b)


RAISING = [asserts_its_batch, returns_another_shape]
COUNTING = [closes_over_the_batch, looks_rows_up_by_place, treats_halves_differently]
COUPLING = [neighbours, next_neighbours, batch_mean, batch_norm, looks_rows_up_by_number]


@pytest.mark.parametrize("f", RAISING + COUNTING, ids=lambda f: f.__name__)
def test_an_f_that_knows_its_rows_by_place_gives_what_it_gives_on_the_whole_batch(caplog, unequal, f):
    with caplog.at_level(logging.DEBUG, logger="fixpoint"):
        compact, whole = both_ways(f, *unequal, rtol=1e-10, max_evals=3000)
    torch.testing.assert_close(compact.value, whole.value, rtol=1e-7, atol=1e-8)
    assert compact.converged.all()
    residual = torch.linalg.vector_norm(f(compact.value, *unequal[1]) - compact.value, dim=1)
    torch.testing.assert_close(compact.residual, residual, rtol=1e-6, atol=1e-13)
    (record,) = caplog.records
    assert record.levelno == logging.DEBUG
    assert "rows that have ended stay in the batch" in record.getMessage()
    trial = f not in RAISING or f is returns_another_shape  # what f completed is counted
    assert compact.nfev == whole.nfev + trial


@pytest.mark.filterwarnings("ignore:f couples rows:UserWarning")
@pytest.mark.parametrize("f", COUPLING, ids=lambda f: f.__name__)
def test_an_f_that_couples_rows_is_solved_as_a_whole(unequal, f):
    compact, whole = both_ways(f, *unequal, rtol=1e-10, max_evals=2000)
    torch.testing.assert_close(compact.value, whole.value, rtol=1e-6, atol=1e-7)
    for sol in (compact, whole):
        residual = torch.linalg.vector_norm(f(sol.value, *unequal[1]) - sol.value, dim=1)
        torch.testing.assert_close(sol.residual, residual, rtol=1e-6, atol=1e-13)
        assert sol.converged.all()
        assert (residual <= 1.01e-10 * torch.linalg.vector_norm(sol.value, dim=1)).all()


@pytest.mark.filterwarnings("ignore:f couples rows:UserWarning")
def test_coupling_is_found_out_though_all_but_the_hardest_rows_are_spared_it(unequal):
    z0, (slope, b) = unequal

    def f(z, slope, b):
        plain = slope * z + b
        return torch.where(slope < 0.9, plain, plain + 0.02 * plain.mean(dim=0))

    compact, whole = both_ways(f, z0, (slope, b), rtol=1e-10, max_evals=5000)
    torch.testing.assert_close(compact.value, whole.value, rtol=1e-6, atol=1e-6)
    assert compact.converged.all()


IDS = torch.tensor([0, 1, 0, 1, 0, 1, 0, 1])
RATE = torch.tensor([0.2, 0.2, 0.9, 0.9, 0.9, 0.9, 0.0, 0.0], dtype=torch.float64)[:, None]


def look_up(z, table, ids, rate):
    """As many entries as rows: nothing tells the table from an argument with one entry for each row."""
    return rate * z + table[ids]


def solve_look_up(table, ids=IDS, rate=RATE, **options):
    options = {"solver": Picard(), "rtol": 1e-10, "max_evals": 3000, "on_failure": "ignore", **options}
    return fixpoint.solve(look_up, torch.zeros(len(table), 1, dtype=torch.float64), (table, ids, rate), **options)


def test_a_table_as_long_as_the_batch_is_looked_up_by_number():
    table = torch.arange(1.0, 9.0, dtype=torch.float64)[:, None].requires_grad_()
    sol = solve_look_up(table)
    assert sol.converged.all()
    torch.testing.assert_close(sol.value.detach(), table.detach()[IDS] / (1 - RATE), rtol=1e-8, atol=1e-8)
    sol.value[2:6].sum().backward()
    expected = torch.tensor([20.0, 20.0, 0, 0, 0, 0, 0, 0], dtype=torch.float64)[:, None]
    torch.testing.assert_close(table.grad, expected, rtol=1e-5, atol=1e-9)
    rate = RATE.clone().requires_grad_()
    solve_look_up(table.detach(), rate=rate).value.sum().backward()
    torch.testing.assert_close(rate.grad[2], torch.tensor([100.0], dtype=torch.float64), rtol=1e-5, atol=0)


TURN = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)).Q


def turn_and_look_up(z, table, ids, rate):
    return rate * (z @ TURN.T) + table[ids]


def solve_turning(table, ids=IDS, rate=RATE, **options):
    options = {"rtol": 1e-10, "max_evals": 3000, "on_failure": "ignore", **options}
    return fixpoint.solve(turn_and_look_up, 0 * table[ids], (table, ids, rate), **options)


@pytest.mark.parametrize("solver", [Picard(), Anderson(memory=1)], ids=repr)
@given(seed=st.integers(0, 2**31), rows=st.integers(4, 12))
@settings(max_examples=60)
def test_random_tables_give_what_they_say(solver, seed, rows):
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(rows, 3, generator=generator, dtype=torch.float64)
    ids = torch.randint((rows + 1) // 2, (rows,), generator=generator)
    table[(rows + 1) // 2 :][torch.rand(rows // 2, generator=generator) < 0.2] = torch.nan  # nobody may look these up
    rate = torch.tensor([0.0, 0.1, 0.6, 0.7])[torch.randint(4, (rows, 1), generator=generator)].double()
    sol = solve_turning(table, ids, rate, solver=solver, rtol=1e-8)
    assert sol.converged.all()
    expected = torch.linalg.solve(torch.eye(3).double() - rate[:, :, None] * TURN, table[ids])
    torch.testing.assert_close(sol.value, expected, rtol=1e-6, atol=1e-6)


SLOW = torch.tensor([0.0, 0.0, 0.95, 0.95, 0.95, 0.95, 0.0, 0.0], dtype=torch.float64)[:, None]


def look_up_late(z, table, ids, rate):
    """No row that is tried with the wrong entry has another image yet."""
    return rate * z + torch.where(z > 12, table[ids], 1.0)


def solve_late(table, f=look_up_late, **options):
    options = {"solver": Picard(), "rtol": 1e-10, "max_evals": 3000, "on_failure": "ignore", **options}
    return fixpoint.solve(f, torch.zeros(8, 1, dtype=torch.float64), (table, IDS, SLOW), **options)


def expected_late(table):
    return torch.where(SLOW > 0.5, table[IDS], 1.0) / (1 - SLOW)


TABLE = torch.arange(1.0, 9.0, dtype=torch.float64)[:, None]


def test_what_no_trial_shows_is_found_out_before_the_solve_ends(caplog):
    with caplog.at_level(logging.DEBUG, logger="fixpoint"):
        sol = solve_late(TABLE)
    assert "all rows together have other images" in caplog.text
    assert sol.converged.all()
    torch.testing.assert_close(sol.value, expected_late(TABLE), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("solver", [Picard(), Picard(damping=0.8)], ids=repr)
@pytest.mark.parametrize("check_every", [1, 3])
@pytest.mark.parametrize("limit", ["max_evals", "callback"])
def test_figures_are_those_of_all_rows_wherever_the_solve_is_cut_short(solver, check_every, limit):
    for count in range(1, 60, 2):
        stop = {"max_evals": count} if limit == "max_evals" else {"callback": lambda p, count=count: p.nfev >= count}
        sol = solve_late(TABLE, solver=solver, check_every=check_every, **stop)
        image = look_up_late(sol.value, TABLE, IDS, SLOW)
        residual, size = (torch.linalg.vector_norm(x, dim=1) for x in (image - sol.value, image))
        torch.testing.assert_close(sol.residual, residual, rtol=1e-6, atol=1e-12)
        assert (residual <= 1.001e-10 * size)[sol.converged].all()
        if limit == "max_evals":
            assert sol.nfev <= count


@pytest.mark.parametrize("check_every", [1, 3])
def test_a_row_that_breaks_where_it_is_shown_anothers_arguments_goes_on(check_every):
    table = torch.where(TABLE < 3, TABLE, torch.nan)
    sol = solve_late(table, check_every=check_every)
    assert sol.converged.all()
    torch.testing.assert_close(sol.value, expected_late(table), rtol=1e-8, atol=1e-8)


def test_an_interrupted_solve_says_converged_of_no_row_that_is_not_confirmed():
    calls = []

    def interrupted(z, *args):
        calls.append(len(z))
        if len(calls) > 20 and calls[-2] < 8 == calls[-1]:
            raise KeyboardInterrupt  # instead of the evaluation that confirms
        return look_up_late(z, *args)

    with pytest.raises(KeyboardInterrupt) as caught:
        solve_late(TABLE, interrupted)
    found = caught.value.solution
    assert min(calls) < 8
    assert found.status.tolist() == [Status.CONVERGED] * 2 + [Status.MAX_EVALS] * 4 + [Status.CONVERGED] * 2


@pytest.mark.parametrize("f", [*RAISING, *COUNTING, Cell()], ids=lambda f: getattr(f, "__name__", "sound"))
def test_evaluations_repeated_and_confirming_are_within_the_budget(unequal, f):
    for max_evals in (*range(1, 40), 60):
        completed = []

        def counting(z, *args, completed=completed):
            image = f(z, *args)
            completed.append(len(z))
            return image

        options = {"solver": Picard(), "record": True, "on_failure": "ignore"}
        sol = fixpoint.solve(counting, *unequal, max_evals=max_evals, **options)
        assert len(completed) == sol.nfev == len(sol.trace) <= max_evals
        assert int(sol.evals.max()) <= sol.nfev
        assert completed[-1] == ROWS


def test_rows_that_broke_are_left_out_too(unequal):
    z0, (slope, b) = unequal
    slope = torch.linspace(0.5, 0.97, ROWS, dtype=torch.float64)[:, None]
    slope[: ROWS // 8] = torch.nan  # these end first, before any other
    f = Cell()
    sol = fixpoint.solve(f, z0, (slope, b), rtol=1e-6, max_evals=600, on_failure="ignore")
    assert (sol.status[: ROWS // 8] == Status.NON_FINITE).all()
    assert sol.converged[ROWS // 8 :].all()
    assert sum(f.sizes) == cost_by_the_rule(sol.evals, sol.nfev, ROWS)


def test_a_row_that_breaks_while_others_are_left_out_ends_and_harms_no_other(unequal):
    z0, (slope, b) = unequal
    slope = slope.clone()
    slope[5], b[5] = 1e40, 1.0  # overflows at its eighth evaluation
    slope[:5] = slope[6:50] = 0.0
    f = lambda z, slope, b: slope * z + b  # noqa: E731
    compact, whole = both_ways(f, z0, (slope, b))
    assert compact.status.tolist() == whole.status.tolist()
    assert compact.status[5] == Status.NON_FINITE
    torch.testing.assert_close(compact.value, whole.value, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, ZeroDivisionError])
def test_what_f_raises_on_all_rows_too_comes_through(unequal, error):
    z0, (slope, b) = unequal
    slope = torch.where(slope < 0.5, 0.0, 0.97)  # one cut, then the same batch for long
    f, calls = Cell(), []

    def failing(z, *args):
        calls.append(len(z))
        if len(calls) >= 9:
            raise error("by f")
        return f(z, *args)

    with pytest.raises(error, match="by f") as caught:
        fixpoint.solve(failing, z0, (slope, b), solver=Picard())
    assert caught.value.solution.nfev == 8
    assert calls[8] < ROWS
    assert calls[9:] == ([] if error is KeyboardInterrupt else [ROWS])
