"""Euler, flow matching, EDM, Heun, DPM-Solver++ and UniPC: the steps of diffusers' own loops; and what is refused.

The loops run in float64: where diffusers casts to float32, it is told that float32 is float64. The tables of sigmas are
those that it made in float32.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, reject, settings
from hypothesis import strategies as st
from torch import Tensor

from fixpoint_diffusion import SamplingChain
from fixpoint_diffusion.chains import MultistepChain, chain_from_scheduler
from fixpoint_diffusion.processes import solver_transitions

# Schedulers of diffusers use what newer versions of NumPy deprecate, and deprecated values of their own.
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:invalid value:RuntimeWarning"
)

X_T = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
MIX = torch.randn(12, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64) / 4


def network(x: Tensor, t: Tensor) -> Tensor:
    """Random, nonlinear, and of bounded output, for samples ``(3, 4)``."""
    time = torch.stack([torch.sin(t.double() / 300), torch.cos(t.double() / 700)], dim=1)
    hidden = torch.tanh(x.double().flatten(1) @ MIX + time.repeat(1, 6))
    return (hidden @ MIX).reshape(x.shape).to(x.dtype)


class _Float64:
    """A module whose float32 is float64."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, "float64" if name == "float32" else name)


def diffusers_loop(
    scheduler: Any, noise: Tensor | None, denoiser: Callable[..., Tensor] = network, first: int = 0
) -> Tensor:
    """All latents of diffusers' own loop from ``X_T``, at its step ``first``, in float64: ``(B, T, 3, 4)``."""
    module = sys.modules[type(scheduler).__module__]
    latents, drawn = [], iter(() if noise is None else noise.unbind(1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "torch", _Float64(torch))
        if hasattr(module, "randn_tensor"):
            patch.setattr(module, "randn_tensor", lambda *args, **options: next(drawn, torch.zeros_like(X_T)))
        x = X_T * float(getattr(scheduler, "init_noise_sigma", 1.0))
        scheduler.sigmas = scheduler.sigmas.double()
        scheduler.set_begin_index(first)  # as pipelines do: timesteps may repeat
        for t in scheduler.timesteps[first:]:
            seen = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
            x = scheduler.step(denoiser(seen, t.expand(len(x))), t, x).prev_sample
            latents.append(x)
    return torch.stack(latents, dim=1)


def assert_steps_are_those_of(name: str, steps: int, **options: Any) -> SamplingChain:
    """The chain's sequential run and its one-step form against diffusers' loop with the same noise."""
    scheduler = getattr(diffusers, name)(**options)
    scheduler.set_timesteps(steps)
    if not bool(diffusers_loop(scheduler, None).isfinite().all()):
        with pytest.raises(ValueError, match=f"{name} makes coefficients that are not finite"):
            chain_from_scheduler(network, X_T, scheduler, steps=steps)
        reject()
    chain = chain_from_scheduler(network, X_T, scheduler, steps=steps, seed=3)
    scheduler.set_timesteps(steps)
    expected = diffusers_loop(scheduler, chain.noise)
    assert torch.equal(chain.timesteps, scheduler.timesteps)
    found = chain.sequential()
    scales = torch.ones(chain.steps + 1) if chain.transitions.scales is None else chain.transitions.scales
    size = expected.abs().max()
    torch.testing.assert_close(found * scales[1:].reshape(-1, 1, 1) / size, expected / size, rtol=0, atol=1e-10)
    states = chain.z0
    for _ in range(chain.steps):
        states = chain(states)
    torch.testing.assert_close(chain.trajectory(states) / size, found / size, rtol=0, atol=1e-9)
    return chain


TABLES: list[dict[str, Any]] = [
    {},
    {"use_karras_sigmas": True},
    {"use_exponential_sigmas": True},
    {"use_beta_sigmas": True},
]
PROCESSES: list[dict[str, Any]] = [
    {},
    {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    {"beta_schedule": "squaredcos_cap_v2"},
    {"trained_betas": np.linspace(0.001, 0.03, 80).tolist(), "num_train_timesteps": 80},
]
SPACINGS = [
    {"timestep_spacing": "linspace"},
    {"timestep_spacing": "trailing"},
    {"timestep_spacing": "leading", "steps_offset": 1},
]
BETAS = st.sampled_from(["epsilon", "v_prediction", "sample"])
COUNTS = st.integers(1, 21)
tried = settings(
    max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None
)


def merged(*parts: Any) -> st.SearchStrategy[dict[str, Any]]:
    """One choice of each list of options, put together."""
    return st.tuples(*(st.sampled_from(part) for part in parts)).map(
        lambda chosen: {k: v for p in chosen for k, v in p.items()}
    )


@tried
@given(
    merged(
        TABLES,
        [{}, {"shift": 3.0}, {"shift": 0.5}],
        [{}, {"stochastic_sampling": True}],
        [{}, {"shift_terminal": 0.1}],
        [{}, {"num_train_timesteps": 50}],
    ),
    COUNTS,
)
def test_flow_matching(options: dict[str, Any], steps: int) -> None:
    chain = assert_steps_are_those_of("FlowMatchEulerDiscreteScheduler", steps, **options)
    assert (chain.noise is not None) == bool(options.get("stochastic_sampling") and steps > 1)


@pytest.mark.parametrize("shift_type", ["exponential", "linear"])
def test_flow_matching_with_a_shift_by_resolution(shift_type: str) -> None:
    """As FLUX's pipeline does: its own sigmas, and a shift that depends on the size of the image."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type=shift_type)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / 9, 9), mu=0.9)
    chain = chain_from_scheduler(network, X_T, scheduler, steps=None)
    found = chain.sequential() * chain.transitions.scales[1:].reshape(-1, 1, 1)
    torch.testing.assert_close(found, diffusers_loop(scheduler, None), rtol=0, atol=1e-10)
    with pytest.raises(ValueError, match=r"FlowMatchEulerDiscreteScheduler: `mu` must be passed.*pass steps=None"):
        chain_from_scheduler(network, X_T, scheduler, steps=9)


@tried
@given(
    merged(
        TABLES,
        PROCESSES,
        SPACINGS,
        [{}, {"final_sigmas_type": "sigma_min"}, {"rescale_betas_zero_snr": True}],
        [{}, {"sigma_min": 0.05, "sigma_max": 30.0}],
        [{}, {"timestep_type": "continuous"}],
    ),
    BETAS,
    COUNTS,
)
def test_euler(options: dict[str, Any], kind: str, steps: int) -> None:
    assert_steps_are_those_of("EulerDiscreteScheduler", steps, prediction_type=kind, **options)


@tried
@given(merged(PROCESSES, SPACINGS, [{}, {"rescale_betas_zero_snr": True}]), BETAS, COUNTS)
def test_ancestral_euler(options: dict[str, Any], kind: str, steps: int) -> None:
    assume(kind != "sample")
    chain = assert_steps_are_those_of("EulerAncestralDiscreteScheduler", steps, prediction_type=kind, **options)
    assert (chain.noise is not None) == (steps > 1)


@tried
@given(
    merged(
        [{}, {"sigma_schedule": "exponential"}],
        [{}, {"sigma_data": 1.0}, {"sigma_data": 0.2, "sigma_max": 20.0}],
        [{}, {"final_sigmas_type": "sigma_min"}, {"rho": 3.0}],
        [{}, {"prediction_type": "v_prediction"}],
    ),
    COUNTS,
)
def test_edm(options: dict[str, Any], steps: int) -> None:
    assert_steps_are_those_of("EDMEulerScheduler", steps, **options)


@tried
@given(
    merged(TABLES, PROCESSES, SPACINGS, [{}, {"clip_sample": True}, {"clip_sample": True, "clip_sample_range": 0.5}]),
    BETAS,
    st.integers(1, 12),
)
def test_heun(options: dict[str, Any], kind: str, steps: int) -> None:
    chain = assert_steps_are_those_of("HeunDiscreteScheduler", steps, prediction_type=kind, **options)
    assert chain.steps == 2 * steps - 1


THRESHOLDS = [{}, {"thresholding": True, "dynamic_thresholding_ratio": 0.8, "sample_max_value": 1.7}]
LAST = [{}, {"final_sigmas_type": "sigma_min"}]
DPM_TABLES = [*TABLES, {"use_lu_lambdas": True}, {"lambda_min_clipped": -3.0}, {"rescale_betas_zero_snr": True}]
FLOWS = [{"use_flow_sigmas": True, "flow_shift": shift, "prediction_type": "flow_prediction"} for shift in (1.0, 3.0)]


@tried
@given(
    merged(
        [{"solver_order": order} for order in (1, 2, 3)],
        [{}, {"algorithm_type": "sde-dpmsolver++"}],
        [{}, {"solver_type": "heun"}],
        [{}, {"lower_order_final": False}, {"euler_at_final": True}],
        THRESHOLDS,
        LAST,
    ),
    st.one_of(merged(DPM_TABLES, PROCESSES, SPACINGS), st.sampled_from(FLOWS)),
    BETAS,
    COUNTS,
)
def test_dpm_solver(options: dict[str, Any], process: dict[str, Any], kind: str, steps: int) -> None:
    options = {"prediction_type": kind} | options | process
    chain = assert_steps_are_those_of("DPMSolverMultistepScheduler", steps, **options)
    assert isinstance(chain, MultistepChain) == (options["solver_order"] > 1)


@tried
@given(
    merged(
        [{"solver_order": order} for order in (1, 2, 3)],
        [{}, {"solver_type": "bh1"}],
        [{}, {"disable_corrector": [0, 1, 4]}],
        [{}, {"lower_order_final": False}],
        THRESHOLDS,
        LAST,
    ),
    st.one_of(
        merged([*TABLES, {"rescale_betas_zero_snr": True}], PROCESSES, SPACINGS),
        merged(FLOWS, [{}, {"shift_terminal": 0.2}, {"use_karras_sigmas": True}]),
    ),
    BETAS,
    COUNTS,
)
def test_unipc(options: dict[str, Any], process: dict[str, Any], kind: str, steps: int) -> None:
    options = {"prediction_type": kind} | options | process
    assume("final_sigmas_type" in options or ("lower_order_final" not in options and "solver_type" not in options))
    assert_steps_are_those_of("UniPCMultistepScheduler", steps, **options)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("FlowMatchEulerDiscreteScheduler", {}),
        ("EulerDiscreteScheduler", {}),
        ("HeunDiscreteScheduler", {}),
        ("DPMSolverMultistepScheduler", {"solver_order": 3}),
        ("DPMSolverMultistepScheduler", {"solver_order": 3, "algorithm_type": "sde-dpmsolver++"}),
        ("UniPCMultistepScheduler", {"solver_order": 3}),
    ],
)
@pytest.mark.parametrize(("first", "last"), [(4, 12), (2, 10)])
def test_a_part_of_the_steps_is_that_of_a_loop_that_begins_there(
    name: str, options: dict[str, Any], first: int, last: int
) -> None:
    scheduler = getattr(diffusers, name)(**options)
    scheduler.set_timesteps(12)
    transitions = solver_transitions(scheduler, part=slice(first, last))
    scales = torch.ones(transitions.steps + 1) if transitions.scales is None else transitions.scales
    noise = torch.randn(2, transitions.steps, 3, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    kind = SamplingChain if transitions.history is None else MultistepChain
    x = X_T * float(getattr(scheduler, "init_noise_sigma", 1.0)) / scales[0]
    found = kind(network, x, transitions, noise=noise).sequential() * scales[1:].reshape(-1, 1, 1)
    expected = diffusers_loop(scheduler, noise, first=first)[:, : last - first]
    torch.testing.assert_close(found / expected.abs().max(), expected / expected.abs().max(), rtol=0, atol=1e-10)
