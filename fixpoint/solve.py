"""solve(): fixed points of f, row by row, with gradients."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fixpoint.backward.attachment import hand_over
from fixpoint.backward.base import Backward, ForwardSolve
from fixpoint.backward.ift import IFT
from fixpoint.engine.ambient import autocast_dtype
from fixpoint.engine.compaction import Compaction
from fixpoint.engine.compiling import outside_graphs
from fixpoint.engine.evaluation import RowMap
from fixpoint.engine.layout import Layout, as_tensor, map_leaves
from fixpoint.engine.outcome import LoopResult, result_of
from fixpoint.engine.tolerance import ConvergenceError, ConvergenceWarning, OnFailure, Status
from fixpoint.engine.transforms import plain, transformed
from fixpoint.engine.warning import warn
from fixpoint.interop.numpy import accepts_arrays
from fixpoint.options import Norm, check_options, norm_of, tolerance_of
from fixpoint.solution import AdjointSlot, Progress, Solution, evaluations
from fixpoint.solvers.anderson import Anderson
from fixpoint.solvers.base import Solver


@outside_graphs
@accepts_arrays
def solve(
    f: Callable[..., Any],
    z0: Any = None,
    args: Sequence[Any] = (),
    *,
    solver: Solver = Anderson(),  # noqa: B008 - immutable
    backward: Backward | None = IFT(),  # noqa: B008 - immutable
    rtol: float | Tensor = 1e-4,
    atol: float | Tensor = 0.0,
    norm: Norm | None = None,
    max_evals: int = 100,
    batch_dims: int | None = None,
    on_failure: OnFailure = "warn",
    check_every: int = 1,
    record: bool = False,
    callback: Callable[[Progress], object] | None = None,
    depth: int | None = None,
    compact: bool = True,
    keep_states: Collection[int] = (),
    has_aux: bool = False,
) -> Solution:
    """Solve ``z = f(z, *args)``, row by row, and attach gradients to the solution.

    Args:
        f: Maps a state to a state of the same structure, shapes, dtype and device; must not change its input in place.
            A problem (an object with ``z0``, and optionally ``batch_dims`` and ``norm``) can be passed alone.
        z0: Where to start: a tensor, or nested tuples, lists and dicts of tensors, floating point or complex. A start
            and nothing else: its graph plays no part, unless the backward rule says that it differentiates through it.
            Under autocast, a z0 in autocast's dtype is taken to float32, and so is the state. Where z0 holds NumPy
            arrays, f is a NumPy function, the solution holds arrays, and gradients are off.
        args: A tuple or list of further arguments of f.
        solver: The update rule.
        backward: How gradients are attached, when grad mode is on and f's output requires grad; None detaches.
        rtol, atol: A row is done when ``||f(z) - z|| <= atol + rtol * ||f(z)||``. Numbers, or tensors with one for each
            row. A row that tends to zero is done when its residual has fallen to ``1e-16 rtol`` of its start.
        norm: A function that takes a state (of tensors, also where z0 holds arrays) to one value for each row, in place
            of the Euclidean norm. ``"leafwise"``: every leaf must meet the tolerance by itself, in its own Euclidean
            norm; for states of mixed units. None: the problem's own, else the Euclidean norm.
        max_evals: Evaluations of f granted, counted alike for every solver; at least 1.
        batch_dims: Leading dimensions that index independent problems (rows); 0 makes the whole state one problem.
            None: the problem's own; else 1, but 0 where no leaf has more than one dimension, or a leaf is a scalar.
        on_failure: What to do when rows do not converge: "warn", "raise" or "ignore".
        check_every: Check the residuals after the first evaluation, then once in so many: the host waits for the
            device at a check, and rows end at a check only.
        record: Keep the residual of every evaluation in ``Solution.trace``; the host then waits at each.
        callback: Called with a ``Progress`` at each check; returning something true stops the solve. Not called in runs
            of fixed depth.
        depth: If given, apply exactly so many solver updates, in as many evaluations, and hand over the last state
            unverified; tolerance, ``max_evals`` and ``on_failure`` then play no part.
        compact: Leave rows that are done out of what f sees, where an argument has the batch's one dimension, and not
            where f is seen to be compiled or has hooks. What is found in this way is confirmed by an evaluation of all
            rows. Set it to False for an f that must always see the same batch size.
        keep_states: Numbers of evaluations whose states go into ``Solution.states``, for ``fixpoint.correction_loss``.
            Needs ``check_every=1`` and turns ``compact`` off; runs of fixed depth keep none.
        has_aux: f returns ``(state, aux)``. The aux of one more evaluation, at the solution, is in ``Solution.aux``, as
            f gives it: failed rows are in it, and in its gradients, too.

    Returns:
        Solution: the state and how good it is, per row.

    Raises:
        TypeError, ValueError: At once or at the first evaluation, for an option, a state or an output of f that cannot
            work: other structure, shape, dtype or device, a change in place, non-finite or integer z0, an output
            without gradient where an argument or a parameter requires one.
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
    counts = check_options(
        args=args,
        solver=solver,
        backward=backward,
        rtol=rtol,
        atol=atol,
        norm=norm,
        max_evals=max_evals,
        on_failure=on_failure,
        check_every=check_every,
        depth=depth,
        keep_states=keep_states,
        batch_dims=batch_dims,
        callback=callback,
    )
    problem_z0 = getattr(f, "z0", None)
    if problem_z0 is not None:
        batch_dims = getattr(f, "batch_dims", None) if batch_dims is None else batch_dims
        norm = norm_of(f) if norm is None else norm
    start = problem_z0 if z0 is None else z0
    if start is None:
        raise TypeError("z0 is missing: pass a starting state, or a problem that has one as its attribute z0")
    start = _above_autocast(start)
    layout = Layout.of(start, batch_dims)
    problem = f
    f, solver = solver.bind(f, layout)
    gradients = backward is not None and torch.is_grad_enabled()
    rows = RowMap(f, args, layout, gradients=gradients, has_aux=has_aux)
    flat = layout.flatten(start).clone(memory_format=torch.contiguous_format)
    del start, problem_z0  # nobody else may hold a problem's own
    if backward is None or not backward.uses_start:
        flat = flat.detach()
    adjoint = AdjointSlot(layout, _report_adjoint)
    watch = _Watch(layout, counts.max_evals, callback, counts.keep_states) if callback or counts.keep_states else None
    run = ForwardSolve(
        f=rows,
        z0=flat,
        solver=solver,
        tolerance=tolerance_of(rtol, atol, norm, layout, rows.ambient.rounding),
        max_evals=counts.max_evals,
        check_every=counts.check_every,
        record=record,
        watch=watch,
        depth=counts.depth,
        problem=problem,
        transformed=transformed(flat, *rows.inputs),
        report_adjoint=adjoint.fill,
        compaction=Compaction(rows) if compact and not keep_states and rows.can_take else None,
    )
    if run.watch and run.transformed:
        raise ValueError("callback and keep_states do not work under torch.func or forward-mode differentiation")
    try:
        # Code that is compiled whole cannot solve to a tolerance: a rule with steps of its own takes these.
        own_steps = torch.compiler.is_compiling() and counts.depth is None
        if backward is not None and (rows.differentiates(run.z0) or own_steps):
            attached, result = backward.attach(run)
            value = hand_over(result, attached)
            states = watch.states(lambda z: run.recorded(lambda f, z: f(z), z)) if watch else {}
        else:
            result = run.solve()
            value = result.z
            states = watch.states(lambda z: z) if watch else {}
        aux = _aux(rows, value, recorded=gradients) if has_aux else None
    except BaseException as error:
        result_so_far = result_of(error) or next(reversed(run.results), None)
        if result_so_far is not None:
            _hand_over_so_far(error, layout, result_so_far)
        raise
    solution = replace(Solution.of(result, layout, value, adjoint), states=states, aux=aux)
    rows.ambient.end()
    if layout.rows > 1 and (result.coupled or rows.ambient.couples_rows):
        message = _NORMALISED if rows.ambient.couples_rows else _COUPLED
        warn(message, UserWarning, message)
    if not result.fixed_depth:
        report(solution, on_failure)
    return solution


