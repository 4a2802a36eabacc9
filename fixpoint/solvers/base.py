"""What a solver is: an update rule on rows."""

from __future__ import annotations

import abc
import operator
from typing import TYPE_CHECKING, Any, Unpack

import torch
from torch import Tensor

from fixpoint.engine.loop import LoopOptions, Map, iterate
from fixpoint.engine.outcome import LoopResult
from fixpoint.engine.tolerance import Tolerance

if TYPE_CHECKING:
    from fixpoint.engine.layout import Layout


class Solver(abc.ABC):
    """Given rows ``z`` and ``f(z)``, propose the next rows.

    A solver sees flat ``(rows, dim)`` real tensors, never ``f`` and never a tolerance; the loop evaluates, measures and
    decides. It must not couple rows, must not change ``z`` or ``fz`` in place, and keeps everything that it remembers
    in the state it returns. Subclasses are frozen dataclasses, so that unknown options raise.

    States are values: stepping twice from one state gives the same, whatever else was tried in between. To save memory,
    a step may write where its own state does not read. So a state is good until a state that a step made from it is
    stepped from in turn; whoever wants to keep one longer copies it (``copy.deepcopy``).

    Example:
        >>> import dataclasses, torch, fixpoint
        >>> @dataclasses.dataclass(frozen=True)
        ... class Halfway(fixpoint.Solver):
        ...     def init(self, z):
        ...         return None
        ...     def step(self, z, fz, state):
        ...         return (z + fz) / 2, state
        >>> float(fixpoint.solve(torch.cos, torch.tensor(1.0), solver=Halfway()).value)  # doctest: +ELLIPSIS
        0.739...
    """

    @abc.abstractmethod
    def init(self, z: Tensor) -> Any:
        """State before the first step from rows ``z`` ``(rows, dim)``."""

    @abc.abstractmethod
    def step(self, z: Tensor, fz: Tensor, state: Any) -> tuple[Tensor, Any]:
        """``(z_next, state)`` from the rows ``z`` and their images ``fz = f(z)``, both ``(rows, dim)``.

        ``z_next`` belongs to the loop, which may write the rows that have ended into it. The loop may throw a step away
        and make another one from the same state.
        """

    def bind(self, f: Any, layout: Layout) -> tuple[Any, Solver]:
        """The map to evaluate and the solver to run on it, for a solver that must know its problem.

        Called once before each solve. ``f`` is the caller's, ``layout`` describes its state. Most solvers need neither.
        """
        return f, self

    def run(self, f: Map, z: Tensor, tolerance: Tolerance, **options: Unpack[LoopOptions]) -> LoopResult:
        """Solve from the rows ``z`` ``(rows, dim)``; only a solver that needs a loop of its own overrides it."""
        return iterate(f, z, self, tolerance, **options)

    def plain(self, fz: Tensor) -> Tensor:
        """Where plain iteration goes from images ``fz`` ``(rows, dim)``: to these themselves, nearly always."""
        return fz

    def forget(self, state: Any, rows: Tensor) -> Any:
        """``state`` without what is remembered of the rows in the mask ``rows`` ``(rows,)``; None if that cannot be.

        The next step of these rows depends on no earlier one. It is for whoever changes the map of a row during a
        solve, as ``root`` does.
        """
        return None

    def adjoint(self) -> Solver | None:
        """The solver for the adjoint equation ``u = v + J^T u`` of an f that this solver was bound to.

        None leaves the choice to the backward rule.
        """
        return None


def require_count(name: str, value: object, least: int = 1) -> int:
    """``value`` as an int, whatever integer type it has but bool; raise if it is none, or below ``least``."""
    try:
        count = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        count = None
    if count is None or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, found {value!r}")
    if count < least:
        raise ValueError(f"{name} must be at least {least}, found {count}")
    return count


def require_history_dtype(dtype: object) -> None:
    """Raise unless ``dtype`` is None or a floating point type of torch."""
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"history_dtype must be a floating point torch.dtype or None, found {dtype!r}")


def small_dtype(z: Tensor) -> torch.dtype:
    """Dtype of a solver's small systems: float64, or float32 on a device that lacks it."""
    return torch.float32 if z.device.type == "mps" else torch.float64


def gram_dtype(z: Tensor) -> torch.dtype:
    """Dtype in which a solver subtracts and multiplies rows: that of ``z``, and at least float32."""
    return torch.promote_types(z.dtype, torch.float32)
