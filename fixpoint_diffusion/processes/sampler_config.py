"""All that a diffusers scheduler's configuration says about sampling; what cannot be honoured is refused by name."""

from __future__ import annotations

import math
import numbers
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fixpoint_cli.names import near_miss
from fixpoint_diffusion.files import read_json
from fixpoint_diffusion.processes.scheduler_tables import (
    CLASS_KEYS,
    CLASSES,
    DDIM_CLASSES,
    DDPM_CLASSES,
    LEFTOVER_KEYS,
    OTHER_PROCESSES,
    PLAIN_VALUES,
)
from fixpoint_diffusion.processes.schedules import PREDICTION_TYPES, NoiseSchedule, check_timesteps, refusal
from fixpoint_diffusion.processes.solvers import SERVED
from fixpoint_diffusion.processes.transitions import Transitions
from fixpoint_diffusion.processes.x0_hooks import Clip, DynamicThreshold, X0Hook

_BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
_SPACINGS = ("leading", "linspace", "trailing")
# DDPM's, and what each is called here; the logarithm of the small one and the small one are the same noise.
_VARIANCES = {name: name for name in ("fixed_small", "fixed_large", "learned", "learned_range")} | {
    "fixed_small_log": "fixed_small"
}
_MOST_TIMESTEPS = 1_000_000
SCHEDULER_FILE = "scheduler_config.json"


@dataclass(frozen=True, eq=False, kw_only=True)
class SamplerConfig:
    """What a diffusers scheduler does, read from its configuration: the process, the timesteps and the steps.

    Make one with :meth:`from_diffusers`.

    Attributes:
        class_name: the scheduler's class in diffusers.
        schedule: the noise schedule, with prediction type, timestep spacing and offset, the level that the last step
            arrives at, and clipping or thresholding as its ``x0_hook``.
        variance_type: of DDPM's steps, as for :class:`Transitions`.
        own_steps: whether :meth:`transitions` are the scheduler's own steps (DDIM and DDPM). Otherwise the scheduler
            is another solver of the same process (Euler, DPM-Solver, ...), and the steps are DDIM's; for its own see
            :func:`solver_transitions`.

    Example:
        >>> config = SamplerConfig.from_diffusers({"_class_name": "DDPMScheduler", "variance_type": "fixed_large"})
        >>> config.schedule.x0_hook, config.transitions(10).noise_from_clipped
        (Clip(limit=1.0), True)
    """

    class_name: str
    schedule: NoiseSchedule
    variance_type: str = "fixed_small"

    @property
    def own_steps(self) -> bool:
        return self.class_name in DDIM_CLASSES or self.is_ddpm

    @property
    def is_ddpm(self) -> bool:
        """Whether the scheduler's own steps are DDPM's, with noise."""
        return self.class_name in DDPM_CLASSES

    @classmethod
    def from_diffusers(cls, scheduler: Any) -> SamplerConfig:
        """Read a scheduler's configuration.

        What the configuration leaves out has the default of its class; keys that belong to other classes are ignored,
        as its class does. A configuration without ``_class_name`` is taken for ``DDIMScheduler``'s, unless its keys
        are those of another class.

        Args:
            scheduler: a diffusers scheduler, its ``config``, the path of a ``scheduler_config.json``, or a folder that
                holds one, itself or in a subfolder ``scheduler``.

        Raises:
            ValueError: a class that is not known to describe a process with betas, a value that cannot be honoured or
                has the wrong type, or a key that no known class has.
            FileNotFoundError: no configuration at the given path.
            TypeError: something that is none of the above.

        Example:
            >>> SamplerConfig.from_diffusers({"_class_name": "DEISMultistepScheduler", "use_karras_sigmas": True})
            Traceback (most recent call last):
            ...
            ValueError: DEISMultistepScheduler with use_karras_sigmas=True cannot be honoured; expected False
        """
        config, name = read_config(scheduler)
        _check_class(name)
        defaults = CLASSES[name]
        check_keys(name, config)
        values = defaults | {key: value for key, value in config.items() if key in defaults}
        for key, default in defaults.items():
            _check_value(name, key, values[key], default)
        variance = values["variance_type"] if name in DDPM_CLASSES else "fixed_small"
        if variance not in _VARIANCES:
            raise refusal(name, "variance_type", variance, f"one of {', '.join(map(repr, _VARIANCES))}")
        return cls(
            class_name=name,
            schedule=_schedule(name, values),
            variance_type=_VARIANCES[variance],
        )

    def transitions(
        self,
        steps: int,
        *,
        timesteps: Tensor | None = None,
        eta: float | None = None,
        prediction_type: str | None = None,
        x0_hook: X0Hook | None = None,
        noise_from_clipped: bool = False,
    ) -> Transitions:
        """The scheduler's steps.

        Args:
            steps: how many. DDIM's steps lead from each timestep t to ``t - N // steps``, whichever comes next.
            timesteps: other ones than the schedule gives, ``(T,)`` int64, descending.
            eta: share of DDPM's noise, from 0. None: 1 for a DDPM scheduler, otherwise 0. With less than 1 the steps
                of a DDPM scheduler are DDIM's.
            prediction_type: what the denoiser predicts; by default the schedule's.
            x0_hook: what is done to each predicted x_0, instead of the schedule's clipping.
            noise_from_clipped: DDIM's ``use_clipped_model_output``. DDPM's steps always do so.

        Raises:
            ValueError: as :meth:`Transitions.of`, or more steps than the schedule can give.

        Example:
            >>> config = SamplerConfig.from_diffusers({"timestep_spacing": "linspace"})
            >>> config.transitions(3).timesteps
            tensor([999, 500,   0])
        """
        levels = self.schedule.alphas_cumprod
        final = levels.new_tensor([self.schedule.final_alpha])
        timesteps = check_timesteps(self.schedule.timesteps(steps) if timesteps is None else timesteps, len(levels))
        eta = float(self.is_ddpm) if eta is None else eta
        ancestral = self.is_ddpm and eta == 1
        if ancestral:
            arrive = torch.cat([levels[timesteps[1:]], final])
        else:
            before = timesteps - len(levels) // steps
            arrive = torch.where(before < 0, final, levels[before])
        return Transitions.between(
            timesteps,
            levels[timesteps],
            arrive,
            eta=eta,
            prediction_type=prediction_type or self.schedule.prediction_type,
            x0_hook=self.schedule.x0_hook if x0_hook is None else x0_hook,
            noise_from_clipped=ancestral or noise_from_clipped,
            variance_type=self.variance_type if ancestral else "fixed_small",
        )


