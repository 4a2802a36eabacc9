"""What a denoiser's output means: the predicted image and noise, as weights of the latent and of the output."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fixpoint_diffusion.processes.schedules import PREDICTION_TYPES

# In diffusers' words. A flow predicts eps - x_0, the way from the image to the noise.
DENOISER_PREDICTIONS = (*PREDICTION_TYPES, "flow_prediction")


class Reading(NamedTuple):
    """``x_0 = image_of_x x + image_of_out out`` and ``eps = noise_of_x x + noise_of_out out``, ``(T,)`` each."""

    image_of_x: Tensor
    image_of_out: Tensor
    noise_of_x: Tensor
    noise_of_out: Tensor

    @classmethod
    def of(cls, prediction_type: str, alphas: Tensor, sigma_data: float | None = None) -> Reading:
        """For latents ``x = sqrt(alpha) x_0 + sqrt(1 - alpha) eps``.

        Args:
            prediction_type: what is predicted.
            alphas: signal levels ``(T,)``.
            sigma_data: standard deviation of the data by which a network of EDM scales what it is given and what it
                says (Karras et al., 2022, Eq. 7); None for other networks.
        """
        signal, noise, zero, one = alphas.sqrt(), (1 - alphas).sqrt(), torch.zeros_like(alphas), torch.ones_like(alphas)
        if sigma_data is not None:
            sign = 1 if prediction_type == "epsilon" else -1
            size = (alphas * sigma_data**2 + 1 - alphas).sqrt()
            return cls(
                sigma_data**2 * signal / size**2, sign * noise * sigma_data / size,
                noise / size**2, -sign * signal * sigma_data / size,
            )  # fmt: skip
        if prediction_type == "epsilon":
            return cls(1 / signal, -noise / signal, zero, one)
        if prediction_type == "v_prediction":
            return cls(signal, -noise, noise, signal)
        if prediction_type == "flow_prediction":
            whole = signal + noise
            return cls(1 / whole, -noise / whole, 1 / whole, signal / whole)
        return cls(zero, one, 1 / noise, -signal / noise)
