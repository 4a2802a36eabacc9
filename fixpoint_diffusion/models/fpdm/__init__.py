"""The fixed point diffusion model (FPDM)."""

from fixpoint_diffusion.models.fpdm.config import FPDMConfig
from fixpoint_diffusion.models.fpdm.model import FPDM, FPDMLayerProblem, fpdm_layer_problem

__all__ = ["FPDM", "FPDMConfig", "FPDMLayerProblem", "fpdm_layer_problem"]