def find_scheduler_file(folder: Path) -> Path | None:
    """The scheduler's configuration in a model or pipeline folder: beside the model, or else in ``scheduler/``."""
    candidates = (folder / SCHEDULER_FILE, folder / "scheduler" / SCHEDULER_FILE)
    return next((file for file in candidates if file.is_file()), None)


def read_config(scheduler: Any) -> tuple[Mapping[str, Any], Any]:
    """The configuration of a scheduler, and the name of its class; arguments as for ``from_diffusers``."""
    if isinstance(scheduler, str | Path):
        path = Path(scheduler)
        file = path if path.is_file() else find_scheduler_file(path)
        if file is None:
            raise FileNotFoundError(f"no {SCHEDULER_FILE} at {path}, nor in its subfolder 'scheduler'")
        config = read_json(file)
        name = config.get("_class_name")
    else:
        config = getattr(scheduler, "config", scheduler)
        if not isinstance(config, Mapping):
            raise TypeError(f"expected a diffusers scheduler, its config or a path, got {type(scheduler).__name__}")
        name = config.get("_class_name") if config is scheduler else type(scheduler).__name__
    return config, _guess_class(config) if name is None else name


def _check_class(name: Any) -> None:
    if isinstance(name, str) and name in CLASSES:
        return
    shown = str(name)[:60]
    what = next((what for start, what in OTHER_PROCESSES.items() if shown.startswith(start)), None)
    if what:
        advice = (
            "chain_from_scheduler takes it" if shown in SERVED else "sample with the model's own diffusers pipeline"
        )
        reason = f"describes {what}: {advice}."
    else:
        reason = f"is not known.{near_miss(shown, CLASSES, cutoff=0.8)}"  # all end alike
    raise ValueError(f"the scheduler {shown} {reason} The docs list those that are read: Schedulers of diffusers")


def _guess_class(config: Mapping[str, Any]) -> str:
    """Which class a configuration without a name belongs to, by its keys."""
    keys = {key for key in config if not key.startswith("_")}
    if "_use_default_values" not in config:  # written by hand
        found = [name for name, defaults in CLASSES.items() if keys & CLASS_KEYS <= defaults.keys()][:1]
    elif keys <= CLASS_KEYS:  # a scheduler's own, which is whole
        fitting = [name for name, defaults in CLASSES.items() if defaults.keys() <= keys]
        most = max((len(CLASSES[name]) for name in fitting), default=0)
        found = [name for name in fitting if len(CLASSES[name]) == most]
    else:
        found = []
    if len({frozenset(CLASSES[name]) for name in found}) != 1:
        raise ValueError(
            "the configuration has no _class_name, and its keys do not tell which scheduler it belongs to: pass the "
            f"scheduler itself, or add _class_name; found the keys {', '.join(sorted(keys)) or 'none'}"
        )
    return found[0]


