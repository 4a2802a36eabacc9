"""Deep-equilibrium cells with random weights: tanh, gated, monotone, convolution, a transformer."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.solvers.cases import Map, SuiteProblem, normal, spectral_radius


def _tanh(generator: torch.Generator, dtype: torch.dtype) -> tuple[Map, Tensor]:
    weight = (normal(generator, 256, 256) * (0.96 / 16)).to(dtype)
    injection = normal(generator, 1, 256).to(dtype)
    return (lambda z: torch.tanh(z @ weight.T + injection)), torch.zeros_like(injection)


def _tanh_edge(generator: torch.Generator, dtype: torch.dtype) -> tuple[Map, Tensor]:
    gaussian = normal(generator, 256, 256)
    symmetric = gaussian + gaussian.T
    weight = (symmetric / spectral_radius(symmetric)).to(dtype)
    injection = 0.3 * normal(generator, 1, 256).to(dtype)
    return (lambda z: torch.tanh(z @ weight.T + injection)), torch.zeros_like(injection)


def _gated(generator: torch.Generator, dtype: torch.dtype) -> tuple[Map, Tensor]:
    dim = 200
    update, reset, candidate = (normal(generator, dim, dim).to(dtype) / dim**0.5 for _ in range(3))
    injections = normal(generator, 3, 1, dim).to(dtype)

    def f(z: Tensor) -> Tensor:
        u = torch.sigmoid(z @ update.T + injections[0])
        r = torch.sigmoid(z @ reset.T + injections[1])
        return (1 - u) * z + u * torch.tanh((r * z) @ candidate.T + injections[2])

    return f, torch.zeros(1, dim, dtype=dtype)


def _monotone(generator: torch.Generator, dtype: torch.dtype) -> tuple[Map, Tensor]:
    dim, margin, step = 200, 0.1, 0.15
    a, b = normal(generator, 2, dim, dim) / dim**0.5
    weight = ((1 - margin) * torch.eye(dim, dtype=torch.float64) - a.T @ a + b - b.T).to(dtype)
    injection = normal(generator, 1, dim).to(dtype)

    def f(z: Tensor) -> Tensor:
        return torch.relu((1 - step) * z + step * (z @ weight.T + injection))

    return f, torch.zeros_like(injection)


def _convolutional(generator: torch.Generator, dtype: torch.dtype) -> tuple[Map, Tensor]:
    channels, side = 8, 10
    first, second = normal(generator, 2, channels, channels, 3, 3).to(dtype) / (9 * channels) ** 0.5
    injection = normal(generator, 1, channels, side, side).to(dtype)

    def normalise(x: Tensor) -> Tensor:
        return functional.group_norm(x, 2)

    def f(z: Tensor) -> Tensor:
        x = z.view(-1, channels, side, side)
        inner = normalise(torch.relu(functional.conv2d(x, first, padding=1)))
        outer = normalise(injection + 0.7 * functional.conv2d(inner, second, padding=1))
        return normalise(torch.relu(0.5 * x + outer)).flatten(1)

    return f, torch.zeros(1, channels * side * side, dtype=dtype)


def _transformer(generator: torch.Generator, dtype: torch.dtype) -> tuple[Map, Tensor]:
    tokens, width, heads = 16, 32, 4
    qkv = (normal(generator, 3 * width, width) / width**0.5).to(dtype)
    mix = (0.7 * normal(generator, width, width) / width**0.5).to(dtype)
    up = (normal(generator, 4 * width, width) / width**0.5).to(dtype)
    down = (0.5 * normal(generator, width, 4 * width) / (4 * width) ** 0.5).to(dtype)
    injection = normal(generator, 1, tokens, width).to(dtype)

    def normalise(x: Tensor) -> Tensor:
        return functional.layer_norm(x, (width,))

    def f(z: Tensor) -> Tensor:
        x = z.view(-1, tokens, width)
        q, k, v = (x @ qkv.T).view(-1, tokens, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
        attention = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape_as(x)
        hidden = normalise(0.5 * x + attention @ mix.T + injection)
        return normalise(hidden + torch.relu(hidden @ up.T) @ down.T).flatten(1)

    return f, torch.zeros(1, tokens * width, dtype=dtype)


PROBLEMS = (
    SuiteProblem(name="deq-tanh", make=_tanh, source="tanh cell: Bai, Kolter & Koltun, NeurIPS 2019"),
    SuiteProblem(
        name="deq-tanh-edge",
        make=_tanh_edge,
        source="tanh cell with symmetric weights of norm 1, the edge of contraction: El Ghaoui et al., SIMODS 3, 2021",
    ),
    SuiteProblem(name="deq-gated", make=_gated, source="gated recurrent unit at rest: Cho et al., EMNLP 2014"),
    SuiteProblem(
        name="deq-monotone",
        make=_monotone,
        source="monotone operator network by forward-backward splitting: Winston & Kolter, NeurIPS 2020",
    ),
    SuiteProblem(
        name="deq-convolution",
        make=_convolutional,
        source="residual block with group normalisation: Bai, Koltun & Kolter, NeurIPS 2020",
    ),
    SuiteProblem(
        name="deq-transformer",
        make=_transformer,
        source="weight-tied transformer block: Bai, Kolter & Koltun, NeurIPS 2019; layer norm after each half",
    ),
)
