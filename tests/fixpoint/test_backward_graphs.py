"""Stochastic JFB, unrolling, and what any rule leaves in the graph and in memory."""

from __future__ import annotations

import gc
import warnings
import weakref

import pytest
import torch
from torch.autograd import gradcheck

import fixpoint
from fixpoint import IFT, JFB, Anderson, Broyden, Phantom, Picard, StochasticJFB, Unroll

D = torch.float64
TIGHT = {"rtol": 1e-13, "max_evals": 500}
EXACT = IFT(rtol=1e-13, max_evals=500)


# Stochastic JFB


def draws(N, M, seed):
    generator = torch.Generator().manual_seed(seed)
    return int(torch.randint(0, N + 1, (), generator=generator)), int(torch.randint(1, M + 1, (), generator=generator))


@pytest.mark.parametrize("closure", [True, False])
def test_sjfb_calls_f_exactly_n_plus_m_times_within_inclusive_bounds(normal, cell_class, closure):
    cell, x = cell_class(), normal(2, 4).requires_grad_()
    f, args = ((lambda z: cell(z, x)), ()) if closure else (cell, (x,))
    seen = set()
    for seed in range(120):
        rule = StochasticJFB(max_no_grad=2, max_grad=3, generator=torch.Generator().manual_seed(seed))
        cell.calls = 0
        sol = fixpoint.solve(f, torch.zeros(2, 4, dtype=D), args, backward=rule)
        n, total = sol.nfev, cell.calls
        assert sol.evals.tolist() == [n, n]
        seen.add((n, total - n))
        assert (n, total - n) == draws(2, 3, seed)
    assert seen == {(n, m) for n in (0, 1, 2) for m in (1, 2, 3)}


@pytest.mark.parametrize("solver", [Picard(), Anderson(memory=2), Broyden()], ids=repr)
@pytest.mark.parametrize("seed", range(8))
def test_sjfb_is_n_solver_steps_and_a_series_of_m_terms(linear_problem, solver, seed):
    A, b = linear_problem()
    z0 = torch.zeros(3, 4, dtype=D)
    n, m = draws(4, 3, seed)
    rule = StochasticJFB(max_no_grad=4, max_grad=3, generator=torch.Generator().manual_seed(seed))
    sol = fixpoint.solve(lambda z: z @ A.T + b, z0, solver=solver, backward=rule)
    start = z0 if n == 0 else fixpoint.solve(lambda z: z @ A.T + b, z0, solver=solver, depth=n, backward=None).value
    expected = start
    for _ in range(m):
        expected = expected @ A.T + b
    torch.testing.assert_close(sol.value, expected)
    assert sol.residual.isnan().all()
    for found, wanted in zip(
        torch.autograd.grad(sol.value.square().sum(), (A, b)),
        torch.autograd.grad(expected.square().sum(), (A, b)),
        strict=True,
    ):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("attach", [True, False])
def test_sjfb_lets_gradients_into_z0_when_n_is_0_and_it_is_asked_to(normal, linear_problem, attach):
    A, b = linear_problem()
    z0 = normal(3, 4, seed=2).requires_grad_()
    rule = StochasticJFB(max_no_grad=0, max_grad=1, attach_start=attach)
    value = fixpoint.solve(lambda z: z @ A.T + b, z0, backward=rule).value
    (grad,) = torch.autograd.grad(value.sum(), z0, allow_unused=True)
    if attach:
        torch.testing.assert_close(grad, torch.ones(3, 4, dtype=D) @ A.detach())
    else:
        assert grad is None


def test_sjfb_draws_from_its_generator_or_else_from_the_global_one(normal, cell_class):
    cell, x = cell_class(), normal(2, 4)
    z0 = torch.zeros(2, 4, dtype=D)
    before = torch.get_rng_state()
    own = StochasticJFB(max_no_grad=50, max_grad=1, generator=torch.Generator().manual_seed(1))
    fixpoint.solve(cell, z0, (x,), backward=own)
    assert torch.equal(torch.get_rng_state(), before)
    shared = StochasticJFB(max_no_grad=50, max_grad=1)

    def depths():
        torch.manual_seed(7)
        return [fixpoint.solve(cell, z0, (x,), backward=shared).nfev for _ in range(5)]

    first = depths()
    assert first == depths()
    assert len(set(first)) > 1


def test_sjfb_without_gradients_solves_to_the_tolerance(normal, cell_class):
    cell, x = cell_class(), normal(2, 4)
    with torch.no_grad():
        sol = fixpoint.solve(cell, torch.zeros(2, 4, dtype=D), (x,), backward=StochasticJFB(max_no_grad=1, max_grad=1))
    assert sol.converged.all()


