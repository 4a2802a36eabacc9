"""Recurrences as problems."""

import pytest
import torch
from torch.testing import assert_close

import fixpoint
from fixpoint import Recurrence


def test_the_map_is_one_step_from_every_state():
    inputs = torch.arange(6.0).reshape(2, 3, 1)
    chain = Recurrence(lambda x, u: 2 * x + u, torch.tensor([[1.0], [10.0]]), inputs=(inputs,))
    z = torch.tensor([[[5.0], [6.0], [7.0]], [[8.0], [9.0], [0.0]]])
    expected = torch.tensor([[[2.0], [11.0], [14.0]], [[23.0], [20.0], [23.0]]])
    assert_close(chain(z), expected)
    assert_close(chain.sequential(), torch.tensor([[[2.0], [5.0], [12.0]], [[23.0], [50.0], [105.0]]]))


def test_it_is_a_problem_and_a_chain():
    chain = Recurrence(lambda x: x / 2 + 1, torch.zeros(2, 3), steps=8)
    assert isinstance(chain, fixpoint.Problem)
    assert isinstance(chain, fixpoint.Chain)
    solution = fixpoint.solve(chain, solver=fixpoint.Picard(), rtol=1e-6)
    assert solution.converged.all()
    assert solution.nfev <= 9
    assert_close(solution.value, chain.sequential())


def test_arguments_that_do_not_fit():
    start = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="steps is missing"):
        Recurrence(torch.cos, start)
    with pytest.raises(ValueError, match="at least 0"):
        Recurrence(torch.cos, start, steps=-1)
    with pytest.raises(ValueError, match=r"inputs\[1\].*\(2, 5, ...\), found \(2, 4, 3\)"):
        Recurrence(torch.cos, start, inputs=(torch.zeros(2, 5), torch.zeros(2, 4, 3)))
    with pytest.raises(TypeError, match="start"):
        Recurrence(torch.cos, torch.zeros(2, dtype=torch.int64), steps=3)
    with pytest.raises(ValueError, match=r"\(B, T, \*shape\) = \(2, 4, 3\), found \(2, 5, 3\)"):
        Recurrence(torch.cos, start, steps=4)(torch.zeros(2, 5, 3))


@pytest.mark.parametrize(
    ("step", "message"),
    [(lambda x: x[:, :1], "shape"), (lambda x: x.double(), "dtype"), (lambda x: [x], "shape")],
)
def test_a_step_that_returns_something_else(step, message):
    chain = Recurrence(step, torch.zeros(2, 3), steps=20)
    with pytest.raises(ValueError, match=f"must return the {message}"):
        fixpoint.solve(chain, solver=fixpoint.CausalQuasiNewton(window=5), backward=None)


@pytest.mark.parametrize("solver", [fixpoint.CausalQuasiNewton(), fixpoint.Anderson()], ids=repr)
@pytest.mark.parametrize("step", [lambda x: x[:, :2], lambda x: x.flatten(), lambda x: (x,)])
def test_a_step_of_another_shape_is_refused_by_every_solver(solver, step):
    with pytest.raises(ValueError, match="must return the shape of its input"):
        fixpoint.solve(Recurrence(step, torch.ones(2, 3), steps=3), solver=solver)


def test_inputs_and_steps_of_another_type_are_refused():
    with pytest.raises(TypeError, match=r"write inputs=\(x,\)"):
        Recurrence(lambda x, u: x + u, torch.ones(2, 3), inputs=torch.ones(2, 4, 3))
    with pytest.raises(TypeError, match=r"steps must be an integer, found 3\.0"):
        Recurrence(lambda x: x, torch.ones(2, 3), steps=3.0)
    with pytest.raises(ValueError, match="steps is missing"):
        Recurrence(lambda x, u: x + u, torch.ones(2, 3), inputs=(torch.ones(2),))


def test_a_chain_in_autocast_may_return_its_dtype():
    layer = torch.nn.Linear(3, 3)
    chain = Recurrence(lambda x: 0.1 * layer(x), torch.ones(2, 3), steps=4)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert fixpoint.solve(chain, solver=fixpoint.Picard(), rtol=1e-2).converged.all()
