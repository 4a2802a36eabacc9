"""Solvers of diffusers beside DDIM and DDPM as transitions: Euler, flow matching, EDM, Heun, DPM-Solver++, UniPC.

What a scheduler calls sigma tells how much signal ``s`` and noise ``n`` its latents ``s x_0 + n eps`` hold. Divided by
``sqrt(s^2 + n^2)`` they are those of :class:`Transitions`, and a step of any of these solvers is DDIM's, plus, for
multistep solvers, differences of predicted images.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fixpoint_diffusion.processes.multistep import dpm_solver_weights, heun_weights, unipc_weights
from fixpoint_diffusion.processes.predictions import DENOISER_PREDICTIONS
from fixpoint_diffusion.processes.schedules import PREDICTION_TYPES, positive, refusal
from fixpoint_diffusion.processes.transitions import Transitions
from fixpoint_diffusion.processes.x0_hooks import Clip, DynamicThreshold, X0Hook


@dataclass(frozen=True, kw_only=True)
class Served:
    """What is served of a scheduler's class: its steps in words, and the values that its keys may have."""

    steps: str
    only: Mapping[str, tuple[Any, ...]]


SERVED: dict[str, Served] = {
    "FlowMatchEulerDiscreteScheduler": Served(
        steps="Euler's along a flow, with every shift; with fresh noise for `stochastic_sampling`",
        only={"invert_sigmas": (False,)},
    ),
    "EulerDiscreteScheduler": Served(
        # Diffusers makes one sigma too many for log_linear, in ascending order.
        steps="Euler's",
        only={"prediction_type": PREDICTION_TYPES, "interpolation_type": ("linear",)},
    ),
    "EulerAncestralDiscreteScheduler": Served(
        steps="Euler's with fresh noise", only={"prediction_type": ("epsilon", "v_prediction")}
    ),
    "EDMEulerScheduler": Served(
        steps="Euler's, for networks of EDM", only={"prediction_type": ("epsilon", "v_prediction")}
    ),
    "HeunDiscreteScheduler": Served(
        steps="Heun's: two steps of the chain for each but the last", only={"prediction_type": PREDICTION_TYPES}
    ),
    "DPMSolverMultistepScheduler": Served(
        steps="DPM-Solver++ of orders 1 to 3, deterministic or with noise",
        only={
            "algorithm_type": ("dpmsolver++", "sde-dpmsolver++"),
            "solver_order": (1, 2, 3),
            "prediction_type": DENOISER_PREDICTIONS,
        },
    ),
    "UniPCMultistepScheduler": Served(
        steps="UniPC of any order, predictor and corrector in one step",
        only={"predict_x0": (True,), "solver_p": (None,), "prediction_type": DENOISER_PREDICTIONS},
    ),
}


def with_timesteps(scheduler: Any, steps: int) -> Any:
    """A scheduler like this one, after its ``set_timesteps(steps)``.

    Raises:
        ValueError: a class or a value that is not served; steps that are no whole number of at least 1, or that the
            scheduler refuses; a shift that depends on more than their number.

    Example:
        >>> from diffusers import EulerDiscreteScheduler
        >>> from fixpoint_diffusion.processes import with_timesteps
        >>> with_timesteps(EulerDiscreteScheduler(), 4).timesteps
        tensor([999., 666., 333.,   0.])
    """
    check_served(scheduler)
    positive("steps", steps)
    try:
        with torch.device("cpu"):  # its tables, whatever the default device is
            fresh = type(scheduler).from_config(scheduler.config)
            fresh.set_timesteps(steps)
    except ValueError as error:
        advice = "call the scheduler's set_timesteps yourself, and pass steps=None"
        raise ValueError(f"{type(scheduler).__name__}: {str(error).rstrip('.')}; {advice}") from error
    return fresh


