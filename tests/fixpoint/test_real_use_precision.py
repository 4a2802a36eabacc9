"""Every backward rule under autocast and with scaled losses."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.functional import linear

import fixpoint
from fixpoint import IFT, Picard, Status
from tests.fixpoint.differentiated import gradients

D = torch.float64


class Mixed(nn.Module):
    """A cell with a float32 weight that notes the dtype of each product."""

    def __init__(self, cell):
        super().__init__()
        self.linear = nn.Linear(4, 4, bias=False)
        self.linear.weight.data.copy_(cell.W.data)
        self.dtypes = []

    def forward(self, z, x):
        y = self.linear(z)
        self.dtypes.append(y.dtype)
        return torch.tanh(y + x)


def low(enabled=True):
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled)


LOOSE = {"rtol": 2e-2}


@pytest.mark.parametrize("backward_autocast", [False, True])
def test_backward_runs_under_the_autocast_of_forward(solve_from_zeros, formula, rule, cell_class, x, backward_autocast):
    f, x = Mixed(cell_class()), x.detach().float().requires_grad_()
    with low():
        value = solve_from_zeros(f, x, rule=rule, **LOOSE)
    assert value.dtype == torch.float32
    with low(backward_autocast):
        found = gradients(value, f.linear.weight, x)
    assert set(f.dtypes) == {torch.bfloat16}

    by_hand = formula(f.linear.weight, lambda W, z, x: torch.tanh(linear(z.bfloat16(), W.bfloat16()) + x))
    expected = solve_from_zeros(by_hand, x, rule=rule, **LOOSE)
    torch.testing.assert_close(value, expected)
    # Autocast adds up the weight's gradients in bfloat16.
    torch.testing.assert_close(found, gradients(expected, f.linear.weight, x), rtol=1e-2, atol=1e-2)


def test_backward_within_autocast_keeps_a_solve_in_full_precision(solve_from_zeros, rule, cell_class, x):
    f, x = Mixed(cell_class()), x.detach().float().requires_grad_()
    expected = gradients(solve_from_zeros(f, x, rule=rule, rtol=1e-5), f.linear.weight)
    value = solve_from_zeros(f, x, rule=rule, rtol=1e-5)
    with low():
        found = torch.autograd.grad(value, f.linear.weight, 2 * value.detach())
    assert set(f.dtypes) == {torch.float32}
    # What was recorded is differentiated under the autocast of whoever calls backward, as all of PyTorch is.
    torch.testing.assert_close(found, expected, rtol=5e-2, atol=5e-2)


def test_an_output_in_the_autocast_dtype_comes_back_in_that_of_the_state(solve_from_zeros, rule, cell_class, x):
    f, x = Mixed(cell_class()), x.detach().float()
    f.forward = lambda z, x: f.linear(z) + x.bfloat16()
    with low():
        value = solve_from_zeros(f, x, rule=rule, **LOOSE)
    assert value.dtype == torch.float32
    assert gradients(value, f.linear.weight)[0].abs().max() > 0
    for enabled, other in ((False, torch.bfloat16), (True, torch.float64)):
        with low(enabled), pytest.raises(ValueError, match="f must keep the dtype of z0"):
            solve_from_zeros(lambda z, x, dtype=other: z.to(dtype), x, rule=rule)


def test_solvers_keep_out_of_autocast_in_both_directions(solve_from_zeros, cell_class, x):
    seen = []

    class Watching(Picard):
        def step(self, z, fz, state):
            seen.append(torch.is_autocast_enabled("cpu"))
            return super().step(z, fz, state)

    f, x = Mixed(cell_class()), x.detach().float()
    with low():
        value = solve_from_zeros(f, x, rule=IFT(solver=Watching(), rtol=1e-2), solver=Watching(), **LOOSE)
        forward = len(seen)
        gradients(value, f.linear.weight)
    assert 0 < forward < len(seen)
    assert not any(seen)


def test_the_steps_of_a_chain_run_under_autocast_and_its_states_do_not(normal):
    linear, seen, in_the_loop = nn.Linear(3, 3), [], []

    def watch(_):
        in_the_loop.append(torch.is_autocast_enabled("cpu"))

    def step(x):
        seen.append((x.dtype, linear(x).dtype))
        return linear(x).to(x.dtype)

    chain = fixpoint.Recurrence(step, normal(2, 3).float(), steps=8)
    with low(), torch.no_grad():
        solver = fixpoint.CausalQuasiNewton(window=4)
        solution = fixpoint.solve(chain, solver=solver, rtol=5e-2, callback=watch)
    assert set(in_the_loop) == {False}
    assert set(seen) == {(torch.float32, torch.bfloat16)}
    assert solution.value.dtype == torch.float32
    assert solution.converged.all()


def test_rows_at_the_rounding_of_autocast_have_stagnated_and_their_adjoints_are_solved(normal):
    cell, x = nn.Linear(16, 16), normal(64, 16).float().requires_grad_()
    with low():
        found = fixpoint.solve(
            lambda z, x: torch.tanh(1.5 * cell(z) + x), torch.zeros(64, 16), (x,), rtol=1e-6, on_failure="ignore"
        )
    found.value.square().sum().backward()  # a warning would be an error
    for solution in (found, found.adjoint):
        assert set(solution.status.tolist()) == {Status.CONVERGED, Status.STAGNATED}
        assert solution.nfev < 80


def test_an_f_that_keeps_full_precision_under_autocast_is_solved_to_it(normal):
    x = normal(5, 4).float().requires_grad_()
    with low():
        found = fixpoint.solve(lambda z, x: 0.5 * torch.sin(z) + x, torch.zeros(5, 4), (x,), rtol=1e-6)
    found.value.square().sum().backward()
    assert found.converged.all()
    assert found.adjoint.converged.all()
    assert float(found.adjoint.relative_residual.max()) <= 1e-6


def test_a_second_derivative_runs_under_the_autocast_of_forward(solve_from_zeros, cell_class, x):
    f, x = Mixed(cell_class()), x.detach().float().requires_grad_()
    with low():
        value = solve_from_zeros(f, x, rule=IFT(rtol=1e-2), **LOOSE)
    (gradient,) = torch.autograd.grad(value.sum(), x, create_graph=True)
    gradients(gradient, f.linear.weight)
    assert set(f.dtypes) == {torch.bfloat16}


def test_a_scaled_loss_gives_the_same_step(solve_from_zeros, rule, cell_class, x):
    f = Mixed(cell_class())
    plain, x = copy.deepcopy(f), x.detach().float()
    for model, enabled in ((f, True), (plain, False)):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, enabled=enabled)
        with low():
            loss = solve_from_zeros(model, x, rule=rule, **LOOSE).square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    assert not torch.equal(f.linear.weight, torch.as_tensor(cell_class().W).float())
    torch.testing.assert_close(f.linear.weight, plain.linear.weight)


def test_a_scale_that_overflows_skips_the_step_and_is_lowered(solve_from_zeros, rule, cell_class, x):
    f, x = Mixed(cell_class()), x.detach().float()
    before = f.linear.weight.detach().clone()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    optimizer = torch.optim.SGD(f.parameters(), lr=0.1)
    loss = solve_from_zeros(f, x, rule=rule, rtol=1e-5).square().sum()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fixpoint.ConvergenceWarning)
        scaler.scale(loss * 1e4).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(f.linear.weight, before)
    assert scaler.get_scale() == 2.0**126
