"""What other libraries of implicit layers were found to do wrong, one test each.

Two more stand in ``test_real_use_tools.py``: processes that train together, and compilers.
"""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fixpoint
from fixpoint import IFT, FixedPointLayer, Neumann, Picard, Reversible, Status

D = torch.float64


@pytest.fixture
def x(normal):
    return normal(3, 4).requires_grad_()


# For z = a z + 1: z = 1 / (1 - a), its square has the derivative 2 / (1 - a)^3.
A = 0.5
SECOND = 6 / (1 - A) ** 4


@pytest.mark.parametrize("way", ["backward", "grad"])
@pytest.mark.parametrize("known", [True, False], ids=["argument", "closure"])
@pytest.mark.parametrize("rule", [IFT(rtol=1e-12), Neumann(terms=60)], ids=repr)
def test_double_backward_is_exact_or_refused_both_ways(way, known, rule):
    a, z0 = torch.tensor(A, dtype=D, requires_grad=True), torch.zeros(1, dtype=D)
    f, args = ((lambda z, a: a * z + 1), (a,)) if known else ((lambda z: a * z + 1), ())
    value = fixpoint.solve(f, z0, args, solver=Picard(), backward=rule, rtol=1e-13).value
    (first,) = torch.autograd.grad(value.square().sum(), a, create_graph=True)
    assert float(first.detach()) == pytest.approx(2 / (1 - A) ** 3)

    def second():
        if way == "grad":
            return torch.autograd.grad(first, a)[0]
        first.backward()
        return a.grad

    if known and isinstance(rule, IFT):
        assert float(second()) == pytest.approx(SECOND)
    else:
        with pytest.raises(RuntimeError, match="first derivatives only"):
            second()


def test_dropout_in_f_converges_as_it_does_without(cell_class, x):
    cell, drop = cell_class(), nn.Dropout(0.3)
    plain = fixpoint.solve(cell, torch.zeros_like(x), (x,), solver=Picard(), rtol=1e-8)
    dropped = fixpoint.solve(lambda z, x: drop(cell(z, x)), torch.zeros_like(x), (x,), solver=Picard(), rtol=1e-8)
    assert dropped.converged.all()
    assert dropped.nfev <= 2 * plain.nfev


def test_batch_normalisation_in_f_updates_its_statistics_once(cell_class, x):
    cell, norm = cell_class(), nn.BatchNorm1d(4, dtype=D)
    with pytest.warns(UserWarning, match="statistics of the batch") as caught:
        solution = fixpoint.solve(lambda z, x: cell(0.2 * norm(z), x), torch.zeros_like(x), (x,))
    assert [warning.filename for warning in caught] == [__file__]
    solution.value.sum().backward()
    assert solution.nfev > 5
    assert norm.num_batches_tracked == 1


@pytest.mark.parametrize("change", [lambda z: z.mul_(0.5), lambda z: z.relu_(), lambda z: z.data.add_(1)])
def test_an_f_that_works_in_place_is_refused_at_its_first_evaluation(change):
    seen = []

    def f(z):
        seen.append(z)
        return change(z)

    with pytest.raises(ValueError, match="f changed its input in place"):
        fixpoint.solve(f, torch.zeros(2, 3))
    assert len(seen) == 1


@pytest.mark.parametrize("rule", [IFT(), Reversible()], ids=repr)
def test_f_runs_in_the_same_precision_in_backward(rule):
    torch.manual_seed(0)
    linear, dtypes, x = nn.Linear(4, 4), [], torch.ones(2, 4, requires_grad=True)

    class Noting(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = linear

        def forward(self, z, x):
            dtypes.append(self.linear(z).dtype)
            return torch.tanh(0.3 * self.linear(z) + x)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = fixpoint.solve(Noting(), torch.zeros(2, 4), (x,), backward=rule, rtol=5e-2).value
    forward = len(dtypes)
    # A second order for IFT, since its first evaluates nothing.
    torch.autograd.grad(value.sum(), x, create_graph=isinstance(rule, IFT))
    assert len(dtypes) > forward
    assert set(dtypes) == {torch.bfloat16}


def test_a_checkpoint_costs_least_inside_f(cell_class, x):
    def evaluations(wrap_f, wrap_layer):
        cell = cell_class()
        layer = FixedPointLayer(wrap_f(cell), backward=IFT(rtol=1e-8), rtol=1e-8)
        wrap_layer(layer)(x).sum().backward()
        return cell.calls

    def itself(f):
        return f

    def checkpointed(f):
        return lambda *inputs: checkpoint(f, *inputs, use_reentrant=False)

    with_none = evaluations(itself, itself)
    inside, around = evaluations(checkpointed, itself), evaluations(itself, checkpointed)
    solution = FixedPointLayer(cell_class(), backward=IFT(rtol=1e-8), rtol=1e-8)(x, return_solution=True)
    solution.value.sum().backward()
    assert with_none == solution.nfev + 1
    # Inside, f runs once more for each product of the adjoint and for the last; around, the whole solve does.
    assert inside == with_none + solution.adjoint.nfev + 1
    assert around > 3 * inside


def test_a_solution_can_be_saved_for_backward_and_inference_mode_is_a_plain_solve(cell_class, x):
    cell = cell_class()
    value = fixpoint.solve(cell, torch.zeros_like(x), (x,)).value
    (value * value).sum().backward()
    assert x.grad.abs().max() > 0
    with torch.inference_mode():
        plain = fixpoint.solve(cell, torch.zeros_like(x), (x,))
    assert plain.converged.all()
    torch.testing.assert_close(plain.value, value.detach(), rtol=1e-3, atol=1e-4)


def test_eval_mode_returns_gradients(cell_class, x):
    layer = FixedPointLayer(cell_class()).eval()
    layer(x).sum().backward()
    assert x.grad.abs().max() > 0
    assert layer.f.W.grad.abs().max() > 0


def test_an_adjoint_that_does_not_converge_falls_back_row_by_row():
    # Row 0 contracts; the adjoint of row 1, with slope -3, diverges under plain iteration until it overflows.
    slope = torch.tensor([[0.2], [-3.0]], requires_grad=True)
    rule = IFT(solver=Picard(), max_evals=200)
    z0 = 1 / (1 - slope.detach())
    solution = fixpoint.solve(lambda z, slope: slope * z + 1, z0, (slope,), backward=rule)
    assert solution.converged.all()
    with pytest.warns(fixpoint.ConvergenceWarning, match="1 of 2 adjoint rows") as caught:
        solution.value.sum().backward()
    assert len(caught) == 1
    assert solution.adjoint.converged.tolist() == [True, False]
    assert solution.adjoint.status[1] in (Status.NON_FINITE, Status.MAX_EVALS)
    jfb = z0[1]
    torch.testing.assert_close(slope.grad, torch.stack([1 / (1 - slope.detach()[0]) ** 2, jfb]))


def test_the_solve_stays_outside_of_compiled_code(cell_class, x):
    torch._dynamo.reset()
    layer = FixedPointLayer(cell_class(), backward=IFT())
    expected = torch.autograd.grad(layer(x).sum(), layer.f.W)
    with warnings.catch_warnings():
        warnings.simplefilter("error", fixpoint.ConvergenceWarning)
        found = torch.autograd.grad(torch.compile(layer, backend="eager")(x).sum(), layer.f.W)
    assert torch.equal(*found, *expected)
    torch._dynamo.reset()
