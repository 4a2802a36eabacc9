"""Transformer parts of DiT and FPDM: embeddings, the block with adaLN-Zero, the fixed point map and the head.

Tokens are ``(N, L, D)``: N images, L patches, width D. A modulation is ``(N, k*D)``, or ``(1, k*D)`` when nothing
conditions it.

A parameter is used in the forward of the module that owns it, and nowhere else: hooks that load, cast or unpack weights
(offloading, layerwise casting, quantisation) act there.

Sources: Peebles and Xie, "Scalable Diffusion Models with Transformers", ICCV 2023 (block, head, initialisation);
Bai and Melas-Kyriazi, "Fixed Point Diffusion Models", CVPR 2024, Sec. 3.2 (implicit block).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm, scaled_dot_product_attention, silu

from fixpoint_diffusion.models.transformer_config import PositionOrder


def sincos_positions(side: int, width: int, order: PositionOrder = "column-row") -> Tensor:
    """Fixed 2-D positions ``(side*side, width)``: sines and cosines of one coordinate, then of the other.

    ``"column-row"`` is DiT's order.
    """
    if torch.get_default_device().type == "meta":  # `arange` there imports a compiler, for seconds
        return torch.empty(side * side, width)
    frequencies = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * frequencies
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)
    rows = axis[:, None].expand(side, side, -1)
    columns = axis[None, :].expand(side, side, -1)
    both = [columns, rows] if order == "column-row" else [rows, columns]
    return torch.cat(both, dim=-1).reshape(side * side, width).float()


def timestep_features(t: Tensor, features: int = 256, max_period: float = 10000.0, *, freq_shift: int = 0) -> Tensor:
    """Sinusoidal features ``(N, features)`` of the timesteps ``t`` ``(N,)``: cosines, then sines.

    ``freq_shift`` as in :class:`~fixpoint_diffusion.models.TransformerConfig`.
    """
    half = features // 2
    # In this order the rounding of float32 is that of DiT's own code and of diffusers.
    exponents = -math.log(max_period) * torch.arange(half, dtype=torch.float32, device=t.device)
    frequencies = torch.exp(exponents / (half - freq_shift))
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class PatchEmbedding(nn.Conv2d):
    """Images ``(N, C, H, W)`` to tokens ``(N, L, D)``, one for each patch.

    It computes in the dtype of its own weights, which layerwise casting leaves as they are, and returns that of x.
    """

    def __init__(self, channels: int, width: int, patch_size: int) -> None:
        super().__init__(channels, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype)).to(x.dtype).flatten(2).transpose(1, 2)


class TimestepEmbedding(nn.Module):
    """Timesteps ``(N,)`` to conditioning vectors ``(N, D)``: 256 sinusoidal features through a small MLP."""

    def __init__(self, width: int, features: int = 256, *, freq_shift: int = 0) -> None:
        super().__init__()
        self.features, self.freq_shift = features, freq_shift
        self.linear1 = nn.Linear(features, width)
        self.linear2 = nn.Linear(width, width)

    def forward(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        """``dtype`` is the one that the network computes in."""
        features = timestep_features(t, self.features, freq_shift=self.freq_shift)
        return self.linear2(silu(self.linear1(features.to(dtype))))


class Modulation(nn.Module):
    """adaLN: the ``parts`` shift, scale and gate vectors of a block, zero at first (adaLN-Zero).

    Without conditioning a linear map of nothing is its bias, so a bias is all there is.
    """

    def __init__(self, width: int, parts: int, *, conditional: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(width, parts * width) if conditional else None
        self.bias = None if conditional else nn.Parameter(torch.zeros(parts * width))
        self.zero()

    def zero(self) -> None:
        """Make the modulation zero for every conditioning, and so the block the identity."""
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, condition: Tensor | None) -> Tensor:
        if self.linear is None:
            assert self.bias is not None
            return self.bias[None]
        if condition is None:
            raise ValueError("this block is conditional, but no conditioning was given")
        return self.linear(silu(condition))


def _modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    normalised = layer_norm(x, x.shape[-1:], eps=eps)
    return normalised * (1 + scale[:, None]) + shift[:, None]


class Attention(nn.Module):
    """Multi-head self-attention over the tokens of one image."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, width = x.shape
        q, k, v = self.qkv(x).reshape(n, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = scaled_dot_product_attention(q, k, v)
        return self.out(attended.transpose(1, 2).reshape(n, tokens, width))


class DiTBlock(nn.Module):
    """Attention and MLP, each after a modulated layer norm, each added through a gate.

    The modulation can be computed apart (:attr:`modulation`, :meth:`transform`), once for many calls. ``norm_eps`` is
    that of the norm before the MLP.
    """

    def __init__(self, width: int, heads: int, mlp_ratio: float, *, conditional: bool, norm_eps: float = 1e-6) -> None:
        super().__init__()
        self.norm_eps = norm_eps
        hidden = int(width * mlp_ratio)
        self.attention = Attention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, width))
        self.modulation = Modulation(width, 6, conditional=conditional)

    def forward(self, x: Tensor, condition: Tensor | None) -> Tensor:
        """Tokens ``(N, L, D)`` and conditioning ``(N, D)``, None without any, to new tokens ``(N, L, D)``."""
        return self.transform(x, self.modulation(condition))

    def transform(self, x: Tensor, modulation: Tensor) -> Tensor:
        """``x`` ``(N, L, D)`` and its modulation ``(N or 1, 6D)`` to new tokens ``(N, L, D)``."""
        # Without conditioning the modulation is a parameter, and may be kept in a wider dtype than x.
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation.to(x.dtype).chunk(6, dim=1)
        x = x + gate_a[:, None] * self.attention(_modulate(x, shift_a, scale_a))
        return x + gate_m[:, None] * self.mlp(_modulate(x, shift_m, scale_m, self.norm_eps))


