"""A solver in one file: Aitken's scheme, in the vector form of Irons and Tuck (Int. J. Numer. Methods Eng. 1, 1969)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import fixpoint

State = tuple[Tensor, Tensor] | None  # the last residuals, and the damping that was used on them


@dataclass(frozen=True, kw_only=True)
class Aitken(fixpoint.Solver):
    """``z <- z + w g`` with ``g = f(z) - z`` and, for each row, ``w <- -w <g_old, g - g_old> / |g - g_old|^2``."""

    first: float = 0.5  # the damping of the first step

    def init(self, z: Tensor) -> State:
        return None

    def step(self, z: Tensor, fz: Tensor, state: State) -> tuple[Tensor, State]:
        g = fz - z
        if state is None:
            damping = torch.full_like(g[:, :1], self.first)
        else:
            g_old, damping = state
            change = g - g_old
            size = change.square().sum(dim=1, keepdim=True)
            moved = size > 0  # false for a row that is solved, or whose residual did not change
            ratio = (g_old * change).sum(dim=1, keepdim=True) / torch.where(moved, size, 1)
            damping = torch.where(moved, -damping * ratio, damping)
        return z + damping * g, (g, damping)
