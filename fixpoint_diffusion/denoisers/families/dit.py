"""The diffusion transformer of this package, ``DiT``."""

from __future__ import annotations

from fixpoint_diffusion.denoisers.transformer import TransformerDenoiser, transformer_family
from fixpoint_diffusion.models import DiT, DiTConfig, load_dit, save_dit

FAMILY = transformer_family(
    "dit", DiT, DiTConfig, denoiser_class=TransformerDenoiser, load=load_dit, save=save_dit, training={}
)
