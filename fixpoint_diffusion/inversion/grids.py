"""Fewer evaluations of long chains: the denoiser is asked at some steps, its outputs at the others are interpolated."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fixpoint_diffusion.extras import needed_for

_COARSEST = 33  # steps of the first grid; each later one has about twice as many
# Outputs change fastest near the image: the steps lie densest there. 1 would be evenly spaced.
_CROWDING = 1.5


@dataclass(frozen=True, eq=False)
class StepGrid:
    """Steps at which the denoiser is asked, and how to get its outputs at all steps from those.

    Attributes:
        steps: ``(n,)``, rising.
        weights: ``(T, n)`` float64, of the outputs at these steps.
        coarser: the same from every second of them, for an estimate of the error; the others have weight 0.
    """

    steps: Tensor
    weights: Tensor
    coarser: Tensor

    @property
    def half(self) -> Tensor:
        """Every second step."""
        return self.steps[(self.coarser != 0).any(dim=0)]

    def fill(self, out: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs ``(N, T, *)`` of all steps from those ``(N, n, *)`` of the grid, and the same by its coarser half."""
        fine, coarse = (torch.einsum("tn,bn...->bt...", weights, out) for weights in (self.weights, self.coarser))
        return fine, coarse


def step_grids(timesteps: Tensor, device: torch.device) -> list[StepGrid]:
    """Grids for a chain, from coarse to fine: each has the steps of the one before and one more between any two.

    Args:
        timesteps: ``(T,)``; outputs are interpolated along them, by cubic splines.
        device: of the grids.

    Returns:
        An empty list for a chain that is too short, or some of whose timesteps are the same.
    """
    with needed_for("the inverse of a long chain"):
        from scipy.interpolate import CubicSpline

    count, grids = len(timesteps), list[StepGrid]()
    if not bool((timesteps.diff() < 0).all()):
        return []
    place = timesteps.double().cpu().numpy()[::-1]  # splines want rising places

    def spline(steps: Tensor) -> Tensor:
        unit = torch.eye(len(steps), dtype=torch.float64, device="cpu").numpy()
        nodes = (count - 1 - steps).flip(0)
        weights = torch.from_numpy(CubicSpline(place[nodes.numpy()], unit)(place))
        return weights.flip(0, 1)

    def crowded(size: int) -> Tensor:
        share = torch.linspace(0, 1, size, dtype=torch.float64, device="cpu")
        return ((1 - (1 - share) ** _CROWDING) * (count - 1)).round().long().unique()

    size = 2 * _COARSEST - 1
    while 2 * size <= count:
        steps = crowded(size)
        half = crowded((size + 1) // 2)
        coarser = torch.zeros(count, len(steps), dtype=torch.float64, device="cpu")
        coarser[:, torch.isin(steps, half)] = spline(half)
        grids.append(StepGrid(steps.to(device), spline(steps).to(device), coarser.to(device)))
        size = 2 * size - 1
    return grids


def lines(steps: Tensor, first: int, count: int) -> Tensor:
    """Weights ``(count - first, n)`` float64 of values at rising steps, for those on straight lines between them.

    Before the first of them, the values are taken to be its own.

    Example:
        >>> lines(torch.tensor([2, 4]), 1, 5).tolist()
        [[1.0, 0.0], [1.0, 0.0], [0.5, 0.5], [0.0, 1.0]]
    """
    wanted, known = np.arange(first, count), steps.cpu().numpy()
    columns = [np.interp(wanted, known, unit) for unit in np.eye(len(known))]
    return torch.from_numpy(np.stack(columns, axis=1)).to(steps.device)
