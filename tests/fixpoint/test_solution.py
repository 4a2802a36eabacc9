"""Shapes, dtypes and words of a Solution."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import pytest
import torch

import fixpoint
from fixpoint import Picard


def halve(z):
    return 0.5 * z + 1


@pytest.mark.parametrize(("batch_dims", "shape"), [(0, ()), (1, (2,)), (2, (2, 3))])
def test_figures_have_the_batch_shape(batch_dims, shape):
    sol = fixpoint.solve(halve, torch.zeros(2, 3, 4), batch_dims=batch_dims, record=True)
    for name in ("converged", "status", "residual", "relative_residual", "evals"):
        assert getattr(sol, name).shape == shape, name
    assert sol.trace.shape == (sol.nfev, *shape)
    assert sol.converged.dtype == torch.bool
    assert isinstance(sol.nfev, int)


def test_figures_carry_no_graph():
    w = torch.tensor(0.5, requires_grad=True)
    for rule in (fixpoint.IFT(), fixpoint.Unroll(), fixpoint.JFB()):
        sol = fixpoint.solve(lambda z: w * z + 1, torch.zeros(2), backward=rule, record=True)
        figures = [getattr(sol, field.name) for field in dataclasses.fields(sol) if field.name != "value"]
        figures = [figure for figure in figures if isinstance(figure, torch.Tensor)]
        assert len(figures) >= 6
        assert sol.value.requires_grad
        assert not any(figure.requires_grad for figure in figures)


def test_relative_residual_of_an_exact_zero_solution_is_zero():
    sol = fixpoint.solve(lambda z: z, torch.zeros(1, 2))
    assert sol.relative_residual.tolist() == [0.0]
    assert sol.converged.all()


def test_repr_is_one_line_with_the_main_figures():
    text = repr(fixpoint.solve(halve, torch.zeros(3, 1), solver=Picard(), rtol=1e-3))
    assert text.startswith("Solution(3 of 3 rows converged, nfev=")
    assert "\n" not in text
    assert repr(fixpoint.solve(halve, torch.zeros(0, 1))).startswith("Solution(0 of 0 rows")


def test_a_converged_solution_has_no_complaint():
    assert fixpoint.solve(halve, torch.zeros(3, 1)).failure_message() == ""


def test_a_solution_is_immutable():
    sol = fixpoint.solve(halve, torch.zeros(3, 1))
    with pytest.raises(dataclasses.FrozenInstanceError):
        sol.nfev = 0


@pytest.mark.parametrize("copier", [copy.copy, copy.deepcopy, lambda error: pickle.loads(pickle.dumps(error))])
def test_an_error_keeps_its_solution_on_its_way_between_processes(copier):
    with pytest.raises(fixpoint.ConvergenceError) as caught:
        fixpoint.solve(lambda z: 3 * z + 1, torch.zeros(2, 1), solver=Picard(), max_evals=5, on_failure="raise")
    caught.value.add_note("in the third process")
    error = copier(caught.value)
    assert type(error) is fixpoint.ConvergenceError
    assert str(error) == str(caught.value)
    assert error.__notes__ == ["in the third process"]
    assert torch.equal(error.solution.status, caught.value.solution.status)
    assert error.solution.nfev == 5


def test_an_infinite_predicted_error_is_shown_as_such():
    problem = fixpoint.load_problem("linear")
    solution = fixpoint.solve(problem, solver=fixpoint.CausalQuasiNewton(), on_failure="ignore")
    assert repr(solution).endswith("worst predicted error inf)")
