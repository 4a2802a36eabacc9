"""What a step costs a device, counted without one: array calls, launches and waits of the host.

    python -m benchmarks.launches [--out benchmarks/results]

Tensors that claim to lie on a device carry their numbers on the host. A dispatch mode lends these numbers to every
operation and counts it. So everything runs as it would on a GPU, branches included, and the counts are exact.

*Array calls* are operations that torch dispatches. *Launches* are those that must start work on the device: views and
allocations start none; a library call counts as one, however many kernels it has. *Waits* are operations for which the
host waits until the device is done: a copy to the host, a number that is read, a shape that depends on values, an
error that is looked for, a copy from the host that is not asynchronous.

Of ``fixpoint.Compiled`` the kernels and library calls of a step are counted as the compiler makes them for the CPU,
which needs a C++ compiler; for a GPU it may make more or fewer.

Says which targets are met, and writes ``launches.json`` and ``launches.txt``.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._inductor import config as inductor
from torch._inductor import metrics
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import fixpoint
from benchmarks.solvers.report import targets_text
from benchmarks.solvers.standings import Target
from benchmarks.written import write
from fixpoint.chains.sweep import Secants, sweep

# Other names of devices make torch ask for a driver. The code under test asks only whether a tensor lies on the host;
# but ``to_host``, on a GPU, copies to pinned memory and waits for that alone.
DEVICE = torch.device("meta")

ALLOCATIONS = {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "detach",
    "lift_fresh",
    "alias",
    "_unsafe_view",
}
WAITS = {
    "_local_scalar_dense",
    "_linalg_check_errors",
    "_unique2",
    "equal",
    "is_nonzero",
    "masked_select",
    "nonzero",
    "repeat_interleave",
    "unique_consecutive",
    "unique_dim",
}


class OnDevice(Tensor):
    """A tensor that claims to lie on the device; ``numbers`` is what it holds, on the host."""

    numbers: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, numbers: Tensor) -> OnDevice:
        tensor: OnDevice = torch.Tensor._make_wrapper_subclass(
            cls,
            numbers.shape,
            strides=numbers.stride(),
            storage_offset=numbers.storage_offset(),
            dtype=numbers.dtype,
            device=DEVICE,
        )
        tensor.numbers = numbers
        return tensor

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{function} met a tensor on the device outside of Launches")


@dataclass(frozen=True)
class Counts:
    """What was dispatched for the device."""

    calls: float = 0
    launches: float = 0
    waits: float = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(self.calls + other.calls, self.launches + other.launches, self.waits + other.waits)

    def __sub__(self, other: Counts) -> Counts:
        return Counts(self.calls - other.calls, self.launches - other.launches, self.waits - other.waits)

    def each(self, count: int) -> Counts:
        """For one of ``count``."""
        return Counts(self.calls / count, self.launches / count, self.waits / count)


class Constructors(TorchFunctionMode):
    """Numbers of Python reach the device through the host, as they do on a GPU; on "meta" they would be dropped."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if function in (torch.tensor, torch.as_tensor) and kwargs.get("device") == DEVICE:
            return function(*args, **kwargs | {"device": "cpu"}).to(DEVICE)
        return function(*args, **kwargs)


