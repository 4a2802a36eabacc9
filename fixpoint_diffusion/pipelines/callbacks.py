"""Callbacks of a pipeline's run: they may look at it and stop it, but what would change it is refused by name.

A loop of diffusers calls back with its own tensors, at the end of its one step. The solve is run from there, so that
the caller's callback is given these tensors, by the names that the original has for them, after every round.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from copy import copy
from functools import partial
from itertools import chain
from typing import Any

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from torch import Tensor, nn

from fixpoint_diffusion.pipelines.stand_ins import as_shown

CANNOT_CHANGE = "a callback can look at a parallel solve and stop it, but not change it: all steps are solved at once"
# What a callback may set: the request to stop, and how the bar looks. The last is set with every component.
_MAY_BE_SET = ("_interrupt", "_progress_bar_config", "_internal_dict")
# The pipelines whose callback is running in this thread.
_READ_ONLY: ContextVar[tuple[Any, ...]] = ContextVar("read_only_pipelines", default=())


# Called with the number of a round and its x_0; something true stops the solve.
AfterRound = Callable[[int, Tensor], bool]
_ON_STEP_END = "callback_on_step_end"
_ITS_TENSORS = "callback_on_step_end_tensor_inputs"


class Callbacks:
    """What the caller of a pipeline wants to see of a run, taken out of the arguments of the call.

    Args:
        run, shared: the copy of the pipeline that the call works on, and the pipeline that was called.
        arguments: of the original's call, by name; changed here.

    Attributes:
        wanted: whether there is a callback for every round, so that :meth:`solve_at_the_end` is to be called.

    Raises:
        ValueError: one of diffusers' own callbacks, which change later steps.
    """

    def __init__(self, run: Any, shared: Any, arguments: dict[str, Any]) -> None:
        self._run, self._shared, self._arguments = run, shared, arguments
        callback = arguments.get(_ON_STEP_END)
        if isinstance(callback, PipelineCallback | MultiPipelineCallbacks):
            raise ValueError(f"{type(callback).__name__} changes later steps; {CANNOT_CHANGE}")
        self.wanted, self._callback = callback is not None, callback or _unseen
        deprecated = arguments if "callback" in arguments else arguments.get("kwargs", {})
        if deprecated.get("callback"):
            deprecated["callback"] = partial(self._look, deprecated["callback"])
        if hasattr(type(shared), "interrupt"):
            shared._interrupt = False

    def solve_at_the_end(self, solve: Callable[[AfterRound], Tensor], settings: Callable[[], dict[str, Any]]) -> None:
        """Have the original call back for ``solve``, whose latents its loop goes on with.

        Args:
            solve: given what to do after every round.
            settings: what the network is told beside tensors, and the state of network and scheduler.
        """
        names, known = self._arguments[_ITS_TENSORS], self._run._callback_tensor_inputs
        if set(names) <= set(known):  # otherwise the original says what is wrong
            self._arguments[_ITS_TENSORS] = known

        def at_the_end(_: Any, __: int, ___: Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
            return {"latents": solve(partial(self._after_round, names, tensors, settings))}

        self._arguments[_ON_STEP_END] = at_the_end

    def _after_round(
        self, names: list[str], tensors: dict[str, Any], settings: Callable[[], dict[str, Any]], index: int, x_0: Tensor
    ) -> bool:
        held = {**tensors, "latents": x_0.to(tensors["latents"].dtype)}
        given = {name: None if held[name] is None else held[name].clone() for name in names}
        before = {name: _copy(value) for name, value in settings().items()}
        with read_only(self._run, self._shared):
            last = self._run.scheduler.timesteps[-1]
            returned = self._callback(self._run, index, last, dict(given))
        check_unchanged(held | before, {**given, **settings()}, how="changed in place")
        check_returned(held, returned)
        return self.stopped()

    def stopped(self, *_: Any) -> bool:
        """Whether someone asks for the end of this run."""
        return any(getattr(pipe, "interrupt", False) for pipe in (self._run, self._shared))

    def _look(self, callback: Callable[..., Any], index: int, timestep: Tensor, latents: Tensor) -> None:
        """Call the deprecated ``callback``, which comes once, at the end, and returns nothing."""
        latents = as_shown(latents)
        given = latents.clone()
        with read_only(self._run, self._shared):
            callback(index, timestep, given)
        check_unchanged({"latents": latents}, {"latents": given}, how="changed in place")


def _unseen(*_: Any) -> None:
    """The callback of a caller who has none."""


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
