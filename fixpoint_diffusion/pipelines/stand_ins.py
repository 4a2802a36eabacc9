"""What stands in for a scheduler and a network while a pipeline's own loop takes its one step."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from fixpoint_diffusion.denoisers.modules import uncompiled


class OneStep:
    """A scheduler as it is, but loops end after one step, which is ``take_step`` of its arguments by name."""

    def __init__(self, scheduler: Any, take_step: Callable[[Mapping[str, Any]], Tensor]) -> None:
        self._scheduler = scheduler
        self.taken = False  # the step
        self.ended = False  # the loop
        # Which of the scheduler's timesteps were walked last: those of the loop, once its step is taken.
        self.walked = slice(None)
        signature = inspect.signature(scheduler.step)

        def step(*args: Any, **kwargs: Any) -> Any:
            if self.taken:
                raise ValueError("this pipeline's loop takes more steps than it has timesteps")
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            latents = Stepped.of(self, take_step(bound.arguments))
            self.taken = True
            return SimpleNamespace(prev_sample=latents) if bound.arguments["return_dict"] else (latents,)

        # Pipelines look there for what the scheduler accepts.
        step.__signature__ = signature  # type: ignore[attr-defined]
        self.step = step

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """The scheduler's, which diffusers names in its errors."""
        return type(vars(self)["_scheduler"])

    @property
    def timesteps(self) -> Tensor:
        return Timesteps.of(self, self._scheduler.timesteps)

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["_scheduler"], name)


class Timesteps(Tensor):
    """A scheduler's timesteps, or some of them in a row: whoever walks them stops when the step has been taken."""

    owner: OneStep
    first: int

    @classmethod
    def of(cls, owner: OneStep, values: Tensor, first: int = 0) -> Timesteps:
        """``first`` is which of the scheduler's timesteps these begin with."""
        found = values.as_subclass(cls)
        found.owner, found.first = owner, first
        return found

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """What is made of timesteps is a plain tensor, but for a part of them, or all of them elsewhere."""
        with torch._C.DisableTorchFunctionSubclass():
            made = func(*args, **(kwargs or {}))
        given = args[0] if args else None
        if not isinstance(given, cls) or not isinstance(made, Tensor) or made.ndim != 1:
            return made.as_subclass(Tensor) if isinstance(made, cls) else made
        if func is Tensor.__getitem__ and isinstance(args[1], slice) and args[1].step is None:
            return cls.of(given.owner, made, given.first + args[1].indices(len(given))[0])
        return cls.of(given.owner, made, given.first) if func is Tensor.to else made.as_subclass(Tensor)

    def __iter__(self) -> Iterator[Tensor]:
        if not len(self):
            raise ValueError("this call leaves no step to take: give more num_inference_steps, or a larger strength")
        self.owner.walked = slice(self.first, self.first + len(self))
        for timestep in self.as_subclass(Tensor).unbind():
            yield timestep
            if self.owner.taken:
                self.owner.ended = True
                return


class Stepped(Tensor):
    """The latents that a loop's one step returned. A loop that computes with them before its next step is refused."""

    owner: OneStep

    @classmethod
    def of(cls, owner: OneStep, values: Tensor) -> Stepped:
        found = values.as_subclass(cls)
        found.owner = owner
        return found

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            made = func(*args, **(kwargs or {}))
        plain = made.as_subclass(Tensor) if isinstance(made, cls) else made
        given = (*args, *(kwargs or {}).values())
        parts = (each for x in given for each in (x if isinstance(x, tuple | list) else (x,)))
        owner = next((each.owner for each in parts if isinstance(each, cls)), None)
        if owner is None or owner.ended or not (isinstance(made, Tensor) or func is Tensor.__setitem__):
            return plain
        if func in (Tensor.to, Tensor.clone, Tensor.detach):
            return cls.of(owner, plain)
        raise ValueError(
            "the loop of this pipeline changes the latents after the scheduler's step, so it cannot be solved in "
            "parallel"
        )


def as_shown(latents: Tensor) -> Tensor:
    """The latents of a loop for a callback, which may compute what it likes."""
    with torch._C.DisableTorchFunctionSubclass():
        return latents.as_subclass(Tensor)


@dataclass(frozen=True, eq=False, kw_only=True)
class Asked:
    """What a loop asks a network in one step, in one call or in several, whose rows are then one after another.

    Attributes:
        sample, answer: latents and what came back, ``(N, *shape)``.
        timestep: as the network was told it.
        timestep_name: what the network calls it.
        inputs: all else, by name.
        calls: how many there were.
    """

    sample: Tensor
    timestep: Tensor
    timestep_name: str
    inputs: dict[str, Any]
    answer: Tensor
    calls: int = 1


class Listener(nn.Module):
    """A network as it is, but when called it notes what it is asked, and answers at random."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        vars(self)["_real"] = network  # not a submodule, which would be moved and counted twice
        self.calls: list[Asked] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["_real"], name)

    def modules(self, remove_duplicate: bool = True) -> Iterator[nn.Module]:
        """The real ones: a pipeline finds the device to run on by the offloading hooks on them."""
        return vars(self)["_real"].modules()

    def forward(self, *args: Any, return_dict: bool = True, **kwargs: Any) -> Any:
        signature = inspect.signature(type(uncompiled(vars(self)["_real"])).forward)
        (_, *names), more = signature.parameters, dict(kwargs)
        more.update(zip(names, args, strict=False))
        timestep_name = "timestep" if "timestep" in more else names[1]
        sample, timestep = more.pop(names[0]), more.pop(timestep_name)
        shape = list(sample.shape)
        if sample.ndim > 3:  # otherwise tokens, with their channels last
            shape[1] = self.config.out_channels or shape[1]
        draw = torch.Generator().manual_seed(len(self.calls))
        answer = torch.randn(shape, generator=draw, device="cpu").to(sample)
        self.calls.append(
            Asked(sample=sample, timestep=timestep, timestep_name=timestep_name, inputs=more, answer=answer)
        )
        return SimpleNamespace(sample=answer) if return_dict else (answer,)
