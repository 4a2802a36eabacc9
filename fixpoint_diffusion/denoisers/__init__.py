"""Denoisers: anything called as ``denoiser(x: (N, *shape), t: (N,) int64) -> (N, *shape)``, and where to get one."""

from fixpoint_diffusion.denoisers.diffusers import DiffusersDenoiser, load_denoiser
from fixpoint_diffusion.denoisers.embedded import EMBEDDED_MODELS, embedded, embedded_folder

__all__ = ["EMBEDDED_MODELS", "DiffusersDenoiser", "embedded", "embedded_folder", "load_denoiser"]
