"""Zeros of g by a solver for fixed points: ``x - s g(x)``, with an s that is learnt on the way.

Each row ends with two numbers beside x. In a state, the first is the s that f is to use, or 0 while nothing is known of
g: then f chooses one, which comes back in the image. The second is ``||g(x)||`` in an image; in a state, it is the s
that the solver works with, or 0.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Unpack

import numpy as np
import torch
from torch import Tensor

from fixpoint.engine.layout import Layout, leaves
from fixpoint.engine.loop import LoopOptions, Map
from fixpoint.engine.norms import Array, Meanwhile, to_host
from fixpoint.engine.outcome import LoopResult, tensor_like
from fixpoint.engine.tolerance import NOTHING, Figures, Status, Tolerance, for_rows
from fixpoint.solvers.base import Solver, gram_dtype

# Where g(x0) is this small already, it need not fall: so many roundings of what g would be if x were 100% off.
_ROUNDINGS = 64.0
# The slope of g is the smallest of so many steps.
_SLOPES = 3
# A step of this share of x is a long one. What is this small beside x0 is near zero, and every step long beside it.
_LONG = 0.1
_NEAR = 1e-8
# A row starts over when all of these slopes are so many times the one that the solver works with, or as much smaller.
_UNFIT = 5.0
# The least share of ``|dx| / |dg|`` that the shorter step of Barzilai and Borwein may be. It must be more than
# ``1 / _UNFIT``, or the row starts over at once.
_LEAST_COSINE = 0.25
# Evaluations that confirm a solution, where it has to be.
_CONFIRMING = 2
# Slopes that differ by more are no fair judges of all components of g.
_HILLY = 10.0
# A component is small if it is off by no more than so many tolerances: the nudge that tells has one direction of many.
_SLACK = 100.0


def evals_of_loop(max_evals: int) -> int:
    """How many of the evaluations granted the loop may make; the others are for a look at the components."""
    return max(max_evals - _CONFIRMING, min(max_evals, _CONFIRMING))


def row_norms(state: Any, batch_dims: int) -> Tensor:
    """Euclidean norm ``(*batch)`` in at least float32, of rows divided by their largest entry: no square overflows."""
    leaf_rows = [torch.view_as_real(x.resolve_conj()) if x.is_complex() else x for _, x in leaves(state)]
    row = torch.cat([x[..., None].flatten(batch_dims) for x in leaf_rows], dim=-1)
    row = row.to(gram_dtype(row))
    largest = row.abs().amax(dim=-1, keepdim=True) if row.shape[-1] else row.sum(dim=-1, keepdim=True)
    unit = torch.where((largest > 0) & torch.isfinite(largest), largest, 1)
    return (unit * torch.linalg.vector_norm(row / unit, dim=-1, keepdim=True)).squeeze(-1)


@dataclass(frozen=True, kw_only=True)
class NaturalTolerance(Tolerance):
    """``||g(x)|| <= atol + rtol * slope * ||x||``, with the slope ``1 / |scale|`` that a row of the state brings."""

    width: int  # columns of a number
    nothing: Array | float = 0.0  # an x that is nothing beside x0
    first: Array | float = np.inf  # ||g(x0)||
    start: Tensor | None = None  # x0, (rows, dim)

    def started(self, z: Tensor, fz: Tensor, figures: Figures) -> Tolerance:
        length, start = to_host(self._length(z)), z[:, : -2 * self.width].detach()
        return dataclasses.replace(self, nothing=NOTHING * length, first=figures.residual, start=start)

    def measure(self, z: Tensor, fz: Tensor, among: Array | bool = True, meanwhile: Meanwhile = None) -> Figures:
        z, fz = z.detach(), fz.detach()
        scale, size = z[:, -2 * self.width].abs(), fz[:, -self.width]
        host = to_host(torch.stack([x.to(gram_dtype(z)) for x in (size, self._length(fz), scale)]), meanwhile)
        residual, length, scale = host
        with np.errstate(all="ignore"):
            natural = np.maximum(length, self.nothing) / scale
            # While the slope is unknown, or g has hardly fallen since x0, nothing says how good x is: 100% off.
            rounding = np.minimum(self._noise(z) * natural, _ROUNDINGS * self.first)
            known = (scale > 0) & (residual <= np.maximum(0.5 * self.first, rounding))
            known &= ~self._fell_too_little(z, residual, known & (residual <= self.limit(natural)))
            natural = np.where(known, natural, residual)
        return Figures(residual, natural, residual)

    def _fell_too_little(self, z: Tensor, residual: Array, done: Array) -> Array:
        """Which of the rows ``done`` ``(rows,)`` are far from x0, though g is more than ``rtol / _LONG`` of g(x0).

        Beside a steep enough slope any g is small. Where slopes are alike, no root is lost: g(x0) is the slope times
        the distance, which is more than ``_LONG ||x||``, and a g that is done is at most rtol of slope times ``||x||``.
        """
        suspect = done & (residual > for_rows(self.rtol, len(z)) / _LONG * self.first)
        if self.start is None or not np.count_nonzero(suspect):
            return suspect
        return suspect & (to_host(_is_long(z[:, : -2 * self.width], self.start, row_norms(self.start, 1))) > 0)

    def _noise(self, z: Tensor) -> float:
        return _ROUNDINGS * max(torch.finfo(z.dtype).eps, self.rounding)

    def _length(self, z: Tensor) -> Tensor:
        return row_norms(z[:, : -2 * self.width], 1) if self.norm is None else self.norm(z)


class _Memory(NamedTuple):
    """What ``Rescaled`` remembers."""

    x: Tensor  # (rows, dim), of the last step
    g: Tensor
    start: Tensor  # (rows,), the length of x0
    scales: Tensor | None = None  # (rows, _SLOPES): signed inverse slopes of the last steps, the newest first
    local: Any = None  # (rows, _SLOPES): which of them were seen along a step that was not long
    scale: Any = None  # (rows,): the one that the solver works with
    inner: Any = None  # the solver's state
    steepness: Any = None  # (rows, 2): the smallest and the largest slope so far


@dataclass(frozen=True)
class Rescaled(Solver):
    """Steps of ``solver`` on ``x - s g(x)``, with s from what the last steps have shown of the slope of g.

    A state's scale is the largest inverse slope of the last steps: by that its g is judged. The solver works with one
    scale for as long as that fits; a row whose slope has left it far behind starts over with another.

    Attributes:
        solver: The update rule for x.
        width: Columns of a number: 2 where states are complex.
    """

    solver: Solver
    width: int = 1

    def bind(self, f: Any, layout: Layout) -> tuple[Any, Solver]:
        """f itself as the inner solver wants it, and that solver, which is shown x alone."""
        f, solver = self.solver.bind(f, replace(layout, example=layout.example.x))
        return f, Rescaled(solver, layout.leaf_sizes[-1])

    def run(self, f: Map, z: Tensor, tolerance: Tolerance, **options: Unpack[LoopOptions]) -> LoopResult:
        same = {field.name: getattr(tolerance, field.name) for field in dataclasses.fields(tolerance)}
        natural = NaturalTolerance(**same, width=self.width)
        granted = options["max_evals"]
        options["max_evals"] = evals_of_loop(granted)
        return self._confirmed(f, super().run(f, z, natural, **options), tolerance, granted)

    def _confirmed(self, f: Map, result: LoopResult, tolerance: Tolerance, max_evals: int) -> LoopResult:
        """The result, in which a row that met the tolerance in steep terrain alone has stagnated, not converged.

        One slope judges all of g, though g may be flat in some components where it is steep in others. These then say
        nothing of how far the root is. So where slopes have differed very much, g is evaluated at the solution and next
        to it: a component that would have to move x far to vanish is no small one.
        """
        steepness = None if result.state is None else result.state.steepness
        if steepness is None:
            return result
        status, residual = result.status.clone(), to_host(result.residual)
        hilly = to_host(steepness[:, 1] / steepness[:, 0]) > _HILLY
        rtol, atol = (for_rows(limit, len(residual)) for limit in (tolerance.rtol, tolerance.atol))
        suspect = hilly & (to_host(status) == Status.CONVERGED) & (residual > atol)
        if not suspect.any():
            return result
        spent = _CONFIRMING if result.nfev + _CONFIRMING <= max_evals else 0
        flat = suspect & self._is_flat_somewhere(f, result, rtol) if spent else suspect
        index = tensor_like(status, np.flatnonzero(flat))
        status[index] = int(Status.STAGNATED)
        scale = result.scale.index_copy(0, index, result.residual[index])
        trace = None if result.trace is None else torch.cat((result.trace, result.residual.expand(spent, -1)))
        return replace(result, status=status, scale=scale, nfev=result.nfev + spent, trace=trace)

    def _is_flat_somewhere(self, f: Map, result: LoopResult, rtol: Array | float) -> Array:
        """Which rows have a component of g that is no small one, by what a nudge of x changes."""
        z, x = result.z, result.z[:, : -2 * self.width]
        # A step as long as x: g is what is left of an image when x is taken away, and is not to drown in its rounding.
        scale = row_norms(x, 1) / result.residual.to(gram_dtype(z))
        x, g, scale = self.parts(z, f(self.join(z, x, scale, scale)))
        nudge = torch.finfo(z.dtype).eps ** 0.5
        # Entries of both signs, from 1 to 2 in size, no two alike: so that none are seen to cancel in a component.
        wave = torch.cos(torch.arange(1, x.shape[1] + 1, device=x.device, dtype=x.dtype) ** 2)
        direction = wave + wave.sign()
        length = row_norms(x, 1)[:, None] / x.shape[1] ** 0.5
        _, nudged, _ = self.parts(z, f(self.join(z, x + nudge * length * direction, scale, scale)))
        # Near enough the share of x that each component is off by, or more where the direction suits it badly.
        off = nudge * g.abs() / ((nudged - g).abs() * x.shape[1] ** 0.5)
        worst = to_host(torch.where(g == 0, 0, off).amax(dim=1))
        return ~(worst <= np.minimum(_SLACK * rtol, 1))

    def plain(self, fz: Tensor) -> Tensor:
        unknown = torch.zeros_like(fz[:, 0])  # what such a step shows of the slope is not known yet
        return self.join(fz, fz[:, : -2 * self.width], unknown, unknown)

    def init(self, z: Tensor) -> _Memory | None:
        return None

    def step(self, z: Tensor, fz: Tensor, state: _Memory | None) -> tuple[Tensor, _Memory]:
        x, g, scale = self.parts(z, fz)
        if state is None:
            # A step that is short enough to tell the slope along g; its scale is not known yet.
            x_next = x - torch.finfo(z.dtype).eps ** 0.5 * scale[:, None] * g
            unknown = torch.zeros_like(scale)
            return self.join(z, x_next, unknown, unknown), _Memory(x, g, row_norms(x, 1))
        secant, fitting = inverse_slopes(x - state.x, g - state.g)
        local = torch.isfinite(secant) & ~_is_long(x, state.x, state.start)
        largest = _largest_scale(x, g)
        if state.scales is None:
            secant = torch.where(torch.isfinite(secant), secant, largest)
            scales, inner = secant[:, None].repeat(1, _SLOPES), self.solver.init(x)
            local = local[:, None].repeat(1, _SLOPES)
            working = _bounded(fitting, largest, largest)
        else:
            known = torch.where(torch.isnan(state.scales), secant[:, None], state.scales)
            secant = torch.where(torch.isfinite(secant), secant, known[:, 0])
            scales, inner, working = torch.cat((secant[:, None], known[:, :-1]), dim=1), state.inner, state.scale
            local = torch.cat((local[:, None], state.local[:, :-1]), dim=1)
            ratio = (scales / working[:, None]).abs()
            unfit = (ratio.amin(dim=1) > _UNFIT) | (ratio.amax(dim=1) < 1 / _UNFIT)
            forgotten = self.solver.forget(inner, unfit)
            if forgotten is not None:
                inner, working = forgotten, torch.where(unfit, _bounded(fitting, secant, 2 * largest), working)
        x_next, inner = self.solver.step(x, x - working[:, None] * g, inner)
        # A step that rounding swallows teaches nothing, and its size may come from slopes far away: see the slope here.
        swallowed = (x_next == x).all(dim=1) & (row_norms(g, 1) > 0)
        x_next = torch.where(swallowed[:, None], x - torch.finfo(z.dtype).eps ** 0.5 * largest[:, None] * g, x_next)
        local &= ~swallowed[:, None]
        # Where a long step leads slopes may be others, and along it they say little: then nothing says how good x is.
        scale = torch.copysign(torch.where(local, scales.abs(), 0).amax(dim=1), secant)
        scale = torch.where(_is_long(x_next, x, state.start), 0, scale)
        scales = torch.where(swallowed[:, None], torch.nan, scales)
        memory = _Memory(x, g, state.start, scales, local, working, inner, _steepness(state.steepness, secant))
        return self.join(z, x_next, scale, working), memory

    def parts(self, z: Tensor, fz: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x and g(x), both ``(rows, dim)``, and the scale ``(rows,)`` between them in f, in at least float32."""
        wide, end = gram_dtype(z), -2 * self.width
        x, image, scale = z[:, :end].to(wide), fz[:, :end].to(wide), fz[:, end].to(wide)
        scale = torch.where(scale == 0, 1, scale)  # a row that ended before it had one
        return x, (x - image) / scale[:, None], scale

    def join(self, z: Tensor, x: Tensor, scale: Tensor, working: Tensor) -> Tensor:
        """A state like ``z``; the numbers in it are ``(rows,)``."""
        numbers = torch.zeros_like(z[:, -2 * self.width :])
        numbers[:, 0], numbers[:, self.width] = scale.to(z.dtype), working.to(z.dtype)
        return torch.cat((x.to(z.dtype), numbers), dim=1)


