"""Tolerances that are a share of the noise of each step: ``CausalQuasiNewton(noise_rtol=...)``."""

import pytest
import torch

from fixpoint import CausalQuasiNewton, Unroll
from tests.fixpoint.chains import Counted, pendulum, relative_errors, solve

D = torch.float64
STEPS, DIM = 300, 16


class Noisy(Counted):
    """A drift that forgets, with noise that shrinks along the chain: Euler-Maruyama."""

    def __init__(self, seed: int = 0, samples: int = 2) -> None:
        random = torch.Generator().manual_seed(seed)
        size = torch.linspace(0.2, 0.02, STEPS, dtype=D)
        noise = size[:, None] * torch.randn(samples, STEPS, DIM, dtype=D, generator=random)
        start = torch.randn(samples, DIM, dtype=D, generator=random)
        super().__init__(lambda x, u: x + 0.1 * (x.sin() - 1.5 * x) + u, start, inputs=(noise,))
        self.noise_scale = size * DIM**0.5

    @property
    def evals(self) -> int:
        return sum(len(round) for round in self.asked)


def solved(noise_rtol, seed=0, **options):
    chain = Noisy(seed)
    solver = CausalQuasiNewton(noise_rtol=noise_rtol, **{"window": 50} | options)
    return chain, solve(chain, solver, rtol=1e-4)


@pytest.mark.parametrize("certify", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_errors_stay_within_their_share_of_the_noise(seed, certify):
    chain, solution = solved(0.2, seed, certify=certify)
    assert solution.converged.all()
    reference = chain.sequential()
    error, size = ((x).norm(dim=2) for x in (solution.value - reference, reference))
    allowed = 1e-4 * size + 0.2 * chain.noise_scale
    assert (error <= 2 * allowed).all()
    assert (error > 1e-4 * size).any()  # it was used


def test_a_share_of_the_noise_saves_evaluations():
    counts = [solved(share)[0].evals for share in (0.0, 0.01, 0.1)]
    assert counts[0] > counts[1] > counts[2]
    assert counts[2] < 0.7 * counts[0]


def test_without_a_share_noise_changes_nothing():
    chain, solution = solved(0.0)
    chain.noise_scale = None
    assert torch.equal(solve(chain, CausalQuasiNewton(window=50), rtol=1e-4).value, solution.value)
    assert relative_errors(solution.value, chain.sequential()).max() <= 2e-4


def test_quiet_states_keep_the_ordinary_tolerance():
    chain = Noisy()
    chain.noise_scale = torch.where(torch.arange(STEPS) < 200, 0.0, chain.noise_scale)
    solution = solve(chain, CausalQuasiNewton(window=50, noise_rtol=0.5), rtol=1e-4)
    assert relative_errors(solution.value, chain.sequential())[:, :200].max() <= 2e-4


def test_what_noise_blurs_is_no_error_of_the_quiet_states_that_inherit_it():
    def certified(share):
        chain = Noisy()
        chain.noise_scale = torch.where(torch.arange(STEPS) < 150, chain.noise_scale, 0.0)
        solution = solve(chain, CausalQuasiNewton(window=50, noise_rtol=share, certify=True), rtol=1e-4)
        defects = (chain(solution.value) - solution.value).norm(dim=2)
        assert solution.converged.all()
        assert (defects <= 1e-4 * solution.value.norm(dim=2) + share * chain.noise_scale).all()
        return chain.evals - 2 * STEPS

    assert certified(1.0) < certified(0.0)


@pytest.mark.parametrize("share", [-0.1, float("nan"), float("inf")])
def test_a_share_that_is_none_is_refused(share):
    with pytest.raises(ValueError, match="noise_rtol must be a finite number of at least 0"):
        CausalQuasiNewton(noise_rtol=share)


def test_chains_without_noise_are_refused():
    chain = pendulum()
    with pytest.raises(ValueError, match="this one adds none"):
        solve(chain, CausalQuasiNewton(noise_rtol=0.1))
    chain.noise_scale = torch.zeros(chain.steps)
    with pytest.raises(ValueError, match="this one adds none"):
        solve(chain, CausalQuasiNewton(noise_rtol=0.1))
    chain.noise_scale = torch.ones(3)
    with pytest.raises(ValueError, match=r"noise_scale must have shape \(T,\) = \(400,\), found \(3,\)"):
        solve(chain, CausalQuasiNewton(noise_rtol=0.1))


@pytest.mark.parametrize(("wrong", "found"), [(float("nan"), "nan"), (float("inf"), "inf"), (-1.0, "-1")])
def test_noise_that_is_none_is_refused(wrong, found):
    chain = Noisy()
    chain.noise_scale[3] = wrong
    with pytest.raises(ValueError, match=f"noise_scale must be finite and at least 0, found {found}"):
        solve(chain, CausalQuasiNewton(noise_rtol=0.1))


def test_recorded_gradients_are_refused():
    chain = Noisy()
    chain.start.requires_grad_()
    with pytest.raises(ValueError, match="gradients are recorded"):
        solve(chain, CausalQuasiNewton(noise_rtol=0.1), backward=Unroll())