class Launches(TorchDispatchMode):
    """Runs operations on tensors that claim to lie on the device, and counts them.

    Attributes:
        counts: So far.
        at_wait: What they were when the host last waited.
        waited: Name of each operation that the host waited for.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts = self.at_wait = Counts()
        self.waited: list[str] = []
        self._constructors = Constructors()

    def __enter__(self) -> Launches:
        self._constructors.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._constructors.__exit__(*error)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        from_device = any(isinstance(x, OnDevice) for x in inputs)
        written = kwargs.get("out", args[0]) if function._schema.is_mutable else None
        if isinstance(written, Tensor):
            to_device = isinstance(written, OnDevice)
        else:
            target = kwargs.get("device")
            to_device = from_device if target is None else torch.device(target) == DEVICE
        if to_device and "device" in kwargs:
            kwargs["device"] = torch.device("cpu")
        output = function(*tree_map(_numbers, args), **tree_map(_numbers, kwargs))
        if not (from_device or to_device):
            return output
        self._count(function, args, inputs, from_device, to_device, kwargs)
        if isinstance(written, Tensor):
            return written
        # What leaves the device is a copy, as far as the caller can tell.
        return tree_map(lambda x: (OnDevice(x) if to_device else x.clone()) if isinstance(x, Tensor) else x, output)

    def _count(
        self, function: Any, args: Any, inputs: list[Tensor], from_device: bool, to_device: bool, kwargs: Any
    ) -> None:
        name = function._schema.name.partition("::")[2]
        launched = not (function.is_view or name in ALLOCATIONS)
        mixed = any(not isinstance(x, OnDevice) and x.ndim for x in inputs) and from_device
        places = tree_leaves(args[1]) if name in ("index", "index_put", "index_put_") else []
        masked = any(isinstance(x, Tensor) and x.dtype in (torch.bool, torch.uint8) for x in places)
        copied = name in ("_to_copy", "copy_") and (mixed or from_device != to_device)
        asynchronous = copied and to_device and (kwargs.get("non_blocking") or not inputs[-1].ndim)
        waits = name in WAITS or masked or (copied and not asynchronous) or (mixed and not copied)
        self.waited += [name] * waits
        self.counts += Counts(1, launched, waits)
        if waits:
            self.at_wait = self.counts


def _numbers(x: Any) -> Any:
    return x.numbers if isinstance(x, OnDevice) else x


def counted(work: Callable[[], object]) -> Counts:
    """What ``work`` dispatches, on tensors that it makes or was given inside of this mode."""
    with Launches() as mode:
        work()
    return mode.counts


# Counted from where histories are full, over a whole number of cycles of slots, restarts and checks. Rows are so long,
# and float64 so fine, that none ends before.
ROWS, DIM, START, MORE = 3, 400, 12, 18
LOOP_START, LOOP_MORE = 16, 16
# Steps of a chain, its window, and the rounds: those that are evaluated in part are the early ones of wide windows.
CHAIN = {"steps": 48, "window": 16, "first": 4, "more": 4}
IN_PART = {"steps": 256, "window": 128, "first": 2, "more": 2}

STEP_LAUNCHES = 25


def affine() -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """``z -> w z + c`` entry by entry with w in [0, 0.98], on the device, and zeros: one launch an evaluation."""
    generator = torch.Generator().manual_seed(0)
    w = 0.98 * torch.rand(ROWS, DIM, generator=generator, dtype=torch.float64)
    c = torch.randn(ROWS, DIM, generator=generator, dtype=torch.float64)
    w, c = w.to(DEVICE), c.to(DEVICE)
    return partial(_affine, w, c), torch.zeros_like(c)


def _affine(w: Tensor, c: Tensor, z: Tensor) -> Tensor:
    return torch.addcmul(c, w, z)


def _evaluations(
    solve: Callable[[Callable[[Tensor], Tensor], Tensor, int], object], start: int = START, more: int = MORE
) -> Counts:
    """An evaluation of a solve, f's own apart: what ``more`` of them add."""

    def run(evals: int) -> Counts:
        with Launches() as mode:
            f, z0 = affine()
            before = mode.counts
            solve(f, z0, evals)
        return mode.counts - before

    return (run(start + more) - run(start)).each(more) - Counts(1, 1, 0)


def step(solver: fixpoint.Solver) -> Counts:
    """One step, once the histories are full."""
    with Launches() as mode:
        f, z = affine()
        state = solver.init(z)
        total = Counts()
        for index in range(START + MORE):
            fz = f(z)
            before = mode.counts
            z, state = solver.step(z, fz, state)
            total += mode.counts - before if index >= START else Counts()
    return total.each(MORE)


def compiled_step(solver: fixpoint.Solver) -> Counts:
    """What a compiled step starts once the histories are full."""
    generator = torch.Generator().manual_seed(0)
    w = 0.98 * torch.rand(ROWS, DIM, generator=generator)
    c = torch.randn(ROWS, DIM, generator=generator)
    steps, z = fixpoint.Compiled(solver), torch.zeros_like(c)
    state = steps.init(z)
    for _ in range(START):
        z, state = solver.step(z, torch.addcmul(c, w, z), state)
    torch.compiler.reset()  # what is there already, or in a cache, is not counted
    metrics.reset()
    with inductor.patch(force_disable_caches=True):
        steps.step(z, torch.addcmul(c, w, z), state)
    starts = metrics.generated_kernel_count
    return Counts(starts, starts, 0)


