"""FPDM's own samplers: step by step, with iterations and starts of the layer as asked for, and as one fixed point."""

from fixpoint_diffusion.sampling.fpdm.adaptive import adaptive_tolerance
from fixpoint_diffusion.sampling.fpdm.iterations import ToTolerance
from fixpoint_diffusion.sampling.fpdm.joint import JointSamples, sample_fpdm_jointly
from fixpoint_diffusion.sampling.fpdm.sampler import (
    FPDMOptions,
    FPDMSamples,
    FPDMStep,
    follow_transitions,
    fpdm_steps,
    sample_fpdm,
)

__all__ = [
    "FPDMOptions",
    "FPDMSamples",
    "FPDMStep",
    "JointSamples",
    "ToTolerance",
    "adaptive_tolerance",
    "follow_transitions",
    "fpdm_steps",
    "sample_fpdm",
    "sample_fpdm_jointly",
]
