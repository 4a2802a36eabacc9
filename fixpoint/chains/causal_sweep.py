"""The solver of a chain that is bound to it: what it holds of the chain, and what a sweep makes of its states."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple, Unpack

import numpy as np
import torch
from torch import Tensor

from fixpoint.chains.sweep import Past, SecantModel, WindowPast, held_back, parts, sweep
from fixpoint.chains.windows import iterate_windows
from fixpoint.engine.loop import LoopOptions, Map
from fixpoint.engine.norms import Array
from fixpoint.engine.outcome import LoopResult
from fixpoint.engine.tolerance import Tolerance
from fixpoint.solvers.base import Solver, gram_dtype

if TYPE_CHECKING:
    from fixpoint.chains.causal import CausalQuasiNewton


class Swept(NamedTuple):
    """What a sweep makes of the states of some windows."""

    states: Tensor  # (B, W, D)
    corrections: Tensor  # (B, W, D), what was added to the images
    sound: Tensor  # (B, W) bool: false from the first state on that had to be held back


@dataclass(frozen=True)
class CausalSweep(Solver):
    """A ``CausalQuasiNewton`` that is bound to its problem: rows are chains of ``steps`` states with ``dim`` entries.

    Attributes:
        slopes: ``(T, 1 or D)``, in the coordinates that the columns of ``basis`` give.
        basis: One matrix ``(D, D)``, or one for each dimension of a state.
        noise_scale: ``(T,)``, on the host; None without ``noise_rtol``.
        backwards: Whether row k depends on later rows, as in the adjoint of a chain.
        single_steps: Whether the map can be asked for single steps, by its method ``part``.
        sparse: Whether it can interpolate some of them, by its method ``sparse_part``.
        fades: Whether states may fade to nothing along the row, as the derivatives of a chain do.
        stored: Sizes of the dimensions of a row, and these as its entries stand in it; None: one state after another.
    """

    options: CausalQuasiNewton
    steps: int
    dim: int
    slopes: Tensor | None = None
    basis: tuple[Tensor, ...] | None = None
    noise_scale: Array | None = None
    backwards: bool = False
    single_steps: bool = False
    sparse: bool = False
    fades: bool = False
    stored: tuple[tuple[int, ...], tuple[int, ...]] | None = None

    @property
    def noise(self) -> Array:
        """``(T,)``: by how much the noise of its step lets a state be off."""
        return np.zeros(self.steps) if self.noise_scale is None else self.options.noise_rtol * self.noise_scale

    def reference_norms(self, norms: Array, rounding: float) -> Array:
        """``(B, T)``: what the tolerance of each state is relative to, for states of these ``norms`` ``(B, T)``.

        Mostly their norms. Those of an adjoint are at least ``rounding`` times the largest norm before: on the way back
        through a chain that forgets, adjoints fade without end, and to solve each to so many digits would take as many
        rounds as steps. What comes later does not count, for it is not known yet when a state is done.
        """
        if not self.fades or not norms.size:
            return norms
        return np.fmax(norms, rounding * np.fmax.accumulate(norms, axis=1))

    def run(self, f: Map, z: Tensor, tolerance: Tolerance, **options: Unpack[LoopOptions]) -> LoopResult:
        """In windows; in the ordinary loop, all rows whole, where gradients are recorded."""
        if torch.is_grad_enabled():
            for name in ("noise_rtol", "probes"):
                if getattr(self.options, name):
                    raise ValueError(f"{name} has no effect where gradients are recorded: leave it out, or use IFT()")
            return super().run(f, z, tolerance, **options)
        max_evals, record, watch = options["max_evals"], options.get("record", False), options.get("watch")
        return iterate_windows(f, z, self, tolerance, max_evals=max_evals, record=record, watch=watch)

    def init(self, z: Tensor) -> Past:
        return Past.empty((len(z), self.steps), self.options.remembered, self.dim, self.split(z))

    def step(self, z: Tensor, fz: Tensor, state: Past) -> tuple[Tensor, Past]:
        if not self.steps:
            return fz, state
        states, images = self.split(z), self.split(fz)
        inputs = torch.cat((torch.zeros_like(states[:, :1]), states), dim=1)[:, :-1]
        step = torch.arange(self.steps, device=z.device).expand(len(z), -1)
        finite = torch.isfinite(images).all(dim=2)
        images = torch.where(finite[..., None], images, states)
        after, _, sound = self.swept(states, inputs, images, finite, step, state)
        del _, states  # a state of the chain's size each, before the past is copied
        return self.join(after, z), state.with_newest(inputs.detach(), images.detach(), sound)

    def swept(
        self,
        states: Tensor,
        inputs: Tensor,
        images: Tensor,
        finite: Tensor,
        step: Tensor,
        past: Past | WindowPast,
        measured: Tensor | None = None,
    ) -> Swept:
        """Sweep along windows.

        Args:
            states: ``(B, W, D)``.
            inputs: ``(B, W, D)``, of their steps: the states before them.
            images: ``(B, W, D)``, what the steps make of the inputs.
            finite: ``(B, W)``, which images count; the others are the states themselves.
            step: ``(B, W)``, number of each step.
            past: of these steps.
            measured: slopes ``(B, W, D)`` of the entries of the states, in place of the chain's; None: the chain's.
        """
        # The model is a constant where gradients are recorded. Its own derivative is that of quotients of ever smaller
        # changes; it would not vanish as the solve converges, although its effect on the states does.
        with torch.no_grad():
            slopes = self._slopes_at(step, inputs, images, past) if measured is None else measured
        own = self if measured is None else replace(self, basis=None)  # measured slopes are those of the entries
        model = SecantModel(past, inputs, images, slopes, own.to_basis)
        corrections = own.from_basis(sweep(own.to_basis(images - states), slopes, model))
        after, sound = held_back(images, corrections, finite)
        return Swept(after, corrections, sound)

    def inherited(self, defects: Tensor, step: Tensor) -> Tensor:
        """What states inherit of the defects ``(B, W, D)`` before them by the problem's slopes; 0 without slopes."""
        if self.slopes is None:
            return torch.zeros_like(defects)
        return self.from_basis(sweep(self.to_basis(defects), self.slopes[step].to(defects.dtype), None))

    def follow(self, step: Tensor, moved: Tensor, moved_before: Tensor) -> Tensor:
        """By how much to move the guesses of states that enter a window: ``(B, W, D)``.

        The two states in front of the window have moved from their guesses by ``moved_before`` and ``moved``,
        ``(B, D)`` each, the last one by ``moved``. A slope says how a state should follow the one before it. What the
        last state did beyond that, each new state is taken to do as well. Without slopes, all new states move alike.
        """
        if self.slopes is None:
            return moved[:, None].expand(-1, step.shape[1], -1)
        moved, moved_before = self.to_basis(moved), self.to_basis(moved_before)
        beyond = moved - self.slopes[(step[:, 0] - 1).clamp(min=0)].to(moved.dtype) * moved_before
        slopes = self.slopes[step].to(moved.dtype).expand(len(moved), step.shape[1], -1)
        added = beyond[:, None].repeat(1, step.shape[1], 1)
        added[:, 0] += slopes[:, 0] * moved
        return self.from_basis(added + sweep(added, slopes, None))

    def _slopes_at(self, step: Tensor, inputs: Tensor, images: Tensor, past: Past | WindowPast) -> Tensor:
        """``(B, W, 1 or D)``: the problem's, or else what the last round showed, within [-1, 1].

        A step of which nothing is known takes the mean of the others, or 1; so does one whose changes are too large to
        be multiplied.
        """
        if self.slopes is not None:
            return self.slopes[step].to(inputs.dtype)
        products = [self._products(inputs[:, part], images[:, part], past, part) for part in parts(inputs)]
        square, product = (torch.cat(each, dim=1) for each in zip(*products, strict=True))
        shown = (product / square).clamp(-1, 1)
        known = shown == shown  # NaN: 0 / 0, where nothing has changed, or infinity / infinity
        count = known.sum(dim=1, keepdim=True)
        mean = torch.where(known, shown, 0).sum(dim=1, keepdim=True) / count.clamp(min=1)
        return torch.where(known, shown, torch.where(count > 0, mean, 1))

    def _products(self, inputs: Tensor, images: Tensor, past: Past | WindowPast, part: slice) -> tuple[Tensor, Tensor]:
        """The last changes of inputs times themselves and times those of images, ``(B, W, 1)``; 0 where unknown."""
        known, before = past.known[:, part, :1], past.newest(part)
        changes = (torch.where(known, now - then, 0) for now, then in zip((inputs, images), before, strict=True))
        moved, followed = map(self.to_basis, changes)
        return moved.square().sum(dim=2, keepdim=True), (moved * followed).sum(dim=2, keepdim=True)

    def adjoint(self) -> CausalSweep:
        """The same for ``u = v + J^T u``, a chain that runs from the last row to the first.

        A product with ``J^T`` is one of all steps, so there is nothing to be saved by windows.
        """
        slopes = self.slopes
        if slopes is not None:
            slopes = torch.cat((slopes[:1], slopes[1:].flip(0)))
        options = replace(self.options, window=None, max_rows=None, noise_rtol=0.0, probes=0)
        return replace(
            self,
            options=options,
            slopes=slopes,
            backwards=not self.backwards,
            single_steps=False,
            sparse=False,
            fades=True,
        )

    def split(self, z: Tensor) -> Tensor:
        """Rows ``(B, T * D)`` as states ``(B, T, D)`` in the order of the chain, in at least float32."""
        if self.stored is not None:
            sizes, order = self.stored
            places = [1 + order.index(i) for i in range(len(order))]
            z = z.reshape(len(z), *(sizes[i] for i in order)).permute(0, *places)
        states = z.reshape(len(z), self.steps, self.dim).to(gram_dtype(z))
        return states.flip(1) if self.backwards else states

    def join(self, states: Tensor, like: Tensor) -> Tensor:
        """The inverse of ``split``, in the dtype of ``like``."""
        states = states.flip(1) if self.backwards else states
        if self.stored is not None:
            sizes, order = self.stored
            states = states.reshape(len(states), *sizes).permute(0, *(1 + i for i in order))
        return states.reshape(like.shape).to(like.dtype)

    def to_basis(self, x: Tensor) -> Tensor:
        """Coordinates of ``(..., D)`` in which the slopes count."""
        return x if self.basis is None else times_each(x, self.basis)

    def from_basis(self, x: Tensor) -> Tensor:
        """The inverse of ``to_basis``."""
        return x if self.basis is None else times_each(x, [factor.mT for factor in self.basis])


def times_each(x: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """``x`` ``(..., D)`` times the Kronecker product of square ``factors`` of sizes whose product is D."""
    if len(factors) == 1:
        return x @ factors[0].to(x.dtype)
    sizes = [len(factor) for factor in factors]
    out = x.reshape(-1, *sizes)
    for number, factor in enumerate(factors, start=1):
        out = torch.tensordot(out, factor.to(x.dtype), dims=([number], [0])).movedim(-1, number)
    return out.reshape(x.shape)
