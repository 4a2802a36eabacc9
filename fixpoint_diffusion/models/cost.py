"""What one call of a DiT or an FPDM costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fixpoint_diffusion.models.dit import DiT
from fixpoint_diffusion.models.fpdm import FPDM


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one call costs for one image; :func:`cost` counts it.

    Attributes:
        block_passes: Forward passes of blocks: the FPDM paper's measure.
        flops: Operations of matrix products, convolution and attention, a multiplication and an addition as two; those
            of a forward pass.
        parameters: Of the network.
        activation_bytes: What autograd keeps of the call for the backward pass, in float32 and beside parameters.

    Example:
        See :func:`fixpoint_diffusion.models.cost`, which returns one.
    """

    block_passes: int
    flops: int
    parameters: int
    activation_bytes: int


def cost(model: DiT | FPDM, *, iterations: int = 1, grad_iterations: int | None = None) -> Cost:
    """Count what one call costs for one image; nothing is computed, and the model's weights may be on ``meta``.

    The backward pass takes twice the operations of what is recorded.

    Args:
        model: The model.
        iterations: Of an FPDM's layer; a DiT has none.
        grad_iterations: Of these, the last so many that training records (S-JFB's m); None: all.

    Raises:
        ValueError: If the numbers are negative, or more iterations are recorded than made.

    >>> from fixpoint_diffusion.models import DiTConfig, FPDMConfig
    >>> with torch.device("meta"):
    ...     dit, fpdm = DiT(DiTConfig.preset("XL/2")), FPDM(FPDMConfig.preset("XL/2"))
    >>> cost(dit).block_passes, cost(fpdm, iterations=26).block_passes
    (28, 28)
    >>> f"{cost(dit).flops / 1e9:.1f} {cost(fpdm, iterations=26).flops / 1e9:.1f}"
    '237.2 309.5'
    """
    recorded = iterations if grad_iterations is None else grad_iterations
    if not 0 <= recorded <= iterations:
        raise ValueError(
            f"iterations and, of these, grad_iterations must not be negative, got {iterations} and {recorded}"
        )
    return Cost(
        block_passes=model.config.depth if isinstance(model, DiT) else model.config.block_passes(iterations),
        flops=_flops(model, iterations),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        activation_bytes=_activation_bytes(model, recorded),
    )


def _flops(model: DiT | FPDM, iterations: int) -> int:
    c = model.config
    tokens, width = c.tokens, c.width

    def linear(rows: int, inputs: int, outputs: int) -> int:
        return 2 * rows * inputs * outputs

    hidden = int(width * c.mlp_ratio)
    attention = linear(tokens, width, 3 * width) + linear(tokens, width, width) + 4 * tokens * tokens * width
    block = attention + linear(tokens, width, hidden) + linear(tokens, hidden, width)
    patch = c.patch_size * c.patch_size
    total = linear(tokens, c.in_channels * patch, width) + linear(tokens, width, patch * c.out_channels)
    total += linear(1, model.time_embedding.features, width) + linear(1, width, width)
    if isinstance(model, DiT):
        return total + model.config.depth * (block + linear(1, width, 6 * width)) + linear(1, width, 2 * width)
    explicit = model.config.n_pre + model.config.n_post
    total += explicit * block
    if model.head.modulation.linear is not None:
        total += explicit * linear(1, width, 6 * width) + linear(1, width, 2 * width)
    # Once a call: the injection, its half of W1, and the modulations. Then W1's other half, W2 and the blocks.
    group = model.config.implicit_blocks
    total += linear(tokens, width, width) + linear(tokens, width, 2 * width) + group * linear(1, width, 6 * width)
    return total + iterations * (2 * linear(tokens, width, 2 * width) + group * block)


def _activation_bytes(model: DiT | FPDM, recorded: int) -> int:
    """Bytes of the tensors that autograd saves in a call that exists in shapes alone."""
    with FakeTensorMode(), torch.device("cpu"), torch.enable_grad():
        twin = DiT(model.config) if isinstance(model, DiT) else FPDM(model.config)
        x, t = torch.zeros(1, *model.config.sample_shape), torch.zeros(1, dtype=torch.int64)
        return saved_bytes(twin, lambda: _recorded_call(twin, x, t, recorded))


def saved_bytes(model: nn.Module, call: Callable[[], object]) -> int:
    """Bytes that autograd saves for the backward pass of a call, beside the model's parameters."""
    saved: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage()._cdata] = tensor  # kept, so that no other storage gets its number
        return tensor

    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        call()
    return sum(tensor.untyped_storage().nbytes() for number, tensor in saved.items() if number not in own)


def _recorded_call(model: DiT | FPDM, x: Tensor, t: Tensor, recorded: int) -> Tensor:
    """A call without the solve, which looks at numbers."""
    if isinstance(model, DiT):
        return model(x, t)
    z, inputs, condition = model._before_layer(x, t, None)
    z = z.clone()  # as a solve does
    for _ in range(recorded):
        z = model.implicit_block(z, *inputs)
    for block in model.post:
        z = block(z, condition)
    return model.head(z, condition)
