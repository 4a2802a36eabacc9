"""estimate_memory(): how many bytes a solve will hold, said before it starts."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fixpoint.engine.layout import Layout, as_tensor, leaves, map_leaves
from fixpoint.engine.loop import LoopOptions, iterate
from fixpoint.engine.norms import Array, Meanwhile, row_norm
from fixpoint.engine.tolerance import Figures, Tolerance
from fixpoint.solvers.anderson import Anderson
from fixpoint.solvers.base import Solver, require_count

# Bytes added for each row. Where the host can read them, a solver keeps a row's few numbers in arrays, and some of them
# live longer than the tensors that stand for them here.
_NUMBERS = 64


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """What a solve holds beside f's own tensors, z0 and the arguments.

    Attributes:
        bytes: The most that is alive at any moment, what a step needs for a while included.
        states: The most that is held while f is evaluated, counted in states; the loop's own are among them.
        state_bytes: Size of one state.

    Example:
        See :func:`fixpoint.estimate_memory`, which returns one.
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
    check_every: int = 1,
) -> MemoryEstimate:
    """Bytes that ``fixpoint.solve`` will hold in a forward solve from z0, found without allocating any of them.

    The loop itself runs on tensors of the meta device, which have shapes and no data, and whatever is alive is added
    up. So it works for every solver that keeps to its contract, your own included. Of ``CausalQuasiNewton`` it
    says what a window over the whole chain takes; a narrower one takes less.

    Args:
        z0, solver, batch_dims, max_evals, check_every: As in ``fixpoint.solve``. z0 may itself be on the meta
            device. For a z0 that is not on the CPU, the step that the loop makes before it reads the figures is
            counted.

    Returns:
        MemoryEstimate: the bytes, and how many states they are.

    Raises:
        TypeError, ValueError: For an option or a state that ``fixpoint.solve`` would refuse; for ``probes`` or
            ``noise_rtol`` of ``CausalQuasiNewton``, which need to see the chain.
        RuntimeError: If the solver reads numbers out of tensors, which those without data do not have.

    Example:
        >>> import torch, fixpoint
        >>> z0 = torch.empty(64, 2**20, device="meta")
        >>> print(fixpoint.estimate_memory(z0, solver=fixpoint.Picard()))
        2.5 GiB at most; 6.0 states of 256.0 MiB while f runs
    """
    if not isinstance(solver, Solver):
        raise TypeError(f"solver must be a fixpoint.Solver such as Anderson(), found {solver!r}")
    require_count("max_evals", max_evals)
    require_count("check_every", check_every)
    on_host = all(as_tensor(leaf).is_cpu for _, leaf in leaves(z0))
    shapes = map_leaves(lambda leaf: as_tensor(leaf).detach().to("meta"), z0)
    layout = Layout.of(shapes, batch_dims)
    flat = layout.flatten(shapes)
    _, solver = solver.bind(None, layout)
    with torch.no_grad(), LiveBytes() as live:
        f = _Witness(live)
        tolerance = _Unmeasured(rtol=0.0, atol=0.0, on_host=on_host)
        options: LoopOptions = {"max_evals": max_evals, "check_every": check_every, "watch": f.is_full}
        iterate(f, torch.empty_like(flat), solver, tolerance, **options)
    size = flat.numel() * flat.element_size()
    numbers = _NUMBERS * flat.shape[0]
    return MemoryEstimate(bytes=live.peak + numbers, states=f.held / size if size else 0.0, state_bytes=size)


class _Witness:
    """An f without data, which sees how much is held whenever it is evaluated."""

    def __init__(self, live: LiveBytes) -> None:
        self.held = 0
        self._live = live
        self._before = 0, 0
        self._rose_at = self._states = 0

    def __call__(self, z: Tensor) -> Tensor:
        self.held = max(self.held, self._live.now)
        self._states = self.held // max(z.numel() * z.element_size(), 1)
        return torch.empty_like(z)

    def is_full(self, nfev: int, *_: object) -> bool:
        """Whether no more is held than before for so long that no history grows any more, nor starts over.

        To start over may need more, once all the states that there is room for have been written.
        """
        now = self.held, self._live.peak
        if now != self._before:
            self._before, self._rose_at = now, nfev
        return nfev > 2 * self._rose_at + self._states + 10


@dataclass(frozen=True, kw_only=True)
class _Unmeasured(Tolerance):
    """Figures without data, of a run that holds the most.

    The second check is the best one, and all rows but the last end there: so the best states are others than the last
    ones, and rows that have ended are kept as well.
    """

    on_host: bool = False  # there, no step is made before the figures are read
    checks: Iterator[int] = field(default_factory=count)

    def started(self, z: Tensor, fz: Tensor, figures: Figures) -> Tolerance:
        return self

    def measure(self, z: Tensor, fz: Tensor, among: Array | bool = True, meanwhile: Meanwhile = None) -> Figures:
        row_norm(fz - z)
        if meanwhile is not None and not self.on_host:
            meanwhile()
        check, rows = next(self.checks), len(z)
        residual, merit = np.ones(rows), np.full(rows, float(check))
        if check == 1:
            merit[:1] = -1  # the best state is none that the caller holds
        if check > 0 and rows > 1:
            residual[:-1] = 0  # for these rows the best states are copied
        return Figures(residual, np.ones(rows), merit)


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
