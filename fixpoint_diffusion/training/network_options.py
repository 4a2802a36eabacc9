"""What training asks of the network: checkpoints of activations, compiled blocks, penalty and depths of its layer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fixpoint import FixedPointLayer, StochasticJFB, jacobian_penalty
from fixpoint_diffusion.options.training import TrainingConfig
from fixpoint_diffusion.training.layer_states import only_layer, reached_state


@contextmanager
def trained_as(model: nn.Module, config: TrainingConfig) -> Iterator[None]:
    """The network in ``model`` with gradient checkpointing and compiled blocks, as ``config`` asks.

    Compiled blocks stay compiled; they are called and stored as before.

    Raises:
        ValueError: if the network cannot do what is asked.
    """
    checkpointed = _with_method(model, "enable_gradient_checkpointing") if config.gradient_checkpointing else None
    if config.compile_blocks:
        _with_method(model, "compile_repeated_blocks").compile_repeated_blocks()
    if checkpointed is not None:
        checkpointed.enable_gradient_checkpointing()
    try:
        yield
    finally:
        if checkpointed is not None:
            checkpointed.disable_gradient_checkpointing()


def _with_method(model: nn.Module, name: str) -> Any:
    for module in model.modules():
        if hasattr(module, name):
            return module
    network = type(getattr(model, "network", model)).__name__
    what = {"enable_gradient_checkpointing": "gradient checkpointing", "compile_repeated_blocks": "compiled blocks"}
    raise ValueError(f"a {network} has no {what[name]}")


class LayerPenalty:
    """``|J|_F^2 / dim`` of the fixed point layer's map at the solution of the last call, estimated with one probe.

    Args:
        model: has one fixed point layer.

    Raises:
        ValueError: if it has none.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layer = only_layer(model, "jacobian_penalty")
        self._call: tuple[Any, tuple[Any, ...]] | None = None
        self._hook = self._layer.register_forward_hook(self._note)

    def _note(self, layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        self._call = reached_state(output), inputs

    def take(self) -> Tensor:
        """The mean over the rows of the last call; a scalar with a graph."""
        assert self._call is not None
        (z, inputs), self._call = self._call, None
        # Code that is compiled has no second derivative. It stands in a module's call, and not in its forward.
        f = getattr(self._layer.f, "forward", self._layer.f)
        return jacobian_penalty(f, z, inputs, batch_dims=self._layer.options.get("batch_dims")).mean()

    def remove(self) -> None:
        """Take the hook off the layer."""
        self._hook.remove()


class SharedDepths:
    """Random depths of fixed point layers that are the same wherever they are started alike.

    They come from a generator of their own: what else a model draws, such as dropout or noise, may then differ between
    processes and between pieces of a batch. A rule that has a seed or a generator keeps it.

    Args:
        model: may have any number of fixed point layers.
    """

    def __init__(self, model: nn.Module) -> None:
        self._generator = torch.Generator()
        # Kept, for a rule knows what it has drawn under a checkpoint of activations.
        self._rules: dict[StochasticJFB, StochasticJFB] = {}
        layers = [module for module in model.modules() if isinstance(module, FixedPointLayer)]
        self._hooks = [layer.register_forward_pre_hook(self._share, with_kwargs=True) for layer in layers]

    def start(self, seed: int) -> None:
        """The depths from here on are those of ``seed``."""
        self._generator.manual_seed(seed)

    def _share(self, layer: Any, inputs: tuple[Any, ...], options: dict[str, Any]) -> Any:
        rule = options.get("backward", layer.options["backward"])
        if not isinstance(rule, StochasticJFB) or rule.seed is not None or rule.generator is not None:
            return None
        if rule not in self._rules:
            self._rules[rule] = replace(rule, generator=self._generator)
        return inputs, {**options, "backward": self._rules[rule]}

    def remove(self) -> None:
        """Take the hooks off the layers."""
        for hook in self._hooks:
            hook.remove()
