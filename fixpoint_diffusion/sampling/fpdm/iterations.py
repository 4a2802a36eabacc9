"""Iterating an FPDM's layer to a tolerance in place of a count, each image or the whole batch for itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fixpoint import Layout, LoopResult, Solver, Status, Tolerance


@dataclass(frozen=True, kw_only=True)
class ToTolerance:
    """Iterate the layer in every step until an iteration hardly changes the tokens, in place of a fixed count.

    An image is done after the iteration with ``||f(z) - z|| <= atol + rtol ||f(z)||``, norms over all of its tokens.
    What that iteration found is used, so this costs no evaluation more than the same count would. An image that is done
    is not evaluated again.

    With ``atol`` alone it is the adaptive allocation of the paper: the threshold of every step is the same, and steps
    that are harder to solve get more iterations. :func:`adaptive_tolerance` finds the threshold of a budget.

    Args:
        atol: Absolute tolerance, in the units of ``FPDMSamples.deltas``.
        rtol: Relative tolerance.
        max_iterations: Most iterations in a step.
        per_sample: Whether each image stops by itself. False: all images of a batch go on until the mean of the left
            side is at most that of the right one; an image then depends on its batch.

    Raises:
        ValueError: If no tolerance is positive, or ``max_iterations`` is below 1.

    Source: Bai and Melas-Kyriazi, CVPR 2024, Appendix C.

    >>> ToTolerance()
    Traceback (most recent call last):
    ...
    ValueError: ToTolerance needs atol or rtol, neither negative and one of them positive; got atol=0.0, rtol=0.0
    """

    atol: float = 0.0
    rtol: float = 0.0
    max_iterations: int = 50
    per_sample: bool = True

    def __post_init__(self) -> None:
        if not (self.atol >= 0 and self.rtol >= 0 and self.atol + self.rtol > 0):
            raise ValueError(
                "ToTolerance needs atol or rtol, neither negative and one of them positive; "
                f"got atol={self.atol}, rtol={self.rtol}"
            )
        if self.max_iterations < 1:
            raise ValueError(f"max_iterations must be at least 1, got {self.max_iterations}")

    def done(self, z: Tensor, fz: Tensor) -> tuple[Tensor, Tensor]:
        """Which of the rows ``(N, D)`` are done, ``(N,)`` bool, and their differences ``||f(z) - z||`` ``(N,)``."""
        difference = torch.linalg.vector_norm(fz - z, dim=1)
        allowed = self.atol + self.rtol * torch.linalg.vector_norm(fz, dim=1)
        if self.per_sample:
            return difference <= allowed, difference
        return (difference.mean() <= allowed.mean()).expand(len(z)), difference


@dataclass(frozen=True, kw_only=True)
class LastIterate(Solver):
    """The updates of ``solver`` until ``until`` says that a row is done; hands over the state after the last of them.

    A solve to a tolerance hands over the state whose residual it has seen, which is one update earlier, and it pays for
    rows that are done until they are many. Where a step has four iterations, both count: hence a loop of its own.
    """

    solver: Solver
    until: ToTolerance
    chosen: _ChosenRows | None = None

    def bind(self, f: Any, layout: Layout) -> tuple[Any, Solver]:
        """``f`` as a map that may leave rows out, and the solver that tells it which."""
        f, solver = self.solver.bind(f, layout)
        chosen = _ChosenRows(f)
        return chosen, replace(self, solver=solver, chosen=chosen)

    def init(self, z: Tensor) -> Any:
        return self.solver.init(z)

    def step(self, z: Tensor, fz: Tensor, state: Any) -> tuple[Tensor, Any]:
        return self.solver.step(z, fz, state)

    def run(
        self, f: Callable[[Tensor], Tensor], z: Tensor, tolerance: Tolerance, *, record: bool = False, **options: Any
    ) -> LoopResult:
        """``tolerance`` and ``options`` are those of the solve, of which ``until`` takes the place."""
        assert self.chosen is not None
        state = self.solver.init(z)
        active = torch.ones(len(z), dtype=torch.bool, device=z.device)
        evals, latest, trace = torch.zeros_like(active, dtype=torch.int64), torch.zeros_like(z[:, 0]), []
        for _ in range(self.until.max_iterations):
            fz = f(z)
            done, difference = self.until.done(z, fz)
            latest = torch.where(active, difference, latest)
            trace.append(latest)
            evals = evals + active
            z_next, state = self.solver.step(z, fz, state)
            z = torch.where(active[:, None], z_next, z)
            active = active & ~done
            if not bool(active.any()):
                break
            self.chosen.rows = None if bool(active.all()) else active.nonzero()[:, 0]
        unknown = torch.full_like(latest, torch.nan)
        status = torch.where(active, int(Status.MAX_EVALS), int(Status.CONVERGED))
        return LoopResult(
            z,
            unknown,
            unknown,
            torch.where(torch.isfinite(z).all(dim=1), status, int(Status.NON_FINITE)),
            evals,
            len(trace),
            torch.stack(trace) if record else None,
            fixed_depth=True,
            state=state,
        )


class _ChosenRows:
    """``f(z, *inputs)`` on chosen rows; the others are their own images, as in the loop of a solve."""

    def __init__(self, f: Callable[..., Tensor]) -> None:
        self.f = f
        self.rows: Tensor | None = None  # numbers of the rows ``(n,)``; None: all

    def __call__(self, z: Tensor, *inputs: Tensor) -> Tensor:
        if self.rows is None:
            return self.f(z, *inputs)
        chosen = (each[self.rows] if len(each) == len(z) else each for each in inputs)
        return z.index_copy(0, self.rows, self.f(z[self.rows], *chosen).to(z.dtype))
