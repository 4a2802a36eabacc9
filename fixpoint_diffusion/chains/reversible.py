"""A sampler that can be run backwards exactly, for those who may choose their sampler."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fixpoint_diffusion.chains.chain import all_rows
from fixpoint_diffusion.chains.ddim import DDIMChain
from fixpoint_diffusion.processes import NoiseSchedule, wide


class ReversibleChain:
    r"""O-BELM: a two-step sampler of second order, each of whose steps can be solved for the older latent.

    With ``y = x / sqrt(a)``, ``s = sqrt((1 - a) / a)`` and ``h_k = s_k - s_{k+1}``, ``r = h_k / h_{k-1}``::

        y_{k+1} = r^2 y_{k-1} + (1 - r^2) y_k - (1 + r) h_k eps(x_k)

    The first step is DDIM's. What stands for an image is a pair: its x_T and the latent after it. ``invert`` finds the
    pair with T calls, one after another, and ``sequential`` leads from it back to the image, to rounding. It is a
    :class:`fixpoint.Chain` of pairs, so ``fixpoint.solve(chain, solver=CausalQuasiNewton())`` runs it in parallel.

    Args:
        denoiser, schedule, steps, timesteps, spacing, prediction_type, conditioning, max_rows: as for
            :class:`DDIMChain`; at least two steps.
        x_T: initial noise ``(B, *shape)``, or a pair ``(B, 2, *shape)`` that ``invert`` found, with ``pair=True``.
        pair: whether x_T is such a pair.

    Raises:
        ValueError: as :class:`DDIMChain`; fewer than two steps, a chain that clips, or that starts without signal.

    Source: Wang et al., "BELM: Bidirectional Explicit Linear Multi-step Sampler" (NeurIPS 2024).

    Example:
        >>> image = torch.tensor([[0.3, -0.1]], dtype=torch.float64)
        >>> options = {"schedule": NoiseSchedule.linear(), "steps": 20}
        >>> pair = ReversibleChain(lambda x, t: 0.5 * x, image, **options).invert(image)
        >>> chain = ReversibleChain(lambda x, t: 0.5 * x, pair, pair=True, **options)
        >>> torch.allclose(chain.sequential()[:, -1, 1], image)
        True
    """

    batch_dims = 1

    def __init__(
        self,
        denoiser: Callable[..., Tensor],
        x_T: Tensor,
        schedule: NoiseSchedule,
        *,
        pair: bool = False,
        steps: int | None = None,
        timesteps: Tensor | None = None,
        spacing: str | None = None,
        prediction_type: str | None = None,
        conditioning: Mapping[str, Tensor] | None = None,
        max_rows: int | None = None,
    ) -> None:
        self.ddim = DDIMChain(
            denoiser,
            x_T[:, 0] if pair else x_T,
            schedule,
            steps=steps,
            timesteps=timesteps,
            spacing=spacing,
            prediction_type=prediction_type,
            conditioning=conditioning,
            max_rows=max_rows,
        )
        transitions = self.ddim.transitions
        if self.ddim.steps < 2:
            raise ValueError(f"a two-step sampler needs at least two steps, got {self.ddim.steps}")
        if transitions.x0_hook is not None:
            raise ValueError(f"steps that change the predicted image cannot be reversed: {transitions.x0_hook}")
        if float(transitions.alphas[0]) == 0:
            raise ValueError("the sampler divides by the signal, and this chain starts without (zero terminal SNR)")
        self.levels = torch.cat((transitions.alphas, transitions.alphas_prev[-1:])).to(x_T.device)
        self._pair = x_T if pair else None

    @property
    def steps(self) -> int:
        """Steps from pair to pair: one fewer than timesteps."""
        return self.ddim.steps - 1

    @property
    def start(self) -> Tensor:
        """The first two latents, ``(B, 2, *shape)``."""
        if self._pair is None:
            x_T, samples = self.ddim.x_T, self._samples()
            self._pair = torch.stack((x_T, self.ddim.transition(x_T, samples, torch.zeros_like(samples))), dim=1)
        return self._pair

    @property
    def z0(self) -> Tensor:
        """Every pair equal to the first: ``(B, T - 1, 2, *shape)``."""
        return self.start.detach().unsqueeze(1).expand(-1, self.steps, *self.start.shape[1:]).clone()

    def transition(self, x: Tensor, sample: Tensor, step: Tensor) -> Tensor:
        """Pairs ``(N, 2, *shape)`` one step on."""
        k = step.to(x.device) + 1
        older, newer = wide(x).unbind(1)
        eps, (before, now, after), (r, h) = self._eps(x[:, 1], sample, k), *self._coefficients(k)
        y = r**2 * older / before + (1 - r**2) * newer / now - (1 + r) * h * eps
        return torch.stack((newer, after * y), dim=1).to(x.dtype)

    def __call__(self, z: Tensor) -> Tensor:
        """One step from every pair, ``(B, T - 1, 2, *shape)``."""
        x = torch.cat((self.start.unsqueeze(1), z[:, :-1]), dim=1)
        return self.transition(x.flatten(0, 1), *all_rows(self._samples(), self.steps)).unflatten(0, z.shape[:2])

    def sequential(self) -> Tensor:
        """All pairs, one after another: ``(B, T - 1, 2, *shape)``; ``[:, -1, 1]`` is x_0."""
        pair, pairs, samples = self.start, [], self._samples()
        for k in range(self.steps):
            pair = self.transition(pair, samples, torch.full_like(samples, k))
            pairs.append(pair)
        return torch.stack(pairs, dim=1)

    def invert(self, x_0: Tensor) -> Tensor:
        """The pair ``(B, 2, *shape)`` from which the sampler arrives at ``x_0`` ``(B, *shape)``; T calls.

        The latent before x_0, which is not given, is taken from plain DDIM inversion. Whatever it is, the way back is
        exact.
        """
        samples, last = self._samples(), self.ddim.steps - 1
        a, image = self.levels[last], wide(x_0)
        eps = self._eps(x_0, samples, torch.full_like(samples, last))
        newer, newest = a.sqrt() * image + (1 - a).sqrt() * eps, image
        for k in range(last, 0, -1):
            step = torch.full_like(samples, k)
            eps = self._eps(newer.to(x_0.dtype), samples, step)
            (before, now, after), (r, h) = self._coefficients(step)
            older = before * (newest / after - (1 - r**2) * newer / now + (1 + r) * h * eps) / r**2
            newer, newest = older, newer
        return torch.stack((newer, newest), dim=1).to(x_0.dtype)

    def _eps(self, x: Tensor, sample: Tensor, k: Tensor) -> Tensor:
        """The noise that the denoiser sees in latents ``(N, *shape)`` before the timesteps ``k``."""
        out = self.ddim.denoise(x, sample, k)
        return self.ddim.transitions.predict(wide(x), wide(out), k.to(x.device), sample)[1]

    def _samples(self) -> Tensor:
        """The numbers of all samples, ``(B,)``."""
        return torch.arange(len(self.ddim.x_T), device=self.ddim.x_T.device)

    def _coefficients(self, k: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, Tensor]]:
        """``sqrt(a)`` before, at and after the timesteps ``k`` ``(N,)``; ``r`` and ``h``."""
        shape = (-1, *[1] * (self.ddim.x_T.ndim - 1))
        around = [self.levels[k + offset].reshape(shape) for offset in (-1, 0, 1)]
        s = [((1 - a) / a).sqrt() for a in around]
        h = s[1] - s[2]
        return tuple(a.sqrt() for a in around), (h / (s[0] - s[1]), h)
