"""What stands in for a scheduler and a network while a pipeline's own loop takes its one step."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn


class OneStep:
    """A scheduler as it is, but with one timestep, whose step is ``take_step`` of the arguments by name."""

    def __init__(self, scheduler: Any, take_step: Callable[[Mapping[str, Any]], Tensor]) -> None:
        self._scheduler = scheduler
        signature = inspect.signature(scheduler.step)

        def step(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            latents = take_step(bound.arguments)
            return SimpleNamespace(prev_sample=latents) if bound.arguments["return_dict"] else (latents,)

        # Pipelines look there for what the scheduler accepts.
        step.__signature__ = signature  # type: ignore[attr-defined]
        self.step = step

    @property
    def timesteps(self) -> Tensor:
        return self._scheduler.timesteps[:1]

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["_scheduler"], name)


class Listener(nn.Module):
    """A network as it is, but when called it notes the inputs and answers zeros."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        vars(self)["_real"] = network  # not a submodule, which would be moved and counted twice
        self.rows = 0
        self.inputs: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["_real"], name)

    def modules(self, remove_duplicate: bool = True) -> Iterator[nn.Module]:
        """The real ones: a pipeline finds the device to run on by the offloading hooks on them."""
        return vars(self)["_real"].modules()

    def forward(self, sample: Tensor, timestep: Tensor, *, return_dict: bool = True, **inputs: Any) -> Any:
        self.rows, self.inputs = len(sample), inputs
        out = sample.new_zeros(len(sample), self.config.out_channels, *sample.shape[2:])
        return SimpleNamespace(sample=out) if return_dict else (out,)
