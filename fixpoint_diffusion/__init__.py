"""Diffusion sampling and denoisers as fixed point problems, for the solvers of ``fixpoint``."""

from fixpoint_diffusion.chains import DDIMChain, SamplingChain, StochasticDDIMChain, Transitions
from fixpoint_diffusion.denoisers import embedded, load_denoiser
from fixpoint_diffusion.fpdm import FPDM, FPDMConfig, sample_fpdm
from fixpoint_diffusion.noise import initial_noise, step_noise
from fixpoint_diffusion.prior import GaussianPrior
from fixpoint_diffusion.sampling import SamplingResult, deq_ddim_settings, sample
from fixpoint_diffusion.schedules import NoiseSchedule

__all__ = [
    "FPDM",
    "DDIMChain",
    "FPDMConfig",
    "GaussianPrior",
    "NoiseSchedule",
    "SamplingChain",
    "SamplingResult",
    "StochasticDDIMChain",
    "Transitions",
    "deq_ddim_settings",
    "embedded",
    "initial_noise",
    "load_denoiser",
    "sample",
    "sample_fpdm",
    "step_noise",
]
