"""root(): zeros of g(x), as fixed points of a relaxation that learns its own scale."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fixpoint.backward.base import Backward, ForwardSolve
from fixpoint.backward.ift import IFT
from fixpoint.engine.ambient import autocast_dtype
from fixpoint.engine.compiling import outside_graphs
from fixpoint.engine.layout import Layout, leaves, map_leaves, paired_leaves, require_same_layout
from fixpoint.engine.loop import Map
from fixpoint.engine.outcome import LoopResult
from fixpoint.engine.tolerance import OnFailure
from fixpoint.engine.transforms import plain
from fixpoint.interop.numpy import accepts_arrays
from fixpoint.options import check_options
from fixpoint.solution import AdjointSlot, Progress, Solution
from fixpoint.solve import report, solve
from fixpoint.solvers.base import Solver
from fixpoint.solvers.broyden import Broyden
from fixpoint.solvers.picard import Picard
from fixpoint.solvers.rescaled import Rescaled, evals_of_loop, inverse_slopes, row_norms


@outside_graphs
@accepts_arrays
def root(
    g: Callable[..., Any],
    x0: Any,
    args: Sequence[Any] = (),
    *,
    solver: Solver = Broyden(),  # noqa: B008 - immutable
    backward: Backward | None = IFT(),  # noqa: B008 - immutable
    rtol: float | Tensor = 1e-6,
    atol: float | Tensor = 0.0,
    norm: Callable[[Any], Tensor] | None = None,
    max_evals: int = 200,
    batch_dims: int | None = None,
    on_failure: OnFailure = "warn",
    check_every: int = 1,
    record: bool = False,
    callback: Callable[[Progress], object] | None = None,
    compact: bool = True,
    has_aux: bool = False,
) -> Solution:
    """Solve ``g(x, *args) = 0``, row by row, and attach gradients to the solution.

    It is ``fixpoint.solve`` on ``x = x - s g(x)``, where s of each row follows the slope of g as the solve goes on: the
    units of g play no part, and a start may be far away.

    Args:
        g: Maps a state to a state of the same structure, shapes, dtype and device; must not change its input in place.
        x0: Where to start: what ``fixpoint.solve`` takes as z0, NumPy arrays included. A vector is one system.
        args: A tuple or list of further arguments of g.
        solver: The update rule. On a device, ``Broyden`` does not solve systems whose Jacobian turns vectors by right
            angles.
        backward: How gradients are attached to the root that was found: IFT, Phantom or Neumann, say; no rule that goes
            through the forward solve (Unroll, SHINE). Those of IFT do not depend on s.
        rtol, atol: A row is done when ``||g(x)|| <= atol + rtol * slope * ||x||``, where the slope is the smallest that
            g showed along the last three steps, without steps longer than a tenth of x; so ``||g(x)|| / slope`` is how
            far x is from the root, by these slopes.
            A row is not done, other than by atol, where g has not fallen to half of ``||g(x0)||`` (unless that is
            rounding); nor where x has moved from x0 by more than a tenth of itself, and g is more than
            ``10 rtol ||g(x0)||``. Where slopes differed tenfold, two more evaluations look at each component of g: one
            that x would have to move far for makes the row STAGNATED.
            Numbers, or tensors with one for each row. What is small beside a root at zero is told from x0; where x0 is
            zero as well, give an atol.
        norm: Takes a state to one value for each row, in place of the Euclidean norm; of x and of g(x).
        max_evals: Evaluations of g granted; the second one is next to x0, to see the slope, and the last two are for a
            look at the components.
        batch_dims, on_failure, check_every, record, callback, compact: As in ``fixpoint.solve``. The look at the
            components is not in what a callback is shown, nor in its ``Progress.max_evals``.
        has_aux: g returns ``(g(x), aux)``. The aux of one more evaluation, at the solution, is in ``Solution.aux``.

    Returns:
        Solution: ``value`` is the best verified x, with gradients too; ``residual`` and ``trace`` are ``||g(x)||``, and
        ``relative_residual`` is ``||g(x)|| / (slope * ||x||)``, or 1 where no slope is known.

    Raises:
        TypeError, ValueError: As ``fixpoint.solve``.
        ConvergenceError: With ``on_failure="raise"``, when rows did not converge; holds the solution.

    Source: ``s`` is the shorter step of J. Barzilai and J. M. Borwein, IMA J. Numer. Anal. 8 (1988), or a quarter of
    ``|dx| / |dg|`` where that is longer; the first step is at most half as long as x0, or half of 1, as in SciPy's
    quasi-Newton solvers (``alpha`` of ``broyden1``).

    Example:
        >>> import torch, fixpoint
        >>> a = torch.tensor([[2.0], [9.0]], requires_grad=True)
        >>> sol = fixpoint.root(lambda x, a: x * x - a, torch.ones(2, 1), (a,))
        >>> sol.value.detach().flatten()
        tensor([1.4142, 3.0000])
        >>> sol.value.sum().backward()
        >>> a.grad.flatten()  # 1 / (2 sqrt(a))
        tensor([0.3536, 0.1667])
    """
    check_options(
        args=args,
        solver=solver,
        backward=backward,
        rtol=rtol,
        atol=atol,
        on_failure=on_failure,
        batch_dims=batch_dims,
        callback=callback,
    )
    if norm is not None and not callable(norm):
        raise ValueError(f"norm must be a function of a state or None, found {norm!r}")
    layout = Layout.of(x0, batch_dims)
    batch_dims = len(layout.batch_shape)
    relaxed: Callable[..., Any] = partial(_relaxed, g, norm or partial(row_norms, batch_dims=batch_dims), has_aux)
    if isinstance(g, nn.Module):
        relaxed = _RelaxedModule(g, relaxed)
    unknown = torch.zeros(layout.batch_shape, dtype=next(leaves(x0))[1].dtype, device=layout.device)

    def watch(progress: Progress) -> object:
        assert callback is not None
        seen_at_most = evals_of_loop(progress.max_evals)
        return callback(dataclasses.replace(progress, value=progress.value.x, max_evals=seen_at_most))

    try:
        solution = solve(
            relaxed,
            _State(x0, unknown, unknown),
            args,
            solver=Rescaled(solver),
            backward=None if backward is None else _AtRoot(backward),
            rtol=rtol,
            atol=atol,
            norm=None if norm is None else lambda state: norm(state.x),
            max_evals=max_evals,
            batch_dims=batch_dims,
            on_failure="ignore",
            check_every=check_every,
            record=record,
            callback=watch if callback else None,
            compact=compact,
            has_aux=has_aux,
        )
    except BaseException as error:
        if isinstance(getattr(error, "solution", None), Solution):
            error.solution = _of_x(error.solution)  # type: ignore[attr-defined]
        raise
    solution = _of_x(solution)
    report(solution, on_failure)
    return solution


class _State(NamedTuple):
    """What the solve works on, each leaf in the dtype of x.

    ``scale`` ``(*batch)`` is the s of the relaxation ``x - s g(x)``, 0 while it is unknown, and ``size`` ``(*batch)``
    is ``||g(x)||`` in an image; ``Rescaled`` says more of them.
    """

    x: Any
    scale: Tensor
    size: Tensor


def _relaxed(g: Callable[..., Any], norm: Callable[[Any], Tensor], has_aux: bool, state: _State, *args: Any) -> Any:
    x, given, _ = state
    output = g(x, *args)
    if has_aux and not (isinstance(output, tuple) and len(output) == 2):
        raise TypeError(f"with has_aux=True g must return (g(x), aux), found {type(output).__name__}")
    gx, aux = output if has_aux else (output, None)
    require_same_layout(gx, x, f="g", z="x", lower=autocast_dtype(given.device))
    size, given = norm(map_leaves(Tensor.detach, gx)), given.detach().real
    largest = 0.5 * norm(map_leaves(Tensor.detach, x)).clamp(min=1) / size
    scale = torch.where(given == 0, torch.where(torch.isfinite(largest), largest, 1), given)
    moved = iter([leaf - _times(g_leaf, scale) for _, g_leaf, leaf in paired_leaves(gx, x)])
    dtype = state.scale.dtype
    image = _State(map_leaves(lambda _: next(moved), x), scale.to(dtype), size.to(dtype))
    return (image, aux) if has_aux else image


class _RelaxedModule(nn.Module):
    """The same for a module g, whose parameters are then found."""

    def __init__(self, g: nn.Module, relaxed: Callable[..., Any]) -> None:
        super().__init__()
        self.g = g
        self._relaxed = relaxed

    def forward(self, *args: Any) -> Any:
        return self._relaxed(*args)


def _times(leaf: Tensor, factor: Tensor) -> Tensor:
    """A leaf ``(*batch, ...)`` times its row's factor ``(*batch)``."""
    shaped = factor.reshape(factor.shape + (1,) * (leaf.ndim - factor.ndim))
    return leaf * shaped.to(leaf.real.dtype)


