"""The chains that are inverted, the images, and a guided denoiser."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from benchmarks.chains.cases import SHAPE, MixtureDenoiser
from fixpoint_diffusion import DDIMChain, NoiseSchedule, StochasticDDIMChain, embedded, initial_noise
from fixpoint_diffusion.denoisers import NetworkDenoiser
from fixpoint_diffusion.training.data import load_digits, split_held_out

# Rows in one call of the network: more of them are no faster on a CPU.
_MAX_ROWS = 256


@dataclass(frozen=True)
class Setting:
    """Which chain: its steps, eta, the scale of its guidance, and whose ``model`` it is: ``unet`` or ``mixture``."""

    steps: int
    eta: float = 0.0
    guidance: float = 1.0
    model: str = "unet"

    @property
    def name(self) -> str:
        """For tables."""
        parts = [f"T={self.steps}"]
        parts += [f"eta={self.eta:g}"] if self.eta else []
        parts += [f"guidance {self.guidance:g}"] if self.guidance != 1 else []
        parts += [self.model] if self.model != "unet" else []
        return " ".join(parts)


def held_out(count: int) -> tuple[Tensor, Tensor]:
    """The first real digits that the network was not trained on, and their labels."""
    digits = split_held_out(load_digits())[1]
    assert digits.labels is not None
    return digits.images[:count], digits.labels[:count]


def chain(
    setting: Setting, like: Tensor, labels: Tensor | None = None, *, seed: int = 0, noise: Tensor | None = None
) -> DDIMChain:
    """The chain of as many samples as ``like`` has, in its dtype; ``noise`` instead of the seed's."""
    schedule = NoiseSchedule.from_diffusers(network(like.dtype).schedule_config or {})
    denoiser = network(like.dtype) if setting.model == "unet" and setting.guidance == 1 else Toward(setting, like.dtype)
    options = {"steps": setting.steps, "max_rows": _MAX_ROWS}
    if isinstance(denoiser, Toward):
        options["conditioning"] = {"label": labels}
    if setting.eta == 0:
        return DDIMChain(denoiser, torch.zeros_like(like), schedule, **options)
    return StochasticDDIMChain(
        denoiser, torch.zeros_like(like), schedule, eta=setting.eta, seed=seed, noise=noise, **options
    )


@torch.no_grad()
def generated(setting: Setting, count: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Digits that the sampler makes, and the noise that it makes them from."""
    x_T = initial_noise(0, range(count), SHAPE).to(dtype)
    sampler = chain(setting, x_T)
    sampler.x_T = x_T
    return sampler.sequential(trajectory=False), x_T


@cache
def network(dtype: torch.dtype = torch.float32) -> NetworkDenoiser:
    """The embedded U-Net."""
    return embedded("ddpm-digits", dtype=dtype)


class Toward:
    """A guided denoiser: ``eps + (scale - 1) (eps of a class - eps of all classes)``.

    No conditional network comes with the package. So the direction towards a class is that of a mixture of ten
    Gaussians, exactly, and eps is the U-Net's or, with ``model="mixture"``, the class's own.
    """

    def __init__(self, setting: Setting, dtype: torch.dtype) -> None:
        self.scale, self._model = setting.guidance, setting.model
        self._network, self._mixture = network(dtype), _mixture()
        if setting.model == "unet":
            self.prior = self._network.prior

    def __call__(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        """Predictions ``(N, *shape)`` for latents of that shape, towards the labels ``(N,)``."""
        of_class, of_all = self._mixture.both(x, t, label)
        base = of_class if self._model == "mixture" else self._network(x, t)
        return base + (self.scale - 1) * (of_class - of_all)


class _ClassMixture(MixtureDenoiser):
    """The exact denoiser of a mixture of Gaussians, and that of one of them."""

    def both(self, x: Tensor, t: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """What is predicted for a class, and for all of them."""
        a = self._alphas[t, None]
        rows = x.flatten(1).double() @ self._basis
        mean = self._means[label]
        spread = a * self._variances + 1 - a
        x_0 = mean + a.sqrt() * self._variances / spread * (rows - a.sqrt() * mean)
        eps = (rows - a.sqrt() * x_0) / (1 - a).sqrt() @ self._basis.T
        return eps.to(x.dtype).reshape(x.shape), self(x, t)


@cache
def _mixture() -> _ClassMixture:
    digits = load_digits()
    assert digits.labels is not None
    return _ClassMixture(digits.images, digits.labels, NoiseSchedule.linear())
