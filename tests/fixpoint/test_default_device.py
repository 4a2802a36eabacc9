"""A default device other than that of the state: nothing that a solve makes for itself lands there."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

import fixpoint

D = torch.float64


@pytest.fixture(autouse=True)
def default_device():
    """A device whose tensors hold nothing: whatever lands there is lost."""
    with torch.device("meta"):
        yield


def here(*shape, value=0.0):
    return torch.full(shape, value, dtype=D, device="cpu")


def test_a_solve_and_its_gradient(rule):
    a = here(value=0.5).requires_grad_()
    solver = fixpoint.Broyden() if isinstance(rule, fixpoint.SHINE) else fixpoint.Anderson()
    found = fixpoint.solve(lambda z, a: a * torch.cos(z), here(2, 1), (a,), solver=solver, backward=copy.deepcopy(rule))
    found.value.sum().backward()
    assert a.grad.isfinite()
    assert repr(found).startswith("Solution(")


def test_every_solver(solver):
    found = fixpoint.solve(lambda z: 0.3 * torch.cos(z), here(3, 6), solver=solver, on_failure="raise", record=True)
    assert found.trace.device.type == found.value.device.type == "cpu"


@pytest.mark.parametrize(
    "solver",
    [fixpoint.CausalQuasiNewton(certify=True), fixpoint.CausalQuasiNewton(window=4), fixpoint.GMRES()],
    ids=repr,
)
def test_chains(solver):
    chain = fixpoint.Recurrence(lambda x: torch.sin(x) + 0.5, here(2, 3, value=1.0), steps=20)
    found = fixpoint.solve(chain, solver=solver, on_failure="raise")
    torch.testing.assert_close(found.value, chain.sequential(), rtol=1e-3, atol=1e-3)


def test_the_other_ways_in():
    a = here(value=0.5)
    root = fixpoint.root(lambda x: x**3 - 2, here(3, 2, value=1.0))
    torch.testing.assert_close(root.value, here(3, 2, value=2 ** (1 / 3)), rtol=1e-4, atol=0)
    attached = fixpoint.attach(lambda z, a: a * z + 1, here(1, value=2.0), (a.requires_grad_(),))
    assert attached.device.type == "cpu"
    assert fixpoint.estimate_memory(here(3, 4)).state_bytes == 96
    assert fixpoint.solve(np.cos, np.ones(3)).converged
    hessian = torch.func.hessian(lambda a: fixpoint.solve(lambda z, a: a * torch.cos(z), here(), (a,)).value)
    assert hessian(a.detach()).isfinite()
    with pytest.warns(fixpoint.ConvergenceWarning, match="1 of 1 rows did not converge"):
        fixpoint.solve(torch.exp, here(), max_evals=3)
    per_row = here(2, value=1e-3)
    assert fixpoint.solve(torch.cos, here(2, 3), rtol=per_row).converged.all()
