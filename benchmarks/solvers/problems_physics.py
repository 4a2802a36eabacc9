"""Radiative transfer, a self-consistent field, and chains in time written as one fixed point."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from benchmarks.solvers.cases import Map, SuiteProblem, normal


def _h_equation(_: torch.Generator, dtype: torch.dtype, *, albedo: float) -> tuple[Map, Tensor]:
    nodes = 200
    mu = (torch.arange(nodes, dtype=torch.float64) + 0.5) / nodes
    kernel = (albedo / (2 * nodes) * mu[:, None] / (mu[:, None] + mu)).T.to(dtype).contiguous()
    return (lambda z: 1 / (1 - z @ kernel)), torch.ones(1, nodes, dtype=dtype)


def _self_consistent_field(_: torch.Generator, dtype: torch.dtype) -> tuple[Map, Tensor]:
    points, orbitals, half_width = 60, 2, 10.0
    x = torch.linspace(-half_width, half_width, points, dtype=torch.float64)
    h = float(x[1] - x[0])
    kinetic = torch.diag(torch.full((points,), 1 / h**2, dtype=torch.float64))
    kinetic -= 0.5 / h**2 * (torch.ones(points - 1).double().diag(1) + torch.ones(points - 1).double().diag(-1))
    bare = (kinetic + torch.diag(0.02 * x**2)).to(dtype)
    repulsion = (2 * h / (1 + (x[:, None] - x) ** 2).sqrt()).to(dtype)

    def f(z: Tensor) -> Tensor:
        """Density of the lowest orbitals, each filled twice, in the field of the density ``z``."""
        if not torch.isfinite(z).all():  # eigh refuses them
            return torch.full_like(z, torch.nan)
        orbital = torch.linalg.eigh(bare + torch.diag_embed(z @ repulsion)).eigenvectors[..., :orbitals]
        return 2 / h * orbital.square().sum(dim=-1)

    return f, torch.full((1, points), 2 * orbitals / (2 * half_width), dtype=dtype)


def _cumulative(start: Tensor, increments: Tensor) -> Tensor:
    """``start + cumsum(increments)`` over steps, flattened: ``(rows, steps, dim)`` to ``(rows, steps * dim)``."""
    return (start + increments.cumsum(dim=1)).flatten(1)


def _network_chain(generator: torch.Generator, dtype: torch.dtype) -> tuple[Map, Tensor]:
    steps, dim, h = 50, 10, 0.1
    weight = (1.5 * normal(generator, dim, dim) / dim**0.5).to(dtype)
    start = normal(generator, 1, 1, dim).to(dtype)

    def f(z: Tensor) -> Tensor:
        before = torch.cat([start.expand(len(z), 1, dim), z.view(-1, steps, dim)[:, :-1]], dim=1)
        return _cumulative(start, h * (torch.tanh(before) @ weight.T - before))

    return f, start.expand(1, steps, dim).flatten(1)


def _ddim_chain(generator: torch.Generator, dtype: torch.dtype) -> tuple[Map, Tensor]:
    steps, dim = 50, 16
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    kept = torch.cat([torch.ones(1, dtype=torch.float64), (1 - beta).cumprod(0)])[
        torch.linspace(1000, 0, steps + 1).long()
    ]
    sigma = ((1 - kept) / kept).sqrt()  # noise in the variable x / sqrt(alpha_bar)
    variance = torch.logspace(0, -2, dim, dtype=torch.float64)
    slope = (sigma[:-1, None] / (variance + sigma[:-1, None] ** 2)).to(dtype)  # of the exact noise prediction
    change = sigma.diff()[:, None].to(dtype)
    start = (normal(generator, 1, 1, dim) * (1 + sigma[0] ** 2).sqrt()).to(dtype)

    def f(z: Tensor) -> Tensor:
        before = torch.cat([start.expand(len(z), 1, dim), z.view(-1, steps, dim)[:, :-1]], dim=1)
        return _cumulative(start, change * slope * before)

    return f, start.expand(1, steps, dim).flatten(1)


PROBLEMS = (
    SuiteProblem(
        name="h-equation-0.9",
        make=partial(_h_equation, albedo=0.9),
        source="Chandrasekhar, Radiative Transfer, 1960; Kelley, Iterative Methods, 1995, ch. 5",
        seeded=False,
    ),
    SuiteProblem(
        name="h-equation-0.999",
        make=partial(_h_equation, albedo=0.999),
        source="Chandrasekhar 1960; Kelley 1995, ch. 5; nearly singular, with a second root close by",
        seeded=False,
    ),
    SuiteProblem(
        name="self-consistent-field",
        make=_self_consistent_field,
        source="four electrons in a well, soft Coulomb repulsion: Hartree 1928; Yang, Meza, Lee & Wang, TOMS 36, 2009",
        seeded=False,
    ),
    SuiteProblem(
        name="chain-network",
        make=_network_chain,
        source="50 Euler steps of a recurrent network at once: Lim et al. (DEER), ICLR 2024; waveform relaxation",
    ),
    SuiteProblem(
        name="chain-ddim",
        make=_ddim_chain,
        source="50 DDIM steps at once for Gaussian data: Pokle, Geng & Kolter, NeurIPS 2022; Song et al., ICLR 2021",
        affine=True,
    ),
)
