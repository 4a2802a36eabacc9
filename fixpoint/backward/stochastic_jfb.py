"""Stochastic Jacobian-free backpropagation, and its form of fixed depth."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fixpoint.backward.base import Backward, ForwardSolve
from fixpoint.engine.loop import LoopResult


@dataclass(frozen=True, kw_only=True)
class StochasticJFB(Backward):
    """A random number of steps without gradient, then a random number with: ``n ~ U{0..N}``, ``m ~ U{1..M}``.

    The ``n`` steps are updates of the forward solver from z0, exactly ``n`` evaluations, whether or not they converge;
    the ``m`` recorded ones are plain applications of f. All bounds are inclusive, and one draw serves the whole batch.
    The tolerance plays no part in training; without gradients, ``solve`` solves to it as always.

    Args:
        max_no_grad: N, the most steps without gradient.
        max_grad: M, the most steps with gradient.
        min_no_grad, min_grad: The least of each.
        seed: Gives the rule a generator of its own. Ranks that train together need one seed, to draw the same depths.
        generator: Source of the two draws, on the CPU. With neither seed nor generator they come from the global one.
        attach_start: If n = 0, whether the gradient also flows into z0, as in the paper's algorithm.

    Raises:
        TypeError, ValueError: If a bound is no integer or out of range, or both a seed and a generator are given.

    Source: X. Bai and L. Melas-Kyriazi, Fixed Point Diffusion Models, CVPR 2024, Algorithm 1.

    Example:
        >>> import torch, fixpoint
        >>> a = torch.tensor(0.5, requires_grad=True)
        >>> rule = fixpoint.StochasticJFB(max_no_grad=6, max_grad=6, seed=0)
        >>> sol = fixpoint.solve(lambda z: a * z + 1, torch.zeros(1), backward=rule)
        >>> sol.value.sum().backward()
        >>> 0 <= sol.nfev <= 6
        True
    """

    max_no_grad: int
    max_grad: int
    min_no_grad: int = 0
    min_grad: int = 1
    seed: int | None = None
    generator: torch.Generator | None = field(default=None, compare=False, repr=False)
    attach_start: bool = True

    def __post_init__(self) -> None:
        _require_range("no_grad", self.min_no_grad, self.max_no_grad, least=0)
        _require_range("grad", self.min_grad, self.max_grad, least=1)
        if self.seed is not None:
            if self.generator is not None:
                raise ValueError(f"pass seed or generator, found both: seed={self.seed}")
            object.__setattr__(self, "generator", torch.Generator().manual_seed(self.seed))

    def attach(self, run: ForwardSolve) -> tuple[Tensor, LoopResult]:
        n = self._draw(self.min_no_grad, self.max_no_grad)
        m = self._draw(self.min_grad, self.max_grad)
        result = run.run_steps(n)
        z = run.z0 if n == 0 and self.attach_start else result.z
        for step in range(m):
            fz = run.f(z)
            if step == 0:
                result = run.measured(result, fz)
            z = fz
        return z, result

    def can_be_compiled(self, depth: int | None) -> bool:
        return self.min_no_grad == self.max_no_grad and self.min_grad == self.max_grad

    def _draw(self, least: int, most: int) -> int:
        if least == most:
            return least
        return int(torch.randint(least, most + 1, (), generator=self.generator))


def MultiStepJFB(*, no_grad: int, grad: int, attach_start: bool = False) -> StochasticJFB:  # noqa: N802 - a rule
    """Multi-step JFB, the form of fixed depth: always ``no_grad`` steps without gradient, then ``grad`` with.

    Source: X. Bai and L. Melas-Kyriazi, Fixed Point Diffusion Models, CVPR 2024, section 3.3.

    Example:
        >>> import torch, fixpoint
        >>> a = torch.tensor(0.5, requires_grad=True)
        >>> rule = fixpoint.MultiStepJFB(no_grad=20, grad=2)
        >>> sol = fixpoint.solve(lambda z: a * z + 1, torch.zeros(1), solver=fixpoint.Picard(), backward=rule)
        >>> sol.value.sum().backward()
        >>> sol.nfev, round(float(a.grad), 3)  # 2 * (1 + 0.5)
        (20, 3.0)
    """
    return StochasticJFB(
        max_no_grad=no_grad, max_grad=grad, min_no_grad=no_grad, min_grad=grad, attach_start=attach_start
    )


def _require_range(name: str, low: int, high: int, *, least: int) -> None:
    if not (isinstance(low, int) and isinstance(high, int)):
        raise TypeError(f"min_{name} and max_{name} must be integers, found {low!r} and {high!r}")
    if low < least:
        raise ValueError(f"min_{name} must be at least {least}, found {low}")
    if high < low:
        raise ValueError(f"max_{name} must be at least {low}, found {high}")
