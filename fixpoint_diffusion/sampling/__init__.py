"""Sampling: a chain solved for all of its latents, and FPDM's own sampler."""

from fixpoint_diffusion.sampling.fpdm import (
    FPDMSamples,
    FPDMStep,
    JointSamples,
    ToTolerance,
    adaptive_tolerance,
    fpdm_steps,
    sample_fpdm,
    sample_fpdm_jointly,
)
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
