"""The stochastic DDIM chain (DEQ-sDDIM, Appendix D of the paper)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from fixpoint_diffusion.chains.ddim import DDIMChain
from fixpoint_diffusion.processes import NoiseSchedule, X0Hook, step_noise


class StochasticDDIMChain(DDIMChain):
    """DDIM with fresh noise in every step, as one fixed point problem: a :class:`DDIMChain` with an input injection.

    The noises are drawn once, before anything is solved. They are a function of (seed, sample, step), so a batch of B
    images gives what B batches of one give, and the sequential and every parallel run see the same ones.

    Args:
        denoiser, x_T, schedule: as for :class:`DDIMChain`, and so are the options down to ``max_rows``.
        eta: share of DDPM's noise: 0 is deterministic DDIM, 1 is DDPM; with clipping or a hook, DDPM also needs
            ``noise_from_clipped=True``.
        seed: of the noise.
        noise: standard normal noise ``(B, T, *shape)`` in the dtype and on the device of x_T, instead of the seed's.
        first_sample: index of the first image of this batch among all that share the seed.

    Raises:
        ValueError: as :class:`DDIMChain`; an eta below 0, or above the largest that leaves no step a negative variance;
            noise of another shape, dtype or device.

    Source: Pokle, Geng, Kolter (2022), Eq. 20 to 25.

    Example:
        >>> import torch
        >>> schedule = NoiseSchedule.linear()
        >>> chain = StochasticDDIMChain(lambda x, t: 0.5 * x, torch.ones(1, 3), schedule, steps=4, eta=1.0, seed=7)
        >>> z = chain.z0
        >>> for _ in range(4):
        ...     z = chain(z)
        >>> torch.allclose(z, chain.sequential())
        True
    """

    def __init__(
        self,
        denoiser: Callable[..., Tensor],
        x_T: Tensor,
        schedule: NoiseSchedule,
        *,
        steps: int | None = None,
        timesteps: Tensor | None = None,
        spacing: str | None = None,
        prediction_type: str | None = None,
        clip_sample: float | None = None,
        x0_hook: X0Hook | None = None,
        noise_from_clipped: bool = False,
        conditioning: Mapping[str, Tensor] | None = None,
        max_rows: int | None = None,
        eta: float = 1.0,
        seed: int = 0,
        noise: Tensor | None = None,
        first_sample: int = 0,
    ) -> None:
        super().__init__(
            denoiser,
            x_T,
            schedule,
            steps=steps,
            timesteps=timesteps,
            spacing=spacing,
            prediction_type=prediction_type,
            clip_sample=clip_sample,
            x0_hook=x0_hook,
            noise_from_clipped=noise_from_clipped,
            conditioning=conditioning,
            max_rows=max_rows,
        )
        self.eta = eta
        self.transitions = self.transitions.with_eta(eta)
        if noise is None:
            samples = range(first_sample, first_sample + len(x_T))
            noise = step_noise(seed, samples, range(self.steps), x_T.shape[1:], dtype=x_T.dtype, device=x_T.device)
        self.noise = self._check_noise(noise)
