"""What a backward rule is, and what it may use."""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from fixpoint.backward.attachment import without_gradient
from fixpoint.backward.functional import LinearSolves, solve_functionally
from fixpoint.engine.compaction import Compaction
from fixpoint.engine.evaluation import RowMap
from fixpoint.engine.layout import Layout
from fixpoint.engine.loop import Map, Watcher, run_steps
from fixpoint.engine.norms import to_host
from fixpoint.engine.outcome import LoopResult
from fixpoint.engine.tolerance import OnFailure, Status, Tolerance, same_images
from fixpoint.engine.transforms import Functional, is_capturing
from fixpoint.engine.warning import warn
from fixpoint.solvers.base import Solver

_FAR = 10.0  # a recorded image misses the tolerance by far if it does so by this factor
_ANOTHER_MAP = (
    "f has another image of the solution where autograd records it than it had in the solve, so the gradient is that "
    "of another map. Look for what depends on grad mode, such as nn.TransformerEncoder in eval mode with a padding "
    "mask, which needs enable_nested_tensor=False, and for random numbers that are not from torch's global state."
)


@dataclass(frozen=True, kw_only=True)
class ForwardSolve:
    """A forward solve that has not happened yet, with the means to let it happen.

    Attributes:
        f: The map on rows, ``(rows, dim)`` to ``(rows, dim)``; records gradients when grad mode is on. Called
            ``f(z, *tensors)``, it puts the tensors in the place of ``inputs``.
        inputs: The tensors in the caller's args and, if f is a module, its parameters.
        z0: Where to start, ``(rows, dim)``; keeps its graph if the rule ``uses_start``.
        solver, tolerance, max_evals, check_every, record, depth: As in ``fixpoint.solve``; the solver is bound.
        problem: The caller's f.
        transformed: Whether torch.func or forward-mode differentiation works on z0 or the inputs.
        report_adjoint: Takes the outcome of a backward solve, which becomes ``Solution.adjoint``, and what to do about
            rows that did not converge: "warn", "raise" or "ignore".
        results: The outcomes so far, for whoever meets an error in what comes after.

    Example:
        See :class:`fixpoint.Backward`, whose ``attach`` is given one.
    """

    f: RowMap
    z0: Tensor
    solver: Solver
    tolerance: Tolerance
    max_evals: int
    check_every: int = 1
    record: bool = False
    watch: Watcher | None = None
    depth: int | None = None
    compaction: Compaction | None = None
    problem: Any = field(default=None, repr=False)
    transformed: bool = False
    report_adjoint: Callable[[LoopResult, OnFailure], None] = lambda result, on_failure: None
    results: list[LoopResult] = field(default_factory=list, repr=False)

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        return self.f.inputs

    @property
    def layout(self) -> Layout:
        """How the caller's state is laid out as rows."""
        return self.f.layout

    def solve(self) -> LoopResult:
        """Solve without recording gradients: to the tolerance, or to the fixed depth that the caller asked for."""
        if self.transformed:
            return self.solve_functionally(None)
        with torch.no_grad():
            result = self.unroll()
        # At depth 0 the state is z0, graph and all.
        return replace(result, z=result.z.detach()) if result.z.requires_grad else result

    def solve_functionally(self, linear: LinearSolves | None) -> LoopResult:
        """Solve under the transformations of torch.func; with derivatives, if told how to solve their equations."""

        def solve(f: Map, z0: Tensor) -> LoopResult:
            with torch.no_grad():
                return replace(self, z0=z0, compaction=None).on(f)

        if linear is None:
            inputs = [x.detach() for x in self.inputs]
            return solve_functionally(self.f, solve, LinearSolves.alike(solve), self.z0.detach(), inputs)
        return solve_functionally(self.f, solve, linear, self.z0, self.inputs)

    def run_steps(self, depth: int) -> LoopResult:
        """Apply exactly ``depth`` solver updates to z0 without recording gradients, and hand over the last state."""
        return replace(self, depth=depth).solve()

    def unroll(self) -> LoopResult:
        """The same as ``solve``, recording gradients through every update when grad mode is on."""
        return self.on(self.f)

    def on(self, f: Map) -> LoopResult:
        """The same for a map on rows in the place of f, recording gradients when grad mode is on."""
        result = self._outcome(f)
        if not torch.compiler.is_compiling():
            self.results.append(replace(result, z=result.z.detach(), state=None))
        return result

    def _outcome(self, f: Map) -> LoopResult:
        if self.depth is not None:
            return run_steps(f, self.z0, self.solver, self.tolerance, depth=self.depth, record=self.record)
        return self.solver.run(
            f,
            self.z0,
            self.tolerance,
            max_evals=self.max_evals,
            check_every=self.check_every,
            record=self.record,
            watch=self.watch,
            # What is recorded is recorded for all rows: a row left out would be missing from the graph.
            compaction=None if torch.is_grad_enabled() else self.compaction,
        )

    def measured(self, result: LoopResult, fz: Tensor) -> LoopResult:
        """``result`` with the figures that ``fz = f(state)`` gives, if its state was handed over unverified.

        Where it was verified, there is a warning if f says something else now. Under torch.func nobody can look at
        figures, and they stay unknown; nor can a graph that is being compiled whole.
        """
        if self.transformed or torch.compiler.is_compiling():
            return result
        if result.fixed_depth:
            return result.measured(fz.detach(), self.tolerance)
        if self._has_moved(result, fz.detach()):
            warn(_ANOTHER_MAP, UserWarning, _ANOTHER_MAP)
        return result

    def _has_moved(self, result: LoopResult, fz: Tensor) -> bool:
        """Whether a row that met the tolerance misses it by far with ``fz``, by more than rounding can explain."""
        figures = self.tolerance.measure(result.z, fz)
        # Recorded or not, f may take other kernels: half of its digits are enough for the same map.
        rounding = max(torch.finfo(fz.dtype).eps, self.tolerance.rounding)
        with np.errstate(invalid="ignore"):
            moved = figures.residual > _FAR * self.tolerance.limit(figures.scale) + rounding**0.5 * figures.scale
        if not np.count_nonzero(moved):
            return False
        residual, scale = (to_host(x) for x in (result.residual, result.scale))
        # Of a row that came to nothing, what is left may be rounding.
        met = (to_host(result.status) == Status.CONVERGED) & (residual <= self.tolerance.limit(scale)) & (scale > 0)
        return bool((moved & met).any())

    def recorded(
        self,
        apply: Callable[[RowMap, Tensor], Tensor],
        z: Tensor,
        out: Tensor | None = None,
        failed: Tensor | None = None,
    ) -> Tensor:
        """``apply(f, z)``, recorded so that rows which fail leave the gradients of the others alone.

        A row whose outcome is not finite would make NaN of every gradient that rows share, though its own incoming
        gradient is zero. So it is recorded once more with the state and the arguments of another row in its place, if
        that leaves the outcomes of the others as they were. It cannot replace data of the row that f closes over. Where
        the outcome is known already it is ``out``; ``failed`` ``(rows,)`` says which rows have failed though it is
        finite.
        """
        out = apply(self.f, z) if out is None else out
        if self.transformed or torch.compiler.is_compiling() or is_capturing(z):
            return out
        broken = ~torch.isfinite(out.detach()).all(dim=1)
        failed = broken if failed is None else broken | failed
        if not bool(failed.any()):
            return out
        if bool(failed.all()):
            return without_gradient(out)
        found = self._with_others_in_place(apply, z, out, failed)
        return out if found is None else torch.where(failed[:, None], out.detach(), found[2])

    def sound(self, z: Tensor, fz: Tensor) -> Functional:
        """``f(z, *inputs)`` at the state ``z`` with the image ``fz``, constant in rows that are not finite there.

        As ``recorded`` does it, so that their derivatives leave those of the others alone.
        """
        failed, image = ~torch.isfinite(fz.detach()).all(dim=1), fz.detach()
        if not bool(failed.any()):
            return self.f
        if bool(failed.all()):
            return lambda z, *inputs: image
        with torch.no_grad():
            found = self._with_others_in_place(lambda f, z: f(z), z.detach(), image, failed)
        if found is None:
            return self.f
        part, index, _ = found
        taken = [some is not every for some, every in zip(part.inputs, self.inputs, strict=True)]

        def others_in_place(z: Tensor, *inputs: Tensor) -> Tensor:
            of_rows = zip(inputs, taken, strict=True)
            chosen = [x.index_select(0, index.to(x.device)) if picked else x for x, picked in of_rows]
            return torch.where(failed[:, None], image, self.f(z.index_select(0, index), *chosen))

        return others_in_place

    def _with_others_in_place(
        self, apply: Callable[[RowMap, Tensor], Tensor], z: Tensor, out: Tensor, failed: Tensor
    ) -> tuple[RowMap, Tensor, Tensor] | None:
        """f with another row in the place of each that has ``failed``; which rows these are; what comes out.

        None where that changes the outcome ``out`` of other rows, or fails itself.
        """
        index = torch.arange(len(z), device=z.device)
        index = torch.where(failed, index[~failed][0], index)
        # A parameter may look like an argument with rows, as it has as many. One that a failed row broke is none.
        for part in (self.f.take(index, self.layout), self.f.take(index, self.layout, broken_at=failed)):
            try:
                other = apply(part, z.index_select(0, index))
            except Exception:  # f knows its rows by number
                continue
            same = same_images(other.detach(), out.detach(), self.tolerance.rounding)
            if bool((same | failed).all()) and bool(torch.isfinite(other.detach()).all()):
                return part, index, other
        return None

    def adjoint_solver(self, solver: Solver | None) -> Solver | None:
        """``solver``, or else what suits the forward solver, made to suit ``u = v + J^T u``; None: any will do."""
        if solver is None:
            return self.solver.adjoint()
        _, bound = solver.bind(self.problem, self.layout)
        return bound.adjoint() or bound


