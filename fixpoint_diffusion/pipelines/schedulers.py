"""The steps of diffusers' schedulers as transitions, and the noise that they would draw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Generator, Tensor

from fixpoint_diffusion.processes import SERVED, SamplerConfig, Transitions, solver_transitions
from fixpoint_diffusion.processes.solvers import check_served

# Latents are not clipped: their values go far beyond 1.
ADVICE = "DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False, thresholding=False)"
_ALL = slice(None)


def check_scheduler(scheduler: Any) -> SamplerConfig | None:
    """A ``ValueError`` that names the scheduler unless its steps can be solved in parallel.

    DDIM's, DDPM's and those of the solvers in ``SERVED`` can. A subclass may step in its own way, and is refused.

    Returns:
        What a DDIM or DDPM scheduler does; None for a solver.
    """
    if type(scheduler).__name__ in SERVED:
        check_served(scheduler)
        return None
    config = SamplerConfig.from_diffusers(scheduler)
    if not config.own_steps:
        raise ValueError(
            f"the steps of {config.class_name} cannot be solved in parallel; those of DDIMScheduler, DDPMScheduler, "
            f"{', '.join(SERVED)} can. Its training process is that of DDIM: pipe.scheduler = {ADVICE}"
        )
    return config


def scheduler_transitions(
    scheduler: Any, *, part: slice = _ALL, eta: float = 0.0, use_clipped_model_output: bool = False
) -> Transitions:
    """What the scheduler's ``step`` does at each of its timesteps.

    The signal levels of DDIM and DDPM are the scheduler's own, float32 as they are, for a chain must equal its loop.

    Args:
        scheduler: one that :func:`check_scheduler` lets pass, after its ``set_timesteps``.
        part: which of its timesteps the loop walks.
        eta, use_clipped_model_output: what DDIM's ``step`` would be given; the others take neither, or make no use of
            it.

    Raises:
        ValueError: timesteps outside the schedule, or as ``Transitions.between`` and ``solver_transitions``.
    """
    config = check_scheduler(scheduler)
    if config is None:
        return solver_transitions(scheduler, part=part)
    final = 1.0 if config.is_ddpm else float(scheduler.final_alpha_cumprod)
    schedule = replace(config.schedule, alphas_cumprod=scheduler.alphas_cumprod, final_alpha=final)
    transitions = replace(config, schedule=schedule).transitions(
        scheduler.num_inference_steps or len(scheduler.timesteps),
        timesteps=scheduler.timesteps,
        eta=None if config.is_ddpm else _used(config, eta),
        noise_from_clipped=use_clipped_model_output,
    )
    return transitions.part(part)


def scheduler_noise(
    scheduler: Any,
    shape: Sequence[int],
    *,
    part: slice = _ALL,
    eta: float = 0.0,
    generator: Generator | list[Generator] | None = None,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor | None:
    """All noise that the scheduler's loop would draw, in its order.

    Args:
        scheduler, part: as for :func:`scheduler_transitions`.
        shape: of the network's output in the loop, ``(B, C, ...)``; with a learned variance ``(B, 2 C, ...)``.
        eta: what DDIM's ``step`` would be given.
        generator: one for all, or one for each of B; None: the global one.
        dtype, device: of the network's output.

    Returns:
        ``(B, T, C, ...)``, zeros where DDPM draws none; None where no step draws any.
    """
    config, timesteps = check_scheduler(scheduler), scheduler.timesteps[part]
    if config is None:
        settings = scheduler.config
        sde = settings.get("stochastic_sampling") or str(settings.get("algorithm_type")).startswith("sde-")
        if sde:
            dtype = torch.float32
        noisy = bool(sde) or type(scheduler).__name__ == "EulerAncestralDiscreteScheduler"
    else:
        noisy = _used(config, eta) > 0
        if config.variance_type in ("learned", "learned_range"):
            shape = (shape[0], shape[1] // 2, *shape[2:])
    if config is not None and config.is_ddpm:
        drawn = timesteps > 0
    elif noisy:
        drawn = torch.ones(len(timesteps), dtype=torch.bool, device="cpu")
    else:
        return None
    noise = torch.zeros(shape[0], len(drawn), *shape[1:], dtype=dtype, device=device)
    for k in drawn.nonzero().flatten().tolist():
        noise[:, k] = randn_tensor(tuple(shape), generator=generator, device=device, dtype=dtype)
    return noise


def _used(config: SamplerConfig, eta: float) -> float:
    """The eta that the scheduler's ``step`` makes use of: CogVideoX's takes one, and has no code for it."""
    return 0.0 if config.class_name == "CogVideoXDDIMScheduler" else eta
