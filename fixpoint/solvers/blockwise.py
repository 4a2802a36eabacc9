"""A solver that treats equal parts of a row as rows of their own."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from fixpoint.engine.layout import Layout
from fixpoint.solvers.base import Solver, require_count


@dataclass(frozen=True)
class Blockwise(Solver):
    """Apply ``solver`` to each of ``blocks`` equal parts of a row, each part with coefficients of its own.

    Convergence still belongs to the whole row. For a chain of T latents, ``Blockwise(Anderson(), blocks=T)`` is
    DEQ-DDIM with one set of Anderson coefficients per timestep.

    A solver that must know its problem, such as ``CausalQuasiNewton``, is told the shape of a block. Of a state
    ``(B, T, *shape)`` that is ``(T / blocks, *shape)`` if ``blocks`` divides T, else one step, ``(1, length)``. What f
    says of itself (slopes, basis) holds for the whole row and not for a block: the solver does without it.

    Args:
        solver: The update rule for each part.
        blocks: Number of parts; must divide the row's length.

    Raises:
        TypeError: If ``solver`` is no solver.
        ValueError: In the solve, if ``blocks`` does not divide the row's length.

    Example:
        >>> import torch, fixpoint
        >>> solver = fixpoint.Blockwise(fixpoint.Anderson(memory=1), blocks=3)
        >>> bool(fixpoint.solve(torch.cos, torch.zeros(2, 3), solver=solver).converged.all())
        True
    """

    solver: Solver
    blocks: int

    def __post_init__(self) -> None:
        if not isinstance(self.solver, Solver):
            raise TypeError(f"solver must be a fixpoint.Solver such as Anderson(), found {self.solver!r}")
        require_count("blocks", self.blocks)

    def bind(self, f: Any, layout: Layout) -> tuple[Any, Solver]:
        """f itself, and the solver bound to the layout of a block."""
        if self.blocks == 1:
            return self.solver.bind(f, layout)
        _, solver = self.solver.bind(_no_map, self._layout_of_blocks(layout))
        return f, replace(self, solver=solver)

    def init(self, z: Tensor) -> Any:
        return self.solver.init(self._split(z))

    def step(self, z: Tensor, fz: Tensor, state: Any) -> tuple[Tensor, Any]:
        z_next, state = self.solver.step(self._split(z), self._split(fz), state)
        return z_next.reshape(z.shape), state

    def adjoint(self) -> Solver | None:
        """The same around the inner solver's adjoint, if it names one."""
        solver = self.solver.adjoint()
        return None if solver is None else replace(self, solver=solver)

    def _split(self, z: Tensor) -> Tensor:
        if z.shape[1] % self.blocks:
            raise ValueError(f"blocks={self.blocks} must divide the row's length, found {z.shape[1]}")
        return z.reshape(z.shape[0] * self.blocks, z.shape[1] // self.blocks)

    def _layout_of_blocks(self, layout: Layout) -> Layout:
        blocks = self._split(layout.flatten(layout.example))[:, None]
        state, batch_dims = layout.example, len(layout.batch_shape)
        if isinstance(state, Tensor) and not state.is_complex() and state.ndim > batch_dims:
            steps, *shape = state.shape[batch_dims:]
            if steps % self.blocks == 0:
                blocks = blocks.reshape(len(blocks), steps // self.blocks, *shape)
        return Layout.of(blocks, 1)


def _no_map(z: Tensor) -> Tensor:
    raise TypeError("a block of a row has no map of its own: its image depends on the whole row")
