"""Exact gradients by the implicit function theorem."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fixpoint.backward.base import Backward, Run
from fixpoint.convergence import Tolerance
from fixpoint.iterate import Iterates, iterate
from fixpoint.solvers.anderson import Anderson
from fixpoint.solvers.base import Solver


@dataclass(frozen=True, kw_only=True)
class IFT(Backward):
    """The gradient at the fixed point, from the adjoint equation ``u = v + J^T u``.

    ``v`` is the incoming gradient and ``J`` the Jacobian of f at the solution; ``u`` then flows through one recorded
    application of f to parameters, inputs and whatever f closes over. The adjoint is solved by the same loop, with its
    figures in ``Solution.adjoint``. It starts from ``u = v``, so a row whose adjoint cannot be improved keeps the JFB
    gradient; a warning says so. First order only: a second derivative is refused.

    Args:
        solver: Solver of the adjoint equation. Anderson on a linear map is GMRES with restarts by forgetting.
        rtol: Relative tolerance of the adjoint; the rounding of the state's dtype where that is larger.
        max_evals: Vector-Jacobian products granted.

    Raises:
        TypeError, ValueError: If an option is of the wrong type or out of range.
        RuntimeError: In backward, if it is asked to record its own graph (``create_graph=True``).

    Source: S. Bai, J. Z. Kolter, V. Koltun, Deep Equilibrium Models, NeurIPS 2019, Theorem 1.

    Example:
        >>> import torch, fixpoint
        >>> a = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
        >>> z = fixpoint.solve(lambda z: a * z + 1, torch.zeros(1, dtype=torch.float64), rtol=1e-12).value
        >>> z.sum().backward()  # z = 1 / (1 - a), so dz/da = 1 / (1 - a)^2 = 4
        >>> round(float(a.grad), 6)
        4.0
    """

    solver: Solver = field(default_factory=lambda: Anderson(memory=10))
    rtol: float = 1e-6
    max_evals: int = 100

    def __post_init__(self) -> None:
        if not isinstance(self.solver, Solver):
            raise TypeError(f"solver must be a fixpoint.Solver such as Anderson(), found {self.solver!r}")
        if not self.rtol >= 0:
            raise ValueError(f"rtol must be at least 0, found {self.rtol}")
        if not isinstance(self.max_evals, int) or self.max_evals < 1:
            raise ValueError(f"max_evals must be an integer of at least 1, found {self.max_evals!r}")

    def attach(self, run: Run) -> tuple[Tensor, Iterates]:
        iterates = run.solve()
        z = iterates.z.detach().requires_grad_()
        fz = run.f(z)
        if run.depth is not None:
            iterates = iterates.measured(fz.detach(), run.tolerance)

        def adjoint(v: Tensor) -> Tensor:
            def image(u: Tensor) -> Tensor:
                (product,) = torch.autograd.grad(fz, z, u, retain_graph=True, allow_unused=True)
                return v if product is None else v + product

            tolerance = Tolerance(rtol=max(self.rtol, torch.finfo(v.dtype).eps), atol=0.0)
            outcome = iterate(image, v, self.solver, tolerance, max_evals=self.max_evals)
            run.report_adjoint(outcome)
            return outcome.z

        return _Implicit.apply(fz, adjoint), iterates


class _Implicit(torch.autograd.Function):
    """Identity on f(z*) whose backward replaces the incoming gradient by the adjoint solution."""

    @staticmethod
    def forward(ctx: Any, fz: Tensor, adjoint: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.adjoint = adjoint
        return fz.clone()  # a view would forbid in-place use of the solution, by nn.ReLU(inplace=True) say

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "IFT gives first derivatives only, found create_graph=True. Use backward=Unroll() for "
                "second derivatives."
            )
        return ctx.adjoint(grads[0]), None
