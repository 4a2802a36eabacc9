"""Reversible: its gradient is that of plain autograd through the same steps, whether or not they can be reversed."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck

import fixpoint
from fixpoint import IFT, Reversible, Status, Unroll
from fixpoint.memory import LiveBytes

D = torch.float64
TIGHT = {"rtol": 1e-12, "max_evals": 500}


def plain(f, z0, args, steps, damping):
    """The last state and the residual of each state that f was evaluated at: the published iteration in a loop."""
    y = z = z0.double()
    residuals = []

    def image(x):
        fx = f(x.to(z0.dtype), *args)
        residuals.append(torch.linalg.vector_norm((fx - x.to(z0.dtype)).detach(), dim=1))
        return fx.double()

    for _ in range(steps):
        y = torch.lerp(y, image(z), damping)
        z = torch.lerp(z, image(y), damping)
    return z.to(z0.dtype), torch.stack(residuals)


def relative_error(found, wanted):
    return float((found - wanted).abs().max() / wanted.abs().max())


MAPS = {
    "linear": lambda z, a: a * z + 1,
    "tanh": lambda z, a: torch.tanh(a * z + 0.3),
    "cosine": lambda z, a: a * torch.cos(3 * z),
}
DTYPES = [D, torch.float32]
GRID = list(
    itertools.product(
        [-2.0, -0.9, 0.3, 0.9, 1.1, 3.0],
        [1, 4, 9, 20],
        [0.05, 0.5, 0.8, 0.99, 1.2, 1.95],
        [D, torch.float32],
        [0.0, 5.0],
    )
)


@pytest.mark.parametrize("name", MAPS)
def test_no_setting_gives_another_gradient_than_plain_autograd(name):
    f, wrong = MAPS[name], []
    for a, steps, damping, dtype, start in GRID:
        a = torch.full((3, 1), a, dtype=dtype, requires_grad=True)
        z0 = torch.full((3, 2), start, dtype=dtype, requires_grad=True)
        value = fixpoint.solve(f, z0, (a,), backward=Reversible(steps=steps, damping=damping)).value
        expected, _ = plain(f, z0, (a,), steps, damping)
        torch.testing.assert_close(value, expected, rtol=0, atol=0)
        found, wanted = (torch.autograd.grad(z.sum(), (a, z0)) for z in (value, expected))
        errors = [relative_error(*pair) for pair in zip(found, wanted, strict=True)]
        # Sums of float32 in another order differ by more.
        if max(errors) > (1e-6 if dtype == D else 1e-5):
            wrong.append((a, steps, damping, dtype, start, errors))
    assert not wrong


def test_a_run_that_cannot_be_reversed_in_float64_has_its_gradient():
    a = torch.tensor([[0.9]], dtype=D, requires_grad=True)
    f, z0 = MAPS["linear"], torch.zeros(1, 1, dtype=D)
    value = fixpoint.solve(f, z0, (a,), backward=Reversible(steps=20, damping=0.8)).value
    (found,) = torch.autograd.grad(value, a)
    (wanted,) = torch.autograd.grad(plain(f, z0, (a,), 20, 0.8)[0], a)
    assert float(wanted) == pytest.approx(75.4, abs=0.05)
    assert float(found) == pytest.approx(float(wanted), rel=1e-9)


@pytest.mark.parametrize(
    ("a", "steps", "damping", "evaluations"),
    [
        (0.9, 8, 0.5, 1),  # rounding grows to 2^16 * 1e-16: reversed
        (0.9, 20, 0.5, 2),  # 2^40 * 1e-16: forward once more, and reversed between the states that are kept
        (0.9, 20, 0.99, 3),  # a hundred times in each evaluation: states between those that are kept are computed anew
    ],
)
def test_what_backward_evaluates_is_known_beforehand(counted, a, steps, damping, evaluations):
    f = counted(MAPS["linear"])
    a = torch.tensor([[a]], dtype=D, requires_grad=True)
    value = fixpoint.solve(f, torch.zeros(1, 1, dtype=D), (a,), backward=Reversible(steps=steps, damping=damping)).value
    assert f.calls == 2 * steps
    value.backward()
    assert f.calls - 2 * steps <= evaluations * 2 * steps
    assert f.calls - 2 * steps > (evaluations - 0.5) * 2 * steps


def test_a_reversal_that_fails_against_expectation_is_noticed(counted):
    """Of an f that expands, going backwards may magnify more than it could for a contraction."""
    f, args = counted(MAPS["linear"]), (torch.tensor([[3.3]], dtype=D, requires_grad=True),)
    z0 = torch.full((1, 1), 0.7, dtype=D)
    value = fixpoint.solve(f, z0, args, backward=Reversible(steps=7, damping=0.6)).value
    (found,) = torch.autograd.grad(value, args)
    assert f.calls > 4 * 14
    (wanted,) = torch.autograd.grad(plain(MAPS["linear"], z0, args, 7, 0.6)[0], args)
    assert float(found) == pytest.approx(float(wanted), rel=1e-12)


def test_a_small_leaf_beside_a_large_one_is_recovered_as_well():
    def f(z, a):
        return z[0] * 0.1 + 1e10, 8.0 * a * torch.cos(z[1])

    a = torch.linspace(0.5, 1.5, 4, dtype=D)[:, None].requires_grad_()
    z0 = torch.zeros(4, 1, dtype=D), torch.zeros(4, 1, dtype=D)
    for steps, damping in ((4, 0.8), (9, 0.5), (20, 0.8)):
        value = fixpoint.solve(f, z0, (a,), backward=Reversible(steps=steps, damping=damping)).value[1]
        wanted, _ = plain(lambda z, a: 8.0 * a * torch.cos(z), z0[1], (a,), steps, damping)
        torch.testing.assert_close(*(torch.autograd.grad(z.sum(), a)[0] for z in (value, wanted)), rtol=1e-6, atol=0)


def test_a_row_that_overflows_leaves_the_others_their_gradients():
    x = torch.tensor([[0.5], [2.0], [-0.3]], dtype=D, requires_grad=True)

    def f(z, x):
        return x * torch.where(x > 1, torch.exp(z * z), torch.cos(z))

    for steps in (4, 30):
        solution = fixpoint.solve(f, torch.ones(3, 1, dtype=D), (x,), backward=Reversible(steps=steps))
        assert solution.status[:, None].tolist() == [[Status.MAX_EVALS], [Status.NON_FINITE], [Status.MAX_EVALS]]
        (found,) = torch.autograd.grad(solution.value.sum(), x)
        good = torch.tensor([0, 2])
        expected, _ = plain(lambda z, x: x * torch.cos(z), torch.ones(2, 1, dtype=D), (x[good],), steps, 0.5)
        torch.testing.assert_close(found[good], torch.autograd.grad(expected.sum(), x)[0][good])


# Memory


def test_the_same_few_tensors_are_saved_however_many_steps(normal, cell_class):
    cell, x = cell_class(), normal(3, 4).requires_grad_()

    def saved(rule):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
            fixpoint.solve(cell, torch.zeros(3, 4, dtype=D), (x,), backward=rule)
        return sum(sizes)

    assert saved(Reversible(steps=2)) == saved(Reversible(steps=50)) < saved(Unroll())
    value = fixpoint.solve(cell, torch.zeros(3, 4, dtype=D), (x,), backward=Reversible(steps=30)).value
    exact = fixpoint.solve(cell, torch.zeros(3, 4, dtype=D), (x,), backward=IFT(rtol=1e-12), **TIGHT).value
    for found, wanted in zip(
        *(torch.autograd.grad(z.square().sum(), (cell.W, x)) for z in (value, exact)), strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_memory_is_flat_where_steps_are_reversed_and_a_square_root_where_not():
    def peak(steps, damping):
        """The most that backward held, in states."""
        a, z0 = torch.tensor(0.9, dtype=D, requires_grad=True), torch.zeros(2, 1000, dtype=D)
        value = fixpoint.solve(MAPS["linear"], z0, (a,), backward=Reversible(steps=steps, damping=damping)).value
        with LiveBytes() as live:
            value.sum().backward()
        return live.peak / (z0.numel() * z0.element_size())

    few = peak(2, 0.5)
    assert peak(4, 0.5) == peak(9, 0.5) == few
    for steps in (50, 200):
        assert peak(steps, 0.99) < few + 4 * math.sqrt(2 * steps)


# The run


def test_it_runs_through_the_loop_and_reports_what_it_knows(normal, cell_class):
    cell, x = cell_class(), normal(3, 4)
    z0 = torch.zeros(3, 4, dtype=D)
    solution = fixpoint.solve(cell, z0, (x,), backward=Reversible(steps=4), record=True)
    assert cell.calls == solution.nfev == 8
    assert solution.evals.tolist() == [8] * 3
    expected, residuals = plain(cell, z0, (x,), 4, 0.5)
    torch.testing.assert_close(solution.value, expected)
    torch.testing.assert_close(solution.trace, residuals)
    assert solution.residual.isnan().all()
    assert not solution.converged.any()
    assert fixpoint.solve(cell, z0, (x,), backward=Reversible(steps=4)).trace is None


@pytest.mark.parametrize("option", [{"callback": print}, {"keep_states": (2,)}], ids=["callback", "keep_states"])
def test_an_option_that_it_cannot_honour_is_refused_before_f_is_evaluated(normal, cell_class, option):
    cell = cell_class()
    with pytest.raises(ValueError, match=r"callback and keep_states do not work with Reversible"):
        fixpoint.solve(cell, torch.zeros(3, 4, dtype=D), (normal(3, 4),), backward=Reversible(), **option)
    assert cell.calls == 0


@pytest.mark.parametrize("steps", [3, 40])
def test_an_f_that_is_another_map_in_backward_is_noticed(normal, cell_class, steps):
    cell, x = cell_class(), normal(3, 4).requires_grad_()
    gain = [1.0]
    value = fixpoint.solve(
        lambda z, W, x: torch.tanh(gain[0] * z @ W.T + x),
        torch.zeros(3, 4, dtype=D),
        (cell.W, x),
        backward=Reversible(steps=steps),
    ).value
    gain[0] = 1.01
    with pytest.raises(RuntimeError, match="the same map between forward and backward"):
        value.sum().backward()


def test_backward_twice_gives_the_same_twice(normal, cell_class):
    cell, x = cell_class(), normal(3, 4).requires_grad_()
    for steps in (3, 40):
        value = fixpoint.solve(cell, torch.zeros(3, 4, dtype=D), (x,), backward=Reversible(steps=steps)).value.sum()
        first, again = (torch.autograd.grad(value, (cell.W, x), retain_graph=True) for _ in range(2))
        torch.testing.assert_close(first, again)


def test_tensors_made_in_inference_mode_can_be_arguments(normal, cell_class):
    cell = cell_class()
    with torch.inference_mode():
        x = normal(3, 4)
    found = []
    for argument in (x, normal(3, 4)):
        value = fixpoint.solve(cell, torch.zeros(3, 4, dtype=D), (argument,), backward=Reversible()).value
        found.append(torch.autograd.grad(value.sum(), cell.W)[0])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("rule", [Reversible(), IFT()], ids=repr)
def test_a_module_that_stands_in_two_places_keeps_its_parameters(normal, rule):
    linear = torch.nn.Linear(4, 4, dtype=D)
    before = dict(linear.named_parameters())
    f = torch.nn.Sequential(linear, torch.nn.Tanh(), linear, torch.nn.Tanh())
    value = fixpoint.solve(f, torch.zeros(3, 4, dtype=D), backward=rule).value
    gradients = torch.autograd.grad(value.sum(), list(before.values()), create_graph=isinstance(rule, IFT))
    if isinstance(rule, IFT):
        gradients[0].sum().backward()
    after = dict(linear.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())


@pytest.mark.parametrize("damping", [0.3, 0.5, 0.8, 1.2])
@pytest.mark.parametrize("dtype", [torch.float32, D], ids=str)
def test_reversible_equals_its_own_iteration_differentiated(normal, dtype, damping):
    A, b, z0 = (x.to(dtype).requires_grad_() for x in (0.3 * normal(4, 4), normal(3, 4), normal(3, 4, seed=7)))
    f = lambda z, A, b: torch.tanh(z @ A.T + b)  # noqa: E731
    rule = Reversible(steps=7, damping=damping)
    sol = fixpoint.solve(f, z0, (A, b), backward=rule)
    y = z = z0.double()
    for _ in range(7):
        y = (1 - damping) * y + damping * f(z, A.double(), b.double())
        z = (1 - damping) * z + damping * f(y, A.double(), b.double())
    tolerance = {"rtol": 1e-7, "atol": 1e-9} if dtype == D else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(sol.value.double(), z, **tolerance)
    assert sol.nfev == 14
    for found, wanted in zip(
        torch.autograd.grad(sol.value.square().sum(), (A, b, z0)),
        torch.autograd.grad(z.square().sum(), (A, b, z0)),
        strict=True,
    ):
        torch.testing.assert_close(found, wanted, **tolerance)


def test_reversible_refuses_what_it_cannot_follow(linear_problem):
    A, b = linear_problem()
    z0 = torch.zeros(3, 4, dtype=D)
    with pytest.raises(ValueError, match="closes over"):
        fixpoint.solve(lambda z, b: z @ A.T + b, z0, (b,), backward=Reversible())
    with pytest.raises(ValueError, match="depth of its own"):
        fixpoint.solve(lambda z, A, b: z @ A.T + b, z0, (A, b), backward=Reversible(), depth=3)
    frozen = A.detach()
    assert gradcheck(
        lambda b: fixpoint.solve(lambda z, b: z @ frozen.T + b, z0, (b,), backward=Reversible(steps=3)).value, (b,)
    )


def test_four_steps_pass_gradcheck(normal):
    A, b, z0 = (x.requires_grad_() for x in (0.3 * normal(3, 3), normal(2, 3), normal(2, 3, seed=7)))
    rule = Reversible(steps=np.int64(4), damping=0.8)
    assert type(rule.steps) is int
    assert gradcheck(
        lambda z0, A, b: fixpoint.solve(lambda z, A, b: torch.tanh(z @ A.T + b), z0, (A, b), backward=rule).value,
        (z0, A, b),
    )


@pytest.mark.parametrize("shape", [(0, 3), (3, 0)])
def test_a_state_without_entries_has_a_gradient(shape):
    a = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    z0 = torch.zeros(shape, dtype=torch.float64)
    value = fixpoint.solve(lambda z, a: a * z + 1, z0, (a,), backward=Reversible(steps=40)).value
    value.sum().backward()
    assert float(a.grad) == 0
