"""What f depends on beside its arguments: random numbers, buffers that it updates, autocast."""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.utils._python_dispatch import TorchDispatchMode

from fixpoint.engine import private
from fixpoint.engine.transforms import plain

Loop = TypeVar("Loop", bound=Callable[..., Any])


logger = logging.getLogger("fixpoint")


class Ambient:
    """Makes f the same map at every evaluation of a solve and of its backward.

    The first evaluation shows whether f draws from torch's global random state, on the CPU or on the state's device. If
    so, every other one draws the same numbers, and leaves the random state as it was; the random state of an f that
    draws nothing is never touched, whoever else draws. Buffers that normalising modules of f update while they train
    (statistics of batch normalisation, vectors of spectral normalisation) start every evaluation from the values that
    the first one found, so a solve updates them once, by what its last evaluation saw. Evaluations after ``end()``
    leave them alone. The autocast and the training mode that were on going forward are on at each of them.

    Attributes:
        needed: Whether the next evaluation must go through ``evaluate``.
        lower: The dtype that autocast lets f return in place of the state's, if it is on.
        repeats: Whether f draws or updates something; each evaluation must then see all rows.
        couples_rows: Whether f normalises by the statistics of its batch.
        modules: The modules that f holds.
        calls: Evaluations that f completed.
    """

    def __init__(self, f: Callable[..., Any], device: torch.device) -> None:
        self.needed, self.repeats, self.couples_rows = not torch.compiler.is_compiling(), False, False
        self.lower: torch.dtype | None = None
        self.modules: list[nn.Module] = []
        self.calls = 0
        self._began = self._ended = False
        if not self.needed:
            return
        self._device = device
        self._autocast = _autocast(device)
        self.lower = autocast_dtype(device)
        self._accelerator = torch.get_device_module(device) if _has_readable_generator(device) else None
        self.modules = list(modules_of(f))
        self._training = [m.training for m in self.modules]
        self._norms = [m for m in self.modules if isinstance(m, private.NORMS)]
        self._held = [(m, name) for m in self.modules if m.training for name in _updated_buffers(m)]
        # Aliases, so that writing to them is no change of a tensor that autograd has saved.
        self._buffers = [m._buffers[name].data for m, name in self._held]  # type: ignore[union-attr]
        self._found: list[Tensor] = []
        self._random: list[Tensor] = []

    @property
    def rounding(self) -> float:
        """Relative rounding of what autocast may make of f; 0 without it."""
        return 0.0 if self.lower is None else torch.finfo(self.lower).eps

    def end(self) -> None:
        """The solve is over: further evaluations belong to backward."""
        self._ended = self.needed = self._began

    def evaluate(self, call: Callable[[], Any], *, wrapped: bool) -> Any:
        """What ``call``, an evaluation of f, returns. ``wrapped``: whether torch.func is at work on its arguments."""
        same = _autocast(self._device) == self._autocast
        autocast = contextlib.nullcontext() if same else torch.autocast(self._device.type, *self._autocast)
        with autocast, self._private_buffers() if wrapped else contextlib.nullcontext():
            if not self._began:
                return self._first(call)
            with self._same_mode(), self._repeated(buffers=not wrapped):
                return call()

    def _first(self, call: Callable[[], Any]) -> Any:
        random = self._read_random()
        self._found = [b.clone() for b in self._buffers]
        updates = [_updates(m) for m in self._norms]
        output = call()
        self._began = True
        changed = not all(map(torch.equal, random, self._read_random()))
        if changed and (threading.active_count() == 1 or self._draws(call, random)):
            self._random = random
        self.repeats = bool(self._random or self._buffers)
        self.couples_rows = any(
            isinstance(m, private.BATCH_NORMS) and (before is None or before != _updates(m))
            for m, before in zip(self._norms, updates, strict=True)
        )
        self.needed = self._ended or self.repeats or self.lower is not None
        return output

    def _draws(self, call: Callable[[], Any], random: list[Tensor]) -> bool:
        """Whether it was f that changed the random state, and no other thread. Evaluates f once more to see it.

        When f is seen to draw, it is given the numbers of the first evaluation, from the state ``random``.
        """
        after = self._read_random()
        seen = _Draws(lambda: self._write_random(random))
        try:
            with seen, self._repeated(buffers=True):
                call()
        except RuntimeError as error:  # code compiled as one graph does not run in a dispatch mode
            logger.debug("f may have drawn random numbers: %s", error)
            return True
        if seen.any:
            self._write_random(after)
        return seen.any

    @contextlib.contextmanager
    def _repeated(self, *, buffers: bool) -> Iterator[None]:
        """Around each evaluation but the first, with the same random numbers and, if wished, the same buffers."""
        random = self._read_random() if self._random else []
        held = self._buffers if buffers else []
        left_alone = [b.clone() for b in held] if self._ended else []
        self._write_random(self._random)
        _write(held, self._found)
        try:
            yield
        finally:
            self._write_random(random)
            _write(held, left_alone)

    @contextlib.contextmanager
    def _private_buffers(self) -> Iterator[None]:
        """Let modules write to copies of their buffers: torch.func forbids to write to what it has not made."""
        buffers = [(m, name, b) for m in self.modules for name, b in m._buffers.items() if b is not None]
        found = {(id(m), name): b for (m, name), b in zip(self._held, self._found, strict=False)}
        for module, name, buffer in buffers:
            module._buffers[name] = found.get((id(module), name), buffer).clone()
        try:
            yield
        finally:
            for module, name, buffer in buffers:
                module._buffers[name] = buffer

    @contextlib.contextmanager
    def _same_mode(self) -> Iterator[None]:
        """The training mode that was on going forward, for evaluations in backward."""
        now = [m.training for m in self.modules] if self._ended else self._training
        if now == self._training:
            yield
            return
        _set_training(self.modules, self._training)
        try:
            yield
        finally:
            _set_training(self.modules, now)

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


