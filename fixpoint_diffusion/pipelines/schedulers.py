"""The steps of diffusers' schedulers as transitions, and the noise that they would draw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from diffusers import DDIMScheduler, DDPMScheduler
from diffusers.utils.torch_utils import randn_tensor
from torch import Generator, Tensor

from fixpoint_diffusion.processes.transitions import Transitions, check_timesteps

DDPM_VARIANCES = ("fixed_small", "fixed_small_log", "fixed_large")
SERVED = f"DDIMScheduler, and DDPMScheduler with a variance_type of {', '.join(DDPM_VARIANCES)}"


def check_scheduler(scheduler: Any) -> None:
    """Raise a ``ValueError`` that names the scheduler unless its steps can be solved in parallel.

    Exactly the two classes are served: a subclass may step in its own way.
    """
    name, config = type(scheduler).__name__, scheduler.config
    if type(scheduler) is DDPMScheduler and config.variance_type not in DDPM_VARIANCES:
        name += f" with variance_type={config.variance_type!r}"
    elif type(scheduler) in (DDIMScheduler, DDPMScheduler):
        if not config.thresholding:
            return
        name += " with thresholding=True"
    raise ValueError(
        f"{name} cannot be solved in parallel; these can, without thresholding: {SERVED}. To change it: "
        "pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, thresholding=False)"
    )


def scheduler_transitions(
    scheduler: DDIMScheduler | DDPMScheduler, *, eta: float = 0.0, use_clipped_model_output: bool = False
) -> Transitions:
    """What the scheduler's ``step`` does at each of its timesteps.

    The signal levels are the scheduler's own, float32 as they are, for a chain must equal its loop. A step of DDPM is
    one of DDIM with eta = 1 that derives eps from the clipped image.

    Args:
        scheduler: one that :func:`check_scheduler` lets pass, after its ``set_timesteps``.
        eta, use_clipped_model_output: what DDIM's ``step`` would be given; DDPM's takes neither.

    Raises:
        ValueError: timesteps outside the schedule, or as ``Transitions.between``.
    """
    config = scheduler.config
    levels = scheduler.alphas_cumprod.to("cpu", torch.float64)
    timesteps = check_timesteps(scheduler.timesteps, len(levels))
    is_ddpm = isinstance(scheduler, DDPMScheduler)
    if is_ddpm:
        previous = torch.tensor([int(scheduler.previous_timestep(t)) for t in scheduler.timesteps])
        final = torch.tensor(1.0, dtype=torch.float64)
    else:
        previous = timesteps - config.num_train_timesteps // scheduler.num_inference_steps
        final = scheduler.final_alpha_cumprod.to("cpu", torch.float64)
    transitions = Transitions.between(
        timesteps,
        levels[timesteps],
        torch.where(previous < 0, final, levels[previous]),
        eta=1.0 if is_ddpm else eta,
        prediction_type=config.prediction_type,
        clip_sample=config.clip_sample_range if config.clip_sample else None,
        noise_from_clipped=is_ddpm or use_clipped_model_output,
    )
    if is_ddpm and config.variance_type == "fixed_large":
        transitions = replace(transitions, sigma=(1 - transitions.alphas / transitions.alphas_prev).sqrt())
    return transitions


def scheduler_noise(
    scheduler: DDIMScheduler | DDPMScheduler,
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
        shape: of the network's output in the loop, ``(B, *shape)``.
        eta: what DDIM's ``step`` would be given.
        generator: one for all, or one for each of B; None: the global one.
        dtype, device: of the network's output.

    Returns:
        ``(B, T, *shape)``, zeros where DDPM draws none; None for DDIM with ``eta`` = 0.
    """
    if isinstance(scheduler, DDPMScheduler):
        drawn = scheduler.timesteps > 0
    elif eta > 0:
        drawn = torch.ones(len(scheduler.timesteps), dtype=torch.bool)
    else:
        return None
    noise = torch.zeros(shape[0], len(drawn), *shape[1:], dtype=dtype, device=device)
    for k in drawn.nonzero().flatten().tolist():
        noise[:, k] = randn_tensor(tuple(shape), generator=generator, device=device, dtype=dtype)
    return noise