_NORMALISED = (
    "f normalises by the statistics of the batch, so no row is solved for itself: each depends on what stands beside "
    "it, and so does its convergence. Batch normalisation in eval mode, nn.GroupNorm and nn.LayerNorm keep rows apart."
)
_COUPLED = (
    "f couples rows: a row that had converged was seen to have another image while others went on. They were solved "
    "together. Pass batch_dims=0 if the whole state is one problem, or fewer batch_dims."
)


class _Watch:
    """What a loop shows its states to: keeps some for the solution, and calls the caller's callback."""

    def __init__(
        self, layout: Layout, max_evals: int, callback: Callable[[Progress], object] | None, wanted: Collection[int]
    ) -> None:
        self._layout, self._max_evals, self._callback, self._wanted = layout, max_evals, callback, wanted
        self._kept: dict[int, Tensor] = {}

    def __call__(
        self, nfev: int, residual: Tensor, active: int, z: Tensor, predicted_error: Tensor | None = None, /
    ) -> object:
        if nfev in self._wanted:
            self._kept[nfev] = z
        if self._callback is None:
            return None
        # A copy: whoever is shown the state may scale it for display.
        value = map_leaves(torch.clone, self._layout.unflatten(z))
        shape = self._layout.batch_shape
        predicted = None if predicted_error is None else predicted_error.reshape(shape)
        return self._callback(Progress(nfev, self._max_evals, residual.reshape(shape), active, value, predicted))

    def states(self, apply: Callable[[Tensor], Tensor]) -> dict[int, Any]:
        """The states that were kept, after one more application of ``apply`` to each."""
        return {nfev: self._layout.unflatten(apply(z)) for nfev, z in self._kept.items()}