def check_keys(name: str, config: Mapping[str, Any], own: Collection[str] = ()) -> None:
    """Raise for a key that nobody knows, ``own`` ones apart; keys of other classes may stand."""
    if config.get("predict_epsilon", True) is not True:  # of releases before prediction_type
        raise refusal(name, "predict_epsilon", config["predict_epsilon"], 'prediction_type="sample" in its place')
    known = CLASS_KEYS | LEFTOVER_KEYS | {"predict_epsilon", *own}
    unknown = [key for key in config if not key.startswith("_") and key not in known and config[key] is not None]
    if unknown:
        raise ValueError(
            f"the configuration of {name} has keys that no known scheduler has, and what they ask for would be lost: "
            f"{', '.join(f'{key}={config[key]!r}'[:80] for key in unknown[:5])}. Remove those that do not matter"
        )


def _check_value(name: str, key: str, value: Any, default: Any) -> None:
    if key in PLAIN_VALUES:
        if value != PLAIN_VALUES[key]:
            advice = "; chain_from_scheduler, in Python, takes the scheduler's own steps" if name in SERVED else ""
            raise refusal(name, key, value, f"{PLAIN_VALUES[key]!r}{advice}")
    elif isinstance(default, bool):
        if not isinstance(value, bool):
            raise refusal(name, key, value, "true or false")
    elif isinstance(default, int):
        if not isinstance(value, numbers.Integral) or isinstance(value, bool) or not 0 <= int(value) <= _MOST_TIMESTEPS:
            raise refusal(name, key, value, f"a whole number of at most {_MOST_TIMESTEPS}")
    elif isinstance(default, float) and not (
        isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
    ):
        raise refusal(name, key, value, "a number")
    choices = {
        "prediction_type": PREDICTION_TYPES,
        "timestep_spacing": _SPACINGS,
        "beta_schedule": _BETA_SCHEDULES,
        "final_sigmas_type": ("zero", "sigma_min"),
    }.get(key)
    if choices and value not in choices:
        raise refusal(name, key, value, f"one of {', '.join(map(repr, choices))}")


def _schedule(name: str, values: Mapping[str, Any]) -> NoiseSchedule:
    steps = int(values["num_train_timesteps"])
    ends = (float(values["beta_start"]), float(values["beta_end"]))
    if min(ends) < 0:
        raise ValueError(f"beta_start and beta_end of {name} must not be negative, got {ends[0]:g} and {ends[1]:g}")
    if values["trained_betas"] is not None:
        try:
            betas = torch.as_tensor(values["trained_betas"], dtype=torch.float64, device="cpu")
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"trained_betas of {name} must be a list of numbers: {error}") from error
        if betas.shape != (steps,):
            raise ValueError(
                f"trained_betas of {name} have shape {tuple(betas.shape)}; expected ({steps},), for "
                f"num_train_timesteps={steps}"
            )
        schedule = NoiseSchedule.from_betas(betas)
    elif values["beta_schedule"] == "linear":
        schedule = NoiseSchedule.linear(steps, *ends)
    elif values["beta_schedule"] == "scaled_linear":
        schedule = NoiseSchedule.scaled_linear(steps, *ends)
    else:
        schedule = NoiseSchedule.cosine(steps)
    if "snr_shift_scale" in values:
        schedule = schedule.shift_snr(values["snr_shift_scale"])
    if values.get("rescale_betas_zero_snr"):
        schedule = schedule.zero_terminal_snr()
    to_one = values.get("set_alpha_to_one", True) and values.get("final_sigmas_type") != "sigma_min"
    return replace(
        schedule,
        final_alpha=1.0 if to_one else float(schedule.alphas_cumprod[0]),
        prediction_type=values["prediction_type"],
        timestep_spacing=values.get("timestep_spacing", "linspace"),
        steps_offset=int(values.get("steps_offset", 0)),
        x0_hook=_hook(values),
    )


def _hook(values: Mapping[str, Any]) -> X0Hook | None:
    if values.get("thresholding"):
        return DynamicThreshold(values["dynamic_thresholding_ratio"], values["sample_max_value"])
    # CogVideoX's schedulers have the option, and no code for it.
    if values.get("clip_sample") and "snr_shift_scale" not in values:
        return Clip(values["clip_sample_range"])
    return None
