"""Samplers that are made to be inverted: of DDIM's kind, but not DDIM. Each carries a pair of latents.

``pairs = forward(chain, pair)`` samples and ``pair = backward(chain, pair)`` goes back, exactly up to rounding. The
levels, timesteps and the denoiser are those of a chain without noise.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fixpoint_diffusion.chains import SamplingChain
from fixpoint_diffusion.processes import wide

Pair = tuple[Tensor, Tensor]


class CoupledSampler(Protocol):
    """A sampler that goes from a pair to a pair, and back."""

    def start(self, chain: SamplingChain, x: Tensor) -> Pair:
        """The pair to sample from, given x_T."""

    def end(self, chain: SamplingChain, x: Tensor) -> Pair:
        """The pair to go back from, given an image."""

    def forward(self, chain: SamplingChain, pair: Pair) -> Pair:
        """Sample. The image is the first of the two."""

    def backward(self, chain: SamplingChain, pair: Pair) -> Pair:
        """Go back. The noise is the first of the two."""


def _eps(chain: SamplingChain, x: Tensor, k: int) -> Tensor:
    samples = torch.arange(len(x), device=x.device)
    out = chain.denoise(x.to(chain.x_T.dtype), samples, torch.full_like(samples, k))
    return chain.transitions.predict(x, wide(out), k)[1]


def _ab(chain: SamplingChain, k: int) -> tuple[Tensor, Tensor]:
    """DDIM's step is ``a x + b eps(x)``."""
    transitions = chain.transitions
    a = (transitions.alphas_prev[k] / transitions.alphas[k]).sqrt()
    return a, transitions.direction[k] - a * (1 - transitions.alphas[k]).sqrt()


@dataclass(frozen=True, kw_only=True)
class EDICT:
    """Two coupled DDIM chains, each stepping with the noise that it sees in the other, then mixed. Two calls a step.

    Args:
        mixing: share of its own latent that each keeps.

    Source: Wallace, Gokul, Naik, "EDICT: Exact Diffusion Inversion via Coupled Transformations" (CVPR 2023).
    """

    mixing: float = 0.93

    def start(self, chain: SamplingChain, x: Tensor) -> Pair:
        """See :class:`CoupledSampler`."""
        return wide(x), wide(x)

    end = start

    def forward(self, chain: SamplingChain, pair: Pair) -> Pair:
        """See :class:`CoupledSampler`."""
        x, y = pair
        p = self.mixing
        for k in range(chain.steps):
            a, b = _ab(chain, k)
            x = a * x + b * _eps(chain, y, k)
            y = a * y + b * _eps(chain, x, k)
            x = p * x + (1 - p) * y
            y = p * y + (1 - p) * x
        return x, y

    def backward(self, chain: SamplingChain, pair: Pair) -> Pair:
        """See :class:`CoupledSampler`."""
        x, y = pair
        p = self.mixing
        for k in reversed(range(chain.steps)):
            a, b = _ab(chain, k)
            y = (y - (1 - p) * x) / p
            x = (x - (1 - p) * y) / p
            y = (y - b * _eps(chain, x, k)) / a
            x = (x - b * _eps(chain, y, k)) / a
        return x, y


