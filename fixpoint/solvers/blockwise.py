"""A solver that treats equal parts of a row as rows of their own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fixpoint.solvers.base import Solver, require_count


@dataclass(frozen=True)
class Blockwise(Solver):
    """Apply ``solver`` to each of ``blocks`` equal parts of a row, each part with coefficients of its own.

    Convergence still belongs to the whole row. For a chain of T latents, ``Blockwise(Anderson(), blocks=T)`` is
    DEQ-DDIM with one set of Anderson coefficients per timestep.

    Args:
        solver: The update rule for each part.
        blocks: Number of parts; must divide the row's length.

    Raises:
        TypeError: If ``solver`` is no solver.
        ValueError: If ``blocks`` is below 1, or does not divide the row's length.

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

    def init(self, z: Tensor) -> Any:
        if z.shape[1] % self.blocks:
            raise ValueError(f"blocks={self.blocks} must divide the row's length, found {z.shape[1]}")
        return self.solver.init(self._split(z))

    def step(self, z: Tensor, fz: Tensor, state: Any) -> tuple[Tensor, Any]:
        z_next, state = self.solver.step(self._split(z), self._split(fz), state)
        return z_next.reshape(z.shape), state

    def _split(self, z: Tensor) -> Tensor:
        return z.reshape(z.shape[0] * self.blocks, z.shape[1] // self.blocks)
