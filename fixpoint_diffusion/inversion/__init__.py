"""The noise from which a sampler arrives at a given image."""

from fixpoint_diffusion.inversion.gradients import Epoch, LinearTerm
from fixpoint_diffusion.inversion.optimised import Descent, OptimisedInverse, ddim_encoding
from fixpoint_diffusion.inversion.settings import deq_ddim_inversion_settings

__all__ = ["Descent", "Epoch", "LinearTerm", "OptimisedInverse", "ddim_encoding", "deq_ddim_inversion_settings"]
