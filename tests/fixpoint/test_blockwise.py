"""Blockwise solvers against the same solver on the parts as rows."""

from __future__ import annotations

import pytest
import torch

import fixpoint
from fixpoint import Anderson, Blockwise, Broyden, Picard


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
