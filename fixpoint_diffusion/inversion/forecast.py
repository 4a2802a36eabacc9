"""How far off the ordinary sampler will end, foretold without running it."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

_MEMORY = 2  # changes of each step that are remembered
_RIDGE = 1e-3  # relative weight that keeps nearly dependent changes apart


class Forecast:
    """The error of x_0 that follows from what each step misses by.

    From ``X_0`` the sampler drifts from the trajectory X by ``e_{k+1} = J_k e_k + F_k``, with ``F_k = Phi_k(X_k) -
    X_{k+1}`` and ``e_0 = 0``; ``e_T`` is the error of x_0 to first order. Each ``J_k`` is modelled by the prior's slope
    and by what the last rounds showed of that step.

    Args:
        slopes: ``(T, 1 or D)``.
    """

    def __init__(self, slopes: Tensor) -> None:
        self._slopes = slopes
        self._past: list[tuple[Tensor, Tensor]] = []
        self._weights: Tensor | None = None
        self._excess: Tensor | None = None

    def observe(self, latents: Tensor, images: Tensor) -> None:
        """Learn from latents and images ``(B, T, D)`` of a round."""
        self._weights, self._excess = self._secants(latents, images)
        # Copies: the search writes the next round into the same memory.
        self._past = [(latents.clone(), images.clone()), *self._past][:_MEMORY]

    def error(self, misses: Tensor) -> Tensor:
        """RMS error ``(B,)`` that follows from misses ``(B, T, D)``."""
        weights, excess = self._weights, self._excess
        e = torch.zeros_like(misses[:, 0])
        for k in range(misses.shape[1]):
            grown = self._slopes[k] * e
            if weights is not None and excess is not None:
                grown = grown + torch.einsum("bm,bmd->bd", torch.einsum("bmd,bd->bm", weights[:, k], e), excess[:, k])
            e = grown + misses[:, k]
        return e.square().mean(dim=1).sqrt()

    def _secants(self, latents: Tensor, images: Tensor) -> tuple[Tensor | None, Tensor | None]:
        if not self._past:
            return None, None
        rounds = [(latents, images), *self._past]
        pairs = list(pairwise(rounds))
        moved = torch.stack([new[0] - old[0] for new, old in pairs], dim=2)
        seen = torch.stack([new[1] - old[1] for new, old in pairs], dim=2)
        gram = moved @ moved.mT
        size = gram.diagonal(dim1=2, dim2=3).mean(dim=2)[..., None, None]
        unit = torch.eye(len(pairs), dtype=gram.dtype, device=gram.device)
        weights = torch.linalg.solve_ex(torch.where(size > 0, gram + _RIDGE * size * unit, unit), moved)[0]
        return torch.nan_to_num(weights), torch.nan_to_num(seen - self._slopes[:, None] * moved)
