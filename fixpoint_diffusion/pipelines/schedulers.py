"""The steps of diffusers' schedulers as transitions, and the noise that they would draw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Generator, Tensor

from fixpoint_diffusion.processes import SamplerConfig, Transitions

# Latents are not clipped: their values go far beyond 1.
ADVICE = "DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False, thresholding=False)"


def check_scheduler(scheduler: Any) -> SamplerConfig:
    """What the scheduler does; a ``ValueError`` that names it unless its steps can be solved in parallel.

    DDIM's and DDPM's can. A subclass of theirs may step in its own way, and is refused.
    """
    config = SamplerConfig.from_diffusers(scheduler)
    if not config.own_steps:
        raise ValueError(
            f"the steps of {config.class_name} cannot be solved in parallel; those of DDIMScheduler and DDPMScheduler "
            f"can. Its training process is theirs, so change it: pipe.scheduler = {ADVICE}"
        )
    return config


def scheduler_transitions(scheduler: Any, *, eta: float = 0.0, use_clipped_model_output: bool = False) -> Transitions:
    """What the scheduler's ``step`` does at each of its timesteps.

    The signal levels are the scheduler's own, float32 as they are, for a chain must equal its loop.

    Args:
        scheduler: one that :func:`check_scheduler` lets pass, after its ``set_timesteps``.
        eta, use_clipped_model_output: what DDIM's ``step`` would be given; DDPM's takes neither.

    Raises:
        ValueError: timesteps outside the schedule, or as ``Transitions.between``.
    """
    config = check_scheduler(scheduler)
    final = 1.0 if config.is_ddpm else float(scheduler.final_alpha_cumprod)
    schedule = replace(config.schedule, alphas_cumprod=scheduler.alphas_cumprod, final_alpha=final)
    return replace(config, schedule=schedule).transitions(
        scheduler.num_inference_steps or len(scheduler.timesteps),
        timesteps=scheduler.timesteps,
        eta=None if config.is_ddpm else eta,
        noise_from_clipped=use_clipped_model_output,
    )


def scheduler_noise(
    scheduler: Any,
    shape: Sequence[int],
    *,
    eta: float = 0.0,
    generator: Generator | list[Generator] | None = None,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor | None:
    """All noise that the scheduler's loop would draw, in its order.

    Args:
        scheduler: as for :func:`scheduler_transitions`.
        shape: of the network's output in the loop, ``(B, C, ...)``; with a learned variance ``(B, 2 C, ...)``.
        eta: what DDIM's ``step`` would be given.
        generator: one for all, or one for each of B; None: the global one.
        dtype, device: of the network's output.

    Returns:
        ``(B, T, C, ...)``, zeros where DDPM draws none; None for DDIM with ``eta`` = 0.
    """
    config = check_scheduler(scheduler)
    if config.variance_type in ("learned", "learned_range"):
        shape = (shape[0], shape[1] // 2, *shape[2:])
    if config.is_ddpm:
        drawn = scheduler.timesteps > 0
    elif eta > 0:
        drawn = torch.ones(len(scheduler.timesteps), dtype=torch.bool)
    else:
        return None
    noise = torch.zeros(shape[0], len(drawn), *shape[1:], dtype=dtype, device=device)
    for k in drawn.nonzero().flatten().tolist():
        noise[:, k] = randn_tensor(tuple(shape), generator=generator, device=device, dtype=dtype)
    return noise
