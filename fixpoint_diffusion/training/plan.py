"""What a training will cost, told before it begins."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fixpoint_diffusion.models import FPDM, DiT, cost
from fixpoint_diffusion.models.cost import saved_bytes
from fixpoint_diffusion.models.fpdm.training_rules import training_rule
from fixpoint_diffusion.options.training import TrainingConfig

# The peak of NVIDIA's A100 in bf16, and the share of it that trainings of transformers of this size reach.
GPU, GPU_FLOPS, UTILISATION = "A100", 312e12, 0.4
# Weight, gradient, two moments and average of each parameter, in float32.
_BYTES_PER_PARAMETER = 20


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """What a training costs.

    Attributes:
        parameters: of the network.
        flops_per_image: operations of the matrix products in forward and backward pass for one image, on average; a
            multiplication and an addition are two.
        activation_bytes: what the backward pass of one image needs, at most, in float32.
        config: how it is trained.
        images: in the data set.
        notes: what to know of these figures.

    Example:
        See :class:`fixpoint_diffusion.training.TrainingRun`, whose ``plan`` returns one.
    """

    parameters: int
    flops_per_image: float
    activation_bytes: int
    config: TrainingConfig
    images: int
    notes: tuple[str, ...] = ()

    @property
    def flops(self) -> float:
        """Of the whole run."""
        return self.flops_per_image * self.config.batch_size * self.config.steps

    @property
    def gpu_hours(self) -> float:
        """Of the whole run on one A100 that reaches 40 % of its peak."""
        return self.flops / (GPU_FLOPS * UTILISATION) / 3600

    def describe(self) -> str:
        """The figures, one a line."""
        config = self.config
        seen, at_once = config.steps * config.batch_size, config.batch_size // config.accumulate
        lines = [
            ("parameters", f"{self.parameters:,}"),
            ("one step", f"{self.flops_per_image * config.batch_size:.3g} FLOPs, {self.flops_per_image:.3g} an image"),
            (
                "memory",
                f"{self.activation_bytes * at_once / 1e9:.3g} GB of activations in float32 with {at_once} images at "
                f"once, {self.parameters * _BYTES_PER_PARAMETER / 1e9:.3g} GB of weights, gradients, AdamW and average",
            ),
            ("whole run", f"{config.steps:,} steps, {seen:,} images, {seen / self.images:.3g} epochs"),
            (
                "time",
                f"{self.flops:.3g} FLOPs: {self.gpu_hours:.3g} GPU-hours on an {GPU} at {UTILISATION:.0%} of its "
                f"{GPU_FLOPS / 1e12:.0f} TFLOP/s",
            ),
            *(("note", note) for note in self.notes),
        ]
        return "\n".join(f"  {name:<12} {text}" for name, text in lines)


def plan_of(model: Any, config: TrainingConfig, sample_shape: tuple[int, ...], images: int) -> TrainingPlan:
    """What training a ``TrainableDenoiser`` costs; nothing is computed, and its weights may be on ``meta``.

    DiT and FPDM are counted by :func:`fixpoint_diffusion.models.cost`; other networks are run on ``meta``.
    """
    network = model.network
    notes: list[str] = []
    if isinstance(network, FPDM):
        flops, kept, notes = _of_fpdm(network)
    elif isinstance(network, DiT):
        one = cost(network)
        flops, kept = 3.0 * one.flops, one.activation_bytes
    else:
        flops, kept = _counted(model, sample_shape)
        notes.append("the memory includes the weights of attention; fused kernels do not keep them and need less")
    if config.gradient_checkpointing:
        notes.append("gradient checkpointing needs less memory than that, and up to a third more operations")
    if config.state_loss != "none":
        notes.append(f"state_loss {config.state_loss!r} calls the model twice in a step")
    if config.jacobian_penalty:
        notes.append("the Jacobian penalty comes on top")
    return TrainingPlan(
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        flops_per_image=flops,
        activation_bytes=kept,
        config=config,
        images=images,
        notes=tuple(notes),
    )


def _of_fpdm(network: FPDM) -> tuple[float, int, list[str]]:
    rule = training_rule(network.config)
    outside = cost(network, iterations=0).flops
    iteration = cost(network, iterations=1).flops - outside
    flops = 3 * outside + (rule.no_grad + 3 * rule.grad) * iteration
    notes = [
        f"{network.config.backward}: {rule.no_grad:g} iterations that record nothing and {rule.grad:g} recorded ones "
        f"on average; the memory is that of {rule.most_grad}"
    ]
    if network.config.backward in ("ift", "shine"):
        notes.append("the products of the adjoint equation come on top")
    return flops, cost(network, iterations=rule.most_grad).activation_bytes, notes


def _counted(model: nn.Module, sample_shape: tuple[int, ...]) -> tuple[float, int]:
    """Operations of both passes, and what autograd saves, of a call for one image on ``meta``."""
    twin: Any = copy.deepcopy(model).to("meta")
    x, t = torch.zeros(1, *sample_shape, device="meta"), torch.zeros(1, dtype=torch.int64, device="meta")
    rows = {
        name: torch.zeros(1, *(max(size, 1) for size in wanted.shape), dtype=wanted.dtype, device="meta")
        for name, wanted in twin.denoiser.conditioning.items()
    }
    counter = FlopCounterMode(display=False)
    # Of the kernels for attention, torch counts the operations of this one.
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        size = saved_bytes(twin, lambda: twin(x, t, **rows))
    return 3.0 * counter.get_total_flops(), size
