"""Chains that enlarge errors: how much is measured, and what was done too early is done again."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import fixpoint
from fixpoint import CausalQuasiNewton, Recurrence
from fixpoint.chains import recurrence
from fixpoint.chains.amplification import Gains
from tests.fixpoint.chains import Counted


def solve(problem, solver=None, **options):
    solver = solver or CausalQuasiNewton()
    options = {"rtol": 1e-3, "backward": None, "max_evals": 1000, "on_failure": "ignore"} | options
    return fixpoint.solve(problem, solver=solver, **options)


def logistic(steps: int = 40) -> Recurrence:
    """Chaos: an error doubles in every step on average."""
    start = torch.tensor([[0.2], [0.41], [0.633], [0.85]], dtype=torch.float64)
    return Recurrence(lambda x: 4 * x * (1 - x), start, steps=steps)


def worst_errors(problem, solution):
    exact = problem.sequential()
    return ((solution.value - exact).norm(dim=2) / exact.norm(dim=2)).amax(dim=1)


def test_amplification_is_the_product_of_the_steps_gains():
    # Gains of 2 for ten steps; the states stay as large as they are, so relative errors grow as errors do.
    inputs = torch.cat((torch.full((1, 10, 1), -1.0), torch.zeros(1, 10, 1)), dim=1).double()
    gains = torch.cat((torch.full((1, 10, 1), 2.0), torch.full((1, 10, 1), 1.0)), dim=1).double()
    problem = Recurrence(lambda x, a, u: a * x + u, torch.ones(1, 1, dtype=torch.float64), inputs=(gains, inputs))
    solution = fixpoint.solve(problem, 2 * problem.z0, solver=CausalQuasiNewton(), backward=None)
    assert_close(solution.value, problem.z0)
    # The first state has no error, so nine steps enlarge one.
    assert float(solution.amplification[0]) == pytest.approx(2.0**9, rel=0.3)


def test_a_chain_that_forgets_amplifies_nothing():
    inputs = torch.randn(3, 30, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    problem = Recurrence(lambda x, u: 0.5 * x.sin() + u, torch.zeros(3, 2, dtype=torch.float64), inputs=(inputs,))
    assert float(solve(problem).amplification.max()) < 30
    assert solve(problem, fixpoint.Picard()).amplification is None


@pytest.mark.parametrize("certify", [False, True])
@pytest.mark.parametrize("factor", [0.9, -0.5, 1.02])
def test_the_lyapunov_exponent_of_a_linear_chain_is_the_logarithm_of_its_factor(factor, certify):
    inputs = torch.randn(2, 60, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    start = torch.zeros(2, 3, dtype=torch.float64)
    problem = Recurrence(lambda x, u: factor * x + u, start, inputs=(inputs,))
    solution = solve(problem, CausalQuasiNewton(certify=certify))
    expected = torch.full((2,), abs(factor), dtype=torch.float64).log()
    assert_close(solution.lyapunov, expected, rtol=0, atol=0.005)


def test_certified_the_lyapunov_exponent_is_the_mean_logarithm_of_the_slopes():
    inputs = torch.linspace(0, 1, 80, dtype=torch.float64).expand(2, -1)[..., None]
    start = torch.tensor([[0.3], [0.8]], dtype=torch.float64)
    problem = Recurrence(lambda x, u: torch.sin(1.5 * x + u), start, inputs=(inputs,))
    before = torch.cat((start[:, None], problem.sequential()), dim=1)[:, 1:-1]
    slopes = 1.5 * torch.cos(1.5 * before + inputs[:, 1:])
    solution = solve(problem, CausalQuasiNewton(certify=True))
    assert_close(solution.lyapunov, slopes.abs().log().mean(dim=(1, 2)), rtol=0, atol=0.01)


def test_after_one_round_the_lyapunov_exponent_is_that_of_the_model():
    slopes = torch.linspace(0.2, 3.0, 12, dtype=torch.float64)
    inputs = torch.randn(2, 12, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    spread = slopes[None, :, None].expand_as(inputs)
    chain = Recurrence(lambda x, s, u: s * x + u, inputs[:, 0], inputs=(spread, inputs), slopes=slopes)
    solution = solve(chain, max_evals=1)
    assert_close(solution.lyapunov, slopes[1:].log().mean().expand(2))


def test_there_is_no_lyapunov_exponent_where_no_step_was_seen_to_make_anything_of_a_change():
    problem = logistic(steps=5)
    assert solve(problem, CausalQuasiNewton(window=1)).lyapunov.isnan().all()
    assert solve(problem, fixpoint.Picard()).lyapunov is None


@pytest.mark.parametrize("solver", [CausalQuasiNewton(), CausalQuasiNewton(window=10)], ids=["whole", "window"])
@pytest.mark.parametrize("certify", [False, True])
def test_chaos_is_solved_to_the_tolerance(solver, certify):
    from dataclasses import replace

    problem = logistic()
    solution = solve(problem, replace(solver, certify=certify))
    assert solution.converged.all()
    assert float(solution.amplification.min()) > 100
    assert float(worst_errors(problem, solution).max()) < 2e-3


def test_what_no_tolerance_can_be_fine_enough_for_goes_step_by_step():
    """In float32 an error of rounding grows beyond the tolerance: only the sequential run equals itself."""
    start = logistic().start.float()
    problem = Recurrence(lambda x: 4 * x * (1 - x), start, steps=60)
    solution = solve(problem)
    assert solution.converged.all()
    assert_close(solution.value, problem.sequential(), rtol=0, atol=0)


def test_too_few_evaluations_are_no_convergence():
    problem = logistic(60)
    solution = solve(problem, max_evals=30)
    error = worst_errors(problem, solution)
    assert not solution.converged.all()
    assert (error[solution.converged] < 2e-3).all()


def test_a_twin_does_not_depend_on_the_other_rows():
    problem = logistic()
    together = solve(problem, CausalQuasiNewton(certify=True))
    for row in range(4):
        alone = Recurrence(problem.step, problem.start[row : row + 1], steps=problem.steps)
        found = solve(alone, CausalQuasiNewton(certify=True))
        assert_close(found.value[0], together.value[row], rtol=1e-12, atol=0)
        assert_close(found.amplification[0], together.amplification[row], rtol=1e-6, atol=0)


def lorenz(steps: int) -> Recurrence:
    """Errors grow by nine in a thousand in a step, in a direction that takes a hundred steps to emerge."""

    def step(x):
        a, b, c = x.unbind(dim=1)
        return x + 0.01 * torch.stack((10 * (b - a), a * (28 - c) - b, a * b - 8 / 3 * c), dim=1)

    start = torch.tensor([[1.0, 1.0, 20.0], [-5.0, -7.0, 22.0], [3.0, 2.0, 15.0]], dtype=torch.float64)
    return Recurrence(step, start, steps=steps)


def linear(dim: int, radius: float, shear: float, steps: int, samples: int = 3) -> Recurrence:
    """``x' = A x + u`` about states of size 1; A has eigenvalues of up to ``radius`` and is far from normal."""
    generator = torch.Generator().manual_seed(dim)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    eigenvalues = radius * torch.linspace(0.7, 1, dim, dtype=torch.float64)
    basis = torch.linalg.qr(normal(samples, dim, dim))[0]
    a = basis @ (eigenvalues.diag() + shear * normal(samples, dim, dim).triu(1) / dim**0.5) @ basis.mT
    a = a[:, None].expand(-1, steps, -1, -1)
    path = 1 + 0.3 * normal(samples, steps + 1, dim)
    u = path[:, 1:] - (a @ path[:, :-1, :, None])[..., 0]
    return Recurrence(lambda x, a, u: (a @ x[..., None])[..., 0] + u, path[:, 0], inputs=(a, u))


