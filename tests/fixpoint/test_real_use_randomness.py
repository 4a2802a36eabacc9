"""Every backward rule with an f that draws random numbers."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.nn.functional import dropout

import fixpoint
from fixpoint import IFT, Picard
from tests.fixpoint.differentiated import gradients

D = torch.float64


class Dropped(nn.Module):
    """A cell behind dropout, of which it keeps the masks that it was given."""

    def __init__(self, cell, p=0.4):
        super().__init__()
        self.cell, self.p = cell, p
        self.masks = []

    def forward(self, z, x):
        mask = dropout(torch.ones_like(z), self.p)
        self.masks.append(mask)
        return mask * self.cell(z, x)


def test_one_mask_serves_a_solve_and_its_backward(solve_from_zeros, formula, rule, cell_class, x):
    f = Dropped(cell_class())
    torch.manual_seed(0)
    mask = dropout(torch.ones_like(x), f.p)
    after_one = torch.get_rng_state()
    torch.manual_seed(0)
    value = solve_from_zeros(f, x, rule=rule)
    assert torch.equal(torch.get_rng_state(), after_one)
    torch.manual_seed(99)
    before = torch.get_rng_state()
    found = gradients(value, f.cell.W, x)
    assert torch.equal(torch.get_rng_state(), before)
    assert len(f.masks) > 3
    assert all(torch.equal(seen, mask) for seen in f.masks)

    plain = formula(f.cell.W, lambda W, z, x: mask * torch.tanh(z @ W.T + x))
    expected = solve_from_zeros(plain, x, rule=rule)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(found, gradients(expected, f.cell.W, x))


def test_the_next_solve_draws_another_mask(solve_from_zeros, cell_class, x):
    f = Dropped(cell_class())
    with torch.no_grad():
        first, second = (solve_from_zeros(f, x, rule=None) for _ in range(2))
    assert not torch.equal(first, second)
    assert not torch.equal(f.masks[0], f.masks[-1])


def test_second_derivatives_see_the_mask_of_the_solve(solve_from_zeros, cell_class, normal):
    f, x = Dropped(cell_class()), normal(1, 4).requires_grad_()

    def of(x):
        torch.manual_seed(3)
        return solve_from_zeros(f, x, rule=IFT(rtol=1e-12), rtol=1e-12)

    assert torch.autograd.gradgradcheck(of, (x,))
    assert len({tuple(mask.flatten().tolist()) for mask in f.masks}) == 1


def test_an_f_that_draws_nothing_leaves_the_random_state_as_it_was(solve_from_zeros, rule, cell_class, x):
    before = torch.get_rng_state()
    gradients(solve_from_zeros(cell_class(), x, rule=rule), x)
    assert torch.equal(torch.get_rng_state(), before)


def test_an_error_in_a_later_evaluation_leaves_the_state_of_one(solve_from_zeros, cell_class, x):
    f = Dropped(cell_class())

    def failing(z, x):
        fz = f(z, x)
        if len(f.masks) == 3:
            raise OSError("third")
        return fz

    torch.manual_seed(0)
    dropout(torch.ones_like(x), f.p)
    after_one = torch.get_rng_state()
    torch.manual_seed(0)
    with pytest.raises(OSError, match="third"):
        solve_from_zeros(failing, x, rule=None)
    assert torch.equal(torch.get_rng_state(), after_one)


def test_an_f_that_draws_sees_all_rows_though_most_have_ended(normal):
    slope, sizes = torch.tensor([[0.0]] * 9 + [[0.95]], dtype=D), []

    def f(z, slope):
        sizes.append(len(z))
        return slope * z + 1 + dropout(torch.ones_like(z))

    fixpoint.solve(f, torch.zeros(10, 2, dtype=D), (slope,), solver=Picard(), rtol=1e-3, max_evals=200)
    assert len(sizes) > 50
    assert set(sizes) == {10}


def test_a_chain_whose_steps_draw_is_one_chain(normal):
    start, masks = normal(2, 3), []

    def step(x):
        masks.append(dropout(torch.ones_like(x), 0.4))
        return masks[-1] * torch.tanh(x) + 1

    chain = fixpoint.Recurrence(step, start, steps=8)
    torch.manual_seed(0)
    value = fixpoint.solve(chain, solver=fixpoint.CausalQuasiNewton(), rtol=1e-10, backward=None).value
    drawn, x = masks[0].reshape(2, 8, 3), start
    assert len(masks) > 2
    for k in range(8):
        x = drawn[:, k] * torch.tanh(x) + 1
        torch.testing.assert_close(value[:, k], x, rtol=1e-8, atol=1e-9)


def test_nothing_of_it_outlives_the_value_with_the_garbage_collector_off(solve_from_zeros, rule, cell_class, x):
    f = Dropped(cell_class())
    gc.disable()
    try:
        value = solve_from_zeros(f, x, rule=rule)
        watched = weakref.ref(value)
        del value
        assert watched() is None
    finally:
        gc.enable()
