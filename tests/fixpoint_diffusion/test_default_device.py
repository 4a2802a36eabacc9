"""A default device other than the model's: nothing that sampling and inversion make for themselves lands there."""

from __future__ import annotations

from collections.abc import Iterator

import diffusers
import pytest
import torch

from fixpoint import CausalQuasiNewton
from fixpoint_diffusion import (
    FPDM,
    DDIMChain,
    FPDMConfig,
    GaussianPrior,
    NoiseSchedule,
    StochasticDDIMChain,
    embedded,
    initial_noise,
    invert,
    sample,
    sample_fpdm,
)
from fixpoint_diffusion.chains import chain_from_scheduler

DENOISER = embedded("ddpm-digits")
X_T = initial_noise(seed=0, samples=range(2), shape=(1, 8, 8))


@pytest.fixture(autouse=True)
def default_device() -> Iterator[None]:
    """A device whose tensors hold nothing: whatever lands there is lost."""
    with torch.device("meta"):
        yield


def test_noise_is_on_the_host() -> None:
    assert torch.equal(initial_noise(seed=0, samples=range(2), shape=(1, 8, 8)), X_T)


def test_sampling_and_inversion() -> None:
    schedule = NoiseSchedule.linear()
    chain = DDIMChain(DENOISER, X_T, schedule, steps=8)
    found = sample(chain, solver=CausalQuasiNewton(), init="prior")
    torch.testing.assert_close(found.images, chain.sequential()[:, -1], rtol=0, atol=1e-2)
    assert invert(chain, found.images, rtol=1e-2).converged.all()
    noisy = StochasticDDIMChain(DENOISER, X_T, schedule, steps=8, eta=1.0, seed=3)
    torch.testing.assert_close(sample(noisy).images, noisy.sequential()[:, -1], rtol=0, atol=1e-2)


@pytest.mark.parametrize("schedule", [NoiseSchedule.cosine, NoiseSchedule.scaled_linear])
def test_schedules_and_priors(schedule: type[NoiseSchedule]) -> None:
    assert schedule(steps=20).zero_terminal_snr().alphas_cumprod.isfinite().all()
    images = torch.rand(20, 1, 8, 8, device="cpu")
    assert GaussianPrior.of(images).variances.device.type == "cpu"


@pytest.mark.parametrize(
    "name",
    ["EulerDiscreteScheduler", "HeunDiscreteScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"],
)
def test_schedulers(name: str) -> None:
    with torch.device("cpu"):
        scheduler = getattr(diffusers, name)()
    chain = chain_from_scheduler(DENOISER, X_T, scheduler, steps=5)
    torch.testing.assert_close(sample(chain).images, chain.sequential()[:, -1], rtol=0, atol=1e-2)


def test_fpdm() -> None:
    with torch.device("cpu"):
        model = FPDM(FPDMConfig(in_channels=1, sample_size=8, width=16, heads=2)).eval().requires_grad_(False)
    found = sample_fpdm(model, X_T, NoiseSchedule.linear(), steps=4, iterations=3)
    assert found.images.isfinite().all()