def _aux(rows: RowMap, value: Tensor, *, recorded: bool) -> Any:
    with torch.set_grad_enabled(recorded):
        rows(value)
    return rows.aux


def _hand_over_so_far(error: BaseException, layout: Layout, result: LoopResult) -> None:
    """Give ``error`` the state so far as its attribute ``solution``."""
    with contextlib.suppress(Exception):  # the device may be lost: nothing must hide the error itself
        error.solution = Solution.of(result, layout, result.z.detach())  # type: ignore[attr-defined]
        made = evaluations(result.nfev)
        error.add_note(f"fixpoint.solve had made {made}: see this error's attribute 'solution'")


def _above_autocast(start: Any) -> Any:
    """Leaves in the dtype that autocast computes in, taken to float32: f returns either, and this one holds both."""

    def widened(leaf: Any) -> Any:
        lower = isinstance(leaf, Tensor) and leaf.dtype == autocast_dtype(leaf.device)
        return leaf.float() if lower else leaf

    return map_leaves(widened, start)


def report(solution: Solution, on_failure: OnFailure, what: str = "row") -> None:
    """Warn or raise if rows did not converge; the warning is for whoever called this package."""
    if on_failure == "ignore":
        return
    message = solution.failure_message(what)
    if message and on_failure == "raise":
        raise ConvergenceError(message, solution)
    if message:
        causes = frozenset(plain(as_tensor(solution.status)).flatten().tolist()) - {Status.CONVERGED}
        warn(message, ConvergenceWarning, (what, causes))


def _report_adjoint(solution: Solution, on_failure: OnFailure) -> None:
    report(solution, on_failure, "adjoint row")
