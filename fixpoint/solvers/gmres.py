"""GMRES as an update rule, for affine maps such as adjoint equations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fixpoint.solvers.base import Solver, gram_dtype, require_count, small_dtype
from fixpoint.solvers.krylov import Knowledge, Measurement
from fixpoint.solvers.small import NumPyArithmetic, Small, arithmetic
from fixpoint.solvers.states import TORCH_STATES, State

# The basis is allocated by so many vectors, when they are needed.
_BLOCK = 10
# Vectors beyond ``memory`` that a basis has room for: a point that is evaluated for itself takes the place of one.
_SPARE = 5


class GMRESState(NamedTuple):
    """What a step remembers: of each row, a basis and what ``I - A`` does with it.

    Attributes:
        basis: Blocks of orthogonal vectors of length 1, each ``(rows, count, dim)``.
        base: Where the row counts from ``(rows, dim)``.
        proposal: The point to be evaluated next ``(rows, dim)``: the base and a sum of basis vectors.
        knowledge: All that is known in the coordinates of the basis.
    """

    basis: tuple[State, ...]
    base: Tensor
    proposal: Tensor
    knowledge: Knowledge


@dataclass(frozen=True, kw_only=True)
class GMRES(Solver):
    """GMRES for affine maps ``f(z) = A z + b``: needs ``I - A`` to be invertible and nothing else.

    It is the solver of adjoint equations, which are affine, and of affine problems. On other maps it promises nothing:
    use ``Anderson`` or ``Broyden`` there.

    In exact arithmetic, a row of length d is solved after d + 2 evaluations if ``memory`` is at least d, and each
    residual is the least that the directions seen so far allow. When ``memory`` images are known, a row starts over
    from its best point. On a contraction it takes as many evaluations as ``Anderson(memory=...)`` or fewer. Where the
    residual stays large for a while, as it may on a map that expands, points far from the solution are evaluated in
    between: what they teach is less spoilt by rounding.

    Args:
        memory: Number of vectors whose images are known, before a row starts over. The basis grows with evaluations,
            by ten states per row at a time, up to ``memory + 6``; two more states are held beside it.

    Raises:
        TypeError, ValueError: If ``memory`` is not an integer of at least 1.

    Source: Y. Saad, M. H. Schultz, SIAM J. Sci. Stat. Comput. 7 (1986). That images may be rounded the more, the
    smaller the residual: V. Simoncini, D. B. Szyld, SIAM J. Sci. Comput. 25 (2003). How images are learnt from
    evaluations that are themselves approximations is this project's own.

    Example:
        >>> import torch, fixpoint
        >>> b = torch.ones(1, 2)
        >>> expanding = torch.tensor([[2.0, 5.0], [0.0, -3.0]])
        >>> sol = fixpoint.solve(lambda z: z @ expanding.T + b, b, solver=fixpoint.GMRES())
        >>> sol.nfev, [round(x, 4) for x in sol.value[0].tolist()]
        (4, [-2.25, 0.25])
    """

    memory: int = 100

    def __post_init__(self) -> None:
        require_count("memory", self.memory)

    def init(self, z: Tensor) -> None:
        return None

    def step(self, z: Tensor, fz: Tensor, state: GMRESState | None) -> tuple[Tensor, GMRESState]:
        wide, exact = gram_dtype(z), small_dtype(z)
        eps = torch.finfo(wide).eps
        here, image = z.to(wide), fz.to(wide)
        residual = image - here
        # Divided by the largest entry, whatever the row's scale is: squares stay in the range of the dtype.
        unit = residual.abs().amax(dim=1, keepdim=True) if residual.shape[1] else residual.sum(dim=1, keepdim=True)
        unit = torch.where((unit > 0) & (unit < torch.inf), unit, 1)
        residual = residual / unit
        xp = arithmetic(residual) if state is None else arithmetic(residual, state.base, kept=state.knowledge.use)
        scale = xp.take(unit[:, 0].to(exact))
        size = scale * xp.take(torch.linalg.vector_norm(image / unit, dim=1).to(exact))
        room = self.memory + _SPARE
        with xp.quiet():
            if state is None or state.knowledge.vectors > room:
                before = None if state is None else state.knowledge.owned(xp)
                total = xp.take(torch.linalg.vector_norm(residual, dim=1).to(exact))
                knowledge = Knowledge.start(xp, scale * total, size, before)
                vector, base = _divided(xp, residual, total), here
                basis: tuple[State, ...] = ()
            else:
                before, basis = state.knowledge.owned(xp), state.basis
                inside, rest = _split(xp, basis, residual, before.use)
                outside = xp.take(torch.linalg.vector_norm(rest, dim=1).to(exact))
                total = xp.length((inside**2).sum(-1) + outside**2)
                moved = size < 0
                if z is not state.proposal:
                    moved = xp.take((z != state.proposal).any(dim=1))
                measured = Measurement(scale[:, None] * inside, scale * outside, scale * total, size)
                knowledge, change = before.after(xp, measured, moved, eps)
                vector = torch.where(
                    xp.tensor(change.begins)[:, None], _divided(xp, residual, total), _divided(xp, rest, outside)
                )
                vector = torch.where(xp.tensor(change.waits)[:, None], _vector(basis, before.vectors - 1), vector)
                base = torch.where(xp.tensor(change.begins | change.moves)[:, None], here, state.base)
            vector = torch.where(xp.tensor(knowledge.use[:, -1] > 0)[:, None], vector, 0)
            basis = _appended(basis, knowledge.vectors - 1, vector, most=room + 1)
            last = knowledge.vectors > room
            knowledge, point = knowledge.planned(xp, rounding=torch.finfo(z.dtype).eps, last=last)
        proposal = _combined(basis, base, xp.tensor(point).to(wide)).to(z.dtype)
        return proposal, GMRESState(basis, base, proposal, knowledge)


def _split(xp: NumPyArithmetic, basis: tuple[State, ...], x: Tensor, use: Small) -> tuple[Small, Tensor]:
    """Coordinates ``(rows, n)`` of ``x`` ``(rows, dim)`` in the basis, and what is outside it."""
    inside: Small = 0.0
    for _ in range(2):  # the second time for what rounding left
        products = torch.cat([TORCH_STATES.dots(x[:, None], block)[:, 0] for block in basis], dim=1)[:, : use.shape[1]]
        found = xp.where(use > 0, xp.take(products.to(small_dtype(x))), xp.zeros_like(use))
        x = _combined(basis, x, -xp.tensor(found).to(x.dtype))
        inside = inside + found
    return inside, x


def _combined(basis: tuple[State, ...], x: Tensor, weights: Tensor) -> Tensor:
    """``x`` and a sum of basis vectors; ``weights`` is ``(rows, n)``."""
    for block, part in zip(basis, weights.split(_BLOCK, dim=1), strict=True):
        vectors = TORCH_STATES.among(block, 0, part.shape[1])
        x = TORCH_STATES.less(x[:, None], -part[:, None], vectors, keep=True)[:, 0]
    return x


def _divided(xp: NumPyArithmetic, x: Tensor, length: Small) -> Tensor:
    """Rows of ``x`` divided by their lengths; zeros stay."""
    return x / xp.tensor(xp.where(length > 0, length, 1.0)).to(x.dtype)[:, None]


def _vector(basis: tuple[State, ...], index: int) -> Tensor:
    return TORCH_STATES.place(basis[index // _BLOCK], index % _BLOCK)


def _appended(basis: tuple[State, ...], count: int, vector: Tensor, *, most: int) -> tuple[State, ...]:
    """A basis of ``count`` vectors with one more; the last block has no room beyond ``most`` vectors."""
    place = count % _BLOCK
    if place == 0:
        basis = (*basis, vector.new_zeros(len(vector), min(_BLOCK, most - count), vector.shape[1]))
    return (*basis[:-1], TORCH_STATES.put(basis[-1], place, vector, first=place == 0))
