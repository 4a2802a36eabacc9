"""What inverses that undo one step after another have in common: the map of a step, the loop, the counts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fixpoint import Status
from fixpoint_diffusion.chains import SamplingChain
from fixpoint_diffusion.inversion import Found
from fixpoint_diffusion.inversion.problem import rms
from fixpoint_diffusion.processes import wide


class Step:
    """Step k of a chain, which has led to ``after`` ``(B, *shape)``: the latent before it is a fixed point of ``f``."""

    def __init__(self, chain: SamplingChain, k: int, after: Tensor) -> None:
        self._chain, self._k = chain, k
        self.after = after
        self._samples = torch.arange(len(after), device=after.device)
        self._noise = None if chain.noise is None else wide(chain.noise[:, k])

    def f(self, z: Tensor) -> Tensor:
        """The latent from which the step would lead to ``after``, were the noise in it the one that is seen in z.

        For DDIM ``f(z) = (after - b eps(z)) / a``; the noise that a stochastic step adds is taken off first.
        """
        transitions, k = self._chain.transitions, self._k
        eps = transitions.predict(z, self._outputs(z), k)[1]
        added = transitions.direction[k] * eps
        if self._noise is not None:
            added = added + transitions.sigma[k] * self._noise
        image = (self.after - added) / transitions.alphas_prev[k].sqrt()
        a = transitions.alphas[k]
        return a.sqrt() * image + (1 - a).sqrt() * eps

    def forward(self, z: Tensor) -> Tensor:
        """Where the step leads from z."""
        return self._chain.transitions.step(z, self._outputs(z), self._k, self._noise)

    def _outputs(self, z: Tensor) -> Tensor:
        step = torch.full_like(self._samples, self._k)
        return wide(self._chain.denoise(z.to(self._chain.x_T.dtype), self._samples, step))


@dataclass(frozen=True, kw_only=True)
class ImplicitSteps(ABC):
    """Undo the steps one after another, each by so many iterations for all samples; a method for ``invert``.

    Of its own accord it says that a sample has converged when, at every step, the RMS of the last residual was within
    the tolerance.

    Args:
        iterations: of each step.

    Raises:
        ValueError: fewer than one iteration.
    """

    iterations: int

    def __post_init__(self) -> None:
        if self.iterations < 1:
            raise ValueError(f"iterations must be at least 1, got {self.iterations}")

    @abstractmethod
    def undo(self, step: Step) -> tuple[Tensor, Tensor]:
        """The latent before the step, ``(B, *shape)``, and the last residual that was seen, of the same shape."""

    def run(
        self,
        chain: SamplingChain,
        x_0: Tensor,
        *,
        tolerance: Tensor,
        progress: bool = False,
        callback: Callable[[Any], object] | None = None,
    ) -> Found:
        """See :class:`fixpoint_diffusion.inversion.InverseMethod`; the history is empty."""
        before = chain.rounds, chain.evals
        x, settled = wide(x_0), torch.ones(len(x_0), dtype=torch.bool, device=x_0.device)
        for k in reversed(range(chain.steps)):
            x, residual = self.undo(Step(chain, k, x))
            settled &= rms(residual) <= tolerance
        return Found(
            x_T=x.to(x_0.dtype),
            status=torch.where(settled, int(Status.CONVERGED), int(Status.MAX_EVALS)),
            rounds=chain.rounds - before[0],
            evals=chain.evals - before[1],
        )
