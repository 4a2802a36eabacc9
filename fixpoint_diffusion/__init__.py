"""Diffusion sampling and denoisers as fixed point problems, for the solvers of ``fixpoint``."""

from fixpoint_diffusion.chains import DDIMChain, SamplingChain, StochasticDDIMChain
from fixpoint_diffusion.denoisers import embedded, load_denoiser
from fixpoint_diffusion.inversion import (
    DrawnInverse,
    ExplicitInverse,
    Inverse,
    OptimisedInverse,
    ParallelInverse,
    StepwiseInverse,
    deq_ddim_inversion_settings,
    invert,
)
from fixpoint_diffusion.models import FPDM, DiT, DiTConfig, FPDMConfig
from fixpoint_diffusion.processes import GaussianPrior, NoiseSchedule, Transitions, initial_noise, step_noise
from fixpoint_diffusion.sampling import SamplingResult, deq_ddim_settings, sample, sample_fpdm

__all__ = [
    "FPDM",
    "DDIMChain",
    "DiT",
    "DiTConfig",
    "DrawnInverse",
    "ExplicitInverse",
    "FPDMConfig",
    "GaussianPrior",
    "Inverse",
    "NoiseSchedule",
    "OptimisedInverse",
    "ParallelInverse",
    "SamplingChain",
    "SamplingResult",
    "StepwiseInverse",
    "StochasticDDIMChain",
    "Transitions",
    "deq_ddim_inversion_settings",
    "deq_ddim_settings",
    "embedded",
    "initial_noise",
    "invert",
    "load_denoiser",
    "sample",
    "sample_fpdm",
    "step_noise",
]
