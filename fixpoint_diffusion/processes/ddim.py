"""DDIM's and DDPM's steps: how much of the old noise a step keeps, and how much it adds."""

from __future__ import annotations

import torch
from torch import Tensor

from fixpoint_diffusion.processes.schedules import check_choice

# In diffusers' words. The first is DDIM's own, the others are DDPM's, with eta = 1.
VARIANCE_TYPES = ("fixed_small", "fixed_large", "learned", "learned_range")


def ddim_weights(
    timesteps: Tensor, alphas: Tensor, alphas_prev: Tensor, *, eta: float, variance_type: str
) -> tuple[Tensor, Tensor]:
    """``(direction, sigma)``, ``(T,)`` float64 each, as :class:`Transitions` has them.

    Args:
        timesteps, alphas, alphas_prev: ``(T,)``, as there.
        eta, variance_type: as for :meth:`Transitions.of`.

    Raises:
        ValueError: an eta below 0, or above the largest legal one; a variance type that is unknown, or needs another
            eta.

    Source: Song et al., "Denoising Diffusion Implicit Models" (2021), Eq. 12 and 16.
    """
    check_choice("variance_type", variance_type, VARIANCE_TYPES)
    if variance_type != "fixed_small" and eta != 1:
        raise ValueError(f"variance_type={variance_type!r} is DDPM's and needs eta=1, got eta={eta:g}")
    share = 1 - alphas / alphas_prev
    if not eta >= 0:
        raise ValueError(f"eta must be a number of at least 0, got {eta}")
    # 1 - a' - sigma^2 >= 0 for every step that arrives at a noisy latent.
    bounds = ((1 - alphas) / share).sqrt()[alphas_prev < 1]
    largest = float(bounds.min()) if len(bounds) else float("inf")
    if eta > largest * (1 + 1e-12):
        raise ValueError(
            f"eta={eta:g} asks a step for more noise than its latent may hold (a negative variance for what is "
            f"left of the old noise); the largest legal eta for these timesteps is {largest:.6g}"
        )
    # A latent without noise (alpha = 1) keeps none of it and gets none: 0, not 0 / 0.
    kept = torch.where(alphas < 1, alphas / alphas_prev * (1 - alphas_prev) / (1 - alphas), 0)
    noisy = (alphas < 1) & (eta > 0)  # without eta, levels may fall, too, and their share be negative
    sigma = torch.where(noisy, eta * (share * (1 - alphas_prev) / (1 - alphas)).sqrt(), 0)
    if variance_type == "fixed_large":
        sigma = share.sqrt() * (timesteps > 0)
    # 1 - a' - sigma^2, written so that nothing cancels at eta = 1; above, rounding must not leave -1e-17.
    return ((1 - alphas_prev) * (1 - eta**2 + eta**2 * kept)).clamp(min=0).sqrt(), sigma
