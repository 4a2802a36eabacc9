"""The keys of diffusers' schedulers with their defaults, for the classes whose configuration can be read."""

from __future__ import annotations

from typing import Any

_PROCESS: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
    "steps_offset": 0,
}
_LATENT = {"beta_start": 0.00085, "beta_end": 0.012}
_SCALED = {"beta_schedule": "scaled_linear"}
_LINSPACE = {"timestep_spacing": "linspace"}
_CLIP = {"clip_sample": True, "clip_sample_range": 1.0}
_THRESHOLD = {"thresholding": False, "dynamic_thresholding_ratio": 0.995, "sample_max_value": 1.0}
_ZERO_SNR = {"rescale_betas_zero_snr": False}
_SIGMAS = {"use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False}
_FLOW = {"use_flow_sigmas": False, "flow_shift": 1.0}
_SHIFT = {"use_dynamic_shifting": False, "time_shift_type": "exponential"}
_DPM = {
    "solver_order": 2,
    "algorithm_type": "dpmsolver++",
    "solver_type": "midpoint",
    "lambda_min_clipped": float("-inf"),
    "variance_type": None,
    "final_sigmas_type": "zero",
}

_DDIM = _PROCESS | _CLIP | _THRESHOLD | _ZERO_SNR | {"set_alpha_to_one": True}
_DDPM = _PROCESS | _CLIP | _THRESHOLD | _ZERO_SNR | {"variance_type": "fixed_small"}
# These ignore their clip_sample, and have a sample_max_value without thresholding.
_COGVIDEOX = (
    _PROCESS
    | _LATENT
    | _SCALED
    | _CLIP
    | _ZERO_SNR
    | {"set_alpha_to_one": True, "sample_max_value": 1.0, "snr_shift_scale": 3.0}
)

# Schedulers whose steps are those of ``SamplerConfig.transitions``.
DDIM_CLASSES: dict[str, dict[str, Any]] = {
    "DDIMScheduler": _DDIM,
    "DDIMParallelScheduler": _DDIM,
    "CogVideoXDDIMScheduler": _COGVIDEOX,
}
DDPM_CLASSES: dict[str, dict[str, Any]] = {"DDPMScheduler": _DDPM, "DDPMParallelScheduler": _DDPM}
# Schedulers that solve the same process in their own way: of these the process is read.
SOLVER_CLASSES: dict[str, dict[str, Any]] = {
    "PNDMScheduler": _PROCESS | {"skip_prk_steps": False, "set_alpha_to_one": False},
    "LMSDiscreteScheduler": _PROCESS | _LINSPACE | _SIGMAS,
    "EulerDiscreteScheduler": _PROCESS
    | _LINSPACE
    | _SIGMAS
    | _ZERO_SNR
    | {
        "interpolation_type": "linear",
        "sigma_min": None,
        "sigma_max": None,
        "timestep_type": "discrete",
        "final_sigmas_type": "zero",
    },
    "EulerAncestralDiscreteScheduler": _PROCESS | _LINSPACE | _ZERO_SNR,
    "HeunDiscreteScheduler": _PROCESS | _LATENT | _LINSPACE | _SIGMAS | _CLIP | {"clip_sample": False},
    "KDPM2DiscreteScheduler": _PROCESS | _LATENT | _LINSPACE | _SIGMAS,
    "KDPM2AncestralDiscreteScheduler": _PROCESS | _LATENT | _LINSPACE | _SIGMAS,
    "DPMSolverSDEScheduler": _PROCESS | _LATENT | _LINSPACE | _SIGMAS | {"noise_sampler_seed": None},
    "DPMSolverMultistepScheduler": _PROCESS
    | _LINSPACE
    | _THRESHOLD
    | _SIGMAS
    | _FLOW
    | _SHIFT
    | _DPM
    | _ZERO_SNR
    | {"lower_order_final": True, "euler_at_final": False, "use_lu_lambdas": False},
    # It has one spacing alone, and no key for it.
    "DPMSolverSinglestepScheduler": {
        name: value
        for name, value in (_PROCESS | _THRESHOLD | _SIGMAS | _FLOW | _SHIFT | _DPM).items()
        if name not in ("timestep_spacing", "steps_offset")
    }
    | {"lower_order_final": False},
    "DEISMultistepScheduler": _PROCESS
    | _LINSPACE
    | _THRESHOLD
    | _SIGMAS
    | _FLOW
    | _SHIFT
    | {"solver_order": 2, "algorithm_type": "deis", "solver_type": "logrho", "lower_order_final": True},
    "UniPCMultistepScheduler": _PROCESS
    | _LINSPACE
    | _THRESHOLD
    | _SIGMAS
    | _FLOW
    | _SHIFT
    | _ZERO_SNR
    | {
        "solver_order": 2,
        "predict_x0": True,
        "solver_type": "bh2",
        "lower_order_final": True,
        "disable_corrector": [],
        "solver_p": None,
        "final_sigmas_type": "zero",
        "sigma_min": None,
        "sigma_max": None,
        "shift_terminal": None,
    },
    "SASolverScheduler": _PROCESS
    | _LINSPACE
    | _THRESHOLD
    | _SIGMAS
    | _FLOW
    | {
        "predictor_order": 2,
        "corrector_order": 2,
        "tau_func": None,
        "algorithm_type": "data_prediction",
        "lower_order_final": True,
        "lambda_min_clipped": float("-inf"),
        "variance_type": None,
    },
    "CogVideoXDPMScheduler": _COGVIDEOX,
}
CLASSES = DDIM_CLASSES | DDPM_CLASSES | SOLVER_CLASSES

# Values that leave the process and its timesteps as the betas say; with any other, a configuration is refused.
PLAIN_VALUES: dict[str, Any] = {
    **_SIGMAS,
    "use_lu_lambdas": False,
    "use_flow_sigmas": False,
    "use_dynamic_shifting": False,
    "lambda_min_clipped": float("-inf"),
    "sigma_min": None,
    "sigma_max": None,
    "shift_terminal": None,
    "timestep_type": "discrete",
}
# Keys of known classes; of old configurations, and of schedulers for distilled models, that say nothing of the process.
CLASS_KEYS = {key for keys in CLASSES.values() for key in keys}
LEFTOVER_KEYS = {"tensor_format", "original_inference_steps", "timestep_scaling"}

# What else a class may describe, by how its name begins.
OTHER_PROCESSES = {
    "FlowM": "a flow between noise and data",
    "LTX": "a flow between noise and data",
    "Helios": "a flow between noise and data",
    "Piflow": "a flow between noise and data",
    "MiniMax": "a flow between noise and data",
    "EDM": "noise levels without betas, on data that is not scaled down",
    "Cosine": "noise levels without betas, on data that is not scaled down",
    "KarrasVe": "noise levels without betas, on data that is not scaled down",
    "ScoreSde": "a stochastic differential equation in continuous time",
    "CMStochastic": "a consistency model",
    "ConsistencyDecoder": "a consistency model",
    "LCM": "a consistency model",
    "TCD": "a consistency model",
    "SCM": "a consistency model",
    "IPNDM": "levels of its own, not those of betas",
    "DDPMWuerstchen": "a process in continuous time",
    "UnCLIP": "a sampler of its own",
    "RePaint": "a sampler of its own",
    "DDIMInverse": "the way from an image to its noise",
    "DPMSolverMultistepInverse": "the way from an image to its noise",
    "VQDiffusion": "noise on discrete tokens",
    "Amused": "noise on discrete tokens",
}
