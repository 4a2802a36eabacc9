"""What a backward rule is, and what it may use."""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fixpoint.backward.explicit import Solve, solve_explicitly
from fixpoint.engine.compaction import Compaction
from fixpoint.engine.loop import BestSoFar, LoopResult, Map, Watcher, run_steps
from fixpoint.engine.tolerance import OnFailure, Tolerance
from fixpoint.engine.transforms import Explicit
from fixpoint.solvers.base import Solver


@dataclass(frozen=True, kw_only=True)
class ForwardSolve:
    """A forward solve that has not happened yet, with the means to let it happen.

    Attributes:
        f: The map on rows, ``(rows, dim)`` to ``(rows, dim)``; records gradients when grad mode is on. Called
            ``f(z, *tensors)``, it puts the tensors in the place of ``inputs``.
        inputs: The tensors in the caller's args and, if f is a module, its parameters.
        z0: Where to start, ``(rows, dim)``; keeps its graph if the caller's z0 had one.
        transformed: Whether torch.func or forward-mode differentiation works on z0 or the inputs.
        report_adjoint: Takes the outcome of a backward solve, which becomes ``Solution.adjoint``, and what to do about
            rows that did not converge: "warn", "raise" or "ignore".
    """

    f: Explicit
    z0: Tensor
    solver: Solver
    tolerance: Tolerance
    max_evals: int
    check_every: int = 1
    record: bool = False
    watch: Watcher | None = None
    depth: int | None = None
    compaction: Compaction | None = None
    announce: Callable[[BestSoFar], object] = lambda _: None
    inputs: tuple[Tensor, ...] = ()
    transformed: bool = False
    report_adjoint: Callable[[LoopResult, OnFailure], None] = lambda result, on_failure: None

    def solve(self) -> LoopResult:
        """Solve without recording gradients: to the tolerance, or to the fixed depth that the caller asked for."""
        if self.transformed:
            return self.solve_explicitly(None)
        with torch.no_grad():
            result = self.unroll()
        # At depth 0 the state is z0, graph and all.
        return replace(result, z=result.z.detach()) if result.z.requires_grad else result

    def solve_explicitly(self, linear: Solve | None) -> LoopResult:
        """Solve under the transformations of torch.func; with derivatives, if told how to solve their equations."""

        def solve(f: Map, z0: Tensor) -> LoopResult:
            with torch.no_grad():
                return replace(self, f=f, z0=z0, compaction=None).unroll()

        if linear is None:
            return solve_explicitly(self.f, solve, solve, self.z0.detach(), [x.detach() for x in self.inputs])
        return solve_explicitly(self.f, solve, linear, self.z0, self.inputs)

    def measured(self, result: LoopResult, fz: Tensor) -> LoopResult:
        """``result`` with the figures that ``fz = f(state)`` gives, if its state was handed over unverified.

        Under torch.func nobody can look at them, and they stay unknown; nor can a graph that is being compiled whole.
        """
        if not result.fixed_depth or self.transformed or torch.compiler.is_compiling():
            return result
        return result.measured(fz.detach(), self.tolerance)

    def run_steps(self, depth: int) -> LoopResult:
        """Apply exactly ``depth`` solver updates to z0 without recording gradients, and hand over the last state."""
        return replace(self, depth=depth).solve()

    def unroll(self) -> LoopResult:
        """The same as ``solve``, recording gradients through every update when grad mode is on."""
        if self.depth is not None:
            return run_steps(self.f, self.z0, self.solver, self.tolerance, depth=self.depth, record=self.record)
        return self.solver.run(
            self.f,
            self.z0,
            self.tolerance,
            max_evals=self.max_evals,
            check_every=self.check_every,
            record=self.record,
            watch=self.watch,
            # What is recorded is recorded for all rows: a row left out would be missing from the graph.
            compaction=None if torch.is_grad_enabled() else self.compaction,
            announce=self.announce,
        )


class Backward(abc.ABC):
    """A way to attach gradients to a solved state. Subclasses are frozen dataclasses.

    Example:
        >>> import dataclasses, torch, fixpoint
        >>> @dataclasses.dataclass(frozen=True)
        ... class TwoSteps(fixpoint.Backward):
        ...     def attach(self, run):
        ...         result = run.solve()
        ...         return run.f(run.f(result.z)), result
        >>> w = torch.tensor(0.5, requires_grad=True)
        >>> sol = fixpoint.solve(lambda z: w * torch.cos(z), torch.zeros(3), backward=TwoSteps())
        >>> sol.value.sum().backward()
        >>> w.grad is not None
        True
    """

    @abc.abstractmethod
    def attach(self, run: ForwardSolve) -> tuple[Tensor, LoopResult]:
        """Let ``run`` happen and return ``(value, result)``.

        ``value`` ``(rows, dim)`` is what the caller gets, with the gradient that this rule gives it; ``result`` are
        the figures of the forward solve. Called with grad mode on.
        """

    @property
    def uses_start(self) -> bool:
        """Whether gradients flow into z0. If not, z0 is a start and nothing else."""
        return False

    def can_be_compiled(self, depth: int | None) -> bool:
        """Whether ``torch.compile`` may trace a solve with this rule and this ``depth``.

        Only where nothing is decided by numbers, and no gradient is taken before backward.
        """
        return False
