"""estimate_memory(): how many bytes a solve will hold, said before it starts."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fixpoint.engine.layout import Layout, map_leaves
from fixpoint.solvers.anderson import Anderson
from fixpoint.solvers.base import Solver, require_count


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """What a solve holds beside f's own tensors, z0 and the arguments.

    Attributes:
        bytes: The most that is alive at any moment, what a step needs for a while included.
        states: The most that is held while f is evaluated, counted in states; the loop's own are among them.
        state_bytes: Size of one state.
    """

    bytes: int
    states: float
    state_bytes: int

    def __str__(self) -> str:
        return (
            f"{_readable(self.bytes)} at most; {self.states:.1f} states of {_readable(self.state_bytes)} while f runs"
        )


def estimate_memory(
    z0: Any,
    *,
    solver: Solver = Anderson(),  # noqa: B008 - immutable
    batch_dims: int | None = None,
    max_evals: int = 100,
) -> MemoryEstimate:
    """Bytes that ``fixpoint.solve`` will hold in a forward solve from z0, found without allocating any of them.

    The solver takes its steps on tensors of the meta device, which have shapes and no data, and whatever is alive is
    added up. So it works for every solver that keeps to its contract, your own included. Of ``CausalQuasiNewton`` it
    says what a window over the whole chain takes; a narrower one takes less.

    Args:
        z0, solver, batch_dims, max_evals: As in ``fixpoint.solve``. z0 may itself be on the meta device.

    Returns:
        MemoryEstimate: the bytes, and how many states they are.

    Raises:
        TypeError, ValueError: For an option or a state that ``fixpoint.solve`` would refuse.
        RuntimeError: If the solver reads numbers out of tensors, which those without data do not have.

    Example:
        >>> import torch, fixpoint
        >>> z0 = torch.empty(64, 2**20, device="meta")
        >>> print(fixpoint.estimate_memory(z0, solver=fixpoint.Picard()))
        2.0 GiB at most; 6.0 states of 256.0 MiB while f runs
    """
    if not isinstance(solver, Solver):
        raise TypeError(f"solver must be a fixpoint.Solver such as Anderson(), found {solver!r}")
    require_count("max_evals", max_evals)
    shapes = map_leaves(lambda leaf: torch.as_tensor(leaf).detach().to("meta"), z0)
    layout = Layout.of(shapes, batch_dims)
    flat = layout.flatten(shapes)
    _, solver = solver.bind(None, layout)
    held = rose_at = 0
    with torch.no_grad(), LiveBytes() as live:
        z = torch.empty_like(flat)
        throughout = [z, torch.empty_like(flat)]  # the copy of z0, and the best state of each row
        throughout += [z, z]
        if len(flat) > 1:
            throughout.append(torch.empty_like(flat))  # the rows that have ended
        state = solver.init(z)
        for count in range(1, max_evals + 1):
            before = held, live.peak
            held = max(held, live.now)
            fz = torch.empty_like(z)
            torch.linalg.vector_norm(fz - z, dim=1)
            throughout[2:4] = z, fz  # to which a row can go back, until the next check
            if count == max_evals:
                break
            if len(flat) > 1:
                # As the solver is shown them: rows that have ended stand where they were left.
                z, fz = torch.empty_like(z), torch.empty_like(fz)
            z, state = solver.step(z, fz, state)
            del fz
            rose_at = count if (held, live.peak) != before else rose_at
            if count > 2 * rose_at + 10:
                break  # full: it took half as long to get here
    size = flat.numel() * flat.element_size()
    return MemoryEstimate(bytes=live.peak, states=held / size if size else 0.0, state_bytes=size)


class LiveBytes(TorchDispatchMode):
    """Adds up the storages that operations make, for as long as each is alive."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = function(*args, **(kwargs or {}))
        map_leaves(self._note, output)
        return output

    def _note(self, leaf: Any) -> None:
        if not isinstance(leaf, Tensor) or (storage := leaf.untyped_storage()) in self._known:
            return
        self._known.add(storage)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, storage.nbytes())

    def _forget(self, size: int) -> None:
        self.now -= size


def _readable(count: int) -> str:
    """Bytes in the largest binary unit that leaves a number of at least 1."""
    size, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1024 and len(units) > 1:
        size, units = size / 1024, units[1:]
    return f"{size:.1f} {units[0]}"
