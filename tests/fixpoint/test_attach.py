"""attach(): gradients for a fixed point that was found elsewhere."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import fixpoint
from fixpoint import IFT, JFB, Neumann, Phantom
from tests.fixpoint.differentiated import Z0, f, iterated


@pytest.mark.parametrize("rule", [IFT(rtol=1e-12), JFB(), Neumann(terms=4), Phantom(steps=2)], ids=repr)
def test_value_and_gradient_are_those_of_a_solve(rule, A, b):
    A.requires_grad_()
    z_star = iterated(A, b).detach()
    attached = fixpoint.attach(f, z_star, (A, b), rule)
    assert torch.equal(attached, z_star)
    solved = fixpoint.solve(f, Z0, (A, b), backward=rule, rtol=1e-14, on_failure="ignore").value
    found, expected = (torch.autograd.grad(value.square().sum(), A)[0] for value in (attached, solved))
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


def test_f_is_evaluated_once(A, b, counted):
    cell = counted(f)
    A.requires_grad_()
    fixpoint.attach(cell, iterated(A, b).detach(), (A, b))
    assert cell.calls == 1


def test_derivatives_of_any_order(A, b):
    z_star = iterated(A, b).detach()

    def found(A):
        return fixpoint.attach(f, z_star, (A, b), IFT(rtol=1e-13)).square().sum()

    def expected(A):
        return iterated(A, b).square().sum()

    for transform in (torch.func.grad, torch.func.hessian):
        torch.testing.assert_close(transform(found)(A), transform(expected)(A), rtol=1e-7, atol=1e-9)


def test_nested_states_and_nothing_to_differentiate():
    state = {"a": torch.tensor([[2.0]]), "b": torch.tensor([[2.0]])}
    value = fixpoint.attach(lambda s: {"a": 0.5 * s["b"] + 1, "b": 0.5 * s["a"] + 1}, state)
    assert torch.equal(value["a"], state["a"])
    assert not value["a"].requires_grad


@pytest.mark.parametrize(
    "rule",
    [fixpoint.Unroll(), fixpoint.SHINE(), fixpoint.Reversible(), fixpoint.StochasticJFB(max_no_grad=2, max_grad=2)],
    ids=repr,
)
def test_rules_that_run_the_forward_solve_are_refused(rule):
    with pytest.raises(TypeError, match="needs a forward solve of its own"):
        fixpoint.attach(lambda z: 0.5 * z + 1, torch.full((1, 1), 2.0), (), rule)


def test_what_is_no_rule_is_refused():
    with pytest.raises(TypeError, match=r"backward must be a fixpoint.Backward such as IFT\(\), found None"):
        fixpoint.attach(lambda z: 0.5 * z + 1, torch.full((1, 1), 2.0), (), None)


def test_arrays_of_another_program_become_tensors():
    a = torch.tensor([0.5], dtype=torch.float64, requires_grad=True)
    value = fixpoint.attach(lambda z, a: a * z + 1, np.array([2.0]), (a,))
    value.sum().backward()
    assert round(float(a.grad), 6) == 4
