"""CUDA graphs of solver steps and of the ordinary sampler, their likeness on a CPU, and what the profiler counts."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fixpoint
from benchmarks.device.common import Part
from fixpoint.solvers.small import TORCH, NumPyArithmetic
from fixpoint_diffusion import SamplingChain

Work = Callable[[], object]
_WARM_UPS = 3


def captured(work: Work) -> Work:
    """``work`` as a CUDA graph: it is recorded, not run; what is returned replays it."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


class _Recorded(TorchDispatchMode):
    """Operations are noted with their tensors, undone, and done again on the same tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, dict[str, Any], Any]] = []
        self.before: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function._schema.is_mutable:
            written = kwargs.get("out", args[0])
            self.before.append((written, written.clone()))
        output = function(*args, **kwargs)
        if not function.is_view:
            self.calls.append((function, args, kwargs, output))
        return output

    def undo(self) -> None:
        for written, value in reversed(self.before):
            written.copy_(value)

    def replay(self) -> None:
        for function, args, kwargs, output in self.calls:
            again = function(*args, **kwargs)
            if not function._schema.is_mutable:
                for kept, value in zip(tree_leaves(output), tree_leaves(again), strict=True):
                    if isinstance(kept, Tensor):
                        kept.copy_(value)


def recorded(work: Work) -> Work:
    """A graph's likeness on a CPU: afterwards nothing has happened, and what is returned makes it happen."""
    with _Recorded() as graph:
        work()
    graph.undo()
    return graph.replay


def _on_tensors(*_: Tensor, kept: object = None) -> NumPyArithmetic:
    return TORCH


@contextlib.contextmanager
def solvers_as_there(part: Part) -> Iterator[None]:
    """On a CPU solvers keep their small systems as arrays, which no graph sees: for a rehearsal they stay tensors."""
    with contextlib.ExitStack() as stack:
        for module in ("anderson", "broyden") if part.device == "cpu" else ():
            stack.enter_context(mock.patch(f"fixpoint.solvers.{module}.arithmetic", _on_tensors))
        yield


def capture(part: Part) -> Callable[[Work], Work]:
    """How work becomes a graph on the part's device."""
    return captured if part.device == "cuda" else recorded


def backend(part: Part) -> str:
    """What compiles on the part's device: a rehearsal has no time for a compiler."""
    return "inductor" if part.device == "cuda" else "eager"


class GraphedSteps:
    """The steps of a solver as graphs: one for each value that the integers in its state take, replayed in turn.

    Plain steps are taken until these integers come round. From then on tensors lie where they lie: each graph reads
    what the one before it wrote, and the last one writes to where the first one reads.

    Attributes:
        taken: Plain steps taken.
        z: The state, overwritten at each step.
    """

    def __init__(self, solver: fixpoint.Solver, f: Callable[[Tensor], Tensor], z0: Tensor, capture: Any) -> None:
        z, state, seen = z0, solver.init(z0), list[tuple[object, ...]]()
        while (now := tuple(each for each in leaves(state) if not isinstance(each, Tensor))) not in seen:
            seen.append(now)
            z, state = solver.step(z, f(z), state)
        self.taken, cycle = len(seen), len(seen) - seen.index(now)
        self.z, self._fz = z.clone(), torch.empty_like(z)
        self._states = [state]  # what the graphs write to must stay alive
        replays = [capture(partial(self._step, solver, last=index + 1 == cycle)) for index in range(cycle)]
        self.graphs = len(replays)
        self._turns = itertools.cycle(replays)

    def __call__(self, fz: Tensor) -> Tensor:
        """The next state, from ``fz = f(self.z)``."""
        self._fz.copy_(fz)
        next(self._turns)()
        return self.z

    def _step(self, solver: fixpoint.Solver, last: bool) -> None:
        # A solver may keep the tensors that it is given, and these two are overwritten.
        z, state = solver.step(self.z.clone(), self._fz.clone(), self._states[-1])
        if last:
            for kept, new in zip(leaves(self._states[0]), leaves(state), strict=True):
                if isinstance(kept, Tensor) and kept is not new:
                    kept.copy_(new)
        self.z.copy_(z)
        self._states.append(state)


def leaves(state: Any) -> list[Any]:
    """What a solver's state is made of: tensors, integers and None; of a history, the tensor that holds it all."""
    if isinstance(state, tuple):
        return [leaf for part in state for leaf in leaves(part)]
    return [getattr(state, "states", state)]


class Sequential:
    """The ordinary sampler of a chain as one graph a step: the baseline that a parallel sampler must beat.

    Args:
        chain: Its transitions, noise and start are those of the chain.
        denoiser: The chain's, or the same one compiled.
        capture: Turns a step into what replays it.

    Attributes:
        latent: Where the last run arrived, ``(B, *shape)``; overwritten by the next.
    """

    def __init__(self, chain: SamplingChain, denoiser: Any, capture: Callable[[Work], Work]) -> None:
        self.steps, device = chain.steps, chain.x_T.device
        # Coefficients on the device: a graph cannot copy them there.
        tensors = {
            each.name: value.to(device)
            for each in dataclasses.fields(chain.transitions)
            if isinstance(value := getattr(chain.transitions, each.name), Tensor)
        }
        self._transitions = dataclasses.replace(chain.transitions, **tensors)
        self._chain, self._denoiser = chain, denoiser
        self._samples = torch.arange(len(chain.x_T), device=device)
        self.latent, self._step = chain.x_T.clone(), torch.zeros_like(self._samples)
        for _ in range(min(_WARM_UPS, self.steps)):  # compiles, and lets libraries set themselves up
            self._advance()
        self._replay = capture(self._advance)

    def __call__(self, steps: int | None = None) -> Tensor:
        """The latents after all steps, or the first few, ``(B, *shape)``; overwritten by the next run."""
        self.latent.copy_(self._chain.x_T)
        self._step.zero_()
        for _ in range(steps or self.steps):
            self._replay()
        return self.latent

    def _advance(self) -> None:
        out = self._denoiser(self.latent, self._transitions.timesteps[self._step])
        noise = None if self._chain.noise is None else self._chain.noise[self._samples, self._step].double()
        after = self._transitions.step(self.latent.double(), out.double(), self._step, noise)
        self.latent.copy_(after)
        self._step.add_(1)


@contextlib.contextmanager
def on_waiting(part: Part, mode: str) -> Iterator[None]:
    """Let torch "warn" or raise an "error" where the host waits for the device."""
    if part.device != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


_WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")


def profiled(part: Part, work: Callable[[int], object], few: int, many: int) -> dict[str, float]:
    """What one more unit of ``work(count)`` costs, by the profiler: operations, launches and waits.

    Work of two sizes is compared, so that what starts and ends it takes no part. Launches are what ran on the device:
    kernels, copies and fills.
    """

    def count(units: int) -> Counter[str]:
        activities = [torch.profiler.ProfilerActivity.CPU]
        if part.device == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        part.wait()
        with torch.profiler.profile(activities=activities) as profile:
            work(units)
            part.wait()
        found: Counter[str] = Counter()
        for event in profile.events():
            found["launches"] += event.device_type == torch.autograd.DeviceType.CUDA
            found["operations"] += event.name.startswith("aten::")
            found["waits"] += event.name in _WAITS
        return found

    work(few)
    less, more = count(few), count(many)
    return {name: (more[name] - less[name]) / (many - few) for name in ("operations", "launches", "waits")}
