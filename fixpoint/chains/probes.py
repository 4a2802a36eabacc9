"""Slopes that are measured: each step is evaluated at displaced inputs too, in random directions."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fixpoint.engine.norms import Array, safe_norm
from fixpoint.engine.outcome import tensor_like

# How far an input is displaced: by this share of its root mean square, and by so many roundings at least. With less,
# the quotient of an inexact step would be mostly its error.
_SPACING = 1e-2
_ROUNDINGS = 16.0
# At least so many directions are drawn, and no more than have so many entries together; then they repeat.
_DIRECTIONS = 64
_ENTRIES = 1 << 22


class Probes:
    """Random directions for chains of ``steps`` states with ``dim`` entries: ``count`` a step, others in each round.

    A chain gets them by its own number of rounds, so its course does not depend on the other chains of the batch.

    Source: C. Bekas, E. Kokiopoulou and Y. Saad, Applied Numerical Mathematics 57 (2007), after M. F. Hutchinson's
    estimate of a trace (1989): for random signs v, the mean of ``v * (J v)`` is the diagonal of J.
    """

    def __init__(self, rows: int, steps: int, dim: int, count: int, like: Tensor) -> None:
        generator = torch.Generator().manual_seed(0)
        number = min(count * max(steps, _DIRECTIONS), max(_ENTRIES // max(dim, 1), _DIRECTIONS))
        signs = torch.randint(0, 2, (number, dim), generator=generator, dtype=torch.int8, device="cpu")
        self._signs, self._dtype = signs.mul_(2).sub_(1).to(like.device), like.dtype
        self._count = count
        self._rounds = np.zeros(rows, dtype=np.int64)

    def signs(self, row: Array, step: Array) -> Tensor:
        """Directions ``(count, N, D)`` for the steps ``(N,)`` of the chains ``row`` ``(N,)``; each call is a round."""
        first = self._count * (step + self._rounds[row])
        self._rounds[np.unique(row)] += 1
        number = (first + np.arange(self._count)[:, None]) % len(self._signs)
        return self._signs[tensor_like(self._signs, number)].to(self._dtype)


def displaced(x: Tensor, signs: Tensor) -> Tensor:
    """Inputs ``(count, N, *shape)``: ``x`` ``(N, *shape)`` moved a little in these directions ``(count, N, D)``."""
    flat = x.flatten(1) if x.ndim > 1 else x[:, None]
    size = safe_norm(flat)[:, None] / max(flat.shape[1], 1) ** 0.5
    spacing = max(_SPACING, _ROUNDINGS * torch.finfo(x.dtype).eps)
    moved = flat + spacing * torch.where((size > 0) & torch.isfinite(size), size, 1) * signs
    return moved.to(x.dtype).unflatten(2, x.shape[1:]) if x.ndim > 1 else moved.to(x.dtype)[..., 0]


def slopes(x: Tensor, images: Tensor, moved: Tensor, moved_images: Tensor) -> Tensor:
    """``(N, D)``: derivative of each entry of the images by its own entry of the inputs, the mean over displacements.

    Where it is not finite, 0: a displaced input may leave the domain of the step.

    Args:
        x, images: Inputs and their images ``(N, *shape)``.
        moved, moved_images: Displaced inputs and their images, ``(count, N, *shape)``; see ``displaced``.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    by, change = (
        (after.to(wide) - before.to(wide)).reshape(*after.shape[:2], -1)
        for before, after in ((x, moved), (images, moved_images))
    )
    quotient = torch.where(by != 0, change / by, 0).mean(dim=0)
    return torch.where(torch.isfinite(quotient), quotient, 0)
