"""Diffusion sampling, inversion and denoisers as fixed point problems, for the solvers of ``fixpoint``.

Denoisers live in :mod:`fixpoint_diffusion.denoisers`, fixed point diffusion models in :mod:`fixpoint_diffusion.fpdm`.
"""

from fixpoint_diffusion.chains import DDIMChain, StochasticDDIMChain, Transitions
from fixpoint_diffusion.noise import initial_noise, step_noise
from fixpoint_diffusion.sampling import SamplingResult, deq_ddim_settings, sample
from fixpoint_diffusion.schedules import NoiseSchedule

__all__ = [
    "DDIMChain",
    "NoiseSchedule",
    "SamplingResult",
    "StochasticDDIMChain",
    "Transitions",
    "deq_ddim_settings",
    "initial_noise",
    "sample",
    "step_noise",
]
