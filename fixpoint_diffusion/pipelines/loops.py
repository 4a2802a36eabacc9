"""What one step of a pipeline's loop says about all of them: the denoiser, what each image is told, the guidance."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fixpoint_diffusion.denoisers import DiffusersDenoiser, Guided
from fixpoint_diffusion.denoisers.guided import NEGATIVE
from fixpoint_diffusion.pipelines.stand_ins import Asked

# Half precision rounds, and another rule makes something else altogether.
_CLOSE = 0.05


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """How a pipeline's loop combines the two halves of what it asks a network in a step.

    Attributes:
        scale, rescale: as for :class:`~fixpoint_diffusion.denoisers.Guided`.
        negative_first: which half the negative rows are in.

    Example:
        See :class:`fixpoint_diffusion.denoisers.Guided`, which it becomes.
    """

    scale: float
    rescale: float = 0.0
    negative_first: bool = True

    def halves(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The negative rows, and the others."""
        first, second = rows.chunk(2)
        return (first, second) if self.negative_first else (second, first)


def joined(calls: Sequence[Asked], shared: Sequence[str]) -> Asked:
    """All that a loop asked in one step, with nested inputs under names such as ``"added_cond_kwargs.time_ids"``.

    Args:
        calls: one or more.
        shared: inputs that are tensors but the same for all rows.

    Raises:
        ValueError: calls that differ in more than their rows.
    """
    if not calls:
        raise ValueError("this pipeline's loop takes a step without asking the network")
    flat = [dict(_flatten(call.inputs)) for call in calls]
    first, inputs = calls[0], flat[0]
    for name, value in inputs.items():
        rows = isinstance(value, Tensor) and name not in shared
        if not all(_alike(value, each.get(name), values=not rows) for each in flat):
            raise ValueError(f"the network is asked more than once in a step, with {name} that do not fit together")
        if rows:
            inputs[name] = torch.cat([each[name] for each in flat])
    return replace(
        first,
        sample=torch.cat([call.sample for call in calls]),
        timestep=torch.cat([call.timestep.expand(len(call.sample)) for call in calls]),
        answer=torch.cat([call.answer for call in calls]),
        inputs=inputs,
        calls=len(calls),
    )


class LoopDenoiser(DiffusersDenoiser):
    """A pipeline's network, asked as the pipeline's loop asks it.

    Args:
        network: the real one.
        asked: what the loop asked.
        told: from the scheduler's timesteps to what the network is told.
        shared: names of inputs that are the same for all rows.
        options: of :class:`DiffusersDenoiser`.
    """

    def __init__(
        self,
        network: nn.Module,
        asked: Asked,
        *,
        told: Callable[[Tensor], Tensor],
        shared: Sequence[str],
        **options: Any,
    ) -> None:
        constants = {name: value for name, value in asked.inputs.items() if not isinstance(value, Tensor)}
        super().__init__(network, inputs=constants, **options)
        self.asks: Callable[..., Any] = network
        self._name, self._told = asked.timestep_name, told
        self._shared = {name: asked.inputs[name] for name in shared if name in asked.inputs}

    @staticmethod
    def _check_call(model: nn.Module) -> None:
        """Nothing: the timestep goes by its name."""

    def _ask(self, x: Tensor, t: Tensor, inputs: dict[str, Any]) -> Any:
        return self.asks(x, **{self._name: self._told(t)}, **_nested({**inputs, **self._shared}))


def conditioning(asked: Asked, batch: int, guidance: Guidance | None, shared: Sequence[str]) -> dict[str, Tensor]:
    """What differs from image to image, with the negative half of a guided batch under its own name.

    Raises:
        ValueError: tensors that have no row for each image.
    """
    rows, found = batch * (2 if guidance else 1), dict[str, Tensor]()
    for name, value in asked.inputs.items():
        if name in shared:
            continue
        if not isinstance(value, Tensor):
            if _holds_tensors(value):
                raise ValueError(f"{name} holds tensors ({type(value).__name__}), which cannot be solved in parallel")
        elif value.shape[:1] != (rows,):
            count = value.shape[0] // (rows // batch) if value.ndim else "all"
            raise ValueError(f"there are {batch} latents, but {name} for {count}")
        elif guidance:
            found[NEGATIVE + name], found[name] = guidance.halves(value)
        else:
            found[name] = value
    return found


def check_loop(
    denoiser: Guided | LoopDenoiser,
    asked: Asked,
    guidance: Guidance | None,
    x: Tensor,
    t: Tensor,
    rows: Mapping[str, Tensor],
    expected: Tensor,
) -> None:
    """See that a denoiser asks what the loop asked, and makes the same of the same answers; no network is called.

    Args:
        denoiser: for all steps.
        asked, guidance: what the loop did in the first.
        x, t, rows: latents, timesteps and conditioning of that step.
        expected: what the loop gave the scheduler.

    Raises:
        ValueError: the loop does something else.
    """
    inner = denoiser.denoiser if isinstance(denoiser, Guided) else denoiser
    assert isinstance(inner, LoopDenoiser)

    def ordered(values: Tensor) -> Tensor:
        return torch.cat(guidance.halves(values)) if guidance else values

    def replay(x: Tensor, **given: Any) -> tuple[Tensor]:
        _compare("shows the network other latents", x, ordered(asked.sample))
        told = given[asked.timestep_name]
        _compare("tells the network other timesteps", told, ordered(asked.timestep.expand(len(x))))
        return (ordered(asked.answer),)

    inner.asks = replay
    _compare("makes another prediction of the network's answers", denoiser(x, t, **rows), expected)
    inner.asks = inner.model


def _compare(what: str, found: Tensor, expected: Tensor) -> None:
    same = found.shape == expected.shape
    if same:
        found, expected = found.double().cpu(), expected.double().cpu()
        same = bool((found - expected).norm() <= _CLOSE * expected.norm())
    if not same:
        raise ValueError(f"the loop of this pipeline {what} than is served, so it cannot be solved in parallel")


def _alike(one: Any, other: Any, *, values: bool) -> bool:
    """Whether two inputs have one type and shape and, if ``values``, are the same."""
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return bool(one is other or (type(one) is type(other) and not _holds_tensors(one) and one == other))
    return one.shape == other.shape and (not values or torch.equal(one, other))


def _flatten(inputs: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name, value in inputs.items():
        if isinstance(value, Mapping) and value:
            found += _flatten(value, f"{prefix}{name}.")
        else:
            found.append((prefix + name, value))
    return found


def _nested(inputs: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in inputs.items():
        *outer, last = name.split(".")
        here = found
        for part in outer:
            here = here.setdefault(part, {})
        here[last] = value
    return found


def _holds_tensors(value: Any) -> bool:
    children = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return any(isinstance(child, Tensor) or _holds_tensors(child) for child in children)
