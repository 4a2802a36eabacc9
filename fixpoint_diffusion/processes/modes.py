"""How to write the states of steps that look back, so that a step acts on each of their parts by itself."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fixpoint_diffusion.processes.prior import GaussianPrior, gain
from fixpoint_diffusion.processes.transitions import Transitions

_SMALLEST = 1e-3  # a step that leaves less of a change than this is taken to leave nothing


@dataclass(frozen=True, eq=False)
class Modes:
    r"""Coordinates of a latent x and the p predictions before it, in which steps have slopes.

    Kept are ``e_j = image_j - traces_j x`` and ``y = x + sum_j leads_j e_j``. A change of the latents that comes down
    the chain changes an earlier prediction by ``traces_j`` times as much, so it leaves ``e_j`` as it is. ``leads_j`` is
    what ``e_j`` will still do to later latents. For Gaussian data a step then multiplies y by its slope, whatever e is.

    Attributes:
        prior: in whose coordinates all of these count.
        slopes: ``(T, 1 + p, 1 or D)`` float64: what a step does to y, and to each ``e_j`` of its own.
        traces, leads: ``(T + 1, p, 1 or D)`` float64, before each step and after the last.
    """

    prior: GaussianPrior
    slopes: Tensor
    traces: Tensor
    leads: Tensor

    @classmethod
    def of(cls, prior: GaussianPrior, transitions: Transitions) -> Modes:
        """For transitions with a history."""
        assert transitions.history is not None
        weights, slopes = transitions.history[..., None], prior.slopes(transitions)
        nothing = slopes.new_zeros(weights.shape[1], slopes.shape[1])
        traces, leads = [nothing], [nothing]
        for k, followed in enumerate(gain(prior.variances, transitions.alphas[:, None])):
            slopes[k] += (weights[k] * (traces[-1] - followed)).sum(dim=0)
            traces.append(_quotient(torch.cat((followed[None], traces[-1][:-1])), slopes[k]))
        for k in reversed(range(len(slopes))):
            # What a unit of e_j adds to the latent after step k, and to that through the rest of the state there.
            moved = weights[k] * (1 - (leads[0] * traces[k + 1]).sum(dim=0))
            leads.insert(0, _quotient(moved + torch.cat((leads[0][1:], nothing[:1])), slopes[k]))
        trace = torch.stack(traces)
        return cls(prior, torch.cat((slopes[:, None], -weights * trace[1:]), dim=1), trace, torch.stack(leads))

    def encode(self, latent: Tensor, earlier: Tensor, step: Tensor) -> Tensor:
        """States ``(N, 1 + p, *shape)`` from latents ``(N, *shape)`` and earlier predictions ``(N, p, *shape)``.

        They are those before the steps ``step`` ``(N,)``; T stands for after the last. All are ``wide``.
        """
        rest = earlier - self._times(latent.unsqueeze(1), self.traces, step)
        ahead = self._times(rest, self.leads, step).sum(dim=1)
        return torch.cat(((latent + ahead).unsqueeze(1), rest), dim=1)

    def latents(self, states: Tensor, step: Tensor) -> Tensor:
        """The latents ``(N, *shape)`` in states ``(N, 1 + p, *shape)`` before the steps, ``(N,)``."""
        return states[:, 0] - self._times(states[:, 1:], self.leads, step).sum(dim=1)

    def earlier(self, states: Tensor, latent: Tensor, step: Tensor) -> Tensor:
        """The earlier predictions in states whose latents are known, ``(N, p, *shape)``."""
        return states[:, 1:] + self._times(latent.unsqueeze(1), self.traces, step)

    def _times(self, x: Tensor, factors: Tensor, step: Tensor) -> Tensor:
        """``(N, 1 or p, *shape)`` times factors ``(T + 1, p, 1 or D)`` of the steps: ``(N, p, *shape)``."""
        rows, entries = x.shape[:2].numel(), x.shape[2:].numel()
        along = self.prior.to_coordinates(x.reshape(rows, entries)).reshape(*x.shape[:2], entries)
        along = along * factors.to(along)[step]
        return self.prior.from_coordinates(along.flatten(0, 1)).reshape(*along.shape[:2], *x.shape[2:])


def _quotient(values: Tensor, slope: Tensor) -> Tensor:
    """Values by a slope; 0 where that is next to nothing."""
    return torch.where(slope.abs() > _SMALLEST, values / slope, 0)
