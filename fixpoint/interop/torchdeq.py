"""Our solvers in torchdeq's registry, so that a torchdeq project switches with one line."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from fixpoint.engine.layout import Layout
from fixpoint.engine.norms import row_norm
from fixpoint.solution import Progress, Solution
from fixpoint.solve import solve
from fixpoint.solvers.anderson import Anderson
from fixpoint.solvers.base import Solver
from fixpoint.solvers.broyden import Broyden
from fixpoint.solvers.picard import Picard

_REFUSED = {
    "lam": "it is an absolute ridge, ours is relative to the problem's scale: leave it out",
    "ls": "no line search here: leave it out",
}


def register() -> None:
    """Put ``fixpoint_picard``, ``fixpoint_anderson`` and ``fixpoint_broyden`` into torchdeq's registry of solvers.

    They then serve as ``f_solver`` and ``b_solver`` of every torchdeq model. ``max_iter`` counts evaluations of f;
    ``tol`` and ``stop_mode`` are a tolerance on each sample's residual; ``tau`` is ``damping``, ``m`` and
    ``LBFGS_thres`` are ``memory``, and options of our solvers go by their own names too. Other options raise
    ``TypeError``. What differs from torchdeq's own solvers:

    - The state handed back is one that was evaluated, and ``info`` holds its residual.
    - ``indexing`` gives one state for each index: the one evaluated then, or the solution where the solve ended before.
    - ``return_final`` gives the state after ``max_iter`` updates, whose residual nobody knows: NaN.

    Raises:
        ModuleNotFoundError: If torchdeq is not installed.

    Example:
        >>> import torch, torchdeq, fixpoint
        >>> fixpoint.interop.torchdeq.register()
        >>> deq = torchdeq.get_deq(f_solver="fixpoint_anderson", b_solver="fixpoint_anderson", ift=True)
        >>> (z,), info = deq(torch.cos, torch.zeros(2, 3))
        >>> bool((info["abs_lowest"] < 1e-3).all())
        True
    """
    from torchdeq.solver import register_solver

    for name, solver, names in (
        ("fixpoint_picard", Picard, {"tau": "damping"}),
        ("fixpoint_anderson", Anderson, {"tau": "damping", "m": "memory"}),
        ("fixpoint_broyden", Broyden, {"LBFGS_thres": "memory"}),
    ):
        register_solver(name, TorchDEQSolver(name, solver, names))


@dataclass(frozen=True)
class TorchDEQSolver:
    """A solver class of ours, called the way torchdeq calls its solvers; ``names`` maps its option names to ours."""

    name: str
    solver: Callable[..., Solver]
    names: Mapping[str, str]

    def __call__(
        self,
        func: Callable[[Any], Any],
        x0: Any,
        max_iter: int = 50,
        tol: float = 1e-3,
        stop_mode: str = "abs",
        indexing: Sequence[int] | None = None,
        return_final: bool = False,
        **options: Any,
    ) -> tuple[Any, list[Any], dict[str, Tensor]]:
        """``(solution, states at indexing, SolverStat)``."""
        from torchdeq.solver.stat import SolverStat

        if stop_mode not in ("abs", "rel"):
            raise ValueError(f"stop_mode must be 'abs' or 'rel', found {stop_mode!r}")
        wanted = list(indexing or ())
        fixed = return_final or max_iter == 0  # torchdeq hands z_init over after no iteration
        if fixed and any(index < max_iter for index in wanted):
            raise ValueError(f"{self.name}: with return_final there is no state but the last, found indexing={wanted}")
        batch_dims = min(x0.ndim, 1)  # torchdeq takes a vector for that many scalar problems
        layout = Layout.of(x0, batch_dims)
        scales: list[Tensor] = []
        seen: dict[int, Any] = {}

        def f(z: Any) -> Any:
            fz = func(z)
            scales.append(row_norm(layout.flatten(fz)))
            return fz

        def keep(progress: Progress) -> None:
            if progress.nfev in wanted:
                seen[progress.nfev] = progress.value

        solution = solve(
            f,
            x0,
            solver=self.solver(**self._translated(options)),
            backward=None,
            batch_dims=batch_dims,
            atol=tol if stop_mode == "abs" else 0.0,
            rtol=tol if stop_mode == "rel" else 0.0,
            max_evals=max(max_iter, 1),
            depth=max_iter if fixed else None,
            on_failure="ignore",
            record=True,
            callback=keep if wanted else None,
        )
        states = [seen[index] if index < solution.nfev else solution.value for index in wanted]
        return solution.value, states, SolverStat(_statistics(solution, scales, max_iter))

    def _translated(self, options: dict[str, Any]) -> dict[str, Any]:
        """torchdeq's options in our names, or TypeError; None stands for the default, as it does in torchdeq."""
        ours = [field.name for field in fields(self.solver)]  # type: ignore[arg-type]
        for name in options:
            if name in _REFUSED:
                raise TypeError(f"{self.name} takes no option {name!r}: {_REFUSED[name]}")
            if name not in (*ours, *self.names):
                raise TypeError(f"{self.name}: unknown option {name!r}, expected one of {[*self.names, *ours]}")
        return {self.names.get(name, name): value for name, value in options.items() if value is not None}


def _statistics(solution: Solution, scales: list[Tensor], max_iter: int) -> dict[str, Tensor]:
    """The entries of torchdeq's SolverStat; traces ``(B, max_iter)``, their last value repeated after an early end."""
    rows = solution.evals.numel()
    nothing = solution.residual.new_empty(0, rows)
    trace = nothing if solution.trace is None else solution.trace.reshape(-1 if rows else max_iter, rows)
    # The first image may have been computed twice, to see who draws random numbers.
    relative = trace / torch.stack(scales[-len(trace) :]) if scales else trace
    missing = max_iter - len(trace)
    return {
        "abs_lowest": solution.residual.reshape(-1),
        "rel_lowest": solution.relative_residual.reshape(-1),
        "abs_trace": torch.cat([trace, trace[-1:].expand(missing, -1)]).T,
        "rel_trace": torch.cat([relative, relative[-1:].expand(missing, -1)]).T,
        "nstep": solution.evals.reshape(-1).to(trace.dtype),
    }