def loop(check_every: int) -> Counts:
    """One evaluation of the loop beyond f and the step; Picard's step is f(z) itself."""

    def solve(f: Any, z0: Tensor, evals: int) -> None:
        options: dict[str, Any] = {"max_evals": evals, "check_every": check_every, "on_failure": "ignore"}
        fixpoint.solve(f, z0, solver=fixpoint.Picard(), rtol=0, backward=None, **options)

    return _evaluations(solve, LOOP_START, LOOP_MORE)


def between_wait_and_f(solver: fixpoint.Solver) -> Counts:
    """What the device is given after the host has read the figures of an evaluation, and before f."""
    gaps: list[Counts] = []
    with Launches() as mode:
        f, z0 = affine()

        def noted(z: Tensor) -> Tensor:
            gaps.append(mode.counts - mode.at_wait)
            return f(z)

        options: dict[str, Any] = {"max_evals": START + MORE, "on_failure": "ignore", "backward": None}
        fixpoint.solve(noted, z0, solver=solver, rtol=0, **options)
    return sum(gaps[START:], Counts()).each(MORE)


def peer(name: str, **options: int) -> Counts:
    """One evaluation of a solver of torchdeq, its loop and its step."""
    from torchdeq.solver import get_solver

    return _evaluations(
        lambda f, z0, evals: get_solver(name)(f, z0, max_iter=evals, tol=0.0, stop_mode="rel", **options)
    )


def sweep_once() -> Counts:
    """The secants and the sweep of a round with two rounds remembered: one chunk of 32 steps."""
    with Launches() as mode:
        generator = torch.Generator().manual_seed(0)
        defects = torch.randn(ROWS, 32, 8, generator=generator).to(DEVICE)
        moved, images = (torch.randn(ROWS, 32, 2, 8, generator=generator).to(DEVICE) for _ in range(2))
        slopes = torch.full((ROWS, 32, 1), 0.9).to(DEVICE)
        before = mode.counts
        sweep(defects, slopes, Secants.fit(moved, images, slopes))
    return mode.counts - before


class Uncounted(fixpoint.Recurrence):
    """A recurrence that adds up in ``spent`` what its own evaluations cost, for they are not to count.

    Args:
        mode: The mode that counts.
        steps: Number of steps.
    """

    def __init__(self, mode: Launches, steps: int) -> None:
        start = torch.ones(ROWS, 8).to(DEVICE)
        inputs = torch.linspace(0, 1, steps).expand(ROWS, -1)[..., None].to(DEVICE)
        super().__init__(lambda x, u: torch.sin(3 * x + u), start, inputs=(inputs,))
        self.spent = Counts()
        self._mode = mode

    def transition(self, x: Tensor, sample: Tensor, step: Tensor) -> Tensor:
        before = self._mode.counts
        after = super().transition(x, sample, step)
        self.spent += self._mode.counts - before
        return after


class SparseUncounted(Uncounted):
    """The same as a ``SparseChain``. What would be interpolated is exact here."""

    parts = 0  # number of rounds that were evaluated in part

    def sparse_transition(self, x: Tensor, sample: Tensor, step: Tensor, evaluated: Tensor) -> tuple[Tensor, Tensor]:
        self.parts += 1
        every = self.transition(x, sample, step)
        before = self._mode.counts
        missed = x.new_zeros(len(x))
        self.spent += self._mode.counts - before
        return every, missed


def window_round(kind: type[Uncounted], steps: int, window: int, first: int, more: int) -> Counts:
    """A round of the chain solver beyond the evaluation of its windows: sweep, error control, windows moved on."""

    def run(rounds: int) -> Counts:
        with Launches() as mode:
            chain = kind(mode, steps)
            before = mode.counts
            solver = fixpoint.CausalQuasiNewton(window=window)
            options: dict[str, Any] = {"max_evals": rounds, "on_failure": "ignore", "backward": None}
            solution = fixpoint.solve(chain, solver=solver, rtol=1e-6, **options)
            if solution.nfev != rounds:
                raise RuntimeError(f"the chain was done after {solution.nfev} rounds")
            if isinstance(chain, SparseUncounted) and chain.parts != rounds:
                raise RuntimeError(f"{chain.parts} of {rounds} rounds were evaluated in part")
            return mode.counts - before - chain.spent

    return (run(first + more) - run(first)).each(more)


