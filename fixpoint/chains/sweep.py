"""Forward substitution along a chain whose Jacobians are scalar (or diagonal) slopes plus a few secants."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fixpoint.solvers.base import small_dtype

# Products of slopes are formed inside a chunk only: they must stay within the range of float64, and the triangular
# systems small. The number of chunks is what the host loops over.
_CHUNK = 32
_SMALLEST_SLOPE = 1e-4


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


class Secants(NamedTuple):
    """What each step is known to do to ``m`` displacements of its input, beyond its slope.

    Attributes:
        weights: ``(B, W, m, D)``: products of these with a displacement are its coefficients ``c``.
        images: ``(B, W, m, D)``: the step adds ``sum c images`` to what the slope makes of the displacement.
    """

    weights: Tensor
    images: Tensor

    @classmethod
    def of(cls, moved: Tensor, images: Tensor, slopes: Tensor, ridge: float) -> Secants:
        """From displacements ``moved`` of the inputs and ``images`` of the outputs, both ``(B, W, m, D)``.

        ``ridge`` is relative to the mean square of a step's displacements. What did not move tells nothing.
        """
        excess = images - slopes[:, :, None] * moved
        gram = moved @ moved.mT
        size = gram.diagonal(dim1=2, dim2=3).mean(dim=2)[:, :, None, None]
        unit = torch.eye(gram.shape[2], dtype=gram.dtype, device=gram.device)
        known = size > 0
        weights = torch.linalg.solve(torch.where(known, gram + ridge * size * unit, unit), moved)
        sound = (
            known & torch.isfinite(weights).all(dim=3, keepdim=True) & torch.isfinite(excess).all(dim=3, keepdim=True)
        )
        return cls(torch.where(sound, weights, 0), torch.where(sound, excess, 0))


def sweep(defects: Tensor, slopes: Tensor, secants: Secants | None) -> Tensor:
    """``carried_k = slopes_k * d_{k-1} + sum c_k images_k`` with ``c_k = weights_k . d_{k-1}``, for all k.

    ``d_k = defects_k + carried_k`` and ``d_{-1} = 0``: the displacement that corrects latent k, if every step is the
    affine map that slopes and secants describe. A triangular system, solved in chunks without a loop over k.

    Args:
        defects: ``(B, W, D)``, image minus latent of each step of the window.
        slopes: ``(B, W, D)``, or broadcasting to it.
        secants: of every step, or None.

    Returns:
        ``carried``, ``(B, W, D)``: what the images are to be corrected by.
    """
    before = torch.zeros_like(defects[:, 0])
    parts = []
    for start in range(0, defects.shape[1], _CHUNK):
        chunk = slice(start, start + _CHUNK)
        known = None if secants is None else Secants(secants.weights[:, chunk], secants.images[:, chunk])
        carried = _sweep_chunk(before, defects[:, chunk], slopes[:, chunk], known)
        parts.append(carried)
        before = carried[:, -1] + defects[:, chunk][:, -1]
    return torch.cat(parts, dim=1)


def _sweep_chunk(before: Tensor, defects: Tensor, slopes: Tensor, secants: Secants | None) -> Tensor:
    """The same for a few steps, the first of which meets the displacement ``before`` ``(B, D)``.

    With ``C_k`` the product of the slopes up to k, the part without secants is
    ``C_k (before + sum_j defects_j / C_j)``; the coefficients of the secants solve a unit lower triangular system.
    """
    dtype, wide = defects.dtype, small_dtype(defects)
    before, defects, slopes = before.to(wide), defects.to(wide), slopes.to(wide)
    tiny = slopes.abs() < _SMALLEST_SLOPE
    growth = torch.where(tiny, torch.where(slopes < 0, -_SMALLEST_SLOPE, _SMALLEST_SLOPE), slopes).cumprod(dim=1)

    def displacements(added: Tensor) -> Tensor:
        """``d`` before each step, with ``added`` put in after each."""
        after = growth * (before[:, None] + (added / growth).cumsum(dim=1))
        return torch.cat((before[:, None], after[:, :-1]), dim=1)

    met = displacements(defects)
    if secants is None:
        return (slopes * met).to(dtype)
    weights, images = (x.to(wide) for x in secants)
    shape = weights.shape[:3]
    target = (weights * met[:, :, None]).sum(dim=3).flatten(1, 2)
    # How the coefficient of one step shows in the products of a later one.
    reach = torch.cat((torch.ones_like(growth[:, :1]), growth[:, :-1]), dim=1)
    left, right = (weights * reach[:, :, None]).flatten(1, 2), (images / growth[:, :, None]).flatten(1, 2)
    step = torch.arange(shape[1], device=before.device).repeat_interleave(shape[2])
    coupling = (left @ right.mT) * (step[:, None] > step)
    unit = torch.eye(len(step), dtype=wide, device=before.device)
    solved = torch.linalg.solve_triangular(unit - coupling, target[..., None], upper=False, unitriangular=True)
    coefficients = solved.reshape(*shape, 1)
    bent = (coefficients * images).sum(dim=2)
    met = displacements(defects + bent)
    return (slopes * met + bent).to(dtype)
