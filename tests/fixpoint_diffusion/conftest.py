"""Denoisers whose answers are known exactly, shared by the tests of chains and sampling."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from fixpoint_diffusion import NoiseSchedule


@dataclass(frozen=True, kw_only=True)
class MixtureDenoiser:
    """The best denoiser for data from a mixture of Gaussians, ``(modes, dim)`` means and one variance."""

    schedule: NoiseSchedule
    means: Tensor
    variance: float
    prediction_type: str = "epsilon"

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        a = self.schedule.alphas_cumprod.to(x.device)[t][:, None]
        rows, means = x.flatten(1).double(), self.means.to(x.device)
        spread = a * self.variance + 1 - a
        offsets = rows[:, None] - a.sqrt()[..., None] * means
        weights = torch.softmax(-offsets.square().sum(2) / (2 * spread), dim=1)
        posterior = means + (a.sqrt() * self.variance / spread)[..., None] * offsets
        x_0 = (weights[..., None] * posterior).sum(1)
        if self.prediction_type == "sample":
            out = x_0
        else:
            eps = (rows - a.sqrt() * x_0) / (1 - a).sqrt()
            out = eps if self.prediction_type == "epsilon" else a.sqrt() * eps - (1 - a).sqrt() * x_0
        return out.to(x.dtype).reshape(x.shape)


@pytest.fixture(scope="session")
def gaussian() -> Callable[..., MixtureDenoiser]:
    """One Gaussian: the denoiser is linear and whole chains have closed forms."""

    def make(schedule: NoiseSchedule, prediction_type: str = "epsilon") -> MixtureDenoiser:
        means = torch.tensor([[0.7, -0.4, 1.1]], dtype=torch.float64)
        return MixtureDenoiser(schedule=schedule, means=means, variance=0.3, prediction_type=prediction_type)

    return make


@pytest.fixture(scope="session")
def mixture() -> Callable[..., MixtureDenoiser]:
    """Three Gaussians: the denoiser is nonlinear, as that of images is."""

    def make(schedule: NoiseSchedule, prediction_type: str = "epsilon") -> MixtureDenoiser:
        means = torch.tensor([[1.0, -1.0, 0.5], [-1.0, 0.8, 0.0], [0.2, 1.2, -1.0]], dtype=torch.float64)
        return MixtureDenoiser(schedule=schedule, means=means, variance=0.05, prediction_type=prediction_type)

    return make
