"""A solver whose steps are compiled, for a device where starting its many short kernels takes longer than they run."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import FunctionType
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from fixpoint.engine.layout import Layout, map_leaves
from fixpoint.engine.private import in_dispatch_mode
from fixpoint.engine.transforms import recording
from fixpoint.solvers.base import Solver
from fixpoint.solvers.gmres import GMRES

# The most versions that torch may make of a step, where it can be told: its own limit is 8, and sizes that happen to be
# equal may double the usual number.
_VERSIONS = 64
_STEPS = 64  # the most compiled steps, each of a solver and a kind of states, that are kept
_Step = Callable[[Solver, Tensor, Tensor, Any], tuple[Tensor, Any]]


@dataclass(frozen=True)
class Compiled(Solver):
    """The steps of ``solver`` through ``torch.compile``, which joins many short kernels to few.

    It is meant for small states on a GPU; it has not been run on one yet. On the CPU, plain steps on small states are
    NumPy's, and compiled ones are not. Results are those of ``solver`` but for rounding. Where autograd or torch.func
    follows a step, as under ``Unroll``, the plain step is taken, and so it is where a dispatch mode looks on.

    The first solve also compiles, which takes long: ``Anderson`` has a version for the first step, one for the second
    and one for all others; ``Broyden`` has five or six and ``ACX`` eight. They serve the later solves by an equal
    solver, with states of other sizes too. Other versions are made for another dtype or device, in inference mode, for
    a single row or entry, and where sizes happen to be equal, such as the number of rows and the length of one.

    Args:
        solver: ``Anderson()``, ``Broyden()``, ``ACX()``, or a solver of yours whose steps are of few kinds.

    Raises:
        TypeError: If ``solver`` is no solver, cannot be hashed, or is ``GMRES``, whose steps are of as many kinds as
            its basis has sizes; in the solve, if it has a loop of its own, as ``CausalQuasiNewton`` has.
        RuntimeError: In the solve, from torch, without what it compiles with: on a CPU a compiler for C++, on a GPU
            Triton.

    Example:
        >>> import torch, fixpoint
        >>> def on_gpu(f, z0):
        ...     return fixpoint.solve(f, z0.cuda(), solver=fixpoint.Compiled(fixpoint.Anderson()))
    """

    solver: Solver

    def __post_init__(self) -> None:
        if not isinstance(self.solver, Solver):
            raise TypeError(f"solver must be a fixpoint.Solver such as Anderson(), found {self.solver!r}")
        if isinstance(self.solver, GMRES):
            raise TypeError(f"Compiled needs a solver whose steps are of few kinds, found {self.solver!r}")
        try:
            hash(self.solver)  # its compiled steps are found by it
        except TypeError as error:
            raise TypeError(f"solver must be hashable, as a frozen dataclass is, found {self.solver!r}") from error

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
        # With the usual strides, also of one row, and no views (``data``): for others there would be versions.
        z, fz = (x.contiguous().view(-1).view(x.shape).data for x in (z, fz))
        kind = z.shape[0] == 1, z.shape[1] == 1, torch.is_inference_mode_enabled(), z.dtype, z.device
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


@functools.lru_cache(maxsize=_STEPS)
def _compiled_step(solver: Solver, kind: object) -> _Step:
    """A step for states of one kind. A size of 1 is a kind of its own, for torch.compile takes it for one.

    It counts versions by code object, and gives up after a few. So each of these functions gets a copy of the code, and
    may have more versions, where torch can be told so.
    """
    step = FunctionType(_step.__code__.replace(), globals())
    may_have_more = "recompile_limit" in inspect.signature(torch.compile).parameters
    options: dict[str, Any] = {"recompile_limit": _VERSIONS} if may_have_more else {}
    return cast(_Step, torch.compile(step, dynamic=True, **options))


def _step(solver: Solver, z: Tensor, fz: Tensor, state: Any) -> tuple[Tensor, Any]:
    return solver.step(z, fz, state)
