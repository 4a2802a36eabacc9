"""The problems of the solver suite: shapes, repeatability, and closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.sparse
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import fixpoint
from benchmarks.solvers.cases import Case, SuiteProblem, normal
from benchmarks.solvers.problems import PROBLEMS, cases
from benchmarks.solvers.problems_grids import kelley_solution

BY_NAME = {problem.name: problem for problem in PROBLEMS}
UNSOLVABLE = [problem for problem in PROBLEMS if not problem.solvable]


def posed(name: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> Case:
    """The problem at its tightest tolerance in ``dtype``."""
    return [case for case in BY_NAME[name].cases([seed]) if case.z0.dtype == dtype][-1]


def solved(name: str) -> Tensor:
    """A fixed point, by plain or accelerated iteration far beyond the suite's limit."""
    case = posed(name)
    solution = fixpoint.solve(case.f, case.z0, rtol=1e-12, max_evals=5000, backward=None)
    return solution.value


def near(case: Case, rows: int) -> Tensor:
    """Points round the start."""
    generator = torch.Generator().manual_seed(1)
    return case.z0 + 0.1 * normal(generator, rows, case.z0.shape[1]).to(case.z0.dtype)


def test_the_suite_is_wide() -> None:
    chosen = cases([0])
    assert len(PROBLEMS) == len(BY_NAME) >= 24
    assert len({case.name for case in chosen}) == len(chosen)
    assert {case.z0.dtype for case in chosen} == {torch.float32, torch.float64}
    assert {1e-3, 1e-10} <= {case.rtol for case in chosen}
    assert all(problem.source for problem in PROBLEMS)
    # What draws no numbers is the same for every seed, and is to count once.
    assert {case.seed for case in cases([3, 4]) if not BY_NAME[case.problem].seeded} == {3}


@pytest.mark.parametrize("problem", PROBLEMS, ids=BY_NAME)
def test_maps_keep_shape_and_dtype_and_repeat(problem: SuiteProblem) -> None:
    images = []
    for dtype in (torch.float32, torch.float64):
        case, again = posed(problem.name, dtype), posed(problem.name, dtype)
        z = near(case, 3)
        before = z.clone()
        fz = case.f(z)
        assert case.z0.shape == (1, z.shape[1])
        assert fz.shape == z.shape
        assert fz.dtype == dtype
        assert torch.isfinite(case.f(case.z0)).all()
        assert torch.equal(z, before)
        assert torch.equal(fz, case.f(z))
        assert torch.equal(fz, again.f(z))
        # The rows know nothing of one another.
        torch.testing.assert_close(case.f(z[1:2]), fz[1:2])
        images.append(case.f(case.z0))
    # One problem in two precisions.
    torch.testing.assert_close(images[0].double(), images[1], rtol=1e-4, atol=1e-4)
    # A seed that changed nothing would count one case twice.
    other = posed(problem.name, seed=1)
    assert torch.equal(other.f(near(other, 1)), images[1]) is False or not problem.seeded


@pytest.mark.parametrize("problem", PROBLEMS, ids=BY_NAME)
def test_affine_maps_are_said_to_be(problem: SuiteProblem) -> None:
    case = posed(problem.name)
    x, y = 3 * near(case, 1), near(case, 2)[1:]
    at_zero = case.f(torch.zeros_like(x))
    gap = case.f(x + y) + at_zero - case.f(x) - case.f(y)
    assert problem.affine == (float(gap.abs().max()) < 1e-9 * float(case.f(x).abs().max()))


@pytest.mark.parametrize("problem", UNSOLVABLE, ids=lambda problem: problem.name)
@given(exponent=st.floats(-3, 6), seed=st.integers(0, 1000))
def test_no_point_meets_a_tolerance_where_nothing_can_be_solved(
    problem: SuiteProblem, exponent: float, seed: int
) -> None:
    case = posed(problem.name)
    z = 10**exponent * normal(torch.Generator().manual_seed(seed), *case.z0.shape)
    fz = case.f(z)
    assert float((fz - z).norm()) > 0.1 * float(fz.norm())


@pytest.mark.parametrize("problem", UNSOLVABLE, ids=lambda problem: problem.name)
def test_nor_does_a_point_of_equal_coordinates(problem: SuiteProblem) -> None:
    """Where the coordinates do not meet, each might still rest at a value of its own."""
    case = posed(problem.name)
    z = torch.linspace(-2, 2, 4001, dtype=torch.float64)[:, None].expand(-1, case.z0.shape[1])
    fz = case.f(z)
    assert bool(((fz - z).norm(dim=1) > 0.1 * fz.norm(dim=1)).all())


@pytest.mark.parametrize("problem", [problem for problem in PROBLEMS if problem.affine], ids=lambda p: p.name)
def test_affine_problems_have_the_solution_of_the_linear_system(problem: SuiteProblem) -> None:
    case = posed(problem.name)
    identity = torch.eye(case.z0.shape[1], dtype=torch.float64)
    constant = case.f(torch.zeros_like(case.z0))
    transposed = case.f(identity) - constant
    solution = torch.linalg.solve((identity - transposed).T, constant[0])[None]
    torch.testing.assert_close(case.f(solution), solution)


