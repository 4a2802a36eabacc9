"""The noise schedules that new models are trained on, as diffusers' schedulers write them."""

from __future__ import annotations

from typing import Any

LINEAR_SCHEDULE: dict[str, Any] = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_schedule": "linear",
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "prediction_type": "epsilon",
    "rescale_betas_zero_snr": False,
    "timestep_spacing": "leading",
    "steps_offset": 0,
    "set_alpha_to_one": True,
    "clip_sample": False,
}
# With zero terminal SNR a sampler must start at the last timestep, which "leading" never visits. "trailing" does, and
# each of its steps arrives at the level of the next: those of "linspace", as diffusers takes them, arrive beside it.
ZERO_SNR_SCHEDULE = LINEAR_SCHEDULE | {
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
}
