"""root(): zeros of g(x), as fixed points of a relaxation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fixpoint.backward.base import Backward, ForwardSolve
from fixpoint.backward.ift import IFT
from fixpoint.engine.compiling import outside_graphs
from fixpoint.engine.layout import Layout, map_leaves, paired_leaves
from fixpoint.engine.loop import LoopResult
from fixpoint.engine.tolerance import Status, row_norm
from fixpoint.interop.numpy import accepts_arrays
from fixpoint.solution import Progress, Solution
from fixpoint.solve import OnFailure, report, solve
from fixpoint.solvers.base import Solver
from fixpoint.solvers.broyden import Broyden

# The solve aims inside the tolerance, so that rounding between g and the relaxation seldom decides who has met it.
_AIM = 0.9
# Evaluations beside the solve: two to scale it, one to measure what it found.
_EXTRA = 3


@outside_graphs
@accepts_arrays
def root(
    g: Callable[..., Any],
    x0: Any,
    args: Sequence[Any] = (),
    *,
    solver: Solver = Broyden(),  # noqa: B008 - immutable
    backward: Backward | None = IFT(),  # noqa: B008 - immutable
    rtol: float = 1e-6,
    atol: float = 0.0,
    max_evals: int = 200,
    batch_dims: int | None = None,
    on_failure: OnFailure = "warn",
    check_every: int = 1,
    record: bool = False,
    callback: Callable[[Progress], object] | None = None,
) -> Solution:
    """Solve ``g(x, *args) = 0``, row by row, and attach gradients to the solution.

    It is ``fixpoint.solve`` on ``x = x - s g(x)``. The number ``s`` of each row, of either sign, is the one that makes
    the linear model of g smallest along g(x0), cut so that the first step is at most half as long as x0 (half of 1
    where x0 is shorter). So the units of g play no part.

    Args:
        g: Maps a state to a state of the same structure, shapes, dtype and device.
        x0: Where to start: what ``fixpoint.solve`` takes as z0, NumPy arrays included.
        args: Further arguments of g.
        solver: The update rule.
        backward: How gradients are attached; those of IFT do not depend on ``s``.
        rtol, atol: A row is done when ``||g(x)|| <= atol + rtol * ||g(x0)||`` (Euclidean); one of them is positive.
            Where x0 may be nearly right already, give an atol.
        max_evals: Evaluations of g granted, at least 4: the first two, at and next to x0, set ``s``; the last measures
            the solution.
        batch_dims, on_failure, check_every, record, callback: As in ``fixpoint.solve``.

    Returns:
        Solution: ``value`` is the best verified x, with gradients too; ``residual`` and ``trace`` are ``||g(x)||``, and
        ``relative_residual`` is ``||g(x)|| / ||g(x0)||``. The trace leaves out these three evaluations.

    Raises:
        TypeError, ValueError: As ``fixpoint.solve``.
        ConvergenceError: With ``on_failure="raise"``, when rows did not converge; holds the solution.

    Source: ``s`` is the shorter step of J. Barzilai and J. M. Borwein, IMA J. Numer. Anal. 8 (1988), along g(x0); the
    bound is the first step of SciPy's quasi-Newton solvers (``alpha`` of ``scipy.optimize.broyden1``).

    Example:
        >>> import torch, fixpoint
        >>> a = torch.tensor([2.0, 9.0], requires_grad=True)
        >>> sol = fixpoint.root(lambda x, a: x * x - a, torch.ones(2), (a,))
        >>> sol.value.detach()
        tensor([1.4142, 3.0000])
        >>> sol.value.sum().backward()
        >>> a.grad  # 1 / (2 sqrt(a))
        tensor([0.3536, 0.1667])
    """
    if not isinstance(solver, Solver):
        raise TypeError(f"solver must be a fixpoint.Solver such as Broyden(), found {solver!r}")
    if not (rtol >= 0 and atol >= 0 and rtol + atol > 0):
        raise ValueError(f"rtol and atol must be at least 0 and one of them positive, found {rtol} and {atol}")
    if not isinstance(max_evals, int) or max_evals <= _EXTRA:
        raise ValueError(f"max_evals must be an integer of at least {_EXTRA + 1}, found {max_evals!r}")
    layout = Layout.of(x0, batch_dims)

    @torch.no_grad()
    def rows_of_g(x: Any) -> Tensor:
        gx = g(x, *args)
        layout.check_output(gx)
        return layout.flatten(gx)

    def batch(figures: Tensor) -> Tensor:
        return figures.reshape(layout.batch_shape)

    start, g_start = layout.flatten(x0).detach(), rows_of_g(map_leaves(torch.clone, x0))
    initial = batch(row_norm(g_start))
    # A row that is solved or broken at x0 has no scale; the solve will say which it is.
    usable = torch.isfinite(initial) & (initial > 0)
    step = torch.where(usable, batch(_first_step(start, g_start, lambda x: rows_of_g(layout.unflatten(x)))), 1)
    target = torch.where(usable, atol + rtol * initial, 1)
    # The state is y = x / (step * target): its residual is ||g(x)|| / target, and one number serves rows whose
    # ||g(x0)|| differ.
    unit = step * target

    def relaxed(y: Any, unit: Tensor, target: Tensor, *args: Any) -> Any:
        gx = g(_times(y, unit), *args)
        moved = iter([leaf - g_leaf for _, g_leaf, leaf in paired_leaves(_times(gx, 1 / target), y)])
        return map_leaves(lambda _: next(moved), y)

    def watch(progress: Progress) -> object:
        assert callback is not None
        seen = {"nfev": progress.nfev + 2, "max_evals": max_evals, "value": _times(progress.value, unit)}
        return callback(dataclasses.replace(progress, residual=progress.residual * target, **seen))

    def in_units_of_x(found: Solution) -> Solution:
        return dataclasses.replace(
            found,
            value=_times(found.value, unit),
            residual=found.residual * target,
            relative_residual=torch.where(found.residual == 0, 0, found.residual * target / initial),
            evals=found.evals + _EXTRA - 1,
            nfev=found.nfev + _EXTRA - 1,
            trace=None if found.trace is None else found.trace * target,
        )

    try:
        solution = solve(
            relaxed,
            _times(x0, 1 / unit),
            (unit, target, *args),
            solver=solver,
            backward=None if backward is None else _AtRoot(backward),
            rtol=0.0,
            atol=_AIM,
            max_evals=max_evals - _EXTRA,
            batch_dims=len(layout.batch_shape),
            on_failure="ignore",
            check_every=check_every,
            record=record,
            callback=watch if callback else None,
        )
    except BaseException as error:
        if isinstance(getattr(error, "solution", None), Solution):
            error.solution = in_units_of_x(error.solution)  # type: ignore[attr-defined]
        raise
    solution = in_units_of_x(solution)
    # Measured anew: where a state is so long that its rounding swallows the step, the solve saw a residual of zero.
    residual = batch(row_norm(rows_of_g(map_leaves(torch.clone, solution.value))))
    converged = residual <= torch.where(usable, target, 0)
    swallowed = ~converged & (solution.status == Status.CONVERGED)
    status = torch.where(swallowed, int(Status.STAGNATED), solution.status)
    solution = dataclasses.replace(
        solution,
        converged=converged,
        status=torch.where(converged, int(Status.CONVERGED), status),
        residual=residual,
        relative_residual=torch.where(residual == 0, 0, residual / initial),
        evals=solution.evals + 1,
        nfev=solution.nfev + 1,
    )
    report(solution, on_failure)
    return solution


def _first_step(x: Tensor, gx: Tensor, g: Callable[[Tensor], Tensor]) -> Tensor:
    """``s`` of each row, from one evaluation of g on rows next to ``x`` ``(rows, dim)``."""
    size = row_norm(gx)
    bound = 0.5 * row_norm(x).clamp(min=1) / size
    nudge = torch.finfo(x.dtype).eps ** 0.5 * bound
    change = (gx - g(x - nudge[:, None].to(x.dtype) * gx)).to(size.dtype)  # nudge times the Jacobian times g
    slope = row_norm(change) / nudge / size
    cosine = (change / row_norm(change)[:, None] * (gx / size[:, None])).sum(dim=1)
    step = torch.copysign(torch.minimum(cosine.abs() / slope, bound), cosine)
    return torch.where(torch.isfinite(step) & (step != 0), step, bound)


@dataclass(frozen=True)
class _AtRoot(Backward):
    """The gradient that ``rule`` gives, on the verified state: a relaxed step may lead away from a root."""

    rule: Backward

    def attach(self, run: ForwardSolve) -> tuple[Tensor, LoopResult]:
        value, result = self.rule.attach(run)
        return result.z.detach() + (value - value.detach()), result


def _times(state: Any, factor: Tensor) -> Any:
    """Every leaf ``(*batch, ...)`` of the state times its row's factor ``(*batch)``."""

    def scaled(leaf: Tensor) -> Tensor:
        shaped = factor.reshape(factor.shape + (1,) * (leaf.ndim - factor.ndim))
        return leaf * shaped.to(leaf.real.dtype if leaf.is_complex() else leaf.dtype)

    return map_leaves(scaled, state)
