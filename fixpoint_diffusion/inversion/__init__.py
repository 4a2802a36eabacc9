"""Inversion: the noise from which a chain arrives at a given image."""

from fixpoint_diffusion.inversion.descent.gradients import Epoch, Gradient, LinearTerm
from fixpoint_diffusion.inversion.descent.optimised import Descent, OptimisedInverse
from fixpoint_diffusion.inversion.descent.settings import deq_ddim_inversion_settings
from fixpoint_diffusion.inversion.drawn import DrawnInverse
from fixpoint_diffusion.inversion.explicit import ExplicitInverse, ddim_encoding
from fixpoint_diffusion.inversion.invert import invert
from fixpoint_diffusion.inversion.parallel import ParallelInverse
from fixpoint_diffusion.inversion.result import Found, Inverse, InverseMethod, InverseRound
from fixpoint_diffusion.inversion.stepwise import StepwiseInverse

__all__ = [
    "Descent",
    "DrawnInverse",
    "Epoch",
    "ExplicitInverse",
    "Found",
    "Gradient",
    "Inverse",
    "InverseMethod",
    "InverseRound",
    "LinearTerm",
    "OptimisedInverse",
    "ParallelInverse",
    "StepwiseInverse",
    "ddim_encoding",
    "deq_ddim_inversion_settings",
    "invert",
]
