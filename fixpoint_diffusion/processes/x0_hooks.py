"""What may be done to a predicted x_0 before a sampling step uses it: clipping, thresholding, or a hook of your own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# Called as hook(x_0, step, sample): predictions (N, *shape) in float64 (float32 on devices without it), and for each
# row the step of the chain and the sample of the batch that it belongs to, both (N,) int64 on the device of x_0.
# Returns (N, *shape). Each row of the result may depend on its own row alone.
X0Hook = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Clip:
    """Clip every entry of a predicted x_0 to ``[-limit, limit]``: diffusers' ``clip_sample``.

    Args:
        limit: largest absolute value, above 0; diffusers calls it ``clip_sample_range``. Infinity: no clipping.

    Raises:
        ValueError: a limit that is not above 0.

    Example:
        >>> import torch
        >>> row = torch.zeros(1, dtype=torch.int64)
        >>> Clip(1.0)(torch.tensor([[0.5, -3.0]]), row, row)
        tensor([[ 0.5000, -1.0000]])
    """

    limit: float = 1.0

    def __post_init__(self) -> None:
        if not self.limit > 0:
            raise ValueError(f"clip_sample must be a positive number, got {self.limit}")

    def __call__(self, x_0: Tensor, step: Tensor, sample: Tensor) -> Tensor:
        return x_0.clamp(-self.limit, self.limit)


@dataclass(frozen=True)
class DynamicThreshold:
    """Clip each predicted image to a quantile of its own absolute values and scale it back: ``thresholding``.

    Args:
        ratio: which quantile, from 0 to 1; diffusers' ``dynamic_thresholding_ratio``.
        max_value: the largest value that the quantile may have, above 0; diffusers' ``sample_max_value``. The smallest
            is 1 (or ``max_value`` where that is less), so that 1 gives plain clipping to [-1, 1].

    Raises:
        ValueError: a ratio outside [0, 1], a max_value that is not above 0.

    Source: Saharia et al., "Photorealistic Text-to-Image Diffusion Models with Deep Language Understanding" (2022),
        Sec. 2.3.

    Example:
        >>> import torch
        >>> row = torch.zeros(1, dtype=torch.int64)
        >>> DynamicThreshold(ratio=1.0, max_value=2.0)(torch.tensor([[0.5, -3.0]]), row, row)
        tensor([[ 0.2500, -1.0000]])
    """

    ratio: float = 0.995
    max_value: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.ratio <= 1:
            raise ValueError(f"dynamic_thresholding_ratio must lie in [0, 1], got {self.ratio}")
        if not self.max_value > 0:
            raise ValueError(f"sample_max_value must be a positive number, got {self.max_value}")

    def __call__(self, x_0: Tensor, step: Tensor, sample: Tensor) -> Tensor:
        # torch.quantile takes at most 16 million entries, fewer than a long chain of images has.
        values = x_0.flatten(1).abs().sort(dim=1).values
        place = self.ratio * (values.shape[1] - 1)
        below = int(place)
        above = min(below + 1, values.shape[1] - 1)
        quantile = values[:, below].lerp(values[:, above], place - below)
        limit = quantile.clamp(min=1).clamp(max=self.max_value).reshape(-1, *[1] * (x_0.ndim - 1))
        return x_0.clamp(-limit, limit) / limit


def apply_hook(hook: X0Hook, x_0: Tensor, k: int | slice | Tensor, steps: int, sample: Tensor | None) -> Tensor:
    """The hook on one row after another, whatever the shape of x_0.

    Args:
        hook: as above.
        x_0, k, sample: as x, k and sample of :meth:`Transitions.predict`.
        steps: T.

    Raises:
        ValueError: a hook that returns another shape.
    """
    step = torch.arange(steps, device=x_0.device)[k].reshape(-1)
    rows, samples = x_0, torch.arange(len(x_0), device=x_0.device) if sample is None else sample.to(x_0.device)
    if isinstance(k, slice):
        rows, samples, step = x_0.flatten(0, 1), samples.repeat_interleave(len(step)), step.repeat(len(x_0))
    else:
        step = step.expand(len(x_0))
    found = hook(rows, step, samples)
    if not isinstance(found, Tensor) or found.shape != rows.shape:
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(f"x0_hook must return a tensor of the shape of its input {tuple(rows.shape)}, got {shape}")
    return found.to(x_0.dtype).reshape(x_0.shape)