def test_sjfb_does_not_warn_of_what_it_did_not_try_to_solve(normal, cell_class):
    cell, x = cell_class(gain=0.99), normal(2, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rule = StochasticJFB(max_no_grad=0, max_grad=1)
        fixpoint.solve(cell, torch.zeros(2, 4, dtype=D), (x,), backward=rule, on_failure="raise")


# Unroll


@pytest.mark.parametrize("depth", [None, 3])
def test_unroll_equals_finite_differences_and_reaches_z0(normal, linear_problem, depth):
    A, b = linear_problem(dim=3, rows=2)
    z0 = normal(2, 3, seed=8).requires_grad_()

    def few(A, b, z0):
        options = {"depth": depth} if depth else {"max_evals": 4, "rtol": 0.0, "on_failure": "ignore"}
        return fixpoint.solve(
            lambda z: torch.tanh(z @ A.T + b), z0, solver=Picard(), backward=Unroll(), **options
        ).value

    assert gradcheck(few, (A, b, z0))


def test_unroll_and_phantom_have_second_derivatives():
    a = torch.tensor(0.5, dtype=D, requires_grad=True)
    z0 = torch.zeros(1, dtype=D)
    value = fixpoint.solve(lambda z: a * z + 1, z0, solver=Picard(), backward=Unroll(), **TIGHT).value
    (first,) = torch.autograd.grad(value.sum(), a, create_graph=True)
    (second,) = torch.autograd.grad(first, a)
    assert float(first.detach()) == pytest.approx(4, rel=1e-9)  # 1 / (1 - a)^2
    assert float(second) == pytest.approx(16, rel=1e-8)  # 2 / (1 - a)^3


def test_gradients_of_an_unrolled_row_do_not_depend_on_a_broken_one():
    slope = torch.tensor([[0.5], [1e200]], dtype=D, requires_grad=True)
    z0 = torch.ones(2, 1, dtype=D)
    sol = fixpoint.solve(lambda z: slope * z + 1, z0, solver=Picard(), backward=Unroll(), on_failure="ignore", **TIGHT)
    (grad,) = torch.autograd.grad(sol.value[0].sum(), slope)
    assert float(grad[0]) == pytest.approx(4, rel=1e-9)


# Whole graphs


def test_two_solves_in_one_graph_equal_their_closed_form():
    a = torch.tensor(0.5, dtype=D, requires_grad=True)
    z0 = torch.zeros(1, dtype=D)
    first = fixpoint.solve(lambda z: a * z + 1, z0, backward=EXACT, **TIGHT).value  # 1 / (1 - a)
    second = fixpoint.solve(lambda z: 0.5 * a * z + first, z0, backward=EXACT, **TIGHT).value
    (first + second).sum().backward()
    expected = torch.autograd.functional.jacobian(lambda a: 1 / (1 - a) + 1 / (1 - a) / (1 - a / 2), a.detach())
    torch.testing.assert_close(a.grad, expected, rtol=1e-9, atol=0)


def test_a_solve_inside_a_solve_equals_its_closed_form():
    a = torch.tensor(0.3, dtype=D, requires_grad=True)
    zero = torch.zeros(1, dtype=D)

    def outer(z):
        return fixpoint.solve(lambda y: a * y + 0.2 * z + 1, zero, backward=EXACT, **TIGHT).value

    value = fixpoint.solve(outer, zero, backward=IFT(rtol=1e-11), rtol=1e-12).value  # z = (0.2 z + 1) / (1 - a)
    value.sum().backward()
    assert float(value.detach()) == pytest.approx(1 / (0.8 - 0.3), rel=1e-9)
    assert float(a.grad) == pytest.approx(1 / (0.8 - 0.3) ** 2, rel=1e-8)


@pytest.mark.parametrize("rule", [EXACT, Phantom(steps=2), Unroll()], ids=repr)
def test_backward_twice_through_a_retained_graph_adds_the_same_again(linear_problem, rule):
    A, b = linear_problem()
    value = fixpoint.solve(
        lambda z: torch.tanh(z @ A.T + b), torch.zeros(3, 4, dtype=D), solver=Picard(), backward=rule, **TIGHT
    ).value
    value.sum().backward(retain_graph=True)
    once = A.grad.clone()
    value.sum().backward()
    torch.testing.assert_close(A.grad, 2 * once)


class Saved:
    """A tensor that autograd keeps for backward; the graph alone holds on to it."""

    def __init__(self, x):
        self.x = x


class watch_saved(torch.autograd.graph.saved_tensors_hooks):  # noqa: N801 - reads as a context
    """Knows which tensors are kept for backward, and their bytes in all."""

    def __init__(self):
        self.alive = weakref.WeakSet()
        super().__init__(self._pack, lambda saved: saved.x)

    def __enter__(self):
        super().__enter__()
        return self

    @property
    def bytes(self):
        """Of what is alive; flags, one a row, do not count."""
        return sum(saved.x.numel() * saved.x.element_size() for saved in self.alive if saved.x.dtype != torch.bool)

    def _pack(self, x):
        saved = Saved(x.detach())
        self.alive.add(saved)
        return saved


RULES = [IFT(), Phantom(steps=2), StochasticJFB(max_no_grad=2, max_grad=2), Unroll()]


@pytest.mark.parametrize("rule", RULES, ids=repr)
@pytest.mark.parametrize("run_backward", [False, True])
def test_nothing_outlives_the_solution_with_the_garbage_collector_off(normal, rule, run_backward):
    W, x = (0.3 * normal(4, 4)).requires_grad_(), normal(3, 4)
    gc.disable()
    try:
        with watch_saved() as saved:
            sol = fixpoint.solve(lambda z: torch.tanh(z @ W + x), torch.zeros(3, 4, dtype=D), backward=rule)
            if run_backward:
                sol.value.sum().backward(retain_graph=True)
        watched = weakref.ref(sol.value), weakref.ref(sol)
        assert len(saved.alive) > 0
        del sol
        assert [ref() for ref in watched] == [None] * 2
        assert len(saved.alive) == 0
    finally:
        gc.enable()


def test_a_solved_state_keeps_one_application_of_f_alive(normal, cell_class):
    cell, x = cell_class(), normal(3, 4)
    z0 = torch.zeros(3, 4, dtype=D)
    with watch_saved() as one:
        image = cell(z0.clone().requires_grad_(), x)
    for f, args in ((cell, (x,)), (lambda z: cell(z, x), ())):
        with watch_saved() as saved:
            sol = fixpoint.solve(f, z0, args)
        assert saved.bytes == one.bytes > 0
    assert sol.value.shape == image.shape


@pytest.mark.parametrize("rule", [IFT(), fixpoint.Neumann(terms=3), fixpoint.SHINE(), JFB()], ids=repr)
def test_a_start_does_not_live_until_backward(rule):
    b, starts = torch.ones(2, 3, requires_grad=True), []

    def f(z, b):
        starts.append(weakref.ref(z.untyped_storage()))
        return 0.5 * torch.cos(z) + b

    solver = Broyden() if isinstance(rule, fixpoint.SHINE) else Picard()
    solution = fixpoint.solve(f, torch.zeros(2, 3), (b,), solver=solver, backward=rule)
    assert starts[0]() is None
    solution.value.sum().backward()
    assert b.grad is not None


def saved_bytes(solve):
    """Of the tensors that the value keeps: the first evaluation is recorded to see whether it must be."""
    with watch_saved() as saved:
        value = solve()
        held = saved.bytes
    del value
    return held


@pytest.mark.parametrize("closure", [True, False])
def test_memory_for_backward_does_not_grow_with_evaluations_unless_unrolled(normal, cell_class, closure):
    cell, x = cell_class(gain=0.99), normal(3, 4).requires_grad_()
    f, args = ((lambda z: cell(z, x)), ()) if closure else (cell, (x,))
    z0 = torch.zeros(3, 4, dtype=D)

    def saved(rule, evals):
        options = {"solver": Picard(), "rtol": 0.0, "max_evals": evals, "on_failure": "ignore"}
        return saved_bytes(lambda: fixpoint.solve(f, z0, args, backward=rule, **options))

    for rule in (IFT(), JFB(), Phantom(steps=3)):
        assert saved(rule, 3) == saved(rule, 40) > 0
    assert saved(Unroll(), 40) > 5 * saved(Unroll(), 3)
    assert saved(Phantom(steps=3), 3) > saved(JFB(), 3)
    assert saved(None, 40) == 0


def test_sjfb_saves_its_m_steps_alone(normal, cell_class):
    cell, x = cell_class(), normal(3, 4)
    z0 = torch.zeros(3, 4, dtype=D)

    def recorded(m):
        z = z0
        for _ in range(m):
            z = cell(z, x)
        return z

    for seed in range(10):
        n, m = draws(20, 3, seed)
        rule = StochasticJFB(max_no_grad=20, max_grad=3, generator=torch.Generator().manual_seed(seed))
        total = saved_bytes(lambda rule=rule: fixpoint.solve(cell, z0, (x,), backward=rule))
        assert total == saved_bytes(lambda m=m: recorded(m)), (n, m)


def test_a_graph_is_attached_only_where_something_requires_grad(normal, cell_class):
    cell, x = cell_class().requires_grad_(False), normal(3, 4)
    z0 = torch.zeros(3, 4, dtype=D)
    sol = fixpoint.solve(cell, z0, (x,))
    assert not sol.value.requires_grad
    assert cell.calls == sol.nfev
    assert fixpoint.solve(cell, z0, (x.requires_grad_(),)).value.requires_grad
