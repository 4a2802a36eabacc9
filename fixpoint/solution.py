"""What a solve gives back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fixpoint.engine.layout import Layout, as_tensor
from fixpoint.engine.outcome import LoopResult
from fixpoint.engine.tolerance import ADJOINT_ADVICE, OnFailure, Status
from fixpoint.engine.transforms import plain


@dataclass(frozen=True, eq=False)
class Progress:
    """What a callback is shown after an evaluation; returning something true from it stops the solve.

    Attributes:
        nfev: Evaluations so far.
        max_evals: Evaluations granted.
        residual: ``||f(z) - z||`` of the state just evaluated, in the batch shape.
        active: Number of rows that have not ended; once all have, of those that an evaluation of all rows is still to
            confirm (``compact``). It is 0 at the end alone.
        value: A copy of the state just evaluated, in the structure of z0.
        predicted_error: What the solver predicts for the error of each row, where it judges by that and measures no
            residual (``CausalQuasiNewton`` on a chain; ``residual`` is then NaN). None for all other solvers.

    Example:
        >>> import torch, fixpoint
        >>> seen = []
        >>> def note(progress):
        ...     seen.append(float(progress.residual))
        >>> solution = fixpoint.solve(torch.cos, torch.ones(3), callback=note)
        >>> len(seen) == solution.nfev, seen[-1] < seen[0]
        (True, True)
    """

    nfev: int
    max_evals: int
    residual: Tensor
    active: int
    value: Any
    predicted_error: Tensor | None = None


class AdjointSlot:
    """A place for the figures of a backward solve, which exist once backward has run."""

    def __init__(
        self, layout: Layout | None = None, report: Callable[[Solution, OnFailure], None] | None = None
    ) -> None:
        self.solution: Solution | None = None
        self._layout = layout
        self._report = report

    def fill(self, result: LoopResult, on_failure: OnFailure) -> None:
        """Take in the outcome of a backward solve, and report rows that did not converge."""
        layout = self._layout
        if layout is None or len(result.z) != layout.rows:  # a batch of torch.vmap arrives as further rows
            layout = Layout.of(result.z, 1)
        self.solution = Solution.of(result, layout, result.z)
        if self._report is not None:
            self._report(self.solution, on_failure)


@dataclass(frozen=True, repr=False, eq=False)
class Solution:
    """A solved state and how good it is, per row. Where z0 held NumPy arrays, what is a tensor here is an array.

    Attributes:
        value: The best verified state, in the structure of z0; with gradients attached too. After a run of fixed depth,
            the last state.
        converged: Which rows met the tolerance; bool, batch shape.
        status: Why each row ended, as ``fixpoint.Status`` numbers; batch shape.
        residual: ``||f(z*) - z*||`` per row, by the norm of the solve; of the leaf farthest from its tolerance with
            ``norm="leafwise"``. NaN where nobody has evaluated f at the value, as after a run of fixed depth and
            where a solver judged by predicted errors instead.
        relative_residual: ``residual / ||f(z*)||`` per row.
        evals: Evaluations until the row ended.
        nfev: Batched evaluations of f in the solve; a backward rule's own are not in it.
        trace: ``(nfev, *batch)`` residuals if recorded, else None; predicted errors where ``predicted_error`` is not
            None. A row that has ended keeps its final figure.
        states: What ``keep_states`` asked for, by number of evaluations: the states reached before the solve ended.
            With gradients attached, each is one more application of f, with the gradient of JFB.
        aux: What f returned beside the state when it was evaluated at the value, with ``has_aux=True``; else None.
        predicted_error: Norm of the predicted errors of each row, from a solver that judges by them
            (``CausalQuasiNewton`` on a chain); None for all others.
        amplification: How many times larger, at most, later states of a chain show the relative error of an
            earlier one, per row. Measured by following a displacement through the steps where ``CausalQuasiNewton``
            certifies a row; elsewhere estimated from what each step was seen to make of changes of its input, which
            may be far off. None for all other solvers, and where gradients are recorded.
        lyapunov: How fast a chain forgets or amplifies, per row: the mean, over its steps, of the logarithm of how many
            times larger a step makes a small change of its input. Below 0 it forgets, and few rounds do; above 0 errors
            grow, and solving all steps at once may not pay. Known as ``amplification`` is, and None where that is; NaN
            where no step was seen to make anything of a change.

    Example:
        >>> import torch, fixpoint
        >>> solution = fixpoint.solve(torch.cos, torch.ones(3, 2))
        >>> solution.converged, solution.value.shape
        (tensor([True, True, True]), torch.Size([3, 2]))
    """

    value: Any
    converged: Tensor
    status: Tensor
    residual: Tensor
    relative_residual: Tensor
    evals: Tensor
    nfev: int
    trace: Tensor | None = None
    states: dict[int, Any] = field(default_factory=dict)
    aux: Any = None
    predicted_error: Tensor | None = None
    amplification: Tensor | None = None
    lyapunov: Tensor | None = None
    _adjoint: AdjointSlot = field(default_factory=AdjointSlot)

    @property
    def adjoint(self) -> Solution | None:
        """The same figures of the backward solve, once backward has run through a rule that solves one (IFT)."""
        return self._adjoint.solution

    @classmethod
    def of(cls, result: LoopResult, layout: Layout, value: Tensor, adjoint: AdjointSlot | None = None) -> Solution:
        """Put the figures of ``result`` into the caller's shapes; ``value`` ``(rows, dim)`` is what to return."""
        real = torch.float64 if layout.dtype in (torch.float64, torch.complex128) else torch.float32

        def batch(x: Tensor) -> Tensor:
            return x.detach().reshape(layout.batch_shape)

        residual, scale = result.residual, result.scale
        relative = torch.where(residual == 0, 0, residual / scale)
        trace = result.trace
        return cls(
            value=layout.unflatten(value),
            converged=batch(result.status == int(Status.CONVERGED)),
            status=batch(result.status),
            residual=batch(residual).to(real),
            relative_residual=batch(relative).to(real),
            evals=batch(result.evals),
            nfev=result.nfev,
            trace=None if trace is None else trace.detach().reshape(len(trace), *layout.batch_shape).to(real),
            predicted_error=None if result.predicted_error is None else batch(result.predicted_error).to(real),
            amplification=None if result.amplification is None else batch(result.amplification).to(real),
            lyapunov=None if result.lyapunov is None else batch(result.lyapunov).to(real),
            _adjoint=adjoint or AdjointSlot(),
        )

    def failure_message(self, what: str = "row") -> str:
        """One line: how many rows did not converge, why, and what to change; empty if all did."""
        status = plain(as_tensor(self.status))
        failed = status[status != Status.CONVERGED]
        if failed.numel() == 0:
            return ""
        advice = ADJOINT_ADVICE if what == "adjoint row" else {}
        causes = "; ".join(
            f"{int((failed == status).sum())} {status.name} ({advice.get(status, status.advice)})"
            for status in Status
            if (failed == status).any()
        )
        return (
            f"{failed.numel()} of {status.numel()} {what}s did not converge in {evaluations(self.nfev)}, "
            f"{self._worst()}: {causes}"
        )

    def __repr__(self) -> str:
        converged = plain(as_tensor(self.converged))
        done, total = int(converged.sum()), converged.numel()
        return f"Solution({done} of {total} rows converged, nfev={self.nfev}, {self._worst()})"

    def _worst(self) -> str:
        """The worst row's relative residual; its predicted error where no residual was measured of some row."""
        relative = plain(as_tensor(self.relative_residual))
        name, figures = "relative residual", relative
        if self.predicted_error is not None and bool(relative.isnan().any()):
            name, figures = "predicted error", plain(as_tensor(self.predicted_error))
        worst = float(figures.nan_to_num(nan=torch.inf, posinf=torch.inf).max()) if figures.numel() else 0.0
        return f"worst {name} {worst:.1e}"


def evaluations(nfev: int) -> str:
    """So many evaluations, in words."""
    return "1 evaluation" if nfev == 1 else f"{nfev} evaluations"
