"""Three deep-equilibrium cells whose Jacobian at the fixed point is scaled to a given spectral radius."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

import fixpoint

RADII = (0.5, 0.9, 0.99)
_POWER_STEPS = 400
_RADIUS_WITHIN = 1e-3


class Cell(nn.Module):
    """``f(z, x)``; ``gain`` multiplies what depends on z. Weights are drawn in float64."""

    shape: tuple[int, ...]

    def __init__(self) -> None:
        super().__init__()
        self.gain = 0.25

    def draw(self, generator: torch.Generator, *size: int, fan_in: int) -> nn.Parameter:
        """Normal weights whose rows have norm 1, about."""
        return nn.Parameter(torch.randn(*size, generator=generator, dtype=torch.float64) / fan_in**0.5)


class Tanh(Cell):
    """``tanh(gain W z + x)``: S. Bai, J. Z. Kolter, V. Koltun, NeurIPS 2019."""

    shape = (256,)

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.weight = self.draw(generator, 256, 256, fan_in=256)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.gain * (z @ self.weight.T) + x)


class Convolution(Cell):
    """Two convolutions with group normalisation, after S. Bai, V. Koltun, J. Z. Kolter, NeurIPS 2020."""

    shape = (8, 8, 8)

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        channels = self.shape[0]
        self.first, self.second = (self.draw(generator, channels, channels, 3, 3, fan_in=9 * channels) for _ in "12")

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        inner = functional.group_norm(functional.gelu(functional.conv2d(z, self.first, padding=1)), 2)
        outer = functional.conv2d(inner, self.second, padding=1)
        return functional.group_norm(functional.gelu(x + self.gain * outer), 2)


class Transformer(Cell):
    """Attention and a hidden layer, normalised after each: S. Bai, J. Z. Kolter, V. Koltun, NeurIPS 2019."""

    shape = (16, 32)
    heads = 4

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        width = self.shape[1]
        self.qkv = self.draw(generator, 3 * width, width, fan_in=width)
        self.mix = self.draw(generator, width, width, fan_in=width)
        self.up = self.draw(generator, 4 * width, width, fan_in=width)
        self.down = self.draw(generator, width, 4 * width, fan_in=4 * width)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        rows, tokens, width = z.shape
        q, k, v = (z @ self.qkv.T).view(rows, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attention = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(z.shape)
        hidden = functional.layer_norm(x + self.gain * (attention @ self.mix.T), (width,))
        inner = functional.gelu(hidden @ self.up.T) @ self.down.T
        return functional.layer_norm(hidden + self.gain * inner, (width,))


CELLS: dict[str, Callable[[torch.Generator], Cell]] = {
    "tanh": Tanh,
    "convolution": Convolution,
    "transformer": Transformer,
}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A cell at a spectral radius: ``f(z, x)`` with rows ``(rows, *shape)``; the loss is ``(value * target).sum()``.

    ``radius`` is what ``fixpoint.spectral_radius`` measured at the fixed point, the largest of the rows.
    """

    name: str
    radius: float
    cell: Cell
    x: Tensor
    target: Tensor

    def cast(self, dtype: torch.dtype) -> Setting:
        """The same in another precision."""
        cell = copy.deepcopy(self.cell).to(dtype)
        return Setting(name=self.name, radius=self.radius, cell=cell, x=self.x.to(dtype), target=self.target.to(dtype))


def setting(name: str, radius: float, *, rows: int = 8, seed: int = 0) -> Setting:
    """The named cell in float64 with the gain that gives its Jacobian the spectral radius."""
    generator = torch.Generator().manual_seed(seed)
    cell = CELLS[name](generator)
    x, target = torch.randn(2, rows, *cell.shape, generator=generator, dtype=torch.float64)

    while abs((found := measured_radius(cell, x)) - radius) > _RADIUS_WITHIN:
        cell.gain *= radius / found  # the radius grows a little slower than the gain, so this comes from below
    return Setting(name=name, radius=found, cell=cell, x=x, target=target)


def measured_radius(cell: Cell, x: Tensor) -> float:
    """Largest spectral radius over the rows, at the fixed point."""
    options = {"solver": fixpoint.Anderson(memory=20), "rtol": 1e-8, "max_evals": 1000, "backward": None}
    z = fixpoint.solve(cell, torch.zeros_like(x), (x,), **options).value
    generator = torch.Generator().manual_seed(0)
    return float(fixpoint.spectral_radius(cell, z, (x,), steps=_POWER_STEPS, generator=generator).max())
