"""Slopes that are measured: steps are evaluated beside their inputs too, in random directions."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fixpoint.engine.norms import Array, safe_norm
from fixpoint.engine.outcome import tensor_like

# How far from its input a step is evaluated: by this share of the input's root mean square. Nearer, what an inexact
# step says would be its error; and so many roundings at least.
_SPACING = 1e-2
_ROUNDINGS = 16.0
# So many directions at least, before those of a step come again; and no more than have so many entries together.
_DIRECTIONS = 64
_ENTRIES = 1 << 22


class Probes:
    """Random directions for chains of ``steps`` states with ``dim`` entries, other ones for each step and round.

    Which ones a chain gets is decided by its own rounds, so that no other chain beside it changes its course.

    Source: M. F. Hutchinson, Communications in Statistics 18 (1989): entries of ``v * (J v)`` are those of the diagonal
    of J in the mean, for random signs v.
    """

    def __init__(self, rows: int, steps: int, dim: int, count: int, like: Tensor) -> None:
        generator = torch.Generator().manual_seed(0)
        number = max(min(steps, _ENTRIES // max(dim, 1)), _DIRECTIONS)
        signs = torch.randint(0, 2, (number, dim), generator=generator, dtype=torch.int8, device="cpu")
        self._signs, self._dtype = signs.mul_(2).sub_(1).to(like.device), like.dtype
        self._count = count
        self._rounds = np.zeros(rows, dtype=np.int64)

    def signs(self, row: Array, step: Array) -> Tensor:
        """Directions ``(count, N, D)`` for steps ``(N,)`` of the chains ``row`` ``(N,)``, for one round of these."""
        first = step + self._count * self._rounds[row]
        self._rounds[np.unique(row)] += 1
        number = (first + np.arange(self._count)[:, None]) % len(self._signs)
        return self._signs[tensor_like(self._signs, number)].to(self._dtype)


def beside(x: Tensor, signs: Tensor) -> Tensor:
    """Inputs ``(count, N, *shape)`` a little away from ``x`` ``(N, *shape)`` in the directions ``(count, N, D)``."""
    flat = x.flatten(1) if x.ndim > 1 else x[:, None]
    size = safe_norm(flat)[:, None] / max(flat.shape[1], 1) ** 0.5
    spacing = max(_SPACING, _ROUNDINGS * torch.finfo(x.dtype).eps)
    moved = flat + spacing * torch.where((size > 0) & torch.isfinite(size), size, 1) * signs
    return moved.to(x.dtype).unflatten(2, x.shape[1:]) if x.ndim > 1 else moved.to(x.dtype)[..., 0]


def slopes(x: Tensor, images: Tensor, moved: Tensor, moved_images: Tensor) -> Tensor:
    """``(N, D)``: by how much each entry of the images follows its own entry of the inputs.

    Args:
        x, images: Inputs and their images ``(N, *shape)``.
        moved, moved_images: Those ``beside`` them, ``(count, N, *shape)``.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    by, change = (
        (after.to(wide) - before.to(wide)).reshape(*after.shape[:2], -1)
        for before, after in ((x, moved), (images, moved_images))
    )
    shown = torch.where(by != 0, change / by, 0).mean(dim=0)
    return torch.where(torch.isfinite(shown), shown, 0)
