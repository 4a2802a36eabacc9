"""What f depends on beside its arguments: random numbers, buffers that it updates, autocast."""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.utils.parametrizations import _SpectralNorm

from fixpoint.engine.transforms import plain

Loop = TypeVar("Loop", bound=Callable[..., Any])


class Ambient:
    """Makes f the same map at every evaluation of a solve and of its backward.

    The first evaluation shows whether f draws from torch's global random state, on the CPU or on the state's device. If
    so, every other one draws the same numbers, and leaves the random state as it was. Buffers that modules of f update
    while they train (statistics of batch normalisation, vectors of spectral normalisation) start every evaluation from
    the values that the first one found, so a solve updates them once, by what its last evaluation saw. Evaluations
    after ``end()`` leave them alone. The autocast that was on going forward is on at each of them.

    Attributes:
        needed: Whether the next evaluation must stand in ``with ambient.evaluation()``.
        lower: The dtype that autocast lets f return in place of the state's, if it is on.
        repeats: Whether f draws or updates something; each evaluation must then see all rows.
        couples_rows: Whether f normalises by the statistics of its batch.
    """

    def __init__(self, f: Callable[..., Any], device: torch.device) -> None:
        self.needed, self.repeats, self.couples_rows = not torch.compiler.is_compiling(), False, False
        self.lower: torch.dtype | None = None
        self._began = self._ended = False
        if not self.needed:
            return
        self._device = device
        self._autocast = _autocast(device)
        dtype, enabled, _ = self._autocast
        self.lower = dtype if enabled else None
        self._accelerator = torch.get_device_module(device) if _has_readable_generator(device) else None
        self._norms = [m for m in modules_of(f) if isinstance(m, _NormBase | _SpectralNorm)]
        # Aliases, so that writing to them is no change of a tensor that autograd has saved.
        self._buffers = [b.data for m in self._norms if m.training for b in m.buffers(recurse=False)]
        self._found: list[Tensor] = []
        self._random: list[Tensor] = []

    @property
    def rounding(self) -> float:
        """Relative rounding of what autocast may make of f; 0 without it."""
        return 0.0 if self.lower is None else torch.finfo(self.lower).eps

    def end(self) -> None:
        """The solve is over: further evaluations belong to backward."""
        self._ended = self.needed = self._began

    @contextlib.contextmanager
    def evaluation(self) -> Iterator[None]:
        """Around each evaluation of f."""
        same = _autocast(self._device) == self._autocast
        autocast = contextlib.nullcontext() if same else torch.autocast(self._device.type, *self._autocast)
        with autocast, self._repeated() if self._began else self._first():
            yield

    @contextlib.contextmanager
    def _first(self) -> Iterator[None]:
        random = self._read_random()
        self._found = [b.clone() for b in self._buffers]
        updates = [_updates(m) for m in self._norms]
        yield
        self._began = True
        if not all(map(torch.equal, random, self._read_random())):
            self._random = random
        self.repeats = bool(self._random or self._buffers)
        self.couples_rows = any(
            isinstance(m, _BatchNorm) and (before is None or before != _updates(m))
            for m, before in zip(self._norms, updates, strict=True)
        )
        self.needed = self._ended or self.repeats or self.lower is not None

    @contextlib.contextmanager
    def _repeated(self) -> Iterator[None]:
        random = self._read_random() if self._random else []
        left_alone = [b.clone() for b in self._buffers] if self._ended else []
        self._write_random(self._random)
        _write(self._buffers, self._found)
        try:
            yield
        finally:
            self._write_random(random)
            _write(self._buffers, left_alone)

    def _read_random(self) -> list[Tensor]:
        states = [torch.get_rng_state()]
        if self._accelerator is not None:
            states.append(self._accelerator.get_rng_state(self._device))
        return [plain(state) for state in states]

    def _write_random(self, states: list[Tensor]) -> None:
        if states:
            torch.set_rng_state(states[0])
        if len(states) > 1 and self._accelerator is not None:
            self._accelerator.set_rng_state(states[1], self._device)


def modules_of(f: object) -> Iterator[nn.Module]:
    """The modules that f is, is bound to, closes over or names as globals, each once.

    They are looked for through bound methods, ``functools.partial``, closures within closures, and among the attributes
    of an object and of objects that it holds; not in lists and dicts, nor deeper.
    """
    seen: set[int] = set()
    found = [(f, 2)]
    while found:
        x, depth = found.pop()
        if id(x) in seen:
            continue
        seen.add(id(x))
        match x:
            case nn.Module():
                for module in x.modules():
                    if module is x or id(module) not in seen:
                        seen.add(id(module))
                        yield module
            case functools.partial():
                found += [(part, depth) for part in (x.func, *x.args, *x.keywords.values())]
            case types.MethodType():
                found += [(x.__func__, depth), (x.__self__, depth)]
            case types.FunctionType():
                found += [(cell.cell_contents, depth) for cell in x.__closure__ or () if cell != types.CellType()]
                named = (x.__globals__.get(name) for name in x.__code__.co_names)
                found += [(module, 0) for module in named if isinstance(module, nn.Module)]
            case _ if depth and not isinstance(x, type):
                found += [(part, depth - 1) for part in getattr(x, "__dict__", {}).values()]


def without_autocast(loop: Loop) -> Loop:
    """Let ``loop(f, z, ...)`` work in the precision of z, whatever autocast is on; f brings its own."""

    @functools.wraps(loop)
    def run(f: Callable[..., Tensor], z: Tensor, *args: Any, **options: Any) -> Any:
        _, enabled, _ = _autocast(z.device)
        if not enabled:
            return loop(f, z, *args, **options)
        with torch.autocast(z.device.type, enabled=False):
            return loop(f, z, *args, **options)

    return cast(Loop, run)


def _has_readable_generator(device: torch.device) -> bool:
    """Whether the device has a random state; that of a GPU cannot be read while a graph captures its work."""
    if device.type in ("cpu", "meta") or not torch.accelerator.is_available():
        return False
    return not (device.type == "cuda" and torch.cuda.is_current_stream_capturing())


def _autocast(device: torch.device) -> tuple[torch.dtype | None, bool, bool]:
    """What is on for the device, as arguments of ``torch.autocast``: dtype, whether on, whether casts are cached."""
    kind = device.type
    if not torch.amp.is_autocast_available(kind):
        return None, False, False
    return torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind), torch.is_autocast_cache_enabled()


def _write(targets: list[Tensor], values: list[Tensor]) -> None:
    for target, value in zip(targets, values, strict=False):
        target.copy_(value)


def _updates(module: nn.Module) -> int | None:
    """A number that grows when the module normalises by its batch and notes that in its statistics; None without."""
    batches = getattr(module, "num_batches_tracked", None)
    return None if batches is None else version(batches)


def version(x: Tensor) -> int:
    """How often x was written to; inference tensors do not count."""
    return 0 if x.is_inference() else x._version
