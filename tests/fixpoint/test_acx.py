"""ACX against its formulas written out for whole cycles, and what they promise."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fixpoint
from fixpoint import ACX, Status

D = torch.float64


def jump(f, z, length):
    """Where a cycle that starts at the array ``z`` ends, by the formulas of the paper: ``z0 + sum C(p, j) s^j d_j``."""
    states = [z]
    for _ in range(length):
        states.append(f(states[-1]))
    differences = [np.diff(states, order, axis=0)[0] for order in range(length + 1)]
    highest, lower = differences[length], differences[length - 1]
    s = abs(highest @ lower) / (highest @ highest)
    return sum(math.comb(length, order) * s**order * differences[order] for order in range(length + 1))


def bent(seed, dim=4):
    """A smooth map of arrays that contracts, and the same of rows of tensors."""
    generator = np.random.default_rng(seed)
    A, b = 0.9 * np.linalg.qr(generator.normal(size=(dim, dim)))[0], generator.normal(size=dim)
    tensors = torch.from_numpy(A), torch.from_numpy(b)
    return lambda z: np.tanh(A @ z + b), lambda z: torch.tanh(z @ tensors[0].T + tensors[1])


@given(seed=st.integers(0, 10_000))
def test_cycles_of_three_three_and_two_end_where_the_formulas_say(seed):
    f, f_of_rows = bent(seed)
    expected = np.zeros(4)
    z, state = torch.zeros(1, 4, dtype=D), ACX().init(torch.zeros(1, 4, dtype=D))
    for length in (3, 3, 2, 3, 3, 2):
        expected = jump(f, expected, length)
        for place in range(length):
            fz = f_of_rows(z)
            z, state = ACX().step(z, fz, state)
            if place < length - 1:
                assert torch.equal(z, fz)
        torch.testing.assert_close(z[0].numpy(), expected, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("rows_of_one_rate", [[[0.9, 0.9]], [[0.0, 0.0], [-3.0, -3.0], [0.999, 0.999]]])
def test_a_jump_solves_maps_of_one_rate(rows_of_one_rate):
    rate = torch.tensor(rows_of_one_rate, dtype=D)
    b = torch.tensor([1.0, -2.0], dtype=D)
    solution = fixpoint.solve(lambda z: rate * z + b, torch.zeros_like(rate), solver=ACX(), rtol=1e-9)
    assert solution.nfev == 4  # three to jump, and one to see that it was right
    torch.testing.assert_close(solution.value, b / (1 - rate))


def turning(z):
    """Takes (0, 0) to (1, 0), (3, 0) and (6, 1): the second difference is (1, 0), the third (0, 1)."""
    x = z[:, 0]
    return torch.stack((1 + 2 * x - x * (x - 1) / 6, x * (x - 1) / 6), dim=1)


@pytest.mark.parametrize(
    ("f", "z0"),
    [
        (lambda z: z + 1, [[0.0, 0.0]]),  # the highest difference is zero
        (turning, [[0.0, 0.0]]),  # it is at right angles to the lower one
        (lambda z: 0.9 * z, [[1e160, 1e160]]),  # its square is not finite
    ],
    ids=["a translation", "right angles", "out of range"],
)
def test_without_an_s_a_cycle_ends_with_a_plain_step(f, z0):
    z = torch.tensor(z0, dtype=D)
    state = ACX().init(z)
    for _ in range(3):
        fz = f(z)
        z, state = ACX().step(z, fz, state)
        torch.testing.assert_close(z, fz)


@pytest.mark.parametrize("dim", [50, 70_000])  # NumPy's and torch's
def test_no_more_than_two_states_are_held_and_none_of_the_callers_is_written_to(dim):
    z = torch.linspace(0, 1, dim)[None]
    state = ACX().init(z)
    for step in range(16):
        fz = 0.9 * torch.cos(z)
        before = z.clone(), fz.clone()
        z_next, state = ACX().step(z, fz, state)
        assert torch.equal(z, before[0])
        assert torch.equal(fz, before[1])
        assert len(state.differences) == (1, 2, 0, 1, 2, 0, 1, 0)[step % 8]
        z = z_next


def test_it_solves_with_fewer_evaluations_than_plain_iteration_and_where_that_diverges():
    problem = fixpoint.load_problem("linear:rho=0.99,dtype=float64")
    acx, plain = (
        fixpoint.solve(problem, solver=solver, rtol=1e-8, max_evals=4000) for solver in (ACX(), fixpoint.Picard())
    )
    assert acx.converged.all()
    assert acx.nfev < plain.nfev / 5
    expanding = torch.tensor([[-2.0, 0.5]], dtype=D)
    solution = fixpoint.solve(lambda z: expanding * z + 1, torch.zeros(1, 2, dtype=D), solver=ACX(), rtol=1e-8)
    assert solution.converged.all()
    torch.testing.assert_close(solution.value, 1 / (1 - expanding))


def test_a_row_that_leaves_the_domain_goes_back():
    def f(z):  # at negative z, NaN
        return torch.sqrt(z) * 0.999 + 0.001

    solution = fixpoint.solve(f, torch.tensor([[1e-6]], dtype=D), solver=ACX(), rtol=1e-10, max_evals=400)
    assert solution.status.tolist() == [Status.CONVERGED]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_extrapolated_in_float32(dtype):
    rate = torch.tensor([[0.5, 0.9, -0.7]])
    found = fixpoint.solve(
        lambda z: (rate * z.float() + 1).to(dtype), torch.zeros(1, 3, dtype=dtype), solver=ACX(), rtol=2e-2
    )
    assert found.value.dtype == dtype
    assert found.converged.all()
    state = ACX().step(torch.zeros(1, 3, dtype=dtype), torch.ones(1, 3, dtype=dtype), ACX().init(found.value))[1]
    assert state.differences[0].dtype in (torch.float32, np.float32)
