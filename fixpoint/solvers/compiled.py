"""A solver whose steps are compiled: on a GPU, few launches in place of many."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import FunctionType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fixpoint.engine.layout import Layout, map_leaves
from fixpoint.engine.private import in_dispatch_mode
from fixpoint.engine.transforms import recording
from fixpoint.solvers.base import Solver

_Step = Callable[[Solver, Tensor, Tensor, Any], tuple[Tensor, Any]]


@dataclass(frozen=True)
class Compiled(Solver):
    """Let ``torch.compile`` fuse the steps of ``solver``, so that a GPU starts fewer kernels for each.

    This is for a GPU, and for states so small that starting the kernels of a step takes longer than their work. On the
    CPU, steps on small states are NumPy's already, and nothing is gained. Results are those of ``solver`` but for
    rounding.

    The first solve takes longer, by up to a minute: ``Anderson`` has a version for its first step, one for the second
    and one for all others; ``Broyden`` has six. They serve all later solves by an equal solver, with any number of rows
    but one, which has versions of its own, and of any length; another dtype or device needs others. Where autograd or
    torch.func follows a step, as under ``Unroll``, the plain step is taken.

    Args:
        solver: ``Anderson()``, ``Broyden()``, ``ACX()`` or a solver of yours whose steps are of few kinds. Those of
            ``GMRES`` differ with the size of its basis: torch soon gives up on them, says so, and runs them as they
            are.

    Raises:
        TypeError: If ``solver`` is no solver or cannot be hashed; in the solve, if it has a loop of its own, as
            ``CausalQuasiNewton`` has.

    Example:
        >>> import torch, fixpoint
        >>> def on_gpu(f, z0):
        ...     return fixpoint.solve(f, z0.cuda(), solver=fixpoint.Compiled(fixpoint.Anderson()))
    """

    solver: Solver

    def __post_init__(self) -> None:
        if not isinstance(self.solver, Solver):
            raise TypeError(f"solver must be a fixpoint.Solver such as Anderson(), found {self.solver!r}")
        hash(self.solver)  # its compiled steps are found by it

    def bind(self, f: Any, layout: Layout) -> tuple[Any, Solver]:
        """f itself, and the bound solver, compiled."""
        f, solver = self.solver.bind(f, layout)
        if type(solver).run is not Solver.run:
            raise TypeError(f"Compiled needs a solver without a loop of its own, found {self.solver!r}")
        return f, replace(self, solver=solver)

    def init(self, z: Tensor) -> Any:
        # As tensors also what is NumPy's on the CPU: the compiler takes these for tensors of another kind.
        return map_leaves(lambda x: torch.from_numpy(x) if isinstance(x, np.ndarray) else x, self.solver.init(z))

    def step(self, z: Tensor, fz: Tensor, state: Any) -> tuple[Tensor, Any]:
        # Within a graph of the caller's a step is part of that; without data there is nothing to run.
        if torch.compiler.is_compiling() or z.is_meta or in_dispatch_mode() or recording(z, fz):
            return self.solver.step(z, fz, state)
        # Of one layout, and no views (``data``), for the compiler makes versions for other kinds of tensors, too.
        z, fz = (x.data.contiguous() for x in (z, fz))
        kind = len(z) == 1, torch.is_inference_mode_enabled(), z.dtype, z.device
        with torch.no_grad():
            return _compiled_step(self.solver, kind)(self.solver, z, fz, state)

    def plain(self, fz: Tensor) -> Tensor:
        return self.solver.plain(fz)

    def forget(self, state: Any, rows: Tensor) -> Any:
        return self.solver.forget(state, rows)

    def adjoint(self) -> Solver | None:
        """The inner solver's, compiled, if it names one."""
        solver = self.solver.adjoint()
        return None if solver is None else replace(self, solver=solver)


@functools.cache
def _compiled_step(solver: Solver, kind: object) -> _Step:
    """A step for states of a kind, of any size. A single row is a kind, for torch.compile takes it for one.

    It counts versions by code object and gives up after a few, so each of these functions gets a copy of the code.
    """
    step = FunctionType(_step.__code__.replace(), globals())
    return torch.compile(step, dynamic=True)


def _step(solver: Solver, z: Tensor, fz: Tensor, state: Any) -> tuple[Tensor, Any]:
    return solver.step(z, fz, state)
