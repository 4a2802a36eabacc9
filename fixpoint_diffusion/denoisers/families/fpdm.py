"""The fixed point diffusion model of this package, ``FPDM``."""

from __future__ import annotations

from fixpoint_diffusion.denoisers.fpdm import FPDMDenoiser
from fixpoint_diffusion.denoisers.transformer import transformer_family
from fixpoint_diffusion.models import FPDM, FPDMConfig, load_fpdm, save_fpdm

FAMILY = transformer_family(
    "fpdm",
    FPDM,
    FPDMConfig,
    denoiser_class=FPDMDenoiser,
    load=load_fpdm,
    save=save_fpdm,
    # Weight decay keeps the layer a contraction: with 0.01 plain iteration does not converge for some images.
    training={"steps": 8000, "learning_rate": 2e-3, "weight_decay": 0.2},
)
