"""Sampling by causal sweeps: the sequential images in few rounds, in windows, with gradients, and at the limits."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import fixpoint
from fixpoint import CausalQuasiNewton, Status
from fixpoint_diffusion import (
    DDIMChain,
    NoiseSchedule,
    SamplingChain,
    StochasticDDIMChain,
    Transitions,
    initial_noise,
    sample,
)
from fixpoint_diffusion.experiments.chains import embedded_chain

LINEAR = NoiseSchedule.linear()


def errors(result, chain) -> Tensor:
    with torch.no_grad():
        expected = chain.sequential()[:, -1].flatten(1)
    return (result.images.flatten(1) - expected).norm(dim=1) / expected.norm(dim=1)


def mixture_chain(mixture, *, samples: int = 4, steps: int = 100, eta: float = 0.0, schedule=LINEAR, **options):
    x_T = initial_noise(0, range(samples), (3,), dtype=torch.float64)
    return StochasticDDIMChain(mixture(schedule), x_T, schedule, steps=steps, eta=eta, **options)


# The second numbers are the goals for the median of these chains; the worst may take two rounds more.
@pytest.mark.parametrize(("eta", "rounds"), [(0.0, 9), (0.5, 9), (1.0, 10)])
def test_fifty_steps_of_the_embedded_network(eta, rounds):
    chain = embedded_chain(steps=50, samples=6, eta=eta)
    result = sample(chain, solver=CausalQuasiNewton(window=50), rtol=1e-3)
    assert result.solution.converged.all()
    assert int(result.solution.evals.median()) <= rounds
    assert result.rounds <= rounds + 2
    assert float(errors(result, chain).max()) < 1e-3


def test_predicted_errors_hold_on_chains_of_a_trained_network():
    for eta in (0.0, 1.0):
        chain = embedded_chain(steps=25, samples=25, eta=eta, seed=1)
        result = sample(chain, solver=CausalQuasiNewton(window=10), rtol=1e-3)
        assert result.solution.converged.all()
        assert float(errors(result, chain).max()) < 2e-3


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_predicted_errors_hold_on_mixtures(mixture, eta):
    chain = mixture_chain(mixture, samples=100, steps=60, eta=eta)
    for solver in (CausalQuasiNewton(), CausalQuasiNewton(window=15)):
        result = sample(chain, solver=solver, rtol=1e-3)
        assert result.solution.converged.all()
        assert float(errors(result, chain).max()) < 2e-3


def test_a_share_of_the_noise_saves_rows_and_keeps_the_images():
    chain = embedded_chain(steps=200, samples=3, eta=1.0)
    strict, loose = (sample(chain, solver=CausalQuasiNewton(window=50, noise_rtol=c)) for c in (0.0, 0.5))
    assert loose.solution.converged.all()
    assert loose.evals < 0.8 * strict.evals
    assert float(errors(loose, chain).max()) < 2e-2
    with pytest.raises(ValueError, match="this one adds none"):
        sample(embedded_chain(steps=5, samples=1), solver=CausalQuasiNewton(noise_rtol=0.5))


def test_the_noise_of_a_step_has_the_size_that_the_chain_says():
    chain = embedded_chain(steps=10, samples=400, eta=1.0)
    step = torch.arange(10).repeat(400)
    sample_of = torch.arange(400).repeat_interleave(10)
    x = chain.x_T[:1].expand(len(step), -1, -1, -1)
    latents = chain.transition(x, sample_of, step).unflatten(0, (400, 10)).flatten(2)
    spread = (latents - latents.mean(dim=0)).square().sum(dim=2).mean(dim=0).sqrt()
    assert_close(spread.double(), chain.noise_scale, rtol=0.05, atol=1e-4)


def test_a_window_needs_few_rows(mixture):
    chain = mixture_chain(mixture, steps=500)
    result = sample(chain, solver=CausalQuasiNewton(window=50), rtol=1e-3)
    assert result.solution.converged.all()
    assert result.evals <= 2.2 * 4 * 500
    assert result.rounds <= 80


def test_a_budget_holds_in_every_round(mixture):
    sizes = []
    inner = mixture(LINEAR)

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        sizes.append(len(x))
        return inner(x, t)

    chain = DDIMChain(denoiser, initial_noise(0, range(5), (3,), dtype=torch.float64), LINEAR, steps=40)
    result = sample(chain, solver=CausalQuasiNewton(max_rows=32), rtol=1e-4)
    assert result.solution.converged.all()
    assert max(sizes) <= 32
    assert sizes.pop(1) == chain.check_evals
    assert result.rounds == len(sizes)
    assert result.evals == sum(sizes)


def test_samples_that_take_turns_are_all_finished(mixture):
    chain = mixture_chain(mixture, samples=3, steps=15)
    result = sample(chain, solver=CausalQuasiNewton(max_rows=1))
    assert result.solution.converged.all()
    assert result.rounds == 45
    assert_close(result.trajectory, chain.sequential())


def test_the_denoiser_is_timed_only_by_name(mixture, monkeypatch):
    from fixpoint_diffusion.sampling.batch_cost import BatchCost

    saturated = BatchCost((1, 1000), (0.001, 1.0))
    monkeypatch.setattr(BatchCost, "measure", classmethod(lambda cls, chain: saturated))
    chain = mixture_chain(mixture, samples=3, steps=300)
    timed = sample(chain, max_rows="auto")
    assert timed.rounds == 300  # a device that one row keeps busy: the ordinary sampler
    assert (timed.max_rows, timed.cost) == (3, saturated)
    usual = sample(chain)
    assert usual.rounds < 300
    assert (usual.max_rows, usual.cost) == (128, None)
    given = sample(chain, max_rows=30)
    assert given.rounds < 300
    assert given.max_rows == 30


@pytest.mark.parametrize(("samples", "in_parallel"), [(32, True), (33, False)])
def test_so_many_samples_that_windows_would_be_narrow_take_one_step_a_round(mixture, samples, in_parallel):
    chain = mixture_chain(mixture, samples=samples, steps=30)
    result = sample(chain)
    assert (result.rounds < 30) == in_parallel
    assert (result.evals == 30 * samples) == (not in_parallel)


def test_calls_that_time_the_denoiser_are_counted(mixture):
    sizes = []
    inner = mixture(LINEAR)

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        sizes.append(len(x))
        return inner(x, t)

    chain = DDIMChain(denoiser, initial_noise(0, range(2), (3,), dtype=torch.float64), LINEAR, steps=300)
    result = sample(chain, max_rows="auto")
    assert (result.rounds, result.evals) == (len(sizes) - 1, sum(sizes) - chain.check_evals)
    assert result.rounds > result.solution.nfev


def test_the_usual_budget_is_kept_and_shown(mixture, monkeypatch):
    monkeypatch.setattr(sys.modules[sample.__module__], "usual_rows", lambda chain: 24)
    assert sample(mixture_chain(mixture, samples=3, steps=40)).max_rows == 24
    assert sample(mixture_chain(mixture, samples=20, steps=40)).rounds == 40  # hardly a row for each sample


@pytest.mark.parametrize("max_rows", [0, -1, 2.5, True, "all"])
def test_budgets_that_are_none_are_refused(mixture, max_rows):
    with pytest.raises(ValueError, match="max_rows must be an int of at least 1"):
        sample(mixture_chain(mixture), max_rows=max_rows)


def test_two_budgets_are_refused(mixture):
    with pytest.raises(ValueError, match="or a solver with a window or max_rows"):
        sample(mixture_chain(mixture), solver=CausalQuasiNewton(max_rows=3), max_rows=5)
    with pytest.raises(ValueError, match="max_rows is for CausalQuasiNewton"):
        sample(mixture_chain(mixture), solver=fixpoint.Picard(), max_rows=5)


def test_a_neighbours_trajectory_is_a_good_start(mixture):
    chain = mixture_chain(mixture)
    solved = sample(chain, rtol=1e-4)
    near = DDIMChain(mixture(LINEAR), chain.x_T + 1e-3, LINEAR, steps=100)
    assert sample(near, init=solved.trajectory, rtol=1e-4).rounds < sample(near, rtol=1e-4).rounds


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 5)).double()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.layers(torch.cat([x, t[:, None] / 1000], dim=1))


@pytest.mark.parametrize("solver", [CausalQuasiNewton(), fixpoint.Anderson()], ids=["causal", "anderson"])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_gradients_equal_those_of_the_sequential_sampler(eta, solver):
    network = Network()
    x_T = initial_noise(0, range(3), (5,), dtype=torch.float64).requires_grad_()
    chain = StochasticDDIMChain(network, x_T, LINEAR, steps=20, eta=eta)
    wanted = [x_T, *network.parameters()]
    expected = torch.autograd.grad(chain.sequential()[:, -1].square().sum(), wanted)
    solution = fixpoint.solve(chain, solver=solver, rtol=1e-9, backward=fixpoint.IFT(rtol=1e-8))
    found = torch.autograd.grad(solution.value[:, -1].square().sum(), wanted)
    for ours, theirs in zip(found, expected, strict=True):
        assert float((ours - theirs).norm() / theirs.norm()) < 1e-5


@pytest.mark.parametrize("backward", [fixpoint.JFB(), fixpoint.Phantom(steps=2), fixpoint.Neumann(terms=3)], ids=repr)
def test_every_backward_rule_attaches_to_a_chain(backward):
    network = Network()
    chain = DDIMChain(network, initial_noise(0, range(2), (5,), dtype=torch.float64), LINEAR, steps=10)
    solution = fixpoint.solve(chain, solver=CausalQuasiNewton(), rtol=1e-6, backward=backward)
    solution.value[:, -1].sum().backward()
    assert all(float(p.grad.abs().sum()) > 0 for p in network.parameters())


# At the limits


@pytest.mark.parametrize("steps", [1, 2, 7, 333])
def test_any_number_of_steps(mixture, steps):
    chain = mixture_chain(mixture, samples=2, steps=steps)
    result = sample(chain, rtol=1e-4)
    assert result.solution.converged.all()
    assert float(errors(result, chain).max()) < 2e-4


def test_more_noise_than_ddpm(mixture):
    chain = mixture_chain(mixture, steps=50, eta=1.005)
    result = sample(chain, rtol=1e-3)
    assert result.solution.converged.all()
    assert float(errors(result, chain).max()) < 2e-3


def test_zero_terminal_snr(mixture):
    schedule = NoiseSchedule.linear().zero_terminal_snr()
    x_T = initial_noise(0, range(3), (3,), dtype=torch.float64)
    chain = DDIMChain(
        mixture(schedule, "sample"), x_T, schedule, steps=50, spacing="linspace", prediction_type="sample"
    )
    assert chain.transitions.alphas[0] == 0
    result = sample(chain, rtol=1e-4)
    assert result.solution.converged.all()
    assert float(errors(result, chain).max()) < 2e-4


def test_a_denoiser_that_loses_one_sample(mixture):
    inner = mixture(LINEAR)

    def denoiser(x: Tensor, t: Tensor, bad: Tensor) -> Tensor:
        return torch.where((bad & (t < 300))[:, None], torch.nan, inner(x, t))

    x_T = initial_noise(0, range(3), (3,), dtype=torch.float64)
    bad = torch.tensor([False, True, False])
    chain = DDIMChain(denoiser, x_T, LINEAR, steps=40, conditioning={"bad": bad})
    result = sample(chain, on_failure="ignore")
    assert result.solution.status.tolist() == [Status.CONVERGED, Status.NON_FINITE, Status.CONVERGED]
    assert float(errors(result, chain)[[0, 2]].max()) < 2e-3


def test_a_denoiser_that_returns_another_shape():
    chain = DDIMChain(lambda x, t: x[:, :2], torch.ones(2, 3), LINEAR, steps=20)
    with pytest.raises(ValueError, match="must return the shape"):
        sample(chain)


def test_a_window_of_one_is_the_ordinary_sampler(mixture):
    chain = mixture_chain(mixture, steps=30, eta=1.0)
    result = sample(chain, solver=CausalQuasiNewton(window=1))
    assert result.rounds == 30
    assert_close(result.trajectory, chain.sequential())


def test_half_precision_latents(mixture):
    inner = mixture(LINEAR)

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        return inner(x.double(), t).to(x.dtype)

    chain = DDIMChain(denoiser, initial_noise(0, range(3), (3,)).half(), LINEAR, steps=50)
    result = sample(chain, rtol=1e-2)
    assert result.images.dtype == torch.float16
    assert result.solution.converged.all()
    assert float(errors(result, chain).max()) < 5e-2


def test_stopping_hands_over_the_best_trajectory_so_far(mixture):
    chain = mixture_chain(mixture)
    shown = []

    def stop(progress) -> bool:
        shown.append(progress)
        return progress.nfev == 4

    whole = CausalQuasiNewton(window=chain.steps)
    result = sample(chain, solver=whole, rtol=1e-6, callback=stop, on_failure="ignore")
    assert result.rounds == 4
    assert not result.solution.converged.any()
    assert torch.isfinite(result.trajectory).all()
    start = sample(chain, solver=whole, rtol=1e-6, max_evals=1, on_failure="ignore")
    assert float(errors(result, chain).max()) < float(errors(start, chain).max())


def test_a_certificate_under_a_budget_of_rows_has_the_evaluations_it_needs(mixture):
    chain = mixture_chain(mixture, samples=3, steps=40)
    result = sample(chain, solver=CausalQuasiNewton(max_rows=3, certify=True))
    assert result.solution.converged.all()
    assert result.rounds == 40 + 40  # the sampler one step after another, then all steps once more
    assert (result.solution.residual < 1e-10).all()


def test_no_sample_at_all(mixture):
    result = sample(mixture_chain(mixture, samples=0, steps=10))
    assert result.images.shape == (0, 3)
    assert result.solution.nfev == 0


@pytest.mark.parametrize("variance_type", ["fixed_small", "learned"])
def test_a_network_is_not_called_for_no_sample(variance_type):
    def network(x, t):
        return x.reshape(len(x), -1, 3)  # which raises for an empty batch

    transitions = Transitions.of(LINEAR, LINEAR.timesteps(4), eta=1.0, variance_type=variance_type)
    chain = SamplingChain(network, torch.zeros(0, 2, 3), transitions, noise=torch.zeros(0, 4, 2, 3))
    assert chain.sequential().shape == chain(chain.z0).shape == (0, 4, 2, 3)
    for solver in (fixpoint.CausalQuasiNewton(), fixpoint.Picard()):
        assert sample(chain, solver=solver).images.shape == (0, 2, 3)
    assert (chain.rounds, chain.evals) == (0, 0)
