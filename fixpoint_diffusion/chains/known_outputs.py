"""What a denoiser would say at a step, from what it said at steps before and after."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fixpoint_diffusion.processes import Transitions, wide


class KnownOutputs:
    """A denoiser's outputs at some steps of some samples, to interpolate between.

    What is interpolated is by how much the predicted images differ from those that the prior expects of the same
    latents. That changes slowly along a chain, whatever noise the steps add, and is nothing where the prior is right.

    Args:
        transitions: the chain's.
        x: latents ``(M, *shape)`` that the denoiser was asked about.
        expected: the images ``(M, *shape)`` that the prior expects of them.
        out: the denoiser's outputs ``(M, *shape)``, or with twice the channels.
        step: ``(M,)``, the step of each.
    """

    def __init__(self, transitions: Transitions, x: Tensor, expected: Tensor, out: Tensor, step: Tensor) -> None:
        parts: Sequence[Tensor] = wide(out).split(x.shape[1], dim=1) if x.ndim > 1 else (wide(out),)
        self._transitions, self._step, self._dtype = transitions, step, out.dtype
        self._beyond = transitions.image(wide(x), parts[0], step) - expected
        self._variances = parts[1:]

    def between(self, x: Tensor, expected: Tensor, step: Tensor, before: Tensor, after: Tensor) -> Tensor:
        """Outputs for latents ``x`` ``(N, *shape)`` at steps ``(N,)`` from the known ones before and after, ``(N,)``.

        Linear in the number of the step. ``expected``: the images ``(N, *shape)`` that the prior expects of them.
        """
        start, end = self._step[before], self._step[after]
        share = wide((step - start) / (end - start).clamp(min=1)).reshape(-1, *[1] * (x.ndim - 1))

        def mixed(known: Tensor) -> Tensor:
            return torch.lerp(known[before], known[after], share.to(known.dtype))

        prediction = self._transitions.output(wide(x), expected + mixed(self._beyond), step)
        return torch.cat((prediction, *map(mixed, self._variances)), dim=min(1, x.ndim - 1)).to(self._dtype)


def neighbours(known: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Of each of so many rows, which of the known ones ``(M,)`` is the last up to it, and which the first from it on.

    Example:
        >>> neighbours(torch.tensor([0, 3]), 4)
        (tensor([0, 0, 0, 1]), tensor([0, 1, 1, 1]))
    """
    is_known = torch.zeros(count, dtype=torch.int64, device=known.device).index_fill(0, known, 1)
    before = is_known.cumsum(0) - 1
    return before, before + 1 - is_known


def known_neighbours(sample: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    """Of each known row, the known ones before and after it; itself for both, unless they are of its stretch.

    A stretch is a sample ``(M,)`` with ascending steps ``(M,)``.

    Example:
        >>> known_neighbours(torch.tensor([0, 0, 0, 0, 1]), torch.tensor([2, 4, 6, 2, 6]))
        (tensor([0, 0, 2, 3, 4]), tensor([0, 2, 2, 3, 4]))
    """
    number = torch.arange(len(sample), device=sample.device)
    before, after = (number - 1).clamp(min=0), (number + 1).clamp(max=len(sample) - 1)
    inner = (sample[before] == sample) & (sample[after] == sample) & (step[before] < step) & (step < step[after])
    return torch.where(inner, before, number), torch.where(inner, after, number)