def solver_transitions(
    scheduler: Any, *, prediction_type: str | None = None, x0_hook: X0Hook | None = None, part: slice = slice(None)
) -> Transitions:
    """What the ``step`` of a scheduler of diffusers does at each of its timesteps.

    Args:
        scheduler: one whose class is in ``SERVED``, after its ``set_timesteps``.
        prediction_type: what the denoiser says that it predicts. None, along a flow and for EDM: what the scheduler
            says.
        x0_hook: what is done to each predicted x_0, instead of the scheduler's clipping or thresholding.
        part: which of the scheduler's timesteps a loop walks, without gaps, such as those that are left for an image
            that is not all noise. Steps that look back see nothing before its first.

    Returns:
        As many steps as the scheduler has timesteps: Heun's has two for each but the last.

    Raises:
        ValueError: a class or a value that is not served, a scheduler without timesteps, or one whose options make
            it divide by zero.

    Example:
        >>> import diffusers
        >>> scheduler = with_timesteps(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), 4)
        >>> transitions = solver_transitions(scheduler)
        >>> transitions.timesteps.round(), transitions.prediction_type
        (tensor([1000.,  858.,  602.,    9.]), 'flow_prediction')
    """
    name = type(scheduler).__name__
    check_served(scheduler)
    if getattr(scheduler, "num_inference_steps", None) is None:
        raise ValueError(f"{name} has no timesteps yet: pass steps, or call its set_timesteps")
    if not len(scheduler.timesteps[part]):
        raise ValueError(f"no steps are left of the {len(scheduler.timesteps)} timesteps of this {name}")
    config, sigmas = scheduler.config, scheduler.sigmas.to("cpu", torch.float64)
    flow = name.startswith("Flow") or bool(config.get("use_flow_sigmas"))
    signal = 1 - sigmas if flow else torch.ones_like(sigmas)
    size = (signal.square() + sigmas.square()).sqrt()
    kind = "flow_prediction" if name.startswith("Flow") else config.prediction_type
    if prediction_type is not None and not flow and name != "EDMEulerScheduler":
        kind = prediction_type
    if flow and kind == "v_prediction":
        raise refusal(name, "prediction_type", kind, "flow_prediction, along a flow")
    if kind == "flow_prediction" and not flow:
        raise refusal(name, "prediction_type", kind, "another one, or use_flow_sigmas=True with it")
    alphas = (signal / size).square()
    own = _OWN[name](config, signal, sigmas, size, part.indices(len(scheduler.timesteps))[0])
    transitions = Transitions.between(
        scheduler.timesteps.cpu(),
        alphas[:-1],
        alphas[1:],
        eta=float(name == "EulerAncestralDiscreteScheduler"),
        prediction_type=kind,
        x0_hook=x0_hook or _hook(config),
        noise_from_clipped=True,
    )
    found = (alphas, transitions.direction, transitions.sigma, *filter(torch.is_tensor, own.values()))
    if not all(bool(values.isfinite().all()) for values in found):
        raise ValueError(f"with so many steps and these options, {name} makes coefficients that are not finite")
    return replace(transitions, **own).part(part)


def check_served(scheduler: Any) -> None:
    """Raise a ``ValueError`` that names the class, or the value, of a scheduler that is not served."""
    name = type(scheduler).__name__
    if name not in SERVED:
        raise ValueError(f"the steps of {name} are not served; those of {', '.join(SERVED)} are")
    for key, allowed in SERVED[name].only.items():
        if scheduler.config.get(key) not in allowed:
            raise refusal(name, key, scheduler.config.get(key), " or ".join(map(repr, allowed)))


def _hook(config: Mapping[str, Any]) -> X0Hook | None:
    if config.get("thresholding"):
        return DynamicThreshold(config["dynamic_thresholding_ratio"], config["sample_max_value"])
    return Clip(config["clip_sample_range"]) if config.get("clip_sample") else None


# What each class has of its own. ``signal``, ``sigmas`` and ``size`` are ``(T + 1,)``: s, n and sqrt(s^2 + n^2).
# ``first`` is the step that a loop begins with.
_Own = Callable[[Mapping[str, Any], Tensor, Tensor, Tensor, int], dict[str, Any]]


def _euler(config: Mapping[str, Any], signal: Tensor, sigmas: Tensor, size: Tensor, first: int) -> dict[str, Any]:
    """Networks see the latents at unit size."""
    return {"scales": size}


def _flow(config: Mapping[str, Any], signal: Tensor, sigmas: Tensor, size: Tensor, first: int) -> dict[str, Any]:
    own: dict[str, Any] = {"scales": size, "input_scale": size[:-1]}
    if config["stochastic_sampling"]:
        own |= {"direction": torch.zeros_like(sigmas[1:]), "sigma": sigmas[1:] / size[1:]}
    return own


def _edm(config: Mapping[str, Any], signal: Tensor, sigmas: Tensor, size: Tensor, first: int) -> dict[str, Any]:
    data = float(config["sigma_data"])
    seen = size[:-1] / (sigmas[:-1].square() + data**2).sqrt()
    return {"scales": size, "input_scale": seen, "sigma_data": data}


def _heun(config: Mapping[str, Any], signal: Tensor, sigmas: Tensor, size: Tensor, first: int) -> dict[str, Any]:
    return {"scales": size, "history": heun_weights(sigmas) / size[1:, None]}


def _multistep(config: Mapping[str, Any], signal: Tensor, sigmas: Tensor, size: Tensor, first: int) -> dict[str, Any]:
    """Of DPM-Solver and UniPC, which keep latents at unit size, or as a flow does."""
    own: dict[str, Any] = {}
    if config["use_flow_sigmas"]:
        own = {"scales": size, "input_scale": size[:-1]}
    signal, noise = signal / size, sigmas / size
    if "predict_x0" in config:
        return own | {"history": unipc_weights(config, signal, noise, first)}
    if config["algorithm_type"] == "sde-dpmsolver++":
        # exp(-h), by how much the share of noise falls in a step.
        fall = noise[1:] * signal[:-1] / (signal[1:] * noise[:-1])
        own |= {"direction": noise[1:] * fall, "sigma": noise[1:] * (1 - fall.square()).sqrt()}
    history = dpm_solver_weights(config, signal, noise, first)
    return own | ({} if history is None else {"history": history})


_OWN: dict[str, _Own] = {
    "FlowMatchEulerDiscreteScheduler": _flow,
    "EulerDiscreteScheduler": _euler,
    "EulerAncestralDiscreteScheduler": _euler,
    "EDMEulerScheduler": _edm,
    "HeunDiscreteScheduler": _heun,
    "DPMSolverMultistepScheduler": _multistep,
    "UniPCMultistepScheduler": _multistep,
}