class Backward(abc.ABC):
    """A way to attach gradients to a solved state. Subclasses are frozen dataclasses.

    Attributes:
        runs_forward: Whether the rule decides itself how the forward solve runs, so that it has nothing to attach to a
            state that was found elsewhere.

    Example:
        >>> import dataclasses, torch, fixpoint
        >>> @dataclasses.dataclass(frozen=True)
        ... class TwoSteps(fixpoint.Backward):
        ...     def attach(self, run):
        ...         result = run.solve()
        ...         return run.f(run.f(result.z)), result
        >>> w = torch.tensor(0.5, requires_grad=True)
        >>> sol = fixpoint.solve(lambda z: w * torch.cos(z), torch.zeros(3, 1), backward=TwoSteps())
        >>> sol.value.sum().backward()
        >>> w.grad is not None
        True
    """

    runs_forward: ClassVar[bool] = False

    @abc.abstractmethod
    def attach(self, run: ForwardSolve) -> tuple[Tensor, LoopResult]:
        """Let ``run`` happen and return ``(attached, result)``. Called with grad mode on.

        ``result`` is the outcome of the forward solve; the caller gets its state. ``attached`` ``(rows, dim)`` has the
        graph through which the incoming gradient of that state is sent; its numbers play no part.
        """

    @property
    def uses_start(self) -> bool:
        """Whether gradients flow into z0. If not, z0 is a start and nothing else, and nothing of its graph is kept."""
        return False

    def can_be_compiled(self, depth: int | None) -> bool:
        """Whether ``torch.compile`` may trace a solve with this rule and this ``depth``.

        Only where nothing is decided by numbers, and no gradient is taken before backward.
        """
        return False
