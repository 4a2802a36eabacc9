"""Inversion: the noise from which a chain arrives at a given image."""

from fixpoint_diffusion.inversion.drawn import DrawnInverse
from fixpoint_diffusion.inversion.invert import invert
from fixpoint_diffusion.inversion.parallel import ParallelInverse
from fixpoint_diffusion.inversion.result import Found, Inverse, InverseMethod, InverseRound
from fixpoint_diffusion.inversion.stepwise import StepwiseInverse

__all__ = [
    "DrawnInverse",
    "Found",
    "Inverse",
    "InverseMethod",
    "InverseRound",
    "ParallelInverse",
    "StepwiseInverse",
    "invert",
]
