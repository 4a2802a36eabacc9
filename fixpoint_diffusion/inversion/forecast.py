"""How far off the ordinary sampler will end, foretold without running it."""

from __future__ import annotations

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
        # Latents and images of the latest rounds of each sample, the last one first; NaN where there was none.
        self._rounds: Tensor | None = None
        self._secants: tuple[Tensor, Tensor] | None = None

    def observe(self, latents: Tensor, images: Tensor, samples: Tensor) -> None:
        """Learn from latents and images ``(B, T, D)`` of a round in which some samples ``(N,)`` were at work."""
        if self._rounds is None:
            self._rounds = latents.new_full((_MEMORY + 1, 2, *latents.shape), torch.nan)
        self._rounds[1:, :, samples] = self._rounds[:-1, :, samples]
        self._rounds[0, 0, samples], self._rounds[0, 1, samples] = latents[samples], images[samples]
        self._secants = self._learned(self._rounds)

    def forget_move(self, samples: Tensor) -> None:
        """The next images of these samples ``(N,)`` are not to be compared with their last ones."""
        if self._rounds is not None:
            self._rounds[:, 1, samples] = torch.nan

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

    def _learned(self, rounds: Tensor) -> tuple[Tensor, Tensor]:
        """Of every step, coefficients of a change of its input, and what they add to what the slope makes of it."""
        moved, seen = (rounds[:-1] - rounds[1:]).permute(1, 2, 3, 0, 4)
        known = torch.isfinite(moved).all(dim=3, keepdim=True)
        moved = torch.where(known, moved, 0)
        gram = moved @ moved.mT
        size = (gram.diagonal(dim1=2, dim2=3).sum(dim=2) / known.sum(dim=(2, 3)))[..., None, None]
        unit = torch.eye(_MEMORY, dtype=gram.dtype, device=gram.device)
        weights = torch.linalg.solve_ex(torch.where(size > 0, gram + _RIDGE * size * unit, unit), moved)[0]
        excess = seen - self._slopes[:, None] * moved
        # A round that was not finite has shown nothing of its steps.
        sound = (torch.isfinite(weights) & torch.isfinite(excess)).all(dim=3, keepdim=True)
        return torch.where(sound, weights, 0), torch.where(sound, excess, 0)