@dataclass(frozen=True, kw_only=True)
class BDIA:
    """DDIM's step, corrected by a share of what DDIM's step backwards from here missed the last latent by.

    The pair is a latent and the one before it. One call a step.

    Args:
        share: gamma in the paper.

    Source: Zhang, Lewis, Kleijn, "Exact Diffusion Inversion via Bi-directional Integration Approximation" (ECCV 2024).
    """

    share: float = 1.0

    def start(self, chain: SamplingChain, x: Tensor) -> Pair:
        """See :class:`CoupledSampler`; the first step is DDIM's."""
        x = wide(x)
        a, b = _ab(chain, 0)
        return a * x + b * _eps(chain, x, 0), x

    def end(self, chain: SamplingChain, x: Tensor) -> Pair:
        """See :class:`CoupledSampler`; the latent before the image is plain DDIM inversion's."""
        a, b = _ab(chain, chain.steps - 1)
        x = wide(x)
        return x, (x - b * _eps(chain, x, chain.steps - 1)) / a

    def forward(self, chain: SamplingChain, pair: Pair) -> Pair:
        """See :class:`CoupledSampler`."""
        x, last = pair
        for k in range(1, chain.steps):
            ahead, back = self._both(chain, x, k)
            x, last = ahead + self.share * (last - back), x
        return x, last

    def backward(self, chain: SamplingChain, pair: Pair) -> Pair:
        """See :class:`CoupledSampler`; returns x_T first, and the latent after it."""
        following, x = pair
        for k in reversed(range(1, chain.steps)):
            ahead, back = self._both(chain, x, k)
            following, x = x, back + (following - ahead) / self.share
        return x, following

    @staticmethod
    def _both(chain: SamplingChain, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """DDIM's step from the latent before step k, and its step backwards from there."""
        eps, (a, b), (a_last, b_last) = _eps(chain, x, k), _ab(chain, k), _ab(chain, k - 1)
        return a * x + b * eps, (x - b_last * eps) / a_last


@dataclass(frozen=True, kw_only=True)
class Rex:
    """A reversible coupling of any explicit step, in the variables in which DDIM is Euler's method; two calls a step.

    With ``y = x / sqrt(a)``, ``s = sqrt((1 - a) / a)`` and Euler's increment ``psi_h(y) = h eps``::

        y' = zeta y + (1 - zeta) w + psi_h(w),   w' = w - psi_{-h}(y')

    At the image, where the denoiser has no timestep, it is asked at its last one.

    Args:
        coupling: zeta.

    Source: Blasingame, Liu, "Rex: A Family of Reversible Exponential (Stochastic) Runge-Kutta Solvers"
        (arXiv:2502.08834), in its simplest form; the coupling is that of McCallum and Foster (2024).
    """

    coupling: float = 0.999

    def start(self, chain: SamplingChain, x: Tensor) -> Pair:
        """See :class:`CoupledSampler`."""
        return wide(x), wide(x)

    end = start

    def forward(self, chain: SamplingChain, pair: Pair) -> Pair:
        """See :class:`CoupledSampler`."""
        levels, zeta = self._levels(chain), self.coupling
        y, w = (each / levels[0].sqrt() for each in pair)
        for k in range(chain.steps):
            h = self._size(levels, k)
            y = zeta * y + (1 - zeta) * w + h * self._noise(chain, w, levels, k)
            w = w + h * self._noise(chain, y, levels, k + 1)
        return y * levels[-1].sqrt(), w * levels[-1].sqrt()

    def backward(self, chain: SamplingChain, pair: Pair) -> Pair:
        """See :class:`CoupledSampler`."""
        levels, zeta = self._levels(chain), self.coupling
        y, w = (each / levels[-1].sqrt() for each in pair)
        for k in reversed(range(chain.steps)):
            h = self._size(levels, k)
            w = w - h * self._noise(chain, y, levels, k + 1)
            y = (y - (1 - zeta) * w - h * self._noise(chain, w, levels, k)) / zeta
        return y * levels[0].sqrt(), w * levels[0].sqrt()

    @staticmethod
    def _levels(chain: SamplingChain) -> Tensor:
        return torch.cat((chain.transitions.alphas, chain.transitions.alphas_prev[-1:]))

    @staticmethod
    def _size(levels: Tensor, k: int) -> Tensor:
        s = ((1 - levels) / levels).sqrt()
        return s[k + 1] - s[k]

    @staticmethod
    def _noise(chain: SamplingChain, y: Tensor, levels: Tensor, k: int) -> Tensor:
        return _eps(chain, y * levels[k].sqrt(), min(k, chain.steps - 1))
