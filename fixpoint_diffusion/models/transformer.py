"""What DiT and FPDM share: patches with positions, the embeddings of timestep and class, and DiT's initialisation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fixpoint_diffusion.models.blocks import (
    DiTBlock,
    Head,
    ImplicitBlock,
    Modulation,
    PatchEmbedding,
    TimestepEmbedding,
    sincos_positions,
)
from fixpoint_diffusion.models.transformer_config import TransformerConfig


class PatchTransformer(nn.Module):
    """A network on the patches of an image; its subclasses add blocks and a head.

    Args:
        config: The architecture.
        label: Whether there is a table of class vectors. Its last row stands for "no class".
    """

    positions: Tensor

    def __init__(self, config: TransformerConfig, *, label: bool) -> None:
        super().__init__()
        self.config = config
        self._checkpointing = False
        width, patch = config.width, config.patch_size
        self.patch_embedding = PatchEmbedding(config.in_channels, width, patch)
        positions = sincos_positions(config.sample_size // patch, width, config.positions)
        self.register_buffer("positions", positions, persistent=False)
        self.time_embedding = TimestepEmbedding(width, freq_shift=config.freq_shift)
        self.class_embedding = nn.Embedding((config.num_classes or 0) + 1, width) if label else None

    def _blocks(self, count: int, *, conditional: bool) -> nn.ModuleList:
        c = self.config
        return nn.ModuleList(
            DiTBlock(c.width, c.heads, c.mlp_ratio, conditional=conditional, norm_eps=c.norm_eps) for _ in range(count)
        )

    def _head(self, *, conditional: bool) -> Head:
        c = self.config
        return Head(c.width, c.patch_size, c.out_channels, conditional=conditional)

    def enable_gradient_checkpointing(self) -> None:
        """In training, keep the input of each explicit block alone, and run the block again in the backward pass."""
        self._checkpointing = True

    def disable_gradient_checkpointing(self) -> None:
        """Keep what the backward pass needs of every block."""
        self._checkpointing = False

    def compile_repeated_blocks(self, **options: Any) -> None:
        """Compile each block in place, and the map of a fixed point layer as one; ``options`` of ``torch.compile``."""
        for module in self.modules():
            if isinstance(module, DiTBlock | ImplicitBlock):
                module.compile(**options)

    def _through(self, blocks: nn.ModuleList, tokens: Tensor, condition: Tensor | None) -> Tensor:
        again = self._checkpointing and self.training and torch.is_grad_enabled()
        for block in blocks:
            if again:  # blocks draw nothing at random
                tokens = checkpoint(block, tokens, condition, use_reentrant=False, preserve_rng_state=False)
            else:
                tokens = block(tokens, condition)
        return tokens

    def _embed(self, x: Tensor, t: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Tokens ``(N, L, D)``, and the vectors of the timesteps ``(N, D)`` and of the classes, if there are any."""
        if x.ndim != 4 or x.shape[1:] != self.config.sample_shape:
            raise ValueError(f"x must have shape (N, *{self.config.sample_shape}), got {tuple(x.shape)}")
        if t.ndim > 1 or (t.ndim == 1 and t.shape[0] not in (1, x.shape[0])):
            raise ValueError(f"t must be one timestep or one for each of {x.shape[0]} images, got {tuple(t.shape)}")
        label = self._label(x, y)
        tokens = self.patch_embedding(x)
        # The positions stay in float32, and on one device when the parts of a model are spread over several.
        tokens = (tokens + self.positions.to(tokens.device)).to(x.dtype)
        return tokens, self.time_embedding(t.expand(x.shape[0]), x.dtype), label

    def _label(self, x: Tensor, y: Tensor | None) -> Tensor | None:
        classes = self.config.num_classes
        if classes is None and y is not None:
            name = type(self).__name__
            raise ValueError(f"this {name} is unconditional (num_classes is None), but classes y were given")
        if self.class_embedding is None:
            return None
        if y is None:
            y = torch.full((x.shape[0],), classes or 0, device=x.device)
        if y.shape != x.shape[:1]:
            raise ValueError(f"y must hold one class for each of {x.shape[0]} images, got shape {tuple(y.shape)}")
        return self.class_embedding(y).to(x.dtype)

    def _initialise(self) -> None:
        """DiT's: Xavier for linear maps, small normals for embeddings, zero for modulations and the head's output."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(module.weight.flatten(1))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        for module in self.modules():
            if isinstance(module, Modulation):
                module.zero()
            elif isinstance(module, Head):
                nn.init.zeros_(module.linear.weight)
        nn.init.normal_(self.time_embedding.linear1.weight, std=0.02)
        nn.init.normal_(self.time_embedding.linear2.weight, std=0.02)


def condition_of(time: Tensor, label: Tensor | None) -> Tensor:
    """What conditions a block on both: the sum of the vectors of timestep and class."""
    return time if label is None else time + label