def tanh_cells(gain: float, steps: int = 100, dim: int = 6, samples: int = 4) -> Recurrence:
    generator = torch.Generator().manual_seed(0)
    weights = gain * torch.randn(samples, 1, dim, dim, generator=generator, dtype=torch.float64) / dim**0.5
    push = 0.5 * torch.randn(samples, steps, dim, generator=generator, dtype=torch.float64)
    start = torch.zeros(samples, dim, dtype=torch.float64)
    inputs = (weights.expand(-1, steps, -1, -1), push)
    return Recurrence(lambda x, a, u: torch.tanh((a @ x[..., None])[..., 0] + u), start, inputs=inputs)


def amplification(problem: Recurrence) -> torch.Tensor:
    """By products of the steps' exact Jacobians: what becomes at most of a state's relative error, on average over its
    directions."""
    states = problem.sequential()
    before = torch.cat((problem.start[:, None], states), dim=1)[:, : problem.steps]
    sample, step = recurrence.all_pairs(len(states), problem.steps, states.device)

    def one(x, sample, step):
        return problem.transition(x[None], sample[None], step[None])[0]

    jacobians = torch.func.vmap(torch.func.jacrev(one))(before.flatten(0, 1), sample, step)
    jacobians = jacobians.unflatten(0, states.shape[:2])
    size, dim = states.norm(dim=2), states.shape[2]
    largest = torch.ones(len(states), dtype=states.dtype)
    products = torch.zeros(len(states), problem.steps, dim, dim, dtype=states.dtype)
    for k in range(problem.steps):
        products[:, :k] = jacobians[:, k, None] @ products[:, :k]
        products[:, k] = torch.eye(dim, dtype=states.dtype)
        growth = products[:, : k + 1].flatten(2).norm(dim=2) / dim**0.5 * size[:, : k + 1] / size[:, k, None]
        largest = torch.maximum(largest, growth.amax(dim=1))
    return largest


