"""The chain that a diffusers scheduler describes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from fixpoint_diffusion.chains.chain import SamplingChain, check_start
from fixpoint_diffusion.chains.multistep import MultistepChain
from fixpoint_diffusion.denoisers.protocol import describe
from fixpoint_diffusion.extras import needed_for
from fixpoint_diffusion.processes import (
    SERVED,
    SamplerConfig,
    Transitions,
    X0Hook,
    solver_transitions,
    step_noise,
    with_timesteps,
)
from fixpoint_diffusion.processes.sampler_config import check_keys, read_config


def chain_from_scheduler(
    denoiser: Callable[..., Tensor],
    x_T: Tensor,
    scheduler: Any,
    *,
    steps: int | None = 50,
    eta: float | None = None,
    x0_hook: X0Hook | None = None,
    seed: int = 0,
    first_sample: int = 0,
    conditioning: Mapping[str, Tensor] | None = None,
    max_rows: int | None = None,
) -> SamplingChain:
    """The steps of a diffusers scheduler as one fixed point problem.

    Each step is the scheduler's own: timesteps, levels, clipping or thresholding, and noise; those of DDIM, DDPM, and
    of the solvers in the docs' table. What a chain holds are the scheduler's latents at unit size,
    ``sqrt(a) x_0 + sqrt(1 - a) eps``: multiply by ``chain.transitions.scales`` for its own.

    Args:
        denoiser, conditioning, max_rows: as for :class:`SamplingChain`. With a learned variance, the denoiser returns
            twice the channels.
        x_T: standard normal noise ``(B, *shape)``, as diffusers' pipelines draw it. A scheduler's own initial size
            (``init_noise_sigma``) is given to it here. Noise that ``invert`` has found has its size: set the chain's
            attribute ``x_T`` to that.
        scheduler: a scheduler of diffusers, its ``config``, or a path, as for :meth:`SamplerConfig.from_diffusers`; a
            :class:`SamplerConfig` gives DDIM's or DDPM's steps, whichever solver it was read from.
        steps: what ``set_timesteps`` is called with. T is that, but for Heun's method, whose steps are two but for the
            last. None: as the given scheduler's ``set_timesteps`` was called, such as with ``mu`` or ``sigmas``.
        eta: share of DDPM's noise, for DDIM and DDPM, as for :meth:`SamplerConfig.transitions`.
        x0_hook: what is done to each predicted x_0, instead of the scheduler's clipping or thresholding.
        seed, first_sample: of the steps' noise, as for :class:`StochasticDDIMChain`.

    Returns:
        A :class:`MultistepChain` where steps look back (DPM-Solver++, UniPC, Heun).

    Raises:
        ValueError: as :meth:`SamplerConfig.from_diffusers`, :func:`solver_transitions` and :class:`SamplingChain`; an
            eta, or ``steps=None``, where it has no meaning.

    Example:
        >>> import torch
        >>> config = {"_class_name": "DDPMScheduler", "variance_type": "fixed_large"}
        >>> chain = chain_from_scheduler(lambda x, t: 0.5 * x, torch.ones(2, 3), config, steps=10)
        >>> chain.sequential().shape, chain.noise.shape
        (torch.Size([2, 10, 3]), torch.Size([2, 10, 3]))
        >>> from diffusers import FlowMatchEulerDiscreteScheduler
        >>> flow = FlowMatchEulerDiscreteScheduler(shift=3.0)
        >>> chain = chain_from_scheduler(lambda x, t: 0.5 * x, torch.ones(2, 3), flow, steps=10)
        >>> chain.timesteps[:3].round()
        tensor([1000.,  960.,  913.])
    """
    check_start(x_T)
    kind = describe(denoiser).prediction_type
    solver = None if isinstance(scheduler, SamplerConfig) else _solver(scheduler, steps)
    if solver is not None:
        if eta is not None:
            raise ValueError(f"eta is for DDIM and DDPM schedulers, got eta={eta:g} for {type(solver).__name__}")
        transitions = solver_transitions(solver, prediction_type=kind, x0_hook=x0_hook)
        first = 1.0 if transitions.scales is None else float(transitions.scales[0])
        x_T = x_T * (float(getattr(solver, "init_noise_sigma", 1.0)) / first)
    else:
        transitions = _beta_transitions(scheduler, steps, eta, x0_hook, kind)
    noise = None
    if bool((transitions.sigma > 0).any()) or transitions.learned_variance:
        samples, numbers = range(first_sample, first_sample + len(x_T)), range(transitions.steps)
        noise = step_noise(seed, samples, numbers, x_T.shape[1:], dtype=x_T.dtype, device=x_T.device)
    chain = SamplingChain if transitions.history is None else MultistepChain
    return chain(denoiser, x_T, transitions, noise=noise, conditioning=conditioning, max_rows=max_rows)


def _solver(scheduler: Any, steps: int | None) -> Any:
    """The scheduler with its timesteps; None if it is DDIM's or DDPM's."""
    config, name = read_config(scheduler)
    if name not in SERVED:
        return None
    given = getattr(scheduler, "config", None) is not None
    if steps is None and not given:
        raise ValueError(f"steps=None needs a scheduler whose set_timesteps was called; got a configuration of {name}")
    if not given:
        with needed_for("making a scheduler from its configuration"):
            import diffusers
        kind = getattr(diffusers, name)
        check_keys(name, config, own=inspect.signature(kind.__init__).parameters)
        try:
            scheduler = kind.from_config(config)
        except (TypeError, ValueError, ArithmeticError, RuntimeError, NotImplementedError) as error:
            raise ValueError(f"diffusers makes no {name} of this configuration: {error}") from error
    return scheduler if steps is None else with_timesteps(scheduler, steps)


def _beta_transitions(
    scheduler: Any, steps: int | None, eta: float | None, x0_hook: X0Hook | None, prediction_type: str | None
) -> Transitions:
    """DDIM's or DDPM's steps."""
    config = scheduler if isinstance(scheduler, SamplerConfig) else SamplerConfig.from_diffusers(scheduler)
    if config is not scheduler and not config.own_steps:
        raise ValueError(
            f"the steps of {config.class_name} are not served; those of DDIM, DDPM and {', '.join(SERVED)} are. For "
            f"DDIM's on the same process, pass SamplerConfig.from_diffusers(...) of it"
        )
    if steps is None:
        raise ValueError(f"steps=None is for schedulers with a set_timesteps of their own, not for {config.class_name}")
    return config.transitions(steps, eta=eta, x0_hook=x0_hook, prediction_type=prediction_type)
