"""Losses on states that a fixed point layer passes on its way to the solution.

The model is called twice. The second call starts the layer at the state that the first one reached, without its graph:
together they are one long solve, with an output on the way. Memory is that of one call more.

Source: Elastic Looped Transformers (arXiv 2604.09168, 2026) for self-distillation. There both outputs are of one solve
whose full depth is fixed and recorded; here each call draws its own iterations, and records as many as it always does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from fixpoint import FixedPointLayer, Layout, Solution
from fixpoint_diffusion.options.training import TrainingConfig
from fixpoint_diffusion.training.objectives import DenoisingTask

Objective = Callable[[nn.Module, DenoisingTask, Mapping[str, Any], int], Tensor]
"""Model, task, conditioning and number of the step to the loss."""


def objective_of(model: nn.Module, config: TrainingConfig) -> Objective:
    """The loss that ``config.state_loss`` names, as a function of one step.

    Raises:
        ValueError: if it is about the states of a layer that the model does not have.
    """
    if config.state_loss == "none":
        return lambda model, task, conditioning, step: task.loss(task.ask(model, conditioning))
    layer = only_layer(model, f"state_loss {config.state_loss!r}")

    def objective(model: nn.Module, task: DenoisingTask, conditioning: Mapping[str, Any], step: int) -> Tensor:
        with _going_on(layer):
            early = task.ask(model, conditioning)
            late = task.ask(model, conditioning)
        share = 1.0 if config.state_loss == "supervised" else 1 - step / config.steps
        return two_state_loss(task, early, late, share)

    return objective


def two_state_loss(task: DenoisingTask, early: Tensor, late: Tensor, share: float) -> Tensor:
    """``L(late) + share L(early) + (1 - share) |early - late|^2``, where the last term teaches the early output alone.

    Args:
        task: what L measures, and how timesteps weigh.
        early, late: outputs of the model from an early and from a later state.
        share: 1 is plain supervision of the early state, 0 is self-distillation.
    """
    return task.loss(late) + share * task.loss(early) + (1 - share) * task.distance(early, late.detach())


def only_layer(model: nn.Module, what: str) -> FixedPointLayer:
    """The fixed point layer of the model.

    Raises:
        ValueError: if it has none, or several; ``what`` is what asked for it.
    """
    layers = [module for module in model.modules() if isinstance(module, FixedPointLayer)]
    if len(layers) != 1:
        raise ValueError(f"{what} is for a model with one fixed point layer, found {len(layers)}")
    return layers[0]


def reached_state(output: Any) -> Any:
    """The state, of any structure, in what a call of the layer has returned; without its graph."""
    value = output.value if isinstance(output, Solution) else output
    layout = Layout.of(value, batch_dims=0)  # however many problems it is
    return layout.unflatten(layout.flatten(value).detach())


@contextmanager
def _going_on(layer: FixedPointLayer) -> Iterator[None]:
    """Each call of the layer starts at the state where the one before has ended."""
    reached: list[Any] = []

    def start(module: nn.Module, inputs: Any, options: dict[str, Any]) -> Any:
        return inputs, {**options, "z0": reached[-1]} if reached else options

    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        reached.append(reached_state(output))

    hooks = [layer.register_forward_pre_hook(start, with_kwargs=True), layer.register_forward_hook(note)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
