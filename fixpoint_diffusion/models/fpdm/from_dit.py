"""The weights of a trained DiT as a start for an FPDM."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fixpoint_diffusion.models.blocks import ImplicitBlock
from fixpoint_diffusion.models.dit.model import DiT
from fixpoint_diffusion.models.fpdm.config import FPDMConfig
from fixpoint_diffusion.models.transformer_config import TransformerConfig


def config_from_dit(dit: DiT, pre: int, post: int, **options: Any) -> FPDMConfig:
    """The configuration of an FPDM with a DiT's sizes.

    Raises:
        ValueError: If the DiT has too few blocks.
    """
    shared = {field.name: getattr(dit.config, field.name) for field in dataclasses.fields(TransformerConfig)}
    config = FPDMConfig(**shared, n_pre=pre, n_post=post, **options)
    if config.block_passes(1) > dit.config.depth:
        raise ValueError(
            f"{pre} + {config.implicit_blocks} + {post} blocks were asked for, but the DiT has {dit.config.depth}"
        )
    return config


@torch.no_grad()
def copy_from_dit(model: Any, dit: DiT) -> None:
    """Give an FPDM the weights of a DiT of the same sizes."""
    config = model.config
    for name in ("patch_embedding", "time_embedding", "class_embedding"):
        source, target = getattr(dit, name), getattr(model, name)
        if source is not None:
            target.load_state_dict(source.state_dict())
    blocks, group = list(dit.blocks), config.implicit_blocks
    first = config.n_pre + (dit.config.depth - config.block_passes(1)) // 2
    mean = _mean_time_vector(dit)
    for target, source in _explicit_parts(model, dit):
        stored = source.state_dict()
        modulation = target.modulation
        if modulation.linear is None:
            stored = {name: value for name, value in stored.items() if not name.startswith("modulation.")}
            stored["modulation.bias"] = source.modulation(mean[None])[0]
        target.load_state_dict(stored)
    for target, source in zip(model.implicit_block.blocks, blocks[first : first + group], strict=True):
        target.load_state_dict(source.state_dict())
    _start_injection(model.injection, model.implicit_block)
    if config.has_label and not config.timestep_everywhere:
        # Explicit blocks see the class alone: it takes over the mean of the timesteps, which the sum keeps as it was.
        if dit.class_embedding is None:
            model.class_embedding.weight.zero_()
        model.class_embedding.weight.add_(mean)
        model.time_embedding.linear2.bias.sub_(mean)


def _explicit_parts(model: Any, dit: DiT) -> Iterator[tuple[Any, Any]]:
    blocks = list(dit.blocks)
    yield from zip(model.pre, blocks, strict=False)
    yield from zip(model.post, blocks[len(blocks) - len(model.post) :], strict=True)
    yield model.head, dit.head


def _mean_time_vector(dit: DiT) -> Tensor:
    """The mean over 1000 timesteps of the vector that stands for one, ``(D,)``."""
    weight = dit.time_embedding.linear1.weight
    return dit.time_embedding(torch.arange(1000, device=weight.device), weight.dtype).mean(dim=0)


def _start_injection(injection: nn.Linear, block: ImplicitBlock) -> None:
    """Make the group's input ``(z + x_pre) / 2``: ``a = gelu(a) - gelu(-a)`` for every a, of the exact GELU or not."""
    eye = torch.eye(injection.in_features, dtype=injection.weight.dtype, device=injection.weight.device)
    injection.weight.copy_(eye)
    injection.bias.zero_()
    half = torch.cat([eye, -eye]) / 2
    block.w1_z.weight.copy_(half)
    block.w1_u.weight.copy_(half)
    block.w1_u.bias.zero_()
    block.w2.weight.copy_(torch.cat([eye, -eye], dim=1))
    block.w2.bias.zero_()