CHAINS = {
    "lorenz": (lambda: lorenz(400), 1e-4),
    "growing": (lambda: linear(4, 1.04, 0.3, steps=150), 1e-4),
    "growing, in sixteen dimensions": (lambda: linear(16, 1.05, 0.2, steps=150), 1e-4),
    "not normal": (lambda: linear(4, 0.9, 1.5, steps=60), 1e-4),
    "contraction": (lambda: linear(4, 0.6, 0.0, steps=60), 1e-4),
    "cells": (lambda: tanh_cells(1.5), 1e-4),
}


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("name", CHAINS)
def test_what_a_chain_amplifies_is_measured(name, window):
    make, rtol = CHAINS[name]
    problem = make()
    solution = solve(problem, CausalQuasiNewton(certify=True, window=window), rtol=rtol)
    assert solution.converged.all()
    ratio = solution.amplification / amplification(problem)
    assert 1 / 3 < float(ratio.median()) < 3
    assert (ratio > 1 / 10).all()
    assert (ratio < 10).all()
    assert (worst_errors(problem, solution) < 2 * rtol).all()


def test_a_long_slowly_growing_chain_meets_the_tolerance_without_being_asked_to():
    problem = lorenz(1000)
    solution = solve(problem, CausalQuasiNewton(window=50), rtol=1e-6, max_evals=1001)
    assert solution.converged.all()
    assert (solution.amplification > 1e3).all()
    assert float(worst_errors(problem, solution).max()) < 2e-6


def test_a_twin_is_counted_and_keeps_to_the_budget_of_rows():
    problem = lorenz(300)
    counted = Counted(problem.step, problem.start, steps=300)
    shown: list[int] = []
    solver = CausalQuasiNewton(certify=True, max_rows=40)
    solution = solve(counted, solver, rtol=1e-4, record=True, callback=lambda progress: shown.append(progress.nfev))
    assert solution.converged.all()
    assert solution.nfev == len(counted.asked) == len(solution.trace) == len(shown)
    assert max(len(asked) for asked in counted.asked) <= 40


def test_what_forgets_is_not_measured_without_being_asked_to():
    problem = linear(4, 0.6, 0.0, steps=60)
    counted = Counted(problem.step, problem.start, inputs=problem.inputs)
    solution = solve(counted, CausalQuasiNewton(window=20))
    assert solution.residual.isnan().all()  # no certificate, so no twin
    assert_close(solution.amplification, torch.ones(3, dtype=torch.float64), rtol=0, atol=2)


def test_a_basis_may_be_given_by_its_factors():
    generator = torch.Generator().manual_seed(0)
    factors = [torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0] for n in (2, 3, 4)]
    whole = torch.kron(factors[0].contiguous(), torch.kron(factors[1].contiguous(), factors[2].contiguous()))
    slopes = torch.rand(12, 24, generator=generator, dtype=torch.float64)
    inputs = torch.randn(2, 12, 2, 3, 4, generator=generator, dtype=torch.float64)
    found = []
    for basis in (whole, tuple(factors)):

        def step(x, u, s):
            return (((x.flatten(1) @ whole) * s) @ whole.T).reshape(x.shape) + u

        start = torch.zeros(2, 2, 3, 4, dtype=torch.float64)
        chain = Recurrence(step, start, inputs=(inputs, slopes.expand(2, -1, -1)), slopes=slopes)
        chain.basis = basis
        found.append(solve(chain, rtol=1e-8))
    assert found[0].nfev == found[1].nfev == 2  # the slopes are right in the right coordinates alone
    assert_close(found[0].value, found[1].value)
    chain.basis = tuple(factors[:2])
    with pytest.raises(ValueError, match="a matrix for each dimension of a state of shape"):
        solve(chain)


def test_the_twin_that_saw_most_is_kept() -> None:
    gains = Gains(rows=2, steps=3)
    gains.note_twin(np.array([0, 1]), np.array([[np.nan, 4.0, 5.0], [np.nan, 1.0, 2.0]]))
    gains.note_twin(np.array([0, 1]), np.array([[np.nan, 3.0, 2.0], [np.nan, 0.1, 30.0]]))
    np.testing.assert_allclose(np.exp(gains.of(np.array([0, 1])))[:, 1:], [[4.0, 5.0], [0.1, 30.0]])


def test_a_predicted_error_of_nothing_is_not_taken_for_an_exact_state():
    """Where a wrong guess lies outside [0, 1], this step is seen to be constant, and no error is predicted."""
    start = torch.tensor([[0.36621970], [0.55573314], [0.42039555], [0.21484107]])
    chain = fixpoint.Recurrence(lambda x: 3.9 * x.clamp(0, 1) * (1 - x.clamp(0, 1)), start, steps=130)
    solver = fixpoint.CausalQuasiNewton(memory=1)
    solution = fixpoint.solve(chain, solver=solver, rtol=1e-3, backward=None, max_evals=6000)
    assert solution.converged.all()
    assert float((chain(solution.value) - solution.value).norm()) < 1e-3
