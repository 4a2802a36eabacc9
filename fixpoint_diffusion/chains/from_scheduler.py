"""The chain that a diffusers scheduler describes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from fixpoint_diffusion.chains.chain import SamplingChain
from fixpoint_diffusion.denoisers.protocol import describe
from fixpoint_diffusion.processes import SamplerConfig, X0Hook, step_noise


def chain_from_scheduler(
    denoiser: Callable[..., Tensor],
    x_T: Tensor,
    scheduler: Any,
    *,
    steps: int = 50,
    eta: float | None = None,
    x0_hook: X0Hook | None = None,
    seed: int = 0,
    first_sample: int = 0,
    conditioning: Mapping[str, Tensor] | None = None,
    max_rows: int | None = None,
) -> SamplingChain:
    """The steps of a diffusers scheduler as one fixed point problem.

    For DDIM and DDPM schedulers each step is the scheduler's own: timesteps, levels, clipping or thresholding, and
    variance. For another solver of the same process (Euler, DPM-Solver, ...) the steps are DDIM's.

    Args:
        denoiser, x_T, conditioning, max_rows: as for :class:`SamplingChain`. With a learned variance, the denoiser
            returns twice the channels.
        scheduler: a :class:`SamplerConfig`, or whatever :meth:`SamplerConfig.from_diffusers` reads.
        steps: T.
        eta, x0_hook: as for :meth:`SamplerConfig.transitions`.
        seed, first_sample: of the steps' noise, as for :class:`StochasticDDIMChain`.

    Raises:
        ValueError: as :meth:`SamplerConfig.from_diffusers` and :class:`SamplingChain`.

    Example:
        >>> import torch
        >>> config = {"_class_name": "DDPMScheduler", "variance_type": "fixed_large"}
        >>> chain = chain_from_scheduler(lambda x, t: 0.5 * x, torch.ones(2, 3), config, steps=10)
        >>> chain.sequential().shape, chain.noise.shape
        (torch.Size([2, 10, 3]), torch.Size([2, 10, 3]))
    """
    config = scheduler if isinstance(scheduler, SamplerConfig) else SamplerConfig.from_diffusers(scheduler)
    transitions = config.transitions(
        steps, eta=eta, x0_hook=x0_hook, prediction_type=describe(denoiser).prediction_type
    )
    noise = None
    if bool((transitions.sigma > 0).any()) or transitions.learned_variance:
        samples = range(first_sample, first_sample + len(x_T))
        noise = step_noise(seed, samples, range(steps), x_T.shape[1:], dtype=x_T.dtype, device=x_T.device)
    return SamplingChain(denoiser, x_T, transitions, noise=noise, conditioning=conditioning, max_rows=max_rows)
