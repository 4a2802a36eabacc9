"""ACX against its formulas written out for whole cycles, and what they promise."""

from __future__ import annotations

import math
import warnings

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


def nearly_turning(x):
    """Takes 0 to 1, 3 and 6 + 1e-10: the second difference is 1, the third 1e-10."""
    return 1 + 2 * x - (1 - 1e-10) * x * (x - 1) / 6


@pytest.mark.parametrize(
    ("f", "z0"),
    [
        (lambda z: z + 1, [[0.0, 0.0]]),  # the highest difference is zero
        (turning, [[0.0, 0.0]]),  # it is at right angles to the lower one
        (lambda z: 0.9 * z, [[1e160, 1e160]]),  # its square is not finite
        (lambda z: 0.9 * z, [[1e-155, 1e-155]]),  # its square has lost its digits
        (lambda z: 1e160 * nearly_turning(z / 1e160), [[0.0, 0.0]]),  # its square is finite, and its product is not
    ],
    ids=["a translation", "right angles", "too large", "too small", "too large a product"],
)
def test_without_an_s_a_cycle_ends_with_a_plain_step(f, z0):
    z = torch.tensor(z0, dtype=D)
    state = ACX().init(z)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            fz = f(z)
            z, state = ACX().step(z, fz, state)
            torch.testing.assert_close(z, fz, rtol=1e-12, atol=0)


def test_gradients_are_finite_where_there_is_no_s():
    x = torch.tensor([[1e-18, 1.0], [1.0, 1.0], [1e22, 1e22], [0.0, 0.0]]).requires_grad_()
    rate = torch.tensor([[0.5, 0.3], [1.0, 1.0], [0.5, 0.3], [0.5, 0.3]])
    solution = fixpoint.solve(
        lambda z, x: rate * z + x, torch.zeros(4, 2), (x,), solver=ACX(), depth=8, backward=fixpoint.Unroll()
    )
    solution.value.sum().backward()
    assert torch.isfinite(x.grad).all()
    torch.testing.assert_close(x.grad[1], torch.full((2,), 8.0))  # a translation, eight times


def test_autograd_may_begin_in_the_middle_of_a_cycle():
    _, f = bent(5)
    z = torch.randn(2, 4, dtype=D, generator=torch.Generator().manual_seed(0))
    state = ACX().init(z)
    _, first = ACX().step(z, f(z), state)
    z = f(z).requires_grad_()
    _, second = ACX().step(z, f(z), first)
    recorded, _ = ACX().step(f(z), f(f(z)), second)
    plain = z.detach()
    _, second = ACX().step(plain, f(plain), first)
    expected, _ = ACX().step(f(plain), f(f(plain)), second)
    torch.testing.assert_close(recorded.detach(), expected)
    (grad,) = torch.autograd.grad(recorded.sum(), z)
    assert torch.isfinite(grad).all()


def test_its_memory_is_that_of_picard_and_two_states():
    z0 = torch.zeros(8, 70_000)
    one = z0.numel() * z0.element_size()
    acx, plain = (fixpoint.estimate_memory(z0, solver=solver) for solver in (ACX(), fixpoint.Picard()))
    assert acx.states == pytest.approx(plain.states + 2, abs=0.1)
    assert acx.bytes < plain.bytes + 2.1 * one


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


@pytest.mark.parametrize(
    ("f", "z0"),
    [(lambda z: torch.sqrt(z) * 0.999 + 0.001, 0.4), (lambda z: torch.log(z) + 2, 0.5)],
    ids=["square root", "logarithm"],
)
def test_a_row_whose_jump_leaves_the_domain_goes_back(f, z0):
    left = []

    def noted(z):
        left.append(not torch.isfinite(f(z)).all())
        return f(z)

    solution = fixpoint.solve(noted, torch.tensor([[z0]], dtype=D), solver=ACX(), rtol=1e-10, backward=None)
    assert any(left)
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
