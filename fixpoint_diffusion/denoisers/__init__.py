"""Denoisers: anything called as ``denoiser(x: (N, *shape), t: (N,) int64) -> (N, *shape)``, and where to get one."""

from fixpoint_diffusion.denoisers.diffusers import DiffusersDenoiser, load_denoiser
from fixpoint_diffusion.denoisers.embedded import EMBEDDED_MODELS, embedded, embedded_folder
from fixpoint_diffusion.denoisers.guided import Guided

__all__ = ["EMBEDDED_MODELS", "DiffusersDenoiser", "Guided", "embedded", "embedded_folder", "load_denoiser"]