@pytest.mark.parametrize(
    ("name", "side", "wind"), [("poisson", 23, (0.0, 0.0)), ("convection-diffusion", 31, (40.0, 20.0))]
)
def test_linear_equations_are_the_five_point_scheme(name: str, side: int, wind: tuple[float, float]) -> None:
    width = side + 1
    along_x, along_y = (
        scipy.sparse.diags(
            [-(width**2) - w * width / 2, 2.0 * width**2, w * width / 2 - width**2], [-1, 0, 1], (side, side)
        )
        for w in wind
    )
    scheme = scipy.sparse.kronsum(along_x, along_y).tocsc()
    expected = torch.from_numpy(scipy.sparse.linalg.spsolve(scheme, np.ones(side * side)))[None]
    torch.testing.assert_close(posed(name).f(expected), expected)


def test_nonlinear_convection_has_kelleys_solution() -> None:
    known = kelley_solution(31).flatten()[None]
    torch.testing.assert_close(posed("nonlinear-convection").f(known), known)


def test_markov_chain_rests_at_the_eigenvector() -> None:
    case = posed("markov-chain")
    transition = case.f(torch.eye(case.z0.shape[1], dtype=torch.float64)).T
    values, vectors = np.linalg.eig(transition.numpy())
    rest = np.real(vectors[:, np.argmax(np.real(values))])
    rest = torch.from_numpy(rest / rest.sum())[None]
    torch.testing.assert_close(case.f(rest), rest)


@pytest.mark.parametrize("discount", [0.95, 0.99])
def test_value_iteration_contracts_by_its_discount(discount: float) -> None:
    case = posed(f"value-iteration-{discount}")
    z, other = 10 * near(case, 2).split(1)[0], near(case, 2)[1:]
    torch.testing.assert_close(case.f(z + 1), case.f(z) + discount)
    assert float((case.f(z) - case.f(other)).abs().max()) <= discount * float((z - other).abs().max())


def test_poisson_mixture_climbs_to_hasselblads_estimate() -> None:
    deaths, frequency = np.arange(10), np.array([162, 267, 271, 185, 111, 61, 27, 8, 3, 1])

    def likelihood(z: Tensor) -> float:
        share, (first, second) = float(torch.sigmoid(z[0, 0])), torch.exp(z[0, 1:]).tolist()
        mixed = share * scipy.stats.poisson.pmf(deaths, first) + (1 - share) * scipy.stats.poisson.pmf(deaths, second)
        return float(frequency @ np.log(mixed))

    case = posed("em-poisson-mixture")
    path = [case.z0]
    for _ in range(20):
        path.append(case.f(path[-1]))
    assert np.all(np.diff([likelihood(z) for z in path]) > 0)
    found = solved("em-poisson-mixture")
    assert [float(torch.sigmoid(found[0, 0])), *torch.exp(found[0, 1:]).tolist()] == pytest.approx(
        [0.3599, 1.2561, 2.6634], abs=2e-4
    )


def test_multivariate_t_weights_average_to_one() -> None:
    """At the maximum of the likelihood (Kent, Tyler & Vardi, equation 2)."""
    generator = torch.Generator().manual_seed(0)
    mix, chi = normal(generator, 9, 9), normal(generator, 60, 1) ** 2
    data = normal(generator, 60, 9) @ mix.T / chi.sqrt()
    mean, diagonal, below = solved("em-multivariate-t")[0].split([9, 9, 36])
    factor = torch.diag(diagonal.exp())
    factor[tuple(torch.tril_indices(9, 9, -1))] = below
    distance = ((data - mean) @ torch.linalg.inv(factor).T).square().sum(dim=1)
    assert float((10 / (1 + distance)).mean()) == pytest.approx(1)


@pytest.mark.parametrize("albedo", [0.9, 0.999])
def test_h_equation_has_chandrasekhars_mean(albedo: float) -> None:
    mean = float(solved(f"h-equation-{albedo}").mean())
    roots = [2 * (1 + sign * math.sqrt(1 - albedo)) / albedo for sign in (-1, 1)]
    assert min(abs(mean - root) for root in roots) < 1e-8


def test_self_consistent_field_keeps_four_electrons() -> None:
    case = posed("self-consistent-field")
    spacing = 20 / (case.z0.shape[1] - 1)
    assert (spacing * case.f(near(case, 2)).sum(dim=1)).tolist() == pytest.approx([4.0, 4.0])


@pytest.mark.parametrize("name", ["chain-network", "chain-ddim"])
def test_chains_are_strictly_causal(name: str) -> None:
    case = posed(name)
    z = case.z0
    for _ in range(50):
        z = case.f(z)
    torch.testing.assert_close(case.f(z), z, rtol=1e-12, atol=1e-12)


def test_network_chain_takes_eulers_steps() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, x = 1.5 * normal(generator, 10, 10) / 10**0.5, normal(generator, 10)
    for found in solved("chain-network").view(50, 10):
        x = x + 0.1 * (weight @ torch.tanh(x) - x)
        torch.testing.assert_close(found, x)


def test_ddim_chain_ends_where_the_sampler_does() -> None:
    """One step multiplies the coordinate of variance v by ``1 + (s' - s) s / (v + s^2)``."""
    beta = np.linspace(1e-4, 0.02, 1000)
    kept = np.concatenate([[1.0], np.cumprod(1 - beta)])[np.linspace(1000, 0, 51).astype(int)]
    sigma = np.sqrt(1 / kept - 1)
    variance = np.logspace(0, -2, 16)[:, None]
    factors = 1 + np.diff(sigma) * sigma[:-1] / (variance + sigma[:-1] ** 2)
    start = posed("chain-ddim").z0.view(50, 16)[0].numpy()
    end = solved("chain-ddim").view(50, 16)[-1]
    assert end.tolist() == pytest.approx(list(start * factors.prod(axis=1)))
