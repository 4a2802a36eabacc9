"""Callbacks of a pipeline's run: they may look at it and stop it, but what would change it is refused by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from copy import copy
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

CANNOT_CHANGE = "a callback can look at a parallel solve and stop it, but not change it: all steps are solved at once"
# What a callback may set: the request to stop, and how the bar looks. The last is set with every component.
_MAY_BE_SET = ("_interrupt", "_progress_bar_config", "_internal_dict")
# The pipelines whose callback is running in this thread.
_READ_ONLY: ContextVar[tuple[Any, ...]] = ContextVar("read_only_pipelines", default=())


@contextmanager
def read_only(*pipelines: Any) -> Iterator[None]:
    """While it lasts, :func:`check_assignment` refuses changes of these pipelines in this thread."""
    token = _READ_ONLY.set(pipelines)
    try:
        yield
    finally:
        _READ_ONLY.reset(token)


def check_assignment(pipeline: Any, name: str, value: Any) -> None:
    """Refuse to set a component or a setting of a run (``_guidance_scale``) in its callback.

    Attributes of the caller's own, which no pipeline of diffusers reads, may be set.

    Raises:
        ValueError: for a change that a loop would follow from its next step on.
    """
    watched = _READ_ONLY.get()
    if name in _MAY_BE_SET or not any(pipeline is each for each in watched):
        return
    # Before its first run, a pipeline lacks the settings that the copy of the run has.
    old = [vars(each)[name] for each in watched if name in vars(each)]
    known = name in pipeline.config or (name.startswith("_") and old)
    if known and not any(value is each for each in old):
        raise ValueError(f"the callback set {name} of the pipeline; {CANNOT_CHANGE}")


def state_of(scheduler: Any, network: nn.Module) -> dict[str, Any]:
    """What a change in place of a scheduler, or of a network's weights, shows in; for :func:`check_unchanged`."""
    state = {f"scheduler.{name}": _copy(value) for name, value in vars(scheduler).items()}
    tensors = (tensor for tensor in chain(network.parameters(), network.buffers()) if not tensor.is_inference())
    return state | {"the network's weights": [(id(tensor), tensor._version) for tensor in tensors]}


def check_unchanged(values: Mapping[str, Any], found: Mapping[str, Any], *, how: str) -> None:
    """Compare what a run works with, by name, with what a callback left of it or returned.

    Args:
        values: what the run works with.
        found: what came back. Names that are not in ``values`` mean nothing to the run, and are let pass.
        how: what the callback did with values that differ, for the message.

    Raises:
        ValueError: for values that differ.
    """
    changed = [name for name, value in found.items() if name in values and not _equal(value, values[name])]
    if changed:
        raise ValueError(f"the callback {how} {', '.join(changed)}; {CANNOT_CHANGE}")


def check_returned(values: Mapping[str, Any], returned: Any) -> None:
    """Refuse what a callback returned unless it is None or a dict with the run's own values, as they are.

    Raises:
        ValueError: for anything else.
    """
    if not isinstance(returned, Mapping | None):
        raise ValueError(f"the callback must return a dict of tensors or None, got {type(returned).__name__}")
    check_unchanged(values, returned or {}, how="returned another")


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else copy(value)


def _equal(one: Any, other: Any) -> bool:
    if not isinstance(one, Tensor) and not isinstance(other, Tensor):
        return bool(one is other or one == other)
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return False
    if one.shape != other.shape or one.dtype != other.dtype or one.device != other.device:
        return False
    return torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)
