"""Chains of Euler, flow matching, EDM, Heun, DPM-Solver++ and UniPC: parallel solves, priors, refusals."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

import fixpoint
from fixpoint_diffusion import GaussianPrior, SamplingChain, sample
from fixpoint_diffusion.chains import MultistepChain, chain_from_scheduler
from fixpoint_diffusion.inversion import invert
from fixpoint_diffusion.processes import SERVED, SamplerConfig, solver_transitions, with_timesteps

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

X_T = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
SAMPLE = {"prediction_type": "sample"}
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "flow": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    "flow with noise": ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}),
    "Euler": ("EulerDiscreteScheduler", SAMPLE | {"use_karras_sigmas": True}),
    "ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "EDM": ("EDMEulerScheduler", {}),
    "EDM, v": ("EDMEulerScheduler", {"prediction_type": "v_prediction", "sigma_data": 0.3}),
    "Heun": ("HeunDiscreteScheduler", SAMPLE),
    "2M": ("DPMSolverMultistepScheduler", SAMPLE),
    "3M": ("DPMSolverMultistepScheduler", SAMPLE | {"solver_order": 3}),
    "2M with noise": ("DPMSolverMultistepScheduler", SAMPLE | {"algorithm_type": "sde-dpmsolver++"}),
    "2M along a flow": ("DPMSolverMultistepScheduler", FLOW),
    "UniPC": ("UniPCMultistepScheduler", SAMPLE),
    "UniPC 3 along a flow": ("UniPCMultistepScheduler", FLOW | {"solver_order": 3}),
}
every = pytest.mark.parametrize("kind", SCHEDULERS)


def scheduler_of(kind: str) -> Any:
    name, options = SCHEDULERS[kind]
    return getattr(diffusers, name)(**options)


class Exact:
    """What a network would answer for data of ``N(mean, covariance)``, by Gaussian conditioning, in diffusers' terms.

    What a timestep stands for is looked up in the scheduler's own table.
    """

    def __init__(self, scheduler: Any, prior: GaussianPrior) -> None:
        self.prior, self.config, self.name = prior, scheduler.config, type(scheduler).__name__
        self.times, self.sigmas = scheduler.timesteps.double(), scheduler.sigmas.double()
        assert isinstance(prior.basis, Tensor)
        self.covariance = prior.basis @ torch.diag(prior.variances) @ prior.basis.T

    def __call__(self, seen: Tensor, t: Tensor) -> Tensor:
        x = seen.flatten(1).double()
        sigma = self.sigmas[(t.double()[:, None] - self.times).abs().argmin(dim=1)][:, None]
        flow = self.name.startswith("Flow") or self.config.get("use_flow_sigmas")
        signal = 1 - sigma if flow else torch.ones_like(sigma)
        data = self.config.get("sigma_data", 1.0)
        if not flow:  # Euler's latents are 1 / c times as large as what networks see
            x = x * (sigma**2 + data**2).sqrt()
        spread = signal[..., None] ** 2 * self.covariance + sigma[..., None] ** 2 * torch.eye(12, dtype=torch.float64)
        offset = torch.linalg.solve(spread, (x - signal * self.prior.mean)[..., None])
        image = self.prior.mean + signal * (self.covariance @ offset)[..., 0]
        if self.name.startswith("EDM"):
            skip, size = data**2 / (sigma**2 + data**2), sigma * data / (sigma**2 + data**2).sqrt()
            out = (image - skip * x) / size * (1 if self.config["prediction_type"] == "epsilon" else -1)
        else:
            out = image if self.config.get("prediction_type") == "sample" else (x - image) / sigma
        return out.reshape(seen.shape).to(seen.dtype)


@pytest.fixture(scope="module")
def prior() -> GaussianPrior:
    """Of correlated data with variances from 0.01 to 1 or so."""
    drawn = torch.randn(500, 12, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    mixing = torch.randn(12, 12, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return GaussianPrior.of((drawn * torch.linspace(0.1, 1, 12)) @ torch.linalg.qr(mixing)[0] + 0.3, shrinkage=0.0)


def exact_chain(kind: str, prior: GaussianPrior, steps: int = 12) -> SamplingChain:
    scheduler = scheduler_of(kind)
    scheduler.set_timesteps(steps)
    return chain_from_scheduler(Exact(scheduler, prior), X_T, scheduler, steps=None)


@every
def test_gaussian_data_take_two_rounds(kind: str, prior: GaussianPrior) -> None:
    """The prior's path is then the sampler's own."""
    chain = exact_chain(kind, prior)
    expected = chain.sequential()
    torch.testing.assert_close(chain.trajectory(chain.guess), expected, rtol=1e-5, atol=1e-5)
    solution = fixpoint.solve(chain, chain.guess, solver=fixpoint.CausalQuasiNewton(), rtol=1e-6, backward=None)
    assert solution.nfev <= 2
    torch.testing.assert_close(chain.trajectory(solution.value), expected, rtol=1e-5, atol=1e-6)


@every
def test_slopes_are_the_jacobians_diagonal_and_the_first_part_of_a_state_is_by_itself(
    kind: str, prior: GaussianPrior
) -> None:
    chain = exact_chain(kind, prior)
    k, one = torch.tensor([5]), torch.zeros(1, dtype=torch.int64)
    states = chain.z0
    for _ in range(6):
        states = chain(states)
    state = states[0, 4]
    jacobian = torch.autograd.functional.jacobian(lambda x: chain.transition(x[None], one, k)[0], state)
    basis = chain.basis if isinstance(chain, MultistepChain) else chain.prior.basis
    assert isinstance(basis, Tensor)
    found = basis.T @ jacobian.reshape(state.numel(), -1) @ basis
    torch.testing.assert_close(found.diagonal(), chain.slopes[5], rtol=1e-6, atol=1e-7)
    size = X_T[0].numel()
    found = found - torch.diag(found.diagonal())
    for beside in (found[:size], found[:, :size]):
        torch.testing.assert_close(beside, torch.zeros_like(beside), rtol=0, atol=1e-7)


def far_from_gaussian(x: Tensor, t: Tensor) -> Tensor:
    """Two kinds of data, at 1 and -1, as far as a bounded network can tell."""
    return torch.tanh(2 * x.roll(1, dims=1) + x) * (1 - (t.to(x) / 4000)).reshape(-1, 1, 1)


@every
@pytest.mark.parametrize(
    "solver", [fixpoint.CausalQuasiNewton(), fixpoint.CausalQuasiNewton(window=5), fixpoint.Picard()]
)
def test_parallel_is_sequential(kind: str, solver: fixpoint.Solver) -> None:
    chain = chain_from_scheduler(far_from_gaussian, X_T, scheduler_of(kind), steps=12)
    expected = chain.sequential()
    chain.reset_counters()
    result = sample(chain, solver=solver, rtol=1e-8)
    assert bool(result.solution.converged.all())
    error = (result.trajectory - expected).flatten(2).norm(dim=2) / expected.flatten(2).norm(dim=2)
    assert float(error.max()) <= 1e-7
    assert result.images.shape == X_T.shape
    assert result.rounds == chain.rounds


def test_a_prior_in_factors_serves_steps_that_look_back() -> None:
    """As priors of large images are: a matrix for each dimension."""
    images = torch.randn(200, 3, 4, generator=torch.Generator().manual_seed(4), dtype=torch.float64).cumsum(dim=2)
    axes = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64))[0]
    waves = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(6), dtype=torch.float64))[0]
    along = torch.einsum("nij,ia,jb->nab", images, axes, waves).flatten(1)
    factored = GaussianPrior(images.flatten(1).mean(dim=0), along.var(dim=0), (axes, waves))
    whole = GaussianPrior(factored.mean, factored.variances, torch.kron(axes, waves))
    found = []
    for one in (factored, whole):
        denoiser = Exact(with_timesteps(scheduler_of("UniPC"), 9), whole)
        denoiser.prior = one
        chain = chain_from_scheduler(denoiser, X_T, scheduler_of("UniPC"), steps=9)
        denoiser.prior = whole
        found.append(sample(chain, rtol=1e-6).trajectory)
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)


def test_gradients_pass_through_steps_that_look_back() -> None:
    x_T = X_T.clone().requires_grad_()
    chain = chain_from_scheduler(far_from_gaussian, x_T, scheduler_of("2M"), steps=6)
    (expected,) = torch.autograd.grad(chain.sequential()[:, -1].square().sum(), x_T, retain_graph=True)
    solution = fixpoint.solve(chain, solver=fixpoint.CausalQuasiNewton(), rtol=1e-10)
    (found,) = torch.autograd.grad(chain.trajectory(solution.value)[:, -1].square().sum(), x_T)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_half_precision_latents_keep_their_dtype() -> None:
    chain = chain_from_scheduler(far_from_gaussian, X_T.bfloat16(), scheduler_of("flow"), steps=6)
    assert chain.sequential().dtype == torch.bfloat16


def test_a_flow_is_inverted_as_ddim_is(prior: GaussianPrior) -> None:
    chain = exact_chain("flow", prior, steps=8)
    x_0 = chain.sequential()[:, -1]
    torch.testing.assert_close(invert(chain, x_0, rtol=1e-6).x_T, chain.x_T, rtol=1e-3, atol=1e-3)


# What is read


def test_a_configuration_a_folder_and_a_scheduler_are_one(tmp_path: Path) -> None:
    scheduler = diffusers.EulerDiscreteScheduler(use_karras_sigmas=True, timestep_spacing="leading")
    scheduler.save_pretrained(tmp_path)
    sources = (scheduler, scheduler.config, tmp_path, json.loads((tmp_path / "scheduler_config.json").read_text()))
    chains = [chain_from_scheduler(far_from_gaussian, X_T, source, steps=5) for source in sources]
    for chain in chains[1:]:
        assert torch.equal(chain.sequential(), chains[0].sequential())
    assert scheduler.num_inference_steps is None  # as it was


def test_noise_gets_the_size_that_the_scheduler_starts_at() -> None:
    scheduler = diffusers.EulerDiscreteScheduler()
    chain = chain_from_scheduler(far_from_gaussian, X_T, scheduler, steps=5)
    scheduler.set_timesteps(5)
    first = float(scheduler.init_noise_sigma) / float(chain.transitions.scales[0])
    torch.testing.assert_close(chain.x_T, first * X_T)
    assert 0.99 < first < 1


def test_the_denoiser_says_what_it_predicts_but_along_a_flow_the_scheduler_does() -> None:
    class Predicts:
        prediction_type = "v_prediction"

        def __call__(self, x: Tensor, t: Tensor) -> Tensor:
            return x

    def kind(name: str) -> str:
        return chain_from_scheduler(Predicts(), X_T, scheduler_of(name), steps=3).transitions.prediction_type

    assert kind("Euler") == "v_prediction"
    assert kind("flow") == kind("2M along a flow") == "flow_prediction"
    assert kind("EDM") == "epsilon"


# Refusals


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "FlowMatchEulerDiscreteScheduler",
            {"invert_sigmas": True},
            "invert_sigmas=True cannot be honoured; expected Fal",
        ),
        ("EulerDiscreteScheduler", {"interpolation_type": "log_linear"}, "interpolation_type='log_linear' cannot be"),
        ("EulerAncestralDiscreteScheduler", SAMPLE, "prediction_type='sample' cannot be honoured; expected 'epsilon'"),
        (
            "DPMSolverMultistepScheduler",
            {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"},
            "'dpmsolver'",
        ),
        ("DPMSolverMultistepScheduler", {"solver_order": 4}, "solver_order=4"),
        ("DPMSolverMultistepScheduler", {"use_flow_sigmas": True, "prediction_type": "v_prediction"}, "'v_prediction'"),
        (
            "DPMSolverMultistepScheduler",
            {"prediction_type": "flow_prediction"},
            "prediction_type='flow_prediction' cannot be honoured; expected another one, or use_flow_sigmas=True",
        ),
        ("UniPCMultistepScheduler", {"prediction_type": "flow_prediction"}, "or use_flow_sigmas=True with it"),
        ("UniPCMultistepScheduler", {"predict_x0": False}, "predict_x0=False"),
        ("UniPCMultistepScheduler", {"solver_p": diffusers.DDIMScheduler()}, "solver_p=DDIMScheduler"),
    ],
)
def test_values_that_are_not_served_are_refused_by_name(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        chain_from_scheduler(far_from_gaussian, X_T, getattr(diffusers, name)(**options), steps=5)
    assert str(caught.value).startswith(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"_class_name": "EulerDiscreteScheduler", "snr_warp": 2.0}, "keys that no known scheduler has.*snr_warp=2.0"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shifts": 3.0}, "keys that no known scheduler.*shifts=3.0"),
        (
            {"_class_name": "EDMEulerScheduler", "num_train_timesteps": "many"},
            "diffusers makes no EDMEulerScheduler of",
        ),
        ({"_class_name": "EulerDiscreteScheduler", "beta_schedule": "x"}, "diffusers makes no EulerDiscreteScheduler"),
    ],
)
def test_configurations_that_say_what_nobody_knows_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        chain_from_scheduler(far_from_gaussian, X_T, config, steps=5)
    known = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 2.0, "_diffusers_version": "0.30.0"}
    assert chain_from_scheduler(far_from_gaussian, X_T, known, steps=5).steps == 5


@pytest.mark.parametrize("name", ["PNDMScheduler", "LMSDiscreteScheduler", "KDPM2DiscreteScheduler"])
def test_solvers_that_are_not_served_are_refused_but_ddim_on_their_process_is_not(name: str) -> None:
    scheduler = getattr(diffusers, name)()
    with pytest.raises(ValueError, match=f"the steps of {name} are not served; those of DDIM, DDPM and FlowMatchEuler"):
        chain_from_scheduler(far_from_gaussian, X_T, scheduler, steps=5)
    chain = chain_from_scheduler(far_from_gaussian, X_T, SamplerConfig.from_diffusers(scheduler), steps=5)
    assert type(chain) is SamplingChain


def test_options_without_a_meaning_are_refused() -> None:
    flow = scheduler_of("flow")
    with pytest.raises(ValueError, match=r"eta is for DDIM and DDPM schedulers, got eta=0\.5 for FlowMatch"):
        chain_from_scheduler(far_from_gaussian, X_T, flow, steps=5, eta=0.5)
    with pytest.raises(ValueError, match="EulerDiscreteScheduler has no timesteps yet"):
        chain_from_scheduler(far_from_gaussian, X_T, diffusers.EulerDiscreteScheduler(), steps=None)
    with pytest.raises(ValueError, match="steps=None needs a scheduler whose set_timesteps was called"):
        chain_from_scheduler(far_from_gaussian, X_T, {"_class_name": "EulerDiscreteScheduler"}, steps=None)
    with pytest.raises(ValueError, match="steps=None is for schedulers with a set_timesteps of their own"):
        chain_from_scheduler(far_from_gaussian, X_T, diffusers.DDIMScheduler(), steps=None)
    with pytest.raises(ValueError, match="the steps of LCMScheduler are not served"):
        solver_transitions(diffusers.LCMScheduler())


def test_steps_that_look_back_need_a_chain_that_does() -> None:
    transitions = solver_transitions(with_timesteps(scheduler_of("2M"), 5))
    with pytest.raises(ValueError, match="these steps look back at earlier predictions: MultistepChain takes them"):
        SamplingChain(far_from_gaussian, X_T, transitions).sequential()
    chain = MultistepChain(far_from_gaussian, X_T, transitions)
    with pytest.raises(ValueError, match="look back at earlier predictions cannot be inverted"):
        invert(chain, X_T)


def test_every_class_that_is_served_is_tried_here() -> None:
    assert {name for name, _ in SCHEDULERS.values()} == SERVED.keys()


def test_the_table_in_the_docs_is_what_the_code_serves() -> None:
    file = Path(__file__).parents[2] / "docs" / "make_tables.py"
    tables = runpy.run_path(str(file))
    page = tables["PAGE"].read_text()
    assert tables["replaced"](page) == page
    assert all(f"| `{name}` | {served.steps} |" in page for name, served in SERVED.items())
