"""Fixed point diffusion models: a diffusion transformer whose middle is one fixed point layer."""

from fixpoint_diffusion.fpdm.allocation import allocate
from fixpoint_diffusion.fpdm.checkpoint import FPDMDenoiser, load_fpdm, save_fpdm
from fixpoint_diffusion.fpdm.config import FPDMConfig
from fixpoint_diffusion.fpdm.model import FPDM, FPDMLayerProblem, fpdm_layer_problem
from fixpoint_diffusion.fpdm.sampling import FPDMSamples, FPDMStep, fpdm_steps, sample_fpdm

__all__ = [
    "FPDM",
    "FPDMConfig",
    "FPDMDenoiser",
    "FPDMLayerProblem",
    "FPDMSamples",
    "FPDMStep",
    "allocate",
    "fpdm_layer_problem",
    "fpdm_steps",
    "load_fpdm",
    "sample_fpdm",
    "save_fpdm",
]
