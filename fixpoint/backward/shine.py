"""SHINE: the inverse that Broyden built going forward serves the adjoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from fixpoint.backward.attachment import attach_adjoint
from fixpoint.backward.base import Backward, ForwardSolve
from fixpoint.backward.functional import LinearSolves
from fixpoint.engine.loop import Map, iterate
from fixpoint.engine.outcome import LoopResult
from fixpoint.engine.tolerance import Tolerance
from fixpoint.solvers.base import Solver, require_count
from fixpoint.solvers.broyden import Broyden


@dataclass(frozen=True, kw_only=True)
class SHINE(Backward):
    """Solve ``u = v + J^T u`` by a few quasi-Newton steps that start from the forward solve's inverse Jacobian.

    Broyden's method ends with ``H``, an estimate of ``(I - J)^-1`` at the solution. Its transpose takes the adjoint
    from ``u = v`` to ``v + H^T J^T v`` in one step, and ``refine`` further steps improve on that and on ``H^T``. Every
    state is verified and a row keeps the best: where the reused inverse is bad, that is v, the gradient of JFB. The
    figures are in ``Solution.adjoint``; there is no tolerance, so none of them says converged. First derivatives only.

    The published method takes ``H^T v`` itself and falls back by comparing norms. Starting from v costs two products
    more and lets the residual decide. A ``Broyden`` with memory for all its evaluations gives the best ``H``: each
    restart forgets one, that of rows which are done too.

    Args:
        refine: Steps after the first, at least 0. Backward takes ``refine + 2`` vector-Jacobian products.

    Raises:
        TypeError: If ``refine`` is no integer; in the solve, if the solver is not ``Broyden``.
        ValueError: If ``refine`` is below 0; in the solve, under torch.func.
        RuntimeError: In the backward of a gradient.

    Source: Z. Ramzi, F. Mannel, S. Bai, J.-L. Starck, P. Ciuciu, T. Moreau, SHINE: SHaring the INverse Estimate from
    the forward pass for bi-level optimization and implicit models, ICLR 2022.

    Example:
        >>> import torch, fixpoint
        >>> a = torch.tensor(0.5, requires_grad=True)
        >>> rule, solver = fixpoint.SHINE(), fixpoint.Broyden(memory=20)
        >>> solution = fixpoint.solve(lambda z: a * z + 1, torch.zeros(1), solver=solver, backward=rule, rtol=1e-6)
        >>> solution.value.sum().backward()
        >>> round(float(a.grad), 3)
        4.0
    """

    refine: int = 0
    runs_forward: ClassVar[bool] = True  # by Broyden, whose inverse it reuses

    def __post_init__(self) -> None:
        object.__setattr__(self, "refine", require_count("refine", self.refine, least=0))

    def attach(self, run: ForwardSolve) -> tuple[Tensor, LoopResult]:
        if not isinstance(run.solver, Broyden):
            raise TypeError(f"SHINE reuses the inverse that Broyden() builds, found solver={run.solver!r}")
        result = run.solve()
        transposed, rows = partial(run.solver.transposed_inverse, result.state), len(result.z)
        run = replace(run, z0=result.z)  # the start need not live until backward

        def inverse(v: Tensor) -> Tensor:
            """Of several gradients at once, one after the other."""
            return torch.cat([*map(transposed, v.split(rows))]) if rows else v

        def adjoint(image: Map, v: Tensor) -> LoopResult:
            solver = _Preconditioned(inverse=inverse, solver=Broyden(memory=self.refine + 1))
            outcome = iterate(image, v, solver, Tolerance(rtol=0, atol=0), max_evals=self.refine + 2, record=run.record)
            run.report_adjoint(outcome, "ignore")
            return outcome

        return attach_adjoint(run, result, LinearSolves.alike(adjoint))


@dataclass(frozen=True, kw_only=True)
class _Preconditioned(Solver):
    """``solver`` on ``u -> u + inverse(image(u) - u)``, whose fixed point is the same and whose Jacobian is small."""

    inverse: Callable[[Tensor], Tensor]
    solver: Solver

    def init(self, z: Tensor) -> Any:
        return self.solver.init(z)

    def step(self, z: Tensor, fz: Tensor, state: Any) -> tuple[Tensor, Any]:
        return self.solver.step(z, z + self.inverse(fz - z), state)
