"""Blockwise solvers against the same solver on the parts as rows."""

from __future__ import annotations

import pytest
import torch

import fixpoint
from fixpoint import Anderson, Blockwise, Broyden, CausalQuasiNewton, Picard
from fixpoint.engine.layout import Layout
from tests.fixpoint.chains import gru, relative_errors


@pytest.mark.parametrize("inner", [Picard(damping=0.7), Anderson(memory=2), Broyden(memory=3)], ids=repr)
@pytest.mark.parametrize("depth", [1, 4, 7])
def test_parts_are_updated_like_rows_of_their_own(contraction, inner, depth):
    f = contraction(rows=6, dim=4, rho=0.9, squash=torch.tanh)

    def joined(z):  # two rows of three parts
        return f(z.reshape(6, 4)).reshape(2, 12)

    parts = fixpoint.solve(f, solver=inner, depth=depth).value
    blocks = fixpoint.solve(joined, f.z0.reshape(2, 12), solver=Blockwise(inner, blocks=3), depth=depth).value
    torch.testing.assert_close(blocks.reshape(6, 4), parts, rtol=1e-12, atol=1e-13)


def test_one_block_is_the_solver_itself(contraction):
    f = contraction(rho=0.9, squash=torch.tanh)
    plain, one = (fixpoint.solve(f, solver=s, rtol=1e-9) for s in (Anderson(), Blockwise(Anderson(), blocks=1)))
    assert torch.equal(plain.value, one.value)
    assert plain.evals.tolist() == one.evals.tolist()


def test_a_row_is_done_when_its_blocks_are_done_together():
    # Part 0 is solved at once, part 1 contracts slowly: the row must wait for part 1.
    slope = torch.tensor([[0.0, 0.9]])
    sol = fixpoint.solve(lambda z: slope * z + 1, torch.zeros(1, 2), solver=Blockwise(Picard(), blocks=2), rtol=1e-5)
    assert sol.converged.shape == (1,)
    assert sol.nfev > 20
    torch.testing.assert_close(sol.value, torch.tensor([[1.0, 10.0]]), rtol=1e-3, atol=0)


def test_blocks_that_do_not_divide_the_row_raise_with_both_numbers():
    with pytest.raises(ValueError, match=r"blocks=4 must divide the row's length, found 6"):
        fixpoint.solve(torch.cos, torch.zeros(2, 6), solver=Blockwise(Picard(), blocks=4))


@pytest.mark.parametrize("blocks", [1, 4, 20, 40, 3], ids=lambda blocks: f"{blocks} blocks")
def test_a_solver_that_must_know_its_problem_is_told_the_shape_of_a_block(blocks):
    # 20 states of 6 entries: blocks of 20, 5 and 1 states, of half a state, and of 6 states and two thirds.
    chain = gru(samples=2, steps=20)
    chain.slopes = torch.full((20,), 0.5)  # fit one block alone
    solution = fixpoint.solve(
        chain, solver=Blockwise(CausalQuasiNewton(), blocks=blocks), rtol=1e-7, max_evals=21, backward=None
    )
    assert solution.converged.all()
    assert float(relative_errors(solution.value, chain.sequential()).max()) < 1e-5


def test_blocks_of_a_nested_state_can_be_swept():
    state = {"a": torch.zeros(2, 4, dtype=torch.complex64), "b": torch.zeros(2, 2, dtype=torch.complex64)}
    solver = Blockwise(CausalQuasiNewton(), blocks=2)
    solution = fixpoint.solve(lambda z: {"a": z["a"].cos(), "b": 0.5 * z["b"] + 1j}, state, solver=solver)
    assert solution.converged.all()
    torch.testing.assert_close(solution.value["b"], torch.full((2, 2), 2j), rtol=1e-3, atol=0)


def test_a_solver_that_needs_no_problem_is_left_as_it_is():
    solver = Blockwise(Anderson(), blocks=2)
    _, bound = solver.bind(torch.cos, Layout.of(torch.zeros(2, 6), 1))
    assert bound == solver
    assert bound.adjoint() is None


def test_blocks_are_told_of_the_state_and_not_of_memory_that_nobody_has_written():
    torch.use_deterministic_algorithms(True)  # fills such memory with NaN
    try:
        solution = fixpoint.solve(torch.cos, torch.zeros(2, 4), solver=Blockwise(Anderson(), blocks=2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert solution.converged.all()