def _steepness(before: Tensor | None, secant: Tensor) -> Tensor:
    """The smallest and the largest slope ``(rows, 2)``, with that of one more step, whose inverse is ``secant``."""
    slope = secant.abs().reciprocal()[:, None]
    slope = torch.where(torch.isfinite(slope) & (slope > 0), slope, torch.nan)
    if before is None:
        return slope.expand(-1, 2)
    return torch.cat((torch.fmin(before[:, :1], slope), torch.fmax(before[:, 1:], slope)), dim=1)


def _is_long(x: Tensor, before: Tensor, start: Tensor) -> Tensor:
    """Whether the step from ``before`` to ``x``, both ``(rows, dim)``, is long beside x; ``start``: length of x0."""
    return row_norms(x - before, 1) > _LONG * torch.maximum(row_norms(x, 1), _NEAR * start)


def inverse_slopes(dx: Tensor, dg: Tensor) -> tuple[Tensor, Tensor]:
    """Signed inverse slopes ``(rows,)`` along a step: ``|dx| / |dg|``, and the shorter one of Barzilai and Borwein.

    The second is at least ``_LEAST_COSINE`` times the first: it would vanish where g turns a step by a right angle.
    """
    length, change = row_norms(dx, 1), row_norms(dg, 1)
    cosine = ((dx / length[:, None]) * (dg / change[:, None])).sum(dim=1)
    ratio = length / change
    ratio = torch.where(ratio > 0, ratio, torch.nan)
    return torch.copysign(ratio, cosine), torch.copysign(cosine.abs().clamp(min=_LEAST_COSINE) * ratio, cosine)


def _largest_scale(x: Tensor, g: Tensor) -> Tensor:
    """The scale whose step is half as long as x, or half of 1 where x is shorter."""
    return 0.5 * row_norms(x, 1).clamp(min=1) / row_norms(g, 1)


def _bounded(scale: Tensor, otherwise: Tensor, largest: Tensor) -> Tensor:
    scale = torch.where(torch.isfinite(scale) & (scale != 0), scale, otherwise)
    bounded = torch.copysign(torch.minimum(scale.abs(), largest), scale)
    return torch.where(torch.isfinite(bounded), bounded, scale)  # g may be zero
