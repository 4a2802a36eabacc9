"""Exact gradients at constant memory, by an iteration that can be run backwards."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fixpoint.backward.adjoint import refuse_second_order
from fixpoint.backward.base import Backward, ForwardSolve
from fixpoint.engine.loop import LoopResult, run_steps
from fixpoint.engine.transforms import Explicit, depends_on_nothing_else
from fixpoint.solvers.base import require_count, small_dtype
from fixpoint.solvers.picard import Picard


@dataclass(frozen=True, kw_only=True)
class Reversible(Backward):
    """Two coupled, damped iterations, of which backward recomputes each state from the next.

    ``y <- (1 - damping) y + damping f(z)``, then ``z <- (1 - damping) z + damping f(y)``, both from z0. The gradient is
    that of unrolling these ``2 steps`` evaluations, z0 included, but nothing of them is kept: memory is that of two
    states and one application of f. Backward evaluates f again as often. States are kept in float64, because going
    backwards magnifies rounding by ``1 / |1 - damping|`` a step. First derivatives only.

    In training, the rule's own iteration takes the place of the solver and of the tolerance; without gradients,
    ``solve`` solves as always. A gradient for each state can only be passed to what is known by name, so f must not
    close over what requires grad: put it in ``args``, or make f a module.

    Args:
        steps: Pairs of evaluations, at least 1.
        damping: Share of each step, in (0, 2), not 1.

    Raises:
        TypeError, ValueError: If an option is of the wrong type or out of range; in the solve, if f closes over
            something that requires grad, or a depth is asked for.
        RuntimeError: In the backward of a gradient.

    Source: S. McCallum, K. Arora, J. Foster, Reversible Deep Equilibrium Models, 2025, arXiv:2509.12917.

    Example:
        >>> import torch, fixpoint
        >>> a = torch.tensor(0.5, requires_grad=True)
        >>> rule = fixpoint.Reversible(steps=20, damping=0.8)
        >>> fixpoint.solve(lambda z, a: a * z + 1, torch.zeros(1), (a,), backward=rule).value.sum().backward()
        >>> round(float(a.grad), 3)
        4.0
    """

    steps: int = 8
    damping: float = 0.5

    def __post_init__(self) -> None:
        require_count("steps", self.steps)
        if not 0 < self.damping < 2 or self.damping == 1:
            raise ValueError(f"damping must lie in (0, 2) and not be 1, found {self.damping}")

    def attach(self, run: ForwardSolve) -> tuple[Tensor, LoopResult]:
        if run.depth is not None:
            raise ValueError(f"Reversible(steps=...) has a depth of its own, found depth={run.depth}")
        if run.transformed:
            raise ValueError("Reversible() does not work under torch.func or forward-mode differentiation; IFT() does")
        if not depends_on_nothing_else(run.f, run.z0, run.inputs):
            raise ValueError(
                "Reversible() needs all that requires grad in args or in the parameters of a module f: found that f "
                "closes over something more"
            )
        value = _Reversed.apply(run.f, self.steps, self.damping, run.z0, *run.inputs)
        handed_over = run_steps(run.f, value.detach(), Picard(), run.tolerance, depth=0)
        evals = torch.full_like(handed_over.evals, 2 * self.steps)
        return value, LoopResult(
            handed_over.z,
            handed_over.residual,
            handed_over.scale,
            handed_over.status,
            evals,
            2 * self.steps,
            fixed_depth=True,
        )


class _Reversed(torch.autograd.Function):
    """The last z of the coupled iteration; two states and the inputs are all that it keeps."""

    @staticmethod
    def forward(ctx: Any, f: Explicit, steps: int, damping: float, z0: Tensor, *inputs: Tensor) -> Tensor:
        y = z = z0.to(small_dtype(z0))
        for _ in range(steps):
            y = torch.lerp(y, f(z.to(z0.dtype), *inputs).to(y.dtype), damping)
            z = torch.lerp(z, f(y.to(z0.dtype), *inputs).to(z.dtype), damping)
        ctx.f, ctx.steps, ctx.damping = f, steps, damping
        ctx.save_for_backward(y, z, z0, *inputs)
        return z.to(z0.dtype, copy=True)

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
        y, z, z0, *inputs = ctx.saved_tensors
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad[4:]) if needed]
        with torch.no_grad():
            gradients = _run_backwards(ctx.f, ctx.steps, ctx.damping, (y, z), inputs, wanted, v)
        if torch.is_grad_enabled():  # create_graph=True
            gradients = [refuse_second_order(gradient, v, z0, *inputs) for gradient in gradients]
        start, *rest = gradients
        found = dict(zip(wanted, rest, strict=True))
        return None, None, None, start, *(found.get(i) for i in range(len(inputs)))


def _run_backwards(
    f: Explicit,
    steps: int,
    damping: float,
    last: tuple[Tensor, Tensor],
    inputs: list[Tensor],
    wanted: list[int],
    v: Tensor,
) -> list[Tensor]:
    """Gradients for z0 and for the wanted inputs, from the gradient ``v`` of the last z."""
    (y, z), keep = last, 1 - damping
    y_bar, z_bar = torch.zeros_like(z), v.to(z.dtype)
    totals = [torch.zeros_like(inputs[i]) for i in wanted]

    def evaluate(at: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """f there, and its transposed product with a gradient, whose part for the inputs goes into the totals."""
        leaves = [x.detach().requires_grad_(i in wanted) for i, x in enumerate(inputs)]
        point = at.to(v.dtype).requires_grad_()
        with torch.enable_grad():
            image = f(point, *leaves)

        def pull(bar: Tensor) -> Tensor:
            targets = [point, *(leaves[i] for i in wanted)]
            first, *rest = torch.autograd.grad(image, targets, bar.to(v.dtype), materialize_grads=True)
            for total, gradient in zip(totals, rest, strict=True):
                total += gradient
            return first.to(bar.dtype)

        return image.detach().to(at.dtype), pull

    for _ in range(steps):
        image, pull = evaluate(y)
        z = (z - damping * image) / keep
        y_bar, z_bar = y_bar + pull(damping * z_bar), keep * z_bar
        image, pull = evaluate(z)
        y = (y - damping * image) / keep
        z_bar, y_bar = z_bar + pull(damping * y_bar), keep * y_bar
    return [(y_bar + z_bar).to(v.dtype), *totals]