@dataclass(frozen=True)
class _AtRoot(Backward):
    """The gradient that ``rule`` attaches to the root, once it is found."""

    rule: Backward

    def __post_init__(self) -> None:
        if self.rule.runs_forward:
            raise TypeError(
                "root attaches gradients to the root that was found: backward must be a rule that can, such as IFT(), "
                f"found {self.rule!r}"
            )

    def attach(self, run: ForwardSolve) -> tuple[Tensor, LoopResult]:
        result = run.solve()
        assert isinstance(run.solver, Rescaled)
        z = _for_gradients(run.solver, run.f, result.z)
        # Picard stays where it is, in rules that take further steps. A list of its own, for the outcome at depth 0 is
        # none to hand over; what the solve has seen, such as rows that depend on one another, is known all the same.
        at_root = dataclasses.replace(run, z0=z, depth=0, solver=Picard(), results=list(run.results))
        attached, _ = self.rule.attach(at_root)
        return attached, result


@torch.no_grad()
def _for_gradients(solver: Rescaled, f: Map, z: Tensor) -> Tensor:
    """``z`` with the scale that the solver worked with; rows that were done at x0 have none yet and are given one."""
    working = z[:, -solver.width]
    x, unknown = z[:, : -2 * solver.width], working == 0
    if bool(plain(unknown).any()):
        _, g, found = solver.parts(z, f(z))
        length = torch.finfo(z.dtype).eps ** 0.5 * row_norms(x, 1).clamp(min=1).to(z.dtype)
        nudge = length[:, None] / x.shape[1] ** 0.5 * torch.ones_like(x)
        nudged = solver.join(z, x + nudge, found, found)
        _, g_nudged, _ = solver.parts(nudged, f(nudged))
        longer, shorter = inverse_slopes(nudge.to(g.dtype), g_nudged - g)
        shorter = torch.where(torch.isfinite(shorter) & (shorter != 0), shorter, longer)
        working = torch.where(unknown, torch.where(torch.isfinite(shorter), shorter, found).to(z.dtype), working)
    return solver.join(z, x, working, working)


class _AdjointOfX(AdjointSlot):
    """The figures of a backward solve, in the structure of x; where several gradients came at once, in rows of it."""

    def __init__(self, slot: AdjointSlot, width: int) -> None:
        self._slot, self._width = slot, width

    @property
    def solution(self) -> Solution | None:  # type: ignore[override]
        found = self._slot.solution
        if found is None:
            return None
        value = found.value
        x = value.x if isinstance(value, _State) else value[:, : -2 * self._width]
        return dataclasses.replace(found, value=x)


def _of_x(solution: Solution) -> Solution:
    """The solution in the structure of x."""
    width = 2 if solution.value.scale.is_complex() else 1
    return dataclasses.replace(solution, value=solution.value.x, _adjoint=_AdjointOfX(solution._adjoint, width))
