"""The chains: four denoisers, one sample each, with the same noise for every method."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from fixpoint_diffusion import DDIMChain, NoiseSchedule, StochasticDDIMChain, embedded, initial_noise
from fixpoint_diffusion.training.data import load_digits

SHAPE = (1, 8, 8)
DENOISERS = ("unet", "fpdm", "gaussian", "mixture")
ETAS = (0.0, 0.5, 1.0)


@dataclass(frozen=True)
class Setting:
    """A chain of ``steps`` steps: how many samples ours is tried on, and the peers, which cost more."""

    denoiser: str
    steps: int
    eta: float
    samples: int
    peer_samples: int

    @property
    def name(self) -> str:
        """For tables."""
        return f"{self.denoiser} T={self.steps} eta={self.eta:g}"


_OURS = 16
# Samples of the peers, which take many rows where T is large.
_PEERS = {
    "unet": {25: 16, 50: 8, 100: 4, 200: 1, 1000: 1},
    "fpdm": {25: 4, 50: 1, 100: 0, 1000: 0},
    "gaussian": {25: 16, 50: 16, 100: 16, 1000: 1},
    "mixture": {25: 16, 50: 16, 100: 16, 1000: 1},
}
FULL = tuple(
    Setting(denoiser, steps, eta, _OURS, peers)
    for denoiser, sizes in _PEERS.items()
    for steps, peers in sizes.items()
    for eta in ETAS
)
QUICK = (Setting("unet", 6, 1.0, 1, 1), *(Setting("mixture", 12, eta, 2, 1) for eta in ETAS))


def chain(setting: Setting, sample: int) -> DDIMChain:
    """The chain of one sample; a function of the setting and the sample's number alone."""
    return batch(setting.denoiser, setting.steps, setting.eta, range(sample, sample + 1))


def batch(denoiser: str, steps: int, eta: float, samples: range) -> DDIMChain:
    """The chain of several samples."""
    schedule = NoiseSchedule.linear()
    x_T = initial_noise(0, samples, SHAPE)
    if eta == 0:
        return DDIMChain(_denoiser(denoiser), x_T, schedule, steps=steps)
    return StochasticDDIMChain(
        _denoiser(denoiser), x_T, schedule, steps=steps, eta=eta, seed=0, first_sample=samples.start
    )


@cache
def _denoiser(name: str) -> Callable[[Tensor, Tensor], Tensor]:
    if name in ("unet", "fpdm"):
        return embedded("ddpm-digits" if name == "unet" else "fpdm-digits")
    digits = load_digits()
    assert digits.labels is not None
    labels = digits.labels if name == "mixture" else torch.zeros_like(digits.labels)
    return MixtureDenoiser(digits.images, labels, NoiseSchedule.linear())


class MixtureDenoiser:
    """The exact denoiser of a mixture of Gaussians, one a label, with the covariance that is left within labels.

    With one label it is that of a Gaussian. Our solver is not told about it: it keeps its plain prior.
    """

    prediction_type = "epsilon"

    def __init__(self, images: Tensor, labels: Tensor, schedule: NoiseSchedule) -> None:
        flat = images.flatten(1).double()
        means = torch.stack([flat[labels == label].mean(dim=0) for label in labels.unique()])
        variances, self._basis = torch.linalg.eigh(torch.cov((flat - means[labels - labels.min()]).T))
        self._variances = variances.clamp(min=1e-3)
        self._means = means @ self._basis
        self._shares = labels.unique(return_counts=True)[1] / len(labels)
        self._alphas = schedule.alphas_cumprod

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        a = self._alphas[t, None]
        rows = x.flatten(1).double() @ self._basis
        spread = a * self._variances + 1 - a
        offsets = rows[:, None] - a.sqrt()[..., None] * self._means
        weights = (self._shares.log() - (offsets.square() / spread[:, None]).sum(dim=2) / 2).softmax(dim=1)
        posterior = self._means + (a.sqrt() * self._variances / spread)[:, None] * offsets
        x_0 = (weights[..., None] * posterior).sum(dim=1)
        eps = (rows - a.sqrt() * x_0) / (1 - a).sqrt() @ self._basis.T
        return eps.to(x.dtype).reshape(x.shape)
