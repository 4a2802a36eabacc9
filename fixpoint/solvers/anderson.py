"""Anderson acceleration on an orthonormal basis, with restarts where its model has failed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fixpoint.solvers.base import Solver, gram_dtype, require_count
from fixpoint.solvers.history import (
    History,
    Small,
    alike,
    constant,
    copy,
    everywhere,
    large,
    namespace,
    products,
    require_history_dtype,
    silent,
    small,
)

# A difference whose part outside the kept ones is below this share brings rounding, or tells that f has changed.
_NEW_SHARE = 0.01
# A residual so many times the predicted one, beyond what a plain step does to it, is a surprise.
_SURPRISE = 10.0
# A residual that has fallen to this share is a fresh start: failures are counted anew.
_RECOVERY = 0.1
# A predicted |g|^2 below this share of the present one is as good as zero.
_NEGLIGIBLE = 1e-3


class _Guard(NamedTuple):
    """What is known of each row, all ``(rows,)``: squared norms, and how often the model failed."""

    bound: Small  # what |g - dG gamma|^2 must not exceed at the next step; infinity after a plain one
    growth: Small  # the largest factor over the bound that |g|^2 may show
    level: Small  # |g|^2 from which failures are counted
    rest: Small  # plain steps that the next failure costs
    left: Small  # plain steps still to take

    @classmethod
    def start(cls, first: Small, square: Small) -> _Guard:
        """From ``|g|^2`` at the start and after the plain step from there, which shows how f may stretch a residual."""
        xp = namespace(square)
        nothing = xp.zeros_like(square)
        growth = _SURPRISE**2 * xp.maximum(square / first, nothing + 1)
        return cls(nothing + xp.inf, growth, xp.minimum(first, square), nothing + 1, nothing)

    def judge(self, square: Small, predicted: Small) -> tuple[Small, _Guard]:
        """Which rows need not take a plain step, given ``|g|^2`` and ``|g - dG gamma|^2``; and what is known then.

        The kept differences can reproduce the last prediction, unless the one dropped since mattered, and g follows it,
        unless f bends. A row that sees either fail starts over with plain steps, twice as many at each failure until
        the residual has fallen to a tenth.
        """
        xp = namespace(square)
        followed = xp.maximum(predicted, square / self.growth) <= self.bound  # not where something is NaN
        fallen = _RECOVERY**2 * self.level
        if everywhere(followed & (square >= fallen) & (self.left == 0)):
            # Nearly every step is one of these.
            return followed, _Guard(predicted + _NEGLIGIBLE * square, *self[1:])
        recovered = square < fallen
        rest = xp.where(recovered, 1.0, self.rest)
        due = ~followed * rest
        left = xp.maximum(self.left - 1, due)
        plain = left > 0
        bound = xp.where(plain, xp.inf, predicted + _NEGLIGIBLE * square)
        level = xp.where(recovered, square, self.level)
        return ~plain, _Guard(bound, self.growth, level, rest + due, left)


class AndersonState(NamedTuple):
    """An orthonormal basis of the last residual differences, and their images: ``memory`` states each.

    ``use`` ``(rows, memory)`` is one where a slot counts, and ``weights`` are the products of those slots with the last
    residual. That stands in ``pair`` at ``newest``, with room for the next beside it.
    """

    basis: History
    images: History
    pair: History
    use: Small
    weights: Small
    slot: int = 0
    newest: int = 0
    fz: Tensor | None = None
    first: Small = None
    guard: _Guard | None = None


@dataclass(frozen=True, kw_only=True)
class Anderson(Solver):
    """Anderson acceleration (type II), kept honest by restarts that it decides on itself.

    With ``g = f(z) - z`` and the differences of successive result as columns of ``dG`` and ``dF``, a step is
    ``gamma = argmin |g - dG gamma|``, ``z_next = f(z) - dF gamma - (1 - damping) (g - dG gamma)``. Each new
    difference is made orthogonal to the ``memory`` before it, so there is no system to solve and nothing to regularise:
    scaling a problem changes nothing, and on a linear symmetric map a short memory does what an unlimited one would. A
    row whose model fails (a dropped difference was still needed, or the residual is far from the predicted one) forgets
    it and takes plain steps first, more of them each time that this did not help. A row whose next step would go
    against the plain one forgets its model too and takes the plain one: it was drawn to a point that f repels from,
    such as a saddle of the likelihood in expectation-maximisation.

    Args:
        memory: Number of differences kept; two states per row are held for each. Five do for symmetric and for strongly
            contracting maps; 20 or 40 save evaluations on non-symmetric, slowly converging ones.
        damping: Mixing in (0, 1]; 1 trusts the accelerated step wholly.
        ridge: Tikhonov weight on the coefficients of the orthonormal basis: each is divided by ``1 + ridge``.
        history_dtype: Precision of the histories, such as ``torch.bfloat16`` to halve their memory; None takes the
            state's own.

    Raises:
        TypeError, ValueError: If an option is out of range.

    Source: D. G. Anderson, J. ACM 12 (1965); truncated Gram-Schmidt as in Tang et al., arXiv:2403.14961. The tests of
    the model and of the step, and the rests, are this project's own.

    Example:
        >>> import torch, fixpoint
        >>> sol = fixpoint.solve(torch.cos, torch.tensor(1.0), solver=fixpoint.Anderson(memory=3), rtol=1e-6)
        >>> bool(sol.converged), sol.nfev < 10
        (True, True)
    """

    memory: int = 5
    damping: float = 1.0
    ridge: float = 0.0
    history_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        require_count("memory", self.memory)
        if not 0 < self.damping <= 1:
            raise ValueError(f"damping must lie in (0, 1], found {self.damping}")
        if not self.ridge >= 0:
            raise ValueError(f"ridge must be at least 0, found {self.ridge}")
        require_history_dtype(self.history_dtype)

    def init(self, z: Tensor) -> AndersonState:
        wide, kept = gram_dtype(z), self.history_dtype or z.dtype
        basis, images = History.empty(self.memory, z, kept), History.empty(self.memory, z, kept)
        use = torch.zeros(len(z), self.memory, dtype=wide, device=z.device)
        return AndersonState(basis, images, History.empty(2, z, wide), small(use), small(use.clone()))

    def step(self, z: Tensor, fz: Tensor, state: AndersonState) -> tuple[Tensor, AndersonState]:
        dtype, wide = fz.dtype, gram_dtype(fz)
        if dtype != wide:
            z, fz = z.to(wide), fz.to(wide)
        basis, images, pair, use, weights, slot, last, *_ = state
        now = 1 - last
        pair = pair.put(now, torch.sub, fz, z)
        if state.fz is None:
            first = constant(small(pair.product(now, now))[:, 0, 0])
            z_next = z + self.damping * pair.slots[now]
            return z_next.to(dtype), state._replace(pair=pair, newest=now, fz=fz, first=first)
        pair = pair.put(last, torch.sub, pair.slots[now], pair.slots[last])  # the difference takes the old one's place

        old, along = small(basis.dots(pair.lines[now]))[:, 0], small(pair.dots(pair.lines[now]))
        xp, use, weights = namespace(old), alike(use, old), alike(weights, old)
        square, product, size = constant(along[:, 0, now]), along[:, 0, last], small(pair.product(last, last))[:, 0, 0]
        with silent(old):
            # What the basis knows of the residual and of the difference, and what is left of their products.
            old = old * use
            shared = old - weights
            inside = products(old, shared)
            outside = square - constant(inside[:, 0, 0])
            rest, cross = size - inside[:, 1, 1], product - inside[:, 0, 1]
            keep = rest > _NEW_SHARE**2 * size
            kept = everywhere(keep)
            if not kept:
                # Of differences that depend on one another the newest alone is kept.
                old, shared = xp.where(keep[:, None], old, 0), xp.where(keep[:, None], shared, 0)
                outside, rest = xp.where(keep, outside, square), xp.where(keep, rest, size)
                cross = xp.where(keep, cross, product)
            scale = 1 / xp.sqrt(rest + torch.finfo(wide).tiny)  # a power would make 0 times infinity of a gradient
            new = cross * scale
            guard = state.guard or _Guard.start(alike(state.first, square), square)
            follows, guard = guard.judge(square, outside - constant(new * new))
            if not (kept and everywhere(follows)):
                trusted = (keep & follows)[:, None]
                new, old, use = xp.where(follows, new, 0), xp.where(trusted, old, 0), use * trusted
            weights = copy(old)
            use[:, slot], weights[:, slot] = follows, new
            if self.ridge > 0:
                old, new = old / (1 + self.ridge), new / (1 + self.ridge)
            newest = large((new * scale)[:, None])
        old, shared, scale = large(old[:, None]), large(shared[:, None]), large(scale[:, None])

        pair = pair.reduce(last, basis, shared)
        remainder = None
        if self.damping < 1:
            remainder = torch.addcmul(basis.subtract(pair.lines[now], old)[:, 0], pair.slots[last], newest, value=-1)
        basis = basis.put(slot, torch.mul, pair.slots[last], scale)
        pair = pair.put(last, torch.sub, fz, state.fz).reduce(last, images, shared)
        z_next = torch.addcmul(fz, pair.slots[last], newest, value=-1)
        images.subtract(z_next[:, None], old, in_place=True)
        if remainder is not None:
            z_next = z_next - (1 - self.damping) * remainder
        images = images.put(slot, torch.mul, pair.slots[last], scale)
        # The exact step s solves (I - J) s = g, so s . g = s . (I - J) s is positive wherever f does not expand. Where
        # it is not, the model aims at a point that f repels from: let f do so.
        pair = pair.put(last, torch.sub, z_next, z)
        ahead = constant(small(pair.product(last, now))[:, 0, 0]) > 0
        if not everywhere(ahead):
            z_next = torch.where(large(ahead)[:, None], z_next, fz)
            use, weights = use * ahead[:, None], xp.where(ahead[:, None], weights, 0)
            guard = guard._replace(bound=xp.where(ahead, guard.bound, xp.inf))
        state = AndersonState(basis, images, pair, use, weights, (slot + 1) % self.memory, now, fz, None, guard)
        return z_next.to(dtype), state

    def forget(self, state: AndersonState, rows: Tensor) -> AndersonState:
        def where(mask: Tensor, value: float, otherwise: Small) -> Small:
            mask = mask.reshape(-1, *(1,) * (otherwise.ndim - 1))
            return alike(small(torch.where(mask, value, large(otherwise))), otherwise)

        guard = state.guard
        if guard is not None:  # two plain steps, for the next one finds a difference of two maps
            infinite = {name: where(rows, torch.inf, getattr(guard, name)) for name in ("bound", "level")}
            guard = guard._replace(**infinite, left=where(rows, 2, guard.left))
        use, weights = (where(rows, 0, x) for x in (state.use, state.weights))
        return state._replace(use=use, weights=weights, guard=guard)