@torch.no_grad()
def measure() -> dict[str, Counts]:
    """All counts, by name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {
            "Picard, a step": step(fixpoint.Picard()),
            "Anderson, a step": step(fixpoint.Anderson()),
            "Broyden, a step": step(fixpoint.Broyden()),
            "CausalQuasiNewton, a sweep of 32 steps": sweep_once(),
            "the loop, an evaluation": loop(1),
            "the loop, an evaluation, check_every=8": loop(8),
            "Anderson, between a wait and f": between_wait_and_f(fixpoint.Anderson()),
            "Broyden, between a wait and f": between_wait_and_f(fixpoint.Broyden()),
            "CausalQuasiNewton, a round of windows": window_round(Uncounted, **CHAIN),
            "CausalQuasiNewton, a round in part": window_round(SparseUncounted, **IN_PART),
            "torchdeq Anderson m=5, an evaluation": peer("anderson", m=5),
            "torchdeq Broyden, an evaluation": peer("broyden"),
        }


@torch.no_grad()
def measure_compiled() -> dict[str, Counts]:
    """The same of compiled steps; empty where there is no C++ compiler."""
    if shutil.which("c++") is None:
        return {}
    solvers = {"Anderson": fixpoint.Anderson(), "Broyden": fixpoint.Broyden()}
    return {f"{name}, a compiled step": compiled_step(solver) for name, solver in solvers.items()}


def targets(counts: dict[str, Counts]) -> list[Target]:
    """What a device should be asked for at most."""
    every_check, seldom = counts["the loop, an evaluation"], counts["the loop, an evaluation, check_every=8"]
    rounds = {name: each.waits for name, each in counts.items() if "a round" in name}
    steps = {name: each.launches for name, each in counts.items() if re.match("(Anderson|Broyden), a .*step", name)}
    gaps = {name: each.launches for name, each in counts.items() if "between" in name}
    return [
        *(
            Target(f"{name}: at most {STEP_LAUNCHES} launches", launches <= STEP_LAUNCHES, f"{launches:.0f}")
            for name, launches in steps.items()
        ),
        Target("the loop: waits once for a check", every_check.waits <= 1, f"{every_check.waits:.2f}"),
        Target(
            "the loop: waits at no evaluation in between", 8 * seldom.waits <= 1, f"{8 * seldom.waits:.2f} times in 8"
        ),
        *(Target(f"{name}: no launch", launches == 0, f"{launches:.0f}") for name, launches in gaps.items()),
        *(Target(f"{name}: waits once", waits <= 1, f"{waits:.2f}") for name, waits in rounds.items()),
    ]


def table(counts: dict[str, Counts]) -> str:
    """A line for each."""
    lines = [f"{'':40}{'array calls':>14}{'launches':>12}{'waits':>10}"]
    for name, each in counts.items():
        lines.append(f"{name:40}{each.calls:>14.1f}{each.launches:>12.1f}{each.waits:>10.2f}")
    return "\n".join(lines)


_LEGEND = (
    "Beyond f, once histories are full. An evaluation of ours is a step and the loop's share; torchdeq's holds both.\n"
    "waits: times that the host waits for the device. A compiled step: kernels and library calls that the compiler\n"
    "makes for a CPU; for a GPU it may make more or fewer."
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Count, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder for the results")
    options = parser.parse_args(arguments)
    counts = measure() | measure_compiled()
    aims = targets(counts)
    text = f"{table(counts)}\n\n{_LEGEND}\n\n{targets_text(aims)}"
    print(text)
    found = {name: asdict(each) for name, each in counts.items()}
    write(options.out, "launches", text, counts=found, targets=[asdict(aim) for aim in aims])
    return 0


if __name__ == "__main__":
    sys.exit(main())
