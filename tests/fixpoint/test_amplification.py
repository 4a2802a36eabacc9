"""Chains that enlarge errors: how much is measured, and what was done too early is done again."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

import fixpoint
from fixpoint import CausalQuasiNewton, Recurrence


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


def test_probes_do_not_depend_on_the_other_rows():
    problem = logistic()
    together = solve(problem, CausalQuasiNewton(certify=True))
    for row in range(4):
        alone = Recurrence(problem.step, problem.start[row : row + 1], steps=problem.steps)
        assert_close(solve(alone, CausalQuasiNewton(certify=True)).value[0], together.value[row], rtol=1e-12, atol=0)


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
