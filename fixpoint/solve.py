"""solve(): the way through the house."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any, get_args

import torch
from torch import Tensor, nn

from fixpoint.backward.base import Backward, ForwardSolve
from fixpoint.backward.ift import IFT
from fixpoint.engine.compaction import Compaction
from fixpoint.engine.compiling import outside_graphs
from fixpoint.engine.evaluation import RowMap
from fixpoint.engine.layout import Layout
from fixpoint.engine.loop import BestSoFar, LoopResult
from fixpoint.engine.tolerance import ConvergenceError, ConvergenceWarning, OnFailure, Tolerance, row_norm
from fixpoint.engine.transforms import transformed
from fixpoint.interop.numpy import accepts_arrays
from fixpoint.solution import AdjointSlot, Progress, Solution
from fixpoint.solvers.anderson import Anderson
from fixpoint.solvers.base import Solver, require_count


@outside_graphs
@accepts_arrays
def solve(
    f: Callable[..., Any],
    z0: Any = None,
    args: Sequence[Any] = (),
    *,
    solver: Solver = Anderson(),  # noqa: B008 - immutable
    backward: Backward | None = IFT(),  # noqa: B008 - immutable
    rtol: float = 1e-4,
    atol: float = 0.0,
    max_evals: int = 100,
    batch_dims: int | None = None,
    on_failure: OnFailure = "warn",
    check_every: int = 1,
    record: bool = False,
    callback: Callable[[Progress], object] | None = None,
    depth: int | None = None,
    compact: bool = True,
    keep: Collection[int] = (),
) -> Solution:
    """Solve ``z = f(z, *args)``, row by row, and attach gradients to the solution.

    Args:
        f: Maps a state to a state of the same structure, shapes, dtype and device; must not change its input in place.
            A problem (an object with ``z0``, and optionally ``batch_dims`` and ``norm``) can be passed alone.
        z0: Where to start: a tensor, or nested tuples, lists and dicts of tensors, floating point or complex. Where it
            holds NumPy arrays, f is a NumPy function, the solution holds arrays, and gradients are off.
        args: Further arguments of f.
        solver: The update rule.
        backward: How gradients are attached, when grad mode is on and f's output requires grad; None detaches.
        rtol, atol: A row is done when ``||f(z) - z|| <= atol + rtol * ||f(z)||``.
        max_evals: Evaluations of f granted, counted alike for every solver; at least 1.
        batch_dims: Leading dimensions that index independent problems (rows); 0 makes the whole state one problem.
            None: the problem's own, else 1, or 0 when a leaf is a scalar.
        on_failure: What to do when rows do not converge: "warn", "raise" or "ignore".
        check_every: Look at the residuals after the first evaluation, then once in so many: the host waits for the
            device at a look, and rows end at a look only.
        record: Keep the residual of every evaluation in ``Solution.trace``; the host then waits at each.
        callback: Called with a ``Progress`` at each look; returning something true stops the solve. Not called in runs
            of fixed depth.
        depth: If given, apply exactly so many solver updates, in as many evaluations, and hand over the last state
            unverified; tolerance, ``max_evals`` and ``on_failure`` then play no part.
        compact: Leave rows that are done out of what f sees, once more than a sixteenth of them are, where an argument
            has the batch's one dimension. f is tried before it is relied on, and sees all rows when it couples them.
            Set it to False for an f that must always see the same batch size.
        keep: Numbers of evaluations whose states go into ``Solution.states``, for ``fixpoint.correction_loss``. Needs
            ``check_every=1`` and turns ``compact`` off; runs of fixed depth keep none.

    Returns:
        Solution: the state and how good it is, per row.

    Raises:
        TypeError, ValueError: At once or at the first evaluation, for a state or an output of f that cannot work: other
            structure, shape, dtype or device, a change in place, non-finite or integer z0, an output without gradient
            where an argument or a parameter requires one.
        ConvergenceError: With ``on_failure="raise"``, when rows did not converge; holds the solution.
        BaseException: Whatever f or the callback raises, Ctrl-C too, comes through as it is. When f has been evaluated
            by then, the error carries the state so far as ``error.solution``, with ``MAX_EVALS`` for rows not done.

    Example:
        >>> import torch, fixpoint
        >>> A = 0.4 * torch.eye(3)
        >>> sol = fixpoint.solve(lambda z, b: z @ A + b, torch.zeros(2, 3), (torch.ones(2, 3),), rtol=1e-6)
        >>> sol.value[0]
        tensor([1.6667, 1.6667, 1.6667])
        >>> sol.converged
        tensor([True, True])
    """
    check_options(
        solver=solver,
        backward=backward,
        max_evals=max_evals,
        on_failure=on_failure,
        check_every=check_every,
        depth=depth,
        keep=keep,
    )
    problem_z0 = getattr(f, "z0", None)
    if batch_dims is None and problem_z0 is not None:
        batch_dims = getattr(f, "batch_dims", None)
    start = problem_z0 if z0 is None else z0
    if start is None:
        raise TypeError("z0 is missing: pass a starting state, or a problem that has one as its attribute z0")
    layout = Layout.of(start, batch_dims)
    f, solver = solver.bind(f, layout)
    later = AdjointSlot()
    records: list[BestSoFar] = []
    kept: dict[int, Tensor] = {}

    def watch(nfev: int, residual: Tensor, active: int, z: Tensor, predicted_error: Tensor | None = None, /) -> object:
        if nfev in keep:
            kept[nfev] = z
        if callback is None:
            return None
        shaped = residual.reshape(layout.batch_shape)
        predicted = None if predicted_error is None else predicted_error.reshape(layout.batch_shape)
        return callback(Progress(nfev, max_evals, shaped, active, layout.unflatten(z), predicted))

    def report_adjoint(result: LoopResult, on_failure: OnFailure) -> None:
        # A batch of torch.vmap arrives as further rows.
        flat = layout if len(result.z) == layout.rows else Layout.of(result.z, 1)
        later.solution = Solution.of(result, flat, result.z)
        report(later.solution, on_failure, "adjoint row")

    gradients = backward is not None and torch.is_grad_enabled()
    rows = RowMap(f, args, layout, gradients=gradients)
    flat = layout.flatten(start).clone(memory_format=torch.contiguous_format)
    run = ForwardSolve(
        f=rows,
        z0=flat,
        solver=solver,
        tolerance=Tolerance(rtol=rtol, atol=atol, norm=_norm(f, layout), rounding=rows.ambient.rounding),
        max_evals=max_evals,
        check_every=check_every,
        record=record,
        watch=watch if callback or keep else None,
        depth=depth,
        inputs=rows.inputs,
        transformed=transformed(flat, *rows.inputs),
        report_adjoint=report_adjoint,
        compaction=Compaction(rows) if compact and not keep and rows.can_take else None,
        announce=records.append,
    )
    if run.watch and run.transformed:
        raise ValueError("callback and keep do not work under torch.func or forward-mode differentiation")
    try:
        if backward is not None and rows.differentiates(run.z0):
            value, result = backward.attach(run)
            kept = {nfev: rows(z) for nfev, z in kept.items()}
        else:
            result = run.solve()
            value = result.z
    except BaseException as error:
        if records and records[-1].nfev:
            _hand_over(records[-1].outcome, layout, error)
        raise
    solution = replace(
        Solution.of(result, layout, value, later), states={nfev: layout.unflatten(z) for nfev, z in kept.items()}
    )
    rows.ambient.end()
    if rows.ambient.couples_rows and layout.rows > 1:
        warnings.warn(_COUPLED, stacklevel=4)
    if not result.fixed_depth:
        report(solution, on_failure)
    return solution


_COUPLED = (
    "f normalises by the statistics of the batch, so no row is solved for itself: each depends on what stands beside "
    "it, and so does its convergence. Batch normalisation in eval mode, nn.GroupNorm and nn.LayerNorm keep rows apart."
)


def _hand_over(outcome: Callable[[], LoopResult], layout: Layout, error: BaseException) -> None:
    """Give ``error`` the state so far as its attribute ``solution``."""
    with contextlib.suppress(Exception):  # the device may be lost: nothing must hide the error itself
        result = outcome()
        solution = Solution.of(result, layout, result.z.detach())
        error.solution = solution  # type: ignore[attr-defined]
        error.add_note(f"fixpoint.solve had made {result.nfev} evaluations: see this error's attribute 'solution'")


def _norm(f: object, layout: Layout) -> Callable[[Tensor], Tensor]:
    """The problem's own norm on rows if it brings one. A module's attribute of that name is a layer, not a norm."""
    norm = getattr(f, "norm", None) if hasattr(f, "z0") else None
    if norm is None or not callable(norm) or isinstance(norm, nn.Module):
        return row_norm
    return lambda flat: norm(layout.unflatten(flat)).reshape(layout.rows)


def report(solution: Solution, on_failure: OnFailure, what: str = "row") -> None:
    """Warn or raise if rows did not converge; for the caller of the public function that calls this."""
    if on_failure == "ignore":
        return
    complaint = solution.complaint(what)
    if complaint and on_failure == "raise":
        raise ConvergenceError(complaint, solution)
    if complaint:
        warnings.warn(complaint, ConvergenceWarning, stacklevel=5)


def check_options(
    *,
    solver: object = None,
    backward: object = None,
    max_evals: int = 1,
    on_failure: str = "warn",
    check_every: int = 1,
    depth: int | None = None,
    keep: Collection[int] = (),
) -> None:
    """Raise for an option of ``solve`` that cannot work, whatever the problem; others are looked at where they act."""
    if not isinstance(solver, Solver):
        raise TypeError(f"solver must be a fixpoint.Solver such as Anderson(), found {solver!r}")
    if backward is not None and not isinstance(backward, Backward):
        raise TypeError(f"backward must be a fixpoint.Backward such as IFT(), or None, found {backward!r}")
    for name, value, least in (("max_evals", max_evals, 1), ("check_every", check_every, 1), ("depth", depth, 0)):
        if name == "depth" and value is None:
            continue
        if not isinstance(value, int):
            raise TypeError(f"{name} must be an integer, found {value!r}")
        if value < least:
            raise ValueError(f"{name} must be at least {least}, found {value}")
    for nfev in keep:
        require_count("keep's entry", nfev)
    if keep and (check_every > 1 or depth is not None):
        raise ValueError(f"keep needs check_every=1 and depth=None, found check_every={check_every}, depth={depth}")
    if on_failure not in get_args(OnFailure):
        raise ValueError(f"on_failure must be one of {get_args(OnFailure)}, found {on_failure!r}")
