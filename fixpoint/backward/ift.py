"""Exact gradients by the implicit function theorem."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from fixpoint.backward.attachment import attach_adjoint
from fixpoint.backward.base import Backward, ForwardSolve
from fixpoint.backward.functional import LinearSolves, solve_functionally, vector_jacobian_product
from fixpoint.engine.loop import Map
from fixpoint.engine.outcome import LoopResult
from fixpoint.engine.tolerance import OnFailure, Status, Tolerance
from fixpoint.engine.transforms import ClosureError, Functional, depends_on_nothing_else
from fixpoint.solvers.base import Solver, require_count
from fixpoint.solvers.gmres import GMRES

FailedRows = Literal["jfb", "best", "raise"]


@dataclass(frozen=True, kw_only=True)
class IFT(Backward):
    """The gradient at the fixed point, from the adjoint equation ``u = v + J^T u``.

    ``v`` is the incoming gradient and ``J`` the Jacobian of f at the solution; ``u`` then flows through one recorded
    application of f to parameters, inputs and whatever f closes over. The adjoint is solved by the same loop, with its
    figures in ``Solution.adjoint``.

    Derivatives of higher order, and every transformation of ``torch.func``, are exact when all that is differentiated
    is in ``args`` or a parameter of a module f. What f closes over has first derivatives; a second one is refused.

    Args:
        solver: Solver of the adjoint equation; None: what suits the forward solver (for a chain, the same sweeps in the
            other direction), or else ``GMRES()``: it needs ``I - J`` to be invertible, and nothing else.
            Where f was seen to couple rows, all of them are one system.
        rtol: Relative tolerance of the adjoint; the rounding of the state's dtype where that is larger.
        max_evals: Vector-Jacobian products granted.
        on_failure: What to do about rows whose adjoint was not solved: "jfb" gives them the gradient of JFB (u = v) and
            "best" the best u that was found, both with one warning; "raise" raises. A row that has come to the rounding
            of its dtype, or of autocast's, counts as solved.

    Raises:
        TypeError, ValueError: If an option is of the wrong type or out of range.
        ConvergenceError: In backward, with ``on_failure="raise"``.
        RuntimeError: In the backward of a gradient, where a second derivative would have to go through a closure.

    Source: S. Bai, J. Z. Kolter, V. Koltun, Deep Equilibrium Models, NeurIPS 2019, Theorem 1.

    Example:
        >>> import torch, fixpoint
        >>> a = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
        >>> z = fixpoint.solve(lambda z: a * z + 1, torch.zeros(1, dtype=torch.float64), rtol=1e-12).value
        >>> z.sum().backward()  # z = 1 / (1 - a), so dz/da = 1 / (1 - a)^2 = 4
        >>> round(float(a.grad), 6)
        4.0
        >>> def z_of(a):
        ...     return fixpoint.solve(lambda z, a: a * z + 1, torch.zeros((), dtype=a.dtype), (a,), rtol=1e-12).value
        >>> round(float(torch.func.hessian(z_of)(a.detach())), 4)  # 2 / (1 - a)^3
        16.0
    """

    solver: Solver | None = None
    rtol: float = 1e-6
    max_evals: int = 100
    on_failure: FailedRows = "jfb"

    def __post_init__(self) -> None:
        if self.solver is not None and not isinstance(self.solver, Solver):
            raise TypeError(f"solver must be a fixpoint.Solver such as Anderson(), or None, found {self.solver!r}")
        try:
            enough = self.rtol >= 0
        except TypeError:
            raise TypeError(f"rtol must be a number, found {self.rtol!r}") from None
        if not enough:
            raise ValueError(f"rtol must be at least 0, found {self.rtol}")
        require_count("max_evals", self.max_evals)
        if self.on_failure not in get_args(FailedRows):
            raise ValueError(f"on_failure must be one of {get_args(FailedRows)}, found {self.on_failure!r}")

    def attach(self, run: ForwardSolve) -> tuple[Tensor, LoopResult]:
        def adjoint(image: Map, v: Tensor) -> LoopResult:
            return self._solve(image, v, run, run.adjoint_solver(self.solver))

        def tangent(image: Map, v: Tensor) -> LoopResult:
            solver = run.adjoint_solver(self.solver)
            return self._solve(image, v, run, None if solver is None else solver.adjoint() or solver)

        linear = LinearSolves(adjoint, tangent)
        if not run.transformed:
            # The closures live until backward; what the solver remembered and where it started need not.
            result = replace(run.solve(), state=None)
            run = replace(run, z0=result.z)

            def double_backward(f: Functional, v: Tensor) -> tuple[Tensor | None, ...] | None:
                # torch.func loses the outer graph of a scripted module, without an error.
                scripted = any(isinstance(m, torch.jit.ScriptModule) for m in run.f.ambient.modules)
                if scripted or not depends_on_nothing_else(run.f, result.z, run.inputs):
                    return None
                # The same state once more, attached by a solve that is done already.
                known = solve_functionally(f, lambda f, z: result, linear, result.z, run.inputs)
                return vector_jacobian_product(f, linear, known.z, run.inputs, v)

            return attach_adjoint(run, result, linear, double_backward)
        if not depends_on_nothing_else(run.f, run.z0, run.inputs):
            raise ClosureError
        result = run.solve_functionally(linear)
        return result.z, result

    def _solve(self, image: Map, v: Tensor, run: ForwardSolve, solver: Solver | None) -> LoopResult:
        """The fixed point of a linear map, started at ``v``, which rows that fail go back to."""
        rtol = max(self.rtol, torch.finfo(v.dtype).eps)
        tolerance = Tolerance(rtol=rtol, atol=0.0, rounding=run.tolerance.rounding)
        coupled = run.f.ambient.couples_rows or any(result.coupled for result in run.results)
        one_system = solver is None and coupled  # GMRES takes each row for a system of its own
        outcome = (solver or GMRES()).run(
            (lambda u: image(u.reshape(v.shape)).reshape(1, -1)) if one_system else image,
            v.reshape(1, -1) if one_system else v,
            tolerance,
            max_evals=self.max_evals,
            check_every=run.check_every,
            record=run.record,
        )
        outcome = _for_each_row(outcome, v) if one_system else outcome
        failed = (outcome.status == Status.MAX_EVALS) | (outcome.status == Status.NON_FINITE)
        if self.on_failure == "jfb":
            outcome = replace(outcome, z=torch.where(failed[:, None], v, outcome.z))
        on_failure: OnFailure = "raise" if self.on_failure == "raise" else "warn"
        run.report_adjoint(outcome, on_failure if bool(failed.any()) else "ignore")
        return outcome


def _for_each_row(outcome: LoopResult, like: Tensor) -> LoopResult:
    """The outcome of a solve whose one row holds the rows of ``like``; each has the figures of the whole."""
    rows = len(like)
    return replace(
        outcome,
        z=outcome.z.reshape(like.shape),
        residual=outcome.residual.expand(rows),
        scale=outcome.scale.expand(rows),
        status=outcome.status.expand(rows),
        evals=outcome.evals.expand(rows),
        trace=None if outcome.trace is None else outcome.trace.expand(-1, rows),
    )
