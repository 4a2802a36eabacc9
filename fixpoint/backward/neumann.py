"""The adjoint's Neumann series, cut."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from fixpoint.backward.attachment import attach_adjoint
from fixpoint.backward.base import Backward, ForwardSolve
from fixpoint.backward.functional import LinearSolves
from fixpoint.engine.loop import Map, run_steps
from fixpoint.engine.outcome import LoopResult
from fixpoint.solvers.base import require_count
from fixpoint.solvers.picard import Picard


@dataclass(frozen=True)
class Neumann(Backward):
    """Replace ``(I - J^T)^-1 v`` by its first terms, ``v + J^T v + ... + (J^T)^(terms - 1) v``.

    The terms are vector-Jacobian products of one recorded application of f, so memory does not grow with their number,
    as that of ``Phantom(steps=terms)`` does; at a solved state the two gradients are the same. What is missing is
    ``(J^T)^terms`` times the exact adjoint. First derivatives only.

    Args:
        terms: Terms kept, at least 1; one term is JFB.

    Raises:
        TypeError, ValueError: If ``terms`` is no integer or below 1; in the solve, under torch.func.
        RuntimeError: In the backward of a gradient.

    Source: J. Lorraine, P. Vicol, D. Duvenaud, Optimizing Millions of Hyperparameters by Implicit Differentiation,
    AISTATS 2020, Algorithm 3.

    Example:
        >>> import torch, fixpoint
        >>> a = torch.tensor(0.5, requires_grad=True)
        >>> rule = fixpoint.Neumann(3)
        >>> fixpoint.solve(lambda z: a * z + 1, torch.zeros(1), backward=rule, rtol=1e-6).value.sum().backward()
        >>> round(float(a.grad), 3)  # 2 * (1 + 0.5 + 0.25), of the exact 4
        3.5
    """

    terms: int

    def __post_init__(self) -> None:
        require_count("terms", self.terms)

    def attach(self, run: ForwardSolve) -> tuple[Tensor, LoopResult]:
        def adjoint(image: Map, v: Tensor) -> LoopResult:
            return run_steps(image, v, Picard(), run.tolerance, depth=self.terms - 1)

        result = run.solve()
        run = replace(run, z0=result.z)  # the start need not live until backward
        return attach_adjoint(run, result, LinearSolves.alike(adjoint))
