"""Networks: the diffusion transformer, and the fixed point diffusion model whose middle is a fixed point layer."""

from fixpoint_diffusion.models.allocation import allocate
from fixpoint_diffusion.models.checkpoint import load_dit, load_fpdm, save_dit, save_fpdm
from fixpoint_diffusion.models.cost import Cost, cost
from fixpoint_diffusion.models.dit import DiT
from fixpoint_diffusion.models.dit.config import DiTConfig
from fixpoint_diffusion.models.fpdm import FPDM, FPDMLayerProblem, fpdm_layer_problem
from fixpoint_diffusion.models.fpdm.config import FPDMConfig
from fixpoint_diffusion.models.transformer_config import TransformerConfig

__all__ = [
    "FPDM",
    "Cost",
    "DiT",
    "DiTConfig",
    "FPDMConfig",
    "FPDMLayerProblem",
    "TransformerConfig",
    "allocate",
    "cost",
    "fpdm_layer_problem",
    "load_dit",
    "load_fpdm",
    "save_dit",
    "save_fpdm",
]
