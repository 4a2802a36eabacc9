"""Sampling: a chain solved for all of its latents, and FPDM's own sampler."""

from fixpoint_diffusion.sampling.adaptive import adaptive_tolerance
from fixpoint_diffusion.sampling.fpdm import FPDMSamples, FPDMStep, fpdm_steps, sample_fpdm
from fixpoint_diffusion.sampling.iterations import ToTolerance
from fixpoint_diffusion.sampling.joint import JointSamples, sample_fpdm_jointly
from fixpoint_diffusion.sampling.sample import SamplingResult, deq_ddim_settings, sample

__all__ = [
    "FPDMSamples",
    "FPDMStep",
    "JointSamples",
    "SamplingResult",
    "ToTolerance",
    "adaptive_tolerance",
    "deq_ddim_settings",
    "fpdm_steps",
    "sample",
    "sample_fpdm",
    "sample_fpdm_jointly",
]
