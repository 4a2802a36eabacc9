"""Phantom gradients: a few recorded, damped steps at the solution. JFB is one undamped step."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fixpoint.backward.base import Backward, ForwardSolve
from fixpoint.engine.loop import Map
from fixpoint.engine.outcome import LoopResult
from fixpoint.solvers.base import require_count


@dataclass(frozen=True, kw_only=True)
class Phantom(Backward):
    """Record ``steps`` damped steps ``z <- (1 - damping) z + damping f(z)`` and differentiate them.

    The gradient is the Neumann series of the exact one cut after ``steps`` terms: biased, but it needs no second solve
    and its memory is ``steps`` applications of f.

    Args:
        steps: Recorded steps, at least 1.
        damping: Share of each step, in (0, 1]. One step with damping tau scales the gradient of JFB by tau.

    Raises:
        TypeError, ValueError: If an option is of the wrong type or out of range.

    Source: Z. Geng, X.-Y. Zhang, S. Bai, Y. Wang, Z. Lin, On Training Implicit Models, NeurIPS 2021.

    Example:
        >>> import torch, fixpoint
        >>> a = torch.tensor(0.5, requires_grad=True)
        >>> rule = fixpoint.Phantom(steps=2)
        >>> fixpoint.solve(lambda z: a * z + 1, torch.zeros(1), backward=rule, rtol=1e-6).value.sum().backward()
        >>> round(float(a.grad), 3)  # 2 + 0.5 * 2, of the exact 4
        3.0
    """

    steps: int = 1
    damping: float = 1.0

    def __post_init__(self) -> None:
        require_count("steps", self.steps)
        if not 0 < self.damping <= 1:
            raise ValueError(f"damping must lie in (0, 1], found {self.damping}")

    def attach(self, run: ForwardSolve) -> tuple[Tensor, LoopResult]:
        result = run.solve()
        images: list[Tensor] = []

        def steps(f: Map, z: Tensor) -> Tensor:
            for _ in range(self.steps):
                images.append(f(z))
                z = images[-1] if self.damping == 1 else (1 - self.damping) * z + self.damping * images[-1]
            return z

        return run.recorded(steps, result.z), run.measured(result, images[0])

    def can_be_compiled(self, depth: int | None) -> bool:
        return depth is not None


def JFB() -> Phantom:  # noqa: N802 - reads as a rule beside IFT() and Phantom()
    """Jacobian-free backpropagation: one undamped phantom step, so the exact gradient's inverse is replaced by I.

    Source: S. Wu Fung et al., JFB: Jacobian-Free Backpropagation for Implicit Networks, AAAI 2022.

    Example:
        >>> import fixpoint
        >>> fixpoint.JFB() == fixpoint.Phantom(steps=1, damping=1.0)
        True
    """
    return Phantom()
