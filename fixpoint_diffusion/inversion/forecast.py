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
        self._secants: tuple[Tensor, Tensor] | None = None

    def observe(self, latents: Tensor, images: Tensor) -> None:
        """Learn from latents and images ``(B, T, D)`` of a round."""
        self._secants = self._learned(latents, images)
        # Copies: the search writes the next round into the same memory.
        self._past = [(latents.clone(), images.clone()), *self._past][:_MEMORY]

    def forget_move(self, samples: Tensor) -> None:
        """The next images of these samples ``(N,)`` are not to be compared with their last ones."""
        for _, images in self._past:
            images[samples] = torch.nan

    def error(self, misses: Tensor) -> Tensor:
        """RMS errors ``(n, B)`` that follow from n sorts of misses ``(n, B, T, D)``."""
        e = torch.zeros_like(misses[:, :, 0])
        for k in range(misses.shape[2]):
            grown = self._slopes[k] * e
            if self._secants is not None:
                weights, excess = (x[:, k] for x in self._secants)
                grown = grown + torch.einsum("nbm,bmd->nbd", torch.einsum("bmd,nbd->nbm", weights, e), excess)
            e = grown + misses[:, :, k]
        return e.square().mean(dim=2).sqrt()

    def _learned(self, latents: Tensor, images: Tensor) -> tuple[Tensor, Tensor] | None:
        """Of every step, coefficients of a change of its input, and what they add to what the slope makes of it."""
        if not self._past:
            return None
        rounds = [(latents, images), *self._past]
        pairs = list(pairwise(rounds))
        moved = torch.stack([new[0] - old[0] for new, old in pairs], dim=2)
        seen = torch.stack([new[1] - old[1] for new, old in pairs], dim=2)
        gram = moved @ moved.mT
        size = gram.diagonal(dim1=2, dim2=3).mean(dim=2)[..., None, None]
        unit = torch.eye(len(pairs), dtype=gram.dtype, device=gram.device)
        weights = torch.linalg.solve_ex(torch.where(size > 0, gram + _RIDGE * size * unit, unit), moved)[0]
        excess = seen - self._slopes[:, None] * moved
        # A round that was not finite has shown nothing of its steps.
        sound = (torch.isfinite(weights) & torch.isfinite(excess)).all(dim=3, keepdim=True)
        return torch.where(sound, weights, 0), torch.where(sound, excess, 0)
