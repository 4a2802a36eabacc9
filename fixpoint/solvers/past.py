"""What a solver for chains remembers of the steps in its window."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Past(NamedTuple):
    """What is remembered of the last rounds, newest first: inputs and images of steps, ``(B, W, m, D)``."""

    inputs: Tensor
    images: Tensor
    known: Tensor  # (B, W, m) bool

    @classmethod
    def empty(cls, rows: int, width: int, memory: int, dim: int, like: Tensor) -> Past:
        nothing = like.new_zeros(rows, width, memory, dim)
        return cls(nothing, nothing.clone(), torch.zeros(rows, width, memory, dtype=torch.bool, device=like.device))

    def with_newest(self, inputs: Tensor, images: Tensor) -> Past:
        """The same after one more round, the oldest forgotten."""
        known = torch.ones_like(self.known[:, :, :1])
        pairs = ((self.inputs, inputs[:, :, None]), (self.images, images[:, :, None]), (self.known, known))
        return Past(*(torch.cat((new, old[:, :, :-1]), dim=2) for old, new in pairs))