class ImplicitBlock(nn.Module):
    """The fixed point map ``f(z) = B(W2 gelu(W1 [z; u]), c)`` with ``W1: 2D -> 2D`` and ``W2: 2D -> D``.

    B is one :class:`DiTBlock`, or a group of them, one after the other. With a gate, the map is ``z + g (f(z) - z)``:
    it has the same fixed points, and goes only a part ``g`` of the way to ``f(z)``.

    ``W1 [z; u] = Wz z + Wu u``, and neither ``Wu u`` nor the modulations depend on z. :meth:`prepare` computes them
    once; :meth:`forward` takes them as inputs and costs what depends on z alone. ``w1_z`` and ``w1_u`` hold the two
    halves of W1.

    Args:
        width: D.
        blocks: The blocks of B, which are conditional.
        gelu: ``"exact"``, or ``"tanh"`` for its approximation.
        gate_cap: The largest g; it is learned for each of the D features, from half of this on. None: no gate.
    """

    def __init__(
        self, width: int, blocks: nn.ModuleList, *, gelu: str = "exact", gate_cap: float | None = None
    ) -> None:
        super().__init__()
        self.w1_z = nn.Linear(width, 2 * width, bias=False)
        self.w1_u = nn.Linear(width, 2 * width)
        self.w2 = nn.Linear(2 * width, width)
        self.blocks = blocks
        self.approximate = "tanh" if gelu == "tanh" else "none"
        self.gate_cap = gate_cap
        self.gate = None if gate_cap is None else nn.Parameter(torch.zeros(width))

    def prepare(self, u: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        """Injection ``u`` ``(N, L, D)`` and conditioning ``(N, D)`` to ``Wu u + b`` and modulations ``(N, k*6D)``."""
        return self.w1_u(u), torch.cat([block.modulation(condition) for block in self._group], dim=1)

    def forward(self, z: Tensor, projected: Tensor, modulation: Tensor) -> Tensor:
        """One application of f to ``z`` ``(N, L, D)``, given what :meth:`prepare` returned."""
        image = self.w2(gelu(self.w1_z(z) + projected, approximate=self.approximate))
        for block, part in zip(self._group, modulation.chunk(len(self._group), dim=1), strict=True):
            image = block.transform(image, part)
        if self.gate is None:
            return image
        assert self.gate_cap is not None
        return z + (self.gate_cap * self.gate.sigmoid()).to(z.dtype) * (image - z)

    @property
    def _group(self) -> Sequence[DiTBlock]:
        return cast("Sequence[DiTBlock]", self.blocks)

    @torch.no_grad()
    def initialise_w1(self) -> None:
        """Xavier's values for W1 as a whole, on whose size their range depends."""
        if self.w1_z.weight.is_meta:
            return
        whole = nn.init.xavier_uniform_(torch.cat([self.w1_z.weight, self.w1_u.weight], dim=1))
        for half, values in zip((self.w1_z, self.w1_u), whole.chunk(2, dim=1), strict=True):
            half.weight.copy_(values)
        nn.init.zeros_(self.w1_u.bias)


class Head(nn.Module):
    """Modulated layer norm and a linear map of each token to its patch: ``(N, L, D)`` to ``(N, C, H, W)``."""

    def __init__(self, width: int, patch_size: int, out_channels: int, *, conditional: bool) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.modulation = Modulation(width, 2, conditional=conditional)
        self.linear = nn.Linear(width, patch_size * patch_size * out_channels)

    def forward(self, x: Tensor, condition: Tensor | None) -> Tensor:
        shift, scale = self.modulation(condition).to(x.dtype).chunk(2, dim=1)
        patches = self.linear(_modulate(x, shift, scale))
        n, tokens, _ = patches.shape
        side, p = math.isqrt(tokens), self.patch_size
        grid = patches.reshape(n, side, side, p, p, -1)
        return grid.permute(0, 5, 1, 3, 2, 4).reshape(n, -1, side * p, side * p)
