"""Networks: transformer blocks, and the fixed point diffusion model whose middle is one fixed point layer."""

from fixpoint_diffusion.models.allocation import allocate
from fixpoint_diffusion.models.checkpoint import load_fpdm, save_fpdm
from fixpoint_diffusion.models.fpdm import FPDM, FPDMLayerProblem, fpdm_layer_problem
from fixpoint_diffusion.models.fpdm_config import FPDMConfig

__all__ = [
    "FPDM",
    "FPDMConfig",
    "FPDMLayerProblem",
    "allocate",
    "fpdm_layer_problem",
    "load_fpdm",
    "save_fpdm",
]
