"""Weights on disk against the network that a config describes, compared before any memory is asked for."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

from fixpoint_diffusion.extras import needed_for

# What safetensors calls them. Packed and 8-bit formats need the library that wrote them.
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_LARGEST_BUFFERS = 2**30


@final
@dataclass(frozen=True)
class StoredTensor:
    """Shape and dtype of a tensor in a file; ``dtype`` is None for one that no network here computes with."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None
    dtype_name: str


def read_headers(paths: Iterable[Path]) -> dict[str, StoredTensor]:
    """Names, shapes and dtypes of all tensors in safetensors files, read from their headers alone.

    Raises:
        FileNotFoundError: If a file is absent.
        ValueError: If one is not a readable safetensors file, or is shorter than its header says.
    """
    with needed_for("reading weights"):
        from safetensors import SafetensorError, safe_open

    found: dict[str, StoredTensor] = {}
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"no weights {path.name} in {path.parent}")
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - it is no mapping
                    part = file.get_slice(name)
                    kind = part.get_dtype()
                    found[name] = StoredTensor(tuple(part.get_shape()), _FLOATS.get(kind), kind)
        except (SafetensorError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not a readable safetensors file: {error}") from error
    return found


def build_on_meta(build: Callable[[], nn.Module], stored: int, source: Path) -> nn.Module:
    """The network that a config describes, without memory for its weights.

    Args:
        build: makes the network.
        stored: how many tensors its weights have; building ends once it asks for far more.
        source: the config, for messages.

    Raises:
        ValueError: If the network cannot be built, or asks for far more tensors than are stored.
    """
    limit = 4 * stored + 1000
    try:
        message = f"it asks for more than {limit} tensors, and the weights hold {stored}"
        with at_most_tensors(limit, message), torch.device("meta"), _WithoutValues():
            return build()
    except ImportError:
        raise
    except Exception as error:  # a constructor that is given arbitrary values raises whatever it likes
        raise ValueError(f"{source} does not describe a usable network: {describe_error(error)}") from error


class _WithoutValues(TorchFunctionMode):
    """Initial values are not drawn. On the device "meta" there are none, and to draw them imports a compiler."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return given["tensor"] if "tensor" in given else args[0]
        return func(*args, **given)


@contextmanager
def at_most_tensors(limit: int, message: str) -> Iterator[None]:
    """Networks that this thread builds in the block have at most so many parameters; else ValueError(message)."""
    thread, count = threading.get_ident(), 0

    def stop_beyond(module: nn.Module, name: str, parameter: object) -> None:
        nonlocal count
        count += threading.get_ident() == thread
        if count > limit:
            raise ValueError(message)

    hook = register_module_parameter_registration_hook(stop_beyond)
    try:
        yield
    finally:
        hook.remove()


def check_fit(expected: nn.Module, stored: Mapping[str, StoredTensor], source: Path, *, dtype: torch.dtype) -> None:
    """Compare a network, which may be on ``meta``, with what is stored for it.

    Raises:
        ValueError: If names or shapes differ, a tensor is stored in a dtype that cannot be used, or the network asks
            for far more memory beside its weights than they take; the message names the first of each.

    Warns:
        UserWarning: If weights lose precision when they are loaded as ``dtype``.
    """
    state = expected.state_dict()
    missing, unknown = sorted(state.keys() - stored.keys()), sorted(stored.keys() - state.keys())
    problems = [f"missing: {_first(missing)}"] if missing else []
    problems += [f"unknown: {_first(unknown)}"] if unknown else []
    both = sorted(state.keys() & stored.keys())
    shapes = [
        f"{name} has shape {stored[name].shape}, expected {tuple(state[name].shape)}"
        for name in both
        if stored[name].shape != tuple(state[name].shape)
    ]
    kinds = [
        f"{name} is stored as {stored[name].dtype_name}, expected one of {', '.join(_FLOATS)}"
        for name in both
        if state[name].is_floating_point() and stored[name].dtype is None
    ]
    for found in (shapes, kinds):
        problems += found[:2] + ([f"and {len(found) - 2} more like it"] if len(found) > 2 else [])
    if problems:
        raise ValueError(f"the weights in {source} do not fit its config.json: {'; '.join(problems)}")
    weights = sum(_bytes(tensor) for tensor in state.values())
    beside = sum(_bytes(tensor) for name, tensor in expected.named_buffers() if name not in state)
    if beside > max(_LARGEST_BUFFERS, 4 * weights):
        raise ValueError(
            f"config.json in {source} asks for {beside / 1e9:.1f} GB beside weights of {weights / 1e9:.3g} GB: "
            f"is a size in it wrong?"
        )
    wider = [name for name in both if (kind := stored[name].dtype) and torch.finfo(kind).bits > torch.finfo(dtype).bits]
    if torch.float64 in {stored[name].dtype for name in wider}:
        warnings.warn(f"weights stored in float64 are loaded as {dtype}: ask for dtype=torch.float64", stacklevel=4)


def check_values(tensors: Iterable[tuple[str, Tensor]], source: Path) -> None:
    """Refuse weights that are not finite.

    Raises:
        ValueError: The message names the first tensors with NaN or infinite values.
    """
    bad = [
        name
        for name, tensor in tensors
        if tensor.device.type != "meta" and tensor.is_floating_point() and not bool(torch.isfinite(tensor).all())
    ]
    if bad:
        raise ValueError(f"the weights in {source} hold values that are not finite, in {_first(bad)}")


def describe_error(error: Exception) -> str:
    """The type and message of an error, as one short line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}{'...' if len(text) > 300 else ''}"


def _first(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