class _Draws(TorchDispatchMode):
    """Notes whether this thread draws from the global random state; modes are kept for each thread by itself.

    ``before_first`` is called before the first draw.
    """

    def __init__(self, before_first: Callable[[], None]) -> None:
        super().__init__()
        self.any = False
        self._before_first = before_first

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        own = any(isinstance(x, torch.Generator) for x in (*args, *kwargs.values()))
        if torch.Tag.nondeterministic_seeded in function.tags and not own and not self.any:
            self.any = True
            self._before_first()
        return function(*args, **kwargs)


def _updated_buffers(module: nn.Module) -> list[str]:
    """Names of the buffers that a normalising module updates in training."""
    if isinstance(module, private.NORMS):
        return [name for name, buffer in module._buffers.items() if buffer is not None]
    hooks = [hook for hook in module._forward_pre_hooks.values() if isinstance(hook, SpectralNorm)]
    return [f"{hook.name}{end}" for hook in hooks for end in ("_u", "_v")]


def _set_training(modules: list[nn.Module], flags: list[bool]) -> None:
    for module, flag in zip(modules, flags, strict=True):
        module.training = flag


def modules_of(f: object) -> Iterator[nn.Module]:
    """The modules that f is, is bound to, closes over or names as globals, each once; see ``_parts_of``."""
    return (part for part in _parts_of(f) if isinstance(part, nn.Module))


def is_compiled(f: object) -> bool:
    """Whether f or a part of it is compiled by ``torch.compile``."""
    return any(map(private.is_compiled_itself, _parts_of(f)))


def _parts_of(f: object) -> Iterator[object]:
    """What f is made of, each once.

    Parts are looked for through bound methods, ``functools.partial``, closures within closures, and among the
    attributes of an object and of objects that it holds; not in lists and dicts, nor deeper. Of the globals that f
    names, modules and compiled functions count.
    """
    seen: set[int] = set()
    found = [(f, 2)]
    while found:
        x, depth = found.pop()
        if id(x) in seen:
            continue
        seen.add(id(x))
        if not isinstance(x, nn.Module):
            yield x
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
                found += [(x, 0) for x in named if isinstance(x, nn.Module) or private.is_compiled_itself(x)]
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


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that autocast computes in, if it is on for the device."""
    dtype, enabled, _ = _autocast(device)
    return dtype if enabled else None


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
