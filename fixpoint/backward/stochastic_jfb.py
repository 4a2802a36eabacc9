"""Stochastic Jacobian-free backpropagation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fixpoint.backward.base import Backward, Run
from fixpoint.iterate import Iterates


@dataclass(frozen=True, kw_only=True)
class StochasticJFB(Backward):
    """A random number of steps without gradient, then a random number with: ``n ~ U{0..N}``, ``m ~ U{1..M}``.

    The ``n`` steps are updates of the forward solver from z0, exactly ``n`` evaluations, whether or not they converge;
    the ``m`` recorded ones are plain applications of f. Both bounds are inclusive, and one draw serves the whole batch.
    The tolerance plays no part in training; without gradients, ``solve`` solves to it as always.

    Args:
        max_no_grad: N, the most steps without gradient.
        max_grad: M, the most steps with gradient.
        generator: Source of the two draws, on the CPU; None takes the global one. Ranks that train together need
            generators with one seed.
        attach_start: If n = 0, whether the gradient also flows into z0, as in the paper's algorithm.

    Raises:
        ValueError: If a bound is out of range.

    Source: X. Bai and L. Melas-Kyriazi, Fixed Point Diffusion Models, CVPR 2024, Algorithm 1.

    Example:
        >>> import torch, fixpoint
        >>> a = torch.tensor(0.5, requires_grad=True)
        >>> rule = fixpoint.StochasticJFB(max_no_grad=6, max_grad=6, generator=torch.Generator().manual_seed(0))
        >>> sol = fixpoint.solve(lambda z: a * z + 1, torch.zeros(1), backward=rule)
        >>> sol.value.sum().backward()
        >>> 0 <= sol.nfev <= 6
        True
    """

    max_no_grad: int
    max_grad: int
    generator: torch.Generator | None = None
    attach_start: bool = True

    def __post_init__(self) -> None:
        if self.max_no_grad < 0:
            raise ValueError(f"max_no_grad must be at least 0, found {self.max_no_grad}")
        if self.max_grad < 1:
            raise ValueError(f"max_grad must be at least 1, found {self.max_grad}")

    def attach(self, run: Run) -> tuple[Tensor, Iterates]:
        n = int(torch.randint(0, self.max_no_grad + 1, (), generator=self.generator))
        m = int(torch.randint(1, self.max_grad + 1, (), generator=self.generator))
        iterates = run.advance(n)
        z = run.z0 if n == 0 and self.attach_start else iterates.z
        for step in range(m):
            fz = run.f(z)
            if step == 0:
                iterates = iterates.measured(fz.detach(), run.tolerance)
            z = fz
        return z, iterates
