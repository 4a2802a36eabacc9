"""Picard (plain, damped) iteration."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fixpoint.solvers.base import Solver


@dataclass(frozen=True, kw_only=True)
class Picard(Solver):
    """``z <- z + damping * (f(z) - z)``: converges where ``f`` contracts, costs nothing beside ``f``.

    Args:
        damping: Share of the step that is taken, in (0, 2).

    Raises:
        ValueError: If ``damping`` lies outside (0, 2).

    Example:
        >>> import torch, fixpoint
        >>> float(fixpoint.solve(torch.cos, torch.tensor(1.0), solver=fixpoint.Picard()).value)  # doctest: +ELLIPSIS
        0.73...
    """

    damping: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.damping < 2:
            raise ValueError(f"damping must lie in (0, 2), found {self.damping}")

    def init(self, z: Tensor) -> None:
        return None

    def step(self, z: Tensor, fz: Tensor, state: None) -> tuple[Tensor, None]:
        return (fz if self.damping == 1 else z + self.damping * (fz - z)), state

    def forget(self, state: None, rows: Tensor) -> tuple[()]:
        return ()
