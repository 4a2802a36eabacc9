"""The diffusion transformer (DiT)."""

from fixpoint_diffusion.models.dit.config import DiTConfig
from fixpoint_diffusion.models.dit.model import DiT

__all__ = ["DiT", "DiTConfig"]
