"""Backpropagation through every update of the solver: the reference, not the way to train."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from fixpoint.backward.base import Backward, ForwardSolve
from fixpoint.engine.evaluation import RowMap
from fixpoint.engine.outcome import LoopResult
from fixpoint.engine.tolerance import Status


@dataclass(frozen=True, kw_only=True)
class Unroll(Backward):
    """Differentiate the solver itself, evaluation by evaluation. Memory grows with the number of evaluations.

    The gradient is that of the state which the solver returned, so it tends to the exact one as the solve converges.
    Gradients also flow into z0. Under torch.func it needs a fixed ``depth``: whether rows are done is not to be seen.

    Raises:
        ValueError: In the solve, under torch.func without a depth.

    Example:
        >>> import torch, fixpoint
        >>> a = torch.tensor(0.5, requires_grad=True)
        >>> rule, solver = fixpoint.Unroll(), fixpoint.Picard()
        >>> sol = fixpoint.solve(lambda z: a * z + 1, torch.zeros(1), solver=solver, backward=rule, rtol=1e-6)
        >>> sol.value.sum().backward()
        >>> round(float(a.grad), 3)
        4.0
    """

    runs_forward: ClassVar[bool] = True

    @property
    def uses_start(self) -> bool:
        return True

    def attach(self, run: ForwardSolve) -> tuple[Tensor, LoopResult]:
        if run.transformed and run.depth is None:
            raise ValueError("under torch.func or forward-mode differentiation, Unroll() needs a fixed depth=")
        result = run.unroll()
        if run.transformed or torch.compiler.is_compiling():
            return result.z, result

        def unroll(f: RowMap, z: Tensor) -> Tensor:
            return replace(run, f=f, z0=z, watch=None).unroll().z

        if not result.z.requires_grad and torch.equal(result.z, run.z0):
            # Every row ended where it started: a gradient of zero, and no error.
            return run.recorded(lambda f, z: 0 * f(z), result.z), result
        failed = result.status == int(Status.NON_FINITE)
        return run.recorded(unroll, run.z0, result.z, failed), result

    def can_be_compiled(self, depth: int | None) -> bool:
        return depth is not None
