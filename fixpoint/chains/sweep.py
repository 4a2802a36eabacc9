"""One sweep along a chain whose steps are modelled as affine: a slope plus a few secants for each step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fixpoint.engine.norms import safe_norm
from fixpoint.solvers.base import small_dtype

# Products of slopes are formed inside a chunk only: they must stay within the range of float64, and the triangular
# systems small. The number of chunks is what the host loops over.
_CHUNK = 32
_SMALLEST_SLOPE = 1e-4
# A state so many times larger than all before it comes from a wrong model, not from the chain.
_WILD = 100.0
_FADE = 0.1  # by how much a change counts for less than the one a round later
_RIDGE = 1e-3  # relative weight that keeps nearly dependent changes of a step's input apart
# What is remembered of steps is worked on for so many entries of one round at a time: all of a long chain would take
# several times the memory of what is remembered. At least a chunk.
_PART = 1 << 18


def parts(like: Tensor) -> Iterator[slice]:
    """Steps of a window ``(B, W, D)`` to be worked on at a time: whole chunks."""
    rows, steps, dim = like.shape
    size = _CHUNK * max(1, _PART // max(_CHUNK * rows * dim, 1))
    return (slice(start, min(start + size, steps)) for start in range(0, steps, size))


def taken(x: Tensor, places: Tensor) -> Tensor:
    """Entries ``(B, W, ...)`` of ``x`` ``(n, ...)`` at the places ``(B, W)``. An index in brackets takes longer."""
    return x.index_select(0, places.flatten()).unflatten(0, places.shape)


class Past(NamedTuple):
    """Inputs and images of steps in the last ``m`` rounds, newest first: ``(..., m, D)``."""

    inputs: Tensor
    images: Tensor
    known: Tensor  # (..., m) bool: which of them there are

    @classmethod
    def empty(cls, shape: tuple[int, ...], memory: int, dim: int, like: Tensor) -> Past:
        """No round seen yet, for steps of the given shape."""
        nothing = like.new_zeros(*shape, memory, dim)
        return cls(nothing, nothing.clone(), torch.zeros(*shape, memory, dtype=torch.bool, device=like.device))

    def of(self, steps: slice) -> Past:
        """That of some steps of a window."""
        return Past(*(x[:, steps] for x in self))

    def newest(self, steps: slice) -> tuple[Tensor, Tensor]:
        """Inputs and images of the last round ``(B, W, D)``."""
        return self.inputs[:, steps, 0], self.images[:, steps, 0]

    def changes(self, inputs: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
        """Changes from each round to the next, the newest being ``inputs`` and ``images`` ``(..., D)``; 0 if unknown.

        Returns:
            The changes of the inputs and those of the images, ``(..., m, D)`` each.
        """

        def change(newest: Tensor, older: Tensor) -> Tensor:
            return torch.where(self.known[..., None], _shifted(newest, older) - older, 0)

        return change(inputs, self.inputs), change(images, self.images)

    def with_newest(self, inputs: Tensor, images: Tensor, sound: Tensor) -> Past:
        """The same one round later. Nothing is kept of steps that are not ``sound`` ``(...)``."""
        known = torch.cat((torch.ones_like(self.known[..., :1]), self.known[..., :-1]), dim=-1) & sound[..., None]
        return Past(_shifted(inputs, self.inputs), _shifted(images, self.images), known)


def _shifted(newest: Tensor, older: Tensor) -> Tensor:
    """``newest`` ``(..., D)`` in front of ``older`` ``(..., m, D)``, which loses its last."""
    return torch.cat((newest[..., None, :], older[..., :-1, :]), dim=-2)


class WindowPast(NamedTuple):
    """The past of windows, which lies among that of other steps: read when and where it is asked for."""

    past: Past  # of all steps, (places, ...)
    places: Tensor  # (B, W)
    known: Tensor  # (B, W, m)

    def of(self, steps: slice) -> Past:
        """As of ``Past``."""
        inputs, images = (taken(x, self.places[:, steps]) for x in self.past[:2])
        return Past(inputs, images, self.known[:, steps])

    def newest(self, steps: slice) -> tuple[Tensor, Tensor]:
        """As of ``Past``."""
        inputs, images = (taken(x[:, 0], self.places[:, steps]) for x in self.past[:2])
        return inputs, images

    def without_newest(self, steps: Tensor) -> WindowPast:
        """Without the change from the last round to this one, for those steps ``(B, W)`` of which it tells nothing."""
        return self._replace(known=torch.cat((self.known[..., :1] & ~steps[..., None], self.known[..., 1:]), dim=-1))


class Model(Protocol):
    """What is known of the steps of a window beyond their slopes."""

    def of(self, steps: slice) -> Secants:
        """That of some of them."""


class Secants(NamedTuple):
    """What each step is known to do to ``m`` changes of its input, beyond its slope.

    Attributes:
        weights: ``(B, W, m, D)``: products of these with a change of the input are its coefficients ``c``.
        images: ``(B, W, m, D)``: the step adds ``sum c images`` to what the slope makes of the change.
    """

    weights: Tensor
    images: Tensor

    def of(self, steps: slice) -> Secants:
        """Those of some steps."""
        return Secants(self.weights[:, steps], self.images[:, steps])

    @classmethod
    def fit(cls, input_changes: Tensor, image_changes: Tensor, slopes: Tensor) -> Secants:
        """From changes of the inputs and of the images, both ``(B, W, m, D)``, newest first.

        The ridge is relative to the mean square of a step's changes, and larger for those of earlier rounds: they are
        long, and were seen far from here. An input that did not change tells nothing.
        """
        excess = image_changes - slopes[:, :, None] * input_changes
        gram = input_changes @ input_changes.mT
        rounds = gram.shape[2]
        aged = torch.logspace(0, 2 * (rounds - 1), rounds, base=1 / _FADE, dtype=gram.dtype, device=gram.device)
        size = (gram.diagonal(dim1=2, dim2=3) / aged).mean(dim=2)[:, :, None, None]
        unit = aged.diag()
        known = size > 0
        # A singular system is its own step's matter: no check that raises for all of them.
        weights = torch.linalg.solve_ex(torch.where(known, gram + _RIDGE * size * unit, unit), input_changes)[0]
        sound = (
            known & torch.isfinite(weights).all(dim=3, keepdim=True) & torch.isfinite(excess).all(dim=3, keepdim=True)
        )
        return cls(torch.where(sound, weights, 0), torch.where(sound, excess, 0))


@dataclass(frozen=True)
class SecantModel:
    """What the rounds so far have shown of the steps of a window.

    Attributes:
        past: What is remembered.
        inputs, images: Of this round ``(B, W, D)``.
        slopes: ``(B, W, 1 or D)``.
        to_basis: Takes changes to the coordinates in which slopes count.
    """

    past: Past | WindowPast
    inputs: Tensor
    images: Tensor
    slopes: Tensor
    to_basis: Callable[[Tensor], Tensor]

    @torch.no_grad()
    def of(self, steps: slice) -> Secants:
        moved, followed = self.past.of(steps).changes(self.inputs[:, steps], self.images[:, steps])
        return Secants.fit(self.to_basis(moved), self.to_basis(followed), self.slopes[:, steps])


def sweep(defects: Tensor, slopes: Tensor, model: Model | None) -> Tensor:
    """``c_k = slopes_k * e_{k-1} + secants_k(e_{k-1})`` with ``e_k = defects_k + c_k`` and ``e_{-1} = 0``, for all k.

    ``e_k`` is the error of state k, if every step is the affine map that slopes and secants describe: its own defect
    and what it inherits from the error before it. A triangular system, solved in chunks without a loop over k.

    Args:
        defects: ``(B, W, D)``, image minus state for each step of the window.
        slopes: ``(B, W, D)``, or broadcasting to it.
        model: secants of every step, or None.

    Returns:
        The corrections ``c``, ``(B, W, D)``: what is to be added to the images.
    """
    before = torch.zeros_like(defects[:, 0])
    corrections = []
    for part in parts(defects):
        secants = None if model is None else model.of(part)
        part_defects, part_slopes = defects[:, part], slopes[:, part]
        for start in range(0, part_defects.shape[1], _CHUNK):
            chunk = slice(start, start + _CHUNK)
            known = None if secants is None else secants.of(chunk)
            corrections.append(_sweep_chunk(before, part_defects[:, chunk], part_slopes[:, chunk], known))
            before = corrections[-1][:, -1] + part_defects[:, chunk][:, -1]
    return torch.cat(corrections, dim=1)


def _sweep_chunk(before: Tensor, defects: Tensor, slopes: Tensor, secants: Secants | None) -> Tensor:
    """Corrections of a few steps, where ``before`` ``(B, D)`` is the error of the state in front of them.

    With ``C_k`` the product of the slopes up to k, the error after step k without secants is
    ``C_k (before + sum_{j<=k} defects_j / C_j)``. What the secants of a step add counts as a further defect there;
    their coefficients solve a unit lower triangular system.
    """
    dtype, wide = defects.dtype, small_dtype(defects)
    before, defects, slopes = before.to(wide), defects.to(wide), slopes.to(wide)
    tiny = slopes.abs() < _SMALLEST_SLOPE
    growth = torch.where(tiny, torch.where(slopes < 0, -_SMALLEST_SLOPE, _SMALLEST_SLOPE), slopes).cumprod(dim=1)

    def errors_before(added: Tensor) -> Tensor:
        """The error in front of each step, where ``added`` comes in after each."""
        after = growth * (before[:, None] + (added / growth).cumsum(dim=1))
        return torch.cat((before[:, None], after[:, :-1]), dim=1)

    errors = errors_before(defects)
    if secants is None:
        return (slopes * errors).to(dtype)
    weights, images = secants  # in their own dtype: what they are multiplied with is wide
    shape = weights.shape[:3]
    target = (weights * errors[:, :, None]).sum(dim=3).flatten(1, 2)
    # How the coefficient of one step shows in the products of a later one.
    reach = torch.cat((torch.ones_like(growth[:, :1]), growth[:, :-1]), dim=1)
    left, right = (weights * reach[:, :, None]).flatten(1, 2), (images / growth[:, :, None]).flatten(1, 2)
    step = torch.arange(shape[1], device=before.device).repeat_interleave(shape[2])
    coupling = (left @ right.mT).masked_fill_(step[:, None] <= step, 0)  # not times 0: it may be infinite
    unit = torch.eye(len(step), dtype=wide, device=before.device)
    solved = torch.linalg.solve_triangular(unit - coupling, target[..., None], upper=False, unitriangular=True)
    added = (solved.reshape(*shape, 1) * images).sum(dim=2)
    return (slopes * errors_before(defects + added) + added).to(dtype)


def held_back(images: Tensor, corrections: Tensor, finite: Tensor) -> tuple[Tensor, Tensor]:
    """The states ``images + corrections`` without those that a wrong model has thrown far out; and which were sound.

    From the first state on that is not finite, whose image was not (``finite`` ``(B, W)``), or that is a hundred times
    larger than all before it, every state is replaced by the last one before. A state without a correction may have any
    size: no model has part in it. Such is each state whose input is exact, so each round still makes at least one more
    state exact. The first state of a window is always kept.

    Returns:
        The states ``(B, W, D)``, and ``(B, W)`` which of them are not replaced.
    """
    states = images + corrections
    size = safe_norm(states.detach())
    largest = size.cummax(dim=1).values
    sane = torch.isfinite(size) & finite
    modelled = corrections.detach().any(dim=2)
    sane[:, 1:] &= modelled[:, 1:] * size[:, 1:] <= _WILD * largest[:, :-1]
    sane[:, 0] = True
    sound = sane.cumprod(dim=1).bool()
    index = torch.minimum(torch.arange(states.shape[1], device=states.device), sound.sum(dim=1, keepdim=True) - 1)
    return states.gather(1, index[..., None].expand_as(states)), sound
