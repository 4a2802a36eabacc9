"""A solve that is stopped, or falls over, hands over what it had found."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import fixpoint
from fixpoint import Picard, Status


class BoomError(Exception):
    pass


SLOPE = torch.tensor([[0.0], [0.5], [0.9]], dtype=torch.float64)
Z0 = torch.zeros(3, 1, dtype=torch.float64)


def f(z):
    return SLOPE * z + 1


def failing_at(call, error, g=f):
    calls = []

    def failing(z):
        calls.append(z)
        if len(calls) == call:
            raise error
        return g(z)

    return failing


class Raising(Picard):
    """A solver that breaks at its third step."""

    def init(self, z):
        return 0

    def step(self, z, fz, state):
        if state == 2:
            raise BoomError("in the solver")
        return fz, state + 1


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), SystemExit(3), BoomError("in f"), RuntimeError("in f")], ids=repr
)
def test_an_error_in_f_comes_through_unchanged_with_the_state_so_far(error):
    with pytest.raises(type(error)) as caught:
        fixpoint.solve(failing_at(4, error), Z0, solver=Picard(), rtol=1e-9)
    assert caught.value is error
    sol = error.solution
    assert isinstance(sol, fixpoint.Solution)
    assert sol.nfev == 3
    assert sol.status.tolist() == [Status.CONVERGED, Status.MAX_EVALS, Status.MAX_EVALS]
    assert sol.evals.tolist() == [2, 3, 3]
    assert sol.value[:, 0].tolist() == [1.0, 1.5, 1.9]
    torch.testing.assert_close(sol.residual, (f(sol.value) - sol.value).abs()[:, 0])
    (note,) = error.__notes__
    assert "3 evaluations" in note
    assert "'solution'" in note


@pytest.mark.parametrize("error", [KeyboardInterrupt(), BoomError()], ids=repr)
def test_an_error_in_a_callback_does_too(error):
    def callback(progress):
        if progress.nfev == 3:
            raise error

    with pytest.raises(type(error)) as caught:
        fixpoint.solve(f, Z0, solver=Picard(), rtol=1e-9, callback=callback)
    assert caught.value is error
    assert error.solution.value[:, 0].tolist() == [1.0, 1.5, 1.9]


def test_an_error_in_a_solver_does_too():
    with pytest.raises(BoomError, match="in the solver") as caught:
        fixpoint.solve(f, Z0, solver=Raising(), rtol=1e-9)
    assert caught.value.solution.nfev == 3


def test_between_two_checks_the_state_is_that_of_the_last():
    with pytest.raises(BoomError) as caught:
        fixpoint.solve(failing_at(7, BoomError()), Z0, solver=Picard(), rtol=1e-9, check_every=4, record=True)
    sol = caught.value.solution
    assert sol.nfev == 6
    assert sol.trace.shape == (6, 3)
    torch.testing.assert_close(sol.residual, (f(sol.value) - sol.value).abs()[:, 0])
    assert sol.evals.tolist() == [4, 6, 6]


@pytest.mark.parametrize("rule", [fixpoint.IFT(), None], ids=repr)
def test_before_anything_was_evaluated_there_is_no_state(rule):
    with pytest.raises(BoomError) as caught:
        fixpoint.solve(failing_at(1, BoomError()), Z0, backward=rule)
    assert not hasattr(caught.value, "solution")
    assert not hasattr(caught.value, "__notes__")


@pytest.mark.parametrize("rule", [fixpoint.IFT(), fixpoint.Unroll(), fixpoint.Phantom(steps=5)], ids=repr)
def test_the_state_of_a_solve_for_gradients_carries_no_graph(rule):
    w = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    with pytest.raises(BoomError) as caught:
        fixpoint.solve(failing_at(4, BoomError(), lambda z: w * f(z)), Z0, solver=Picard(), rtol=1e-9, backward=rule)
    assert caught.value.solution.nfev == 3
    assert not caught.value.solution.value.requires_grad


def test_an_error_in_the_recorded_steps_after_the_solve_carries_the_solved_state():
    w = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    start, rule = torch.ones_like(Z0), fixpoint.Phantom(steps=5)
    with pytest.raises(BoomError) as caught:
        fixpoint.solve(failing_at(4, BoomError(), lambda z: w * (z * 0 + 1)), start, backward=rule)
    assert caught.value.solution.nfev == 1
    assert caught.value.solution.converged.all()


def test_structure_and_batch_shape_are_the_callers():
    def nested(z):
        if float(z["a"].max()) > 1.5:
            raise KeyboardInterrupt
        return {"a": 0.5 * z["a"] + 1}

    with pytest.raises(KeyboardInterrupt) as caught:
        fixpoint.solve(nested, {"a": torch.zeros(2, 3, 4)}, batch_dims=2, solver=Picard(), rtol=1e-9)
    assert caught.value.solution.value["a"].shape == (2, 3, 4)
    assert caught.value.solution.status.shape == (2, 3)


def test_an_outer_solve_hands_over_its_own_state():
    def outer(z):
        return (
            fixpoint.solve(failing_at(2, BoomError()) if float(z) > 1.5 else f, Z0, rtol=1e-9).value.amin() * 0
            + z / 2
            + 1
        )

    with pytest.raises(BoomError) as caught:
        fixpoint.solve(outer, torch.tensor(0.0, dtype=torch.float64), solver=Picard())
    assert caught.value.solution.value.shape == ()


def test_what_cannot_be_handed_over_does_not_hide_the_error(monkeypatch):
    monkeypatch.setattr(fixpoint.Solution, "of", None)
    with pytest.raises(BoomError):
        fixpoint.solve(failing_at(3, BoomError()), Z0, solver=Picard())


def test_a_callback_that_stops_gets_the_best_state_with_its_status():
    sol = fixpoint.solve(
        f, Z0, solver=Picard(), rtol=1e-9, callback=lambda progress: progress.nfev == 3, on_failure="ignore"
    )
    assert sol.status.tolist() == [Status.CONVERGED, Status.STOPPED, Status.STOPPED]
    assert sol.value[:, 0].tolist() == [1.0, 1.5, 1.9]
    assert sol.evals.tolist() == [2, 3, 3]


def test_a_numpy_function_that_is_interrupted_hands_over_arrays():
    calls = 0

    def f(z):
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return 0.5 * z + 1

    with pytest.raises(KeyboardInterrupt) as caught:
        fixpoint.solve(f, np.zeros((2, 3)), solver=Picard())
    assert isinstance(caught.value.solution.value, np.ndarray)
    np.testing.assert_allclose(caught.value.solution.value, 1.5)


def test_a_root_that_is_interrupted_is_handed_over_in_its_own_units():
    calls = 0

    def g(x):
        nonlocal calls
        calls += 1
        if calls == 6:
            raise KeyboardInterrupt
        return 1e3 * (x**3 - 8)

    with pytest.raises(KeyboardInterrupt) as caught:
        fixpoint.root(g, torch.full((1, 1), 3.0, dtype=torch.float64))
    found = caught.value.solution
    torch.testing.assert_close(found.residual, (1e3 * (found.value**3 - 8)).abs()[:, 0])
    assert found.nfev == 5
