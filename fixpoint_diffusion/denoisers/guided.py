"""Classifier-free guidance as a denoiser around a denoiser."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fixpoint_diffusion.denoisers.protocol import CLASS_LABELS, ConditioningInput, describe
from fixpoint_diffusion.processes import GaussianPrior

NEGATIVE = "negative_"
SCALE = "guidance_scale"


class Guided:
    """Classifier-free guidance: ``out = negative + scale (positive - negative)``, both from one call of a denoiser.

    Called as ``guided(x, t, **inputs)`` with batch-aligned inputs. An input named ``negative_NAME`` takes the place of
    ``NAME`` in the negative half of the call; inputs without one are the same in both. Where the denoiser has a label
    for "no class", ``class_labels`` need no negative. A chain of guided rows counts them as rows; the network sees two
    for each.

    Args:
        denoiser: called as ``denoiser(x, t, **inputs)`` with both halves, ``(2 N, *shape)``, the negative one first.
        scale: 1 is no guidance, more is more of it. A tensor ``(B,)`` has one for each sample: a chain of B samples
            passes the right ones to every call. A call may also be given ``guidance_scale=`` ``(N,)`` of its own.
        rescale: share of the result that is brought back to the standard deviation of the positive prediction; against
            overexposure (Lin et al., 2023, Sec. 3.4).

    Attributes:
        prediction_type, sample_shape, schedule_config, prior, learned_variance, conditioning: those of the denoiser.
            What it learned of the variance is that of the positive half.
        per_sample: the scale, if it is one for each sample.

    Raises:
        ValueError: for a scale of another shape, or that is no finite number; at a call without negative inputs, with
            one that has no positive counterpart, or with another number of scales than rows.

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

    def __init__(self, denoiser: Callable[..., Tensor], scale: float | Tensor, *, rescale: float = 0.0) -> None:
        if isinstance(scale, Tensor) and scale.ndim > 1:
            raise ValueError(f"scale must be a number or hold one for each sample (B,), got {tuple(scale.shape)}")
        if not isinstance(scale, Tensor) and not (isinstance(scale, numbers.Real) and math.isfinite(scale)):
            raise ValueError(f"scale must be a finite number or a tensor with one for each sample (B,), got {scale!r}")
        about = describe(denoiser)
        self.denoiser = denoiser
        self.scale = scale
        self.rescale = rescale
        self.prediction_type = about.prediction_type
        self.sample_shape = about.sample_shape
        self.schedule_config: Mapping[str, Any] | None = about.schedule_config
        self.prior: GaussianPrior | None = about.prior
        self.learned_variance = about.learned_variance
        self.conditioning: Mapping[str, ConditioningInput] = about.conditioning
        self.per_sample = dict(about.per_sample)
        if isinstance(scale, Tensor) and scale.ndim == 1:
            self.per_sample[SCALE] = scale
        labels = about.class_labels
        self._null_label = None if labels is None else labels.null_label

    def __call__(self, x: Tensor, t: Tensor, *, guidance_scale: Tensor | None = None, **inputs: Tensor) -> Tensor:
        """Guided predictions ``(N, *shape)`` for latents of that shape at timesteps ``(N,)``."""
        scale = self._scale(x, guidance_scale)
        negative = {name.removeprefix(NEGATIVE): rows for name, rows in inputs.items() if name.startswith(NEGATIVE)}
        positive = {name: rows for name, rows in inputs.items() if not name.startswith(NEGATIVE)}
        if CLASS_LABELS in positive and self._null_label is not None:
            negative.setdefault(CLASS_LABELS, torch.full_like(positive[CLASS_LABELS], self._null_label))
        if not negative or not negative.keys() <= positive.keys():
            raise ValueError(f"guidance needs inputs NAME and {NEGATIVE}NAME, got {list(inputs)}")
        both = {name: torch.cat([negative.get(name, rows), rows]) for name, rows in positive.items()}
        without, out = self.denoiser(torch.cat([x, x]), torch.cat([t, t]), **both).chunk(2)
        channels = x.shape[1] if self.learned_variance else None
        variance = out[:, channels:] if self.learned_variance else None
        without, out = without[:, :channels], out[:, :channels]
        guided = without + scale * (out - without)
        if self.rescale != 0:
            spread = [part.flatten(1).std(dim=1).reshape(-1, *[1] * (x.ndim - 1)) for part in (out, guided)]
            guided = (1 - self.rescale) * guided + self.rescale * (spread[0] / spread[1]) * guided
        return guided if variance is None else torch.cat([guided, variance], dim=1)

    def _scale(self, x: Tensor, given: Tensor | None) -> float | Tensor:
        """The scale in a form that multiplies rows of x."""
        scale = self.scale if given is None else given
        if not isinstance(scale, Tensor) or scale.ndim == 0:
            return scale
        if scale.shape != x.shape[:1]:
            raise ValueError(f"the guidance has {tuple(scale.shape)} scales, expected one for each of {len(x)} rows")
        return scale.to(x.device, x.dtype).reshape(-1, *[1] * (x.ndim - 1))
