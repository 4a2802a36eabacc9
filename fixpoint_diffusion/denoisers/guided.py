"""Classifier-free guidance as a denoiser around a denoiser."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

NEGATIVE = "negative_"


class Guided:
    """Classifier-free guidance: ``out = negative + scale (positive - negative)``, both from one call of a denoiser.

    Called as ``guided(x, t, **inputs)`` with batch-aligned inputs. An input named ``negative_NAME`` takes the place of
    ``NAME`` in the negative half of the call; inputs without one are the same in both. A chain of guided rows counts
    them as rows; the network sees two for each.

    Args:
        denoiser: called as ``denoiser(x, t, **inputs)`` with both halves, ``(2 N, *shape)``, the negative one first.
        scale: 1 is no guidance, more is more of it.
        rescale: share of the result that is brought back to the standard deviation of the positive prediction; against
            overexposure (Lin et al., 2023, Sec. 3.4).

    Attributes:
        prediction_type: that of the denoiser.

    Raises:
        ValueError: at a call without negative inputs, or with one that has no positive counterpart.

    Source: Ho and Salimans, "Classifier-Free Diffusion Guidance" (2022), Eq. 6.

    Example:
        >>> def denoiser(x, t, label):
        ...     return x * label.reshape(-1, 1)
        >>> labels, none = torch.tensor([1.0, 2.0]), torch.zeros(2)
        >>> guided = Guided(denoiser, 3.0)
        >>> guided(torch.ones(2, 1), torch.zeros(2, dtype=torch.int64), label=labels, negative_label=none)
        tensor([[3.],
                [6.]])
    """

    def __init__(self, denoiser: Callable[..., Tensor], scale: float, *, rescale: float = 0.0) -> None:
        self.denoiser = denoiser
        self.scale = scale
        self.rescale = rescale
        self.prediction_type = getattr(denoiser, "prediction_type", None)
        self.prior = getattr(denoiser, "prior", None)

    def __call__(self, x: Tensor, t: Tensor, **inputs: Tensor) -> Tensor:
        """Guided predictions ``(N, *shape)`` for latents of that shape at timesteps ``(N,)``."""
        negative = {name.removeprefix(NEGATIVE): rows for name, rows in inputs.items() if name.startswith(NEGATIVE)}
        positive = {name: rows for name, rows in inputs.items() if not name.startswith(NEGATIVE)}
        if not negative or not negative.keys() <= positive.keys():
            raise ValueError(f"guidance needs inputs NAME and {NEGATIVE}NAME, got {list(inputs)}")
        both = {name: torch.cat([negative.get(name, rows), rows]) for name, rows in positive.items()}
        without, out = self.denoiser(torch.cat([x, x]), torch.cat([t, t]), **both).chunk(2)
        guided = without + self.scale * (out - without)
        if self.rescale == 0:
            return guided
        spread = [part.flatten(1).std(dim=1).reshape(-1, *[1] * (x.ndim - 1)) for part in (out, guided)]
        return (1 - self.rescale) * guided + self.rescale * (spread[0] / spread[1]) * guided
