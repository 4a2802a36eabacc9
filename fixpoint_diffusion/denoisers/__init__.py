"""Denoisers: anything called as ``denoiser(x: (N, *shape), t: (N,) int64) -> (N, *shape)``, and where to get one."""

# The first import of this subpackage sets the name `families` here: it must come before the function of that name.
import fixpoint_diffusion.denoisers.families  # noqa: F401
from fixpoint_diffusion.denoisers.diffusers import DiffusersDenoiser
from fixpoint_diffusion.denoisers.embedded import EMBEDDED_MODELS, embedded, embedded_folder
from fixpoint_diffusion.denoisers.fpdm import FPDMDenoiser
from fixpoint_diffusion.denoisers.guided import Guided
from fixpoint_diffusion.denoisers.loading import load_denoiser
from fixpoint_diffusion.denoisers.protocol import (
    ConditioningInput,
    Denoiser,
    Description,
    NetworkDenoiser,
    describe,
)
from fixpoint_diffusion.denoisers.registry import Family, families, family, family_of, family_of_class, register_family
from fixpoint_diffusion.denoisers.sharded import ShardedDenoiser, sharded
from fixpoint_diffusion.denoisers.transformer import TransformerDenoiser

__all__ = [
    "EMBEDDED_MODELS",
    "ConditioningInput",
    "Denoiser",
    "Description",
    "DiffusersDenoiser",
    "FPDMDenoiser",
    "Family",
    "Guided",
    "NetworkDenoiser",
    "ShardedDenoiser",
    "TransformerDenoiser",
    "describe",
    "embedded",
    "embedded_folder",
    "families",
    "family",
    "family_of",
    "family_of_class",
    "load_denoiser",
    "register_family",
    "sharded",
]
