"""What a denoiser is trained on and a sampler goes back along: schedules, one step's coefficients, noise, the prior."""

from fixpoint_diffusion.processes.noise import initial_noise, step_noise
from fixpoint_diffusion.processes.prior import GaussianPrior
from fixpoint_diffusion.processes.sampler_config import SamplerConfig
from fixpoint_diffusion.processes.schedules import NoiseSchedule
from fixpoint_diffusion.processes.solvers import SERVED, solver_transitions, with_timesteps
from fixpoint_diffusion.processes.step_values import wide
from fixpoint_diffusion.processes.transitions import Transitions
from fixpoint_diffusion.processes.x0_hooks import Clip, DynamicThreshold, X0Hook

__all__ = [
    "SERVED",
    "Clip",
    "DynamicThreshold",
    "GaussianPrior",
    "NoiseSchedule",
    "SamplerConfig",
    "Transitions",
    "X0Hook",
    "initial_noise",
    "solver_transitions",
    "step_noise",
    "wide",
    "with_timesteps",
]
