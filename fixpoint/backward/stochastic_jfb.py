"""Stochastic Jacobian-free backpropagation, and its form of fixed depth."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from fixpoint.backward.base import Backward, ForwardSolve
from fixpoint.backward.draws import Draws
from fixpoint.engine.loop import Map
from fixpoint.engine.outcome import LoopResult
from fixpoint.engine.tolerance import Status
from fixpoint.solvers.base import require_count


@dataclass(frozen=True, kw_only=True)
class StochasticJFB(Backward):
    """A random number of steps without gradient, then a random number with: ``n ~ U{0..N}``, ``m ~ U{1..M}``.

    The ``n`` steps are updates of the forward solver from z0, exactly ``n`` evaluations, whether or not they converge;
    the ``m`` recorded ones are plain applications of f. All bounds are inclusive, and one draw serves the whole batch.
    What is handed over is the last state, at which nobody has evaluated f: its residual is not known (NaN). As in every
    run of fixed depth, the tolerance, ``max_evals``, ``check_every`` and ``on_failure`` play no part in training;
    ``record`` keeps the residuals of the ``n`` evaluations. Without gradients, ``solve`` solves as always.

    Under ``torch.utils.checkpoint(..., use_reentrant=False)`` the recomputation in backward has the same depths.

    Args:
        max_no_grad: N, the most steps without gradient.
        max_grad: M, the most steps with gradient.
        min_no_grad, min_grad: The least of each.
        seed: Gives the rule a generator of its own. Ranks that train together need one seed, to draw the same depths.
            A rule made by ``dataclasses.replace`` begins with the seed's first draw again.
        generator: Source of the two draws, on the CPU. With neither seed nor generator they come from the global one.
        attach_start: If n = 0, whether the gradient also flows into z0, as in the paper's algorithm. Off by default: z0
            is a start, and a warm start would join the graphs of all solves.

    Raises:
        TypeError, ValueError: If a bound or the seed is no integer or out of range, or both a seed and a generator are
            given; in the solve, with ``callback`` or ``keep_states``.
        RuntimeError: In a reentrant checkpoint's backward, with a seed or a generator: its draws cannot be known there.

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
    attach_start: bool = False
    runs_forward: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name, least in (("no_grad", 0), ("grad", 1)):
            low = require_count(f"min_{name}", getattr(self, f"min_{name}"), least)
            high = require_count(f"max_{name}", getattr(self, f"max_{name}"), low)
            object.__setattr__(self, f"min_{name}", low)
            object.__setattr__(self, f"max_{name}", high)
        generator = self.generator
        if self.seed is not None:
            if generator is not None:
                raise ValueError(f"pass seed or generator, found both: seed={self.seed}")
            object.__setattr__(self, "seed", operator.index(self.seed))
            generator = torch.Generator().manual_seed(self.seed)
        self._draws: Draws  # no field: neither an option nor part of what the rule is
        object.__setattr__(self, "_draws", Draws(generator))

    @property
    def uses_start(self) -> bool:
        return self.attach_start

    def attach(self, run: ForwardSolve) -> tuple[Tensor, LoopResult]:
        if run.watch is not None:
            raise ValueError(
                "callback and keep_states do not work with StochasticJFB(): its depths are drawn beforehand"
            )
        n = self._draw(self.min_no_grad, self.max_no_grad)
        m = self._draw(self.min_grad, self.max_grad)
        result = run.run_steps(n)

        def steps(f: Map, z: Tensor) -> Tensor:
            for _ in range(m):
                z = f(z)
            return z

        attached = run.recorded(steps, run.z0 if n == 0 and self.attach_start else result.z)
        # Nobody evaluates f at the state that is handed over, so its residual stays unknown.
        z, status = attached.detach(), result.status
        if not run.transformed:
            status = torch.where(torch.isfinite(z).all(dim=1), int(Status.MAX_EVALS), int(Status.NON_FINITE))
        return attached, replace(result, z=z, status=status)

    def can_be_compiled(self, depth: int | None) -> bool:
        return self.min_no_grad == self.max_no_grad and self.min_grad == self.max_grad

    def _draw(self, least: int, most: int) -> int:
        return least if least == most else self._draws.integer(least, most)


def MultiStepJFB(*, no_grad: int, grad: int, attach_start: bool = False) -> StochasticJFB:  # noqa: N802 - a rule
    """Multi-step JFB, the form of fixed depth: always ``no_grad`` steps without gradient, then ``grad`` with.

    Code that ``torch.compile`` takes as one graph cannot solve to a tolerance, so there the rule takes these steps
    without gradients, too.

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
