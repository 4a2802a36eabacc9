"""What a denoiser's output means: the predicted image and noise, as weights of the latent and of the output."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fixpoint_diffusion.processes.schedules import PREDICTION_TYPES

# In diffusers' words. A flow predicts eps - x_0, the way from the image to the noise.
DENOISER_PREDICTIONS = (*PREDICTION_TYPES, "flow_prediction")


class Reading(NamedTuple):
    """What is predicted, from a latent x and the denoiser's output; all attributes are ``(T,)``::

        x_0 = (image_of_x x + image_of_out out) / image_divisor
        eps = (noise_of_x x + noise_of_out out) / noise_divisor

    Divided is at the end, so that rounding is that of the usual formulas: a chain may enlarge it much.
    """

    image_of_x: Tensor
    image_of_out: Tensor
    image_divisor: Tensor
    noise_of_x: Tensor
    noise_of_out: Tensor
    noise_divisor: Tensor

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
            sign, square = 1 if prediction_type == "epsilon" else -1, alphas * sigma_data**2 + 1 - alphas
            of_out = sign * sigma_data * square.sqrt()
            return cls(sigma_data**2 * signal, of_out * noise, square, noise, -of_out * signal, square)
        if prediction_type == "epsilon":
            return cls(one, -noise, signal, zero, one, one)
        if prediction_type == "v_prediction":
            return cls(signal, -noise, one, noise, signal, one)
        if prediction_type == "flow_prediction":
            return cls(one, -noise, signal + noise, one, signal, signal + noise)
        return cls(zero, one, one, one, -signal, noise)
