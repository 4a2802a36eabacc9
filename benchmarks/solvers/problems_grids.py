"""Partial differential equations on the unit square, zero on its border: one damped Jacobi sweep an evaluation."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.solvers.cases import Map, SuiteProblem

_DAMPING = 0.8


def _jacobi(u: Tensor, source: Tensor, wind_x: Tensor | float, wind_y: Tensor | float) -> Tensor:
    """The sweep for ``-laplace(u) + (wind_x, wind_y) . grad(u) = source``, central differences on ``(rows, n, n)``."""
    h = 1 / (u.shape[-1] + 1)
    padded = functional.pad(u, (1, 1, 1, 1))
    west, east = padded[:, 1:-1, :-2], padded[:, 1:-1, 2:]
    south, north = padded[:, :-2, 1:-1], padded[:, 2:, 1:-1]
    transport = wind_x * (west - east) + wind_y * (south - north)
    return (west + east + south + north + h / 2 * transport + h * h * source) / 4


def _damped(side: int, dtype: torch.dtype, sweep: Callable[[Tensor], Tensor]) -> tuple[Map, Tensor]:
    """The sweep on flat rows, taken by ``_DAMPING``, from zero."""

    def f(z: Tensor) -> Tensor:
        u = z.view(-1, side, side)
        return torch.lerp(u, sweep(u), _DAMPING).flatten(1)

    return f, torch.zeros(1, side * side, dtype=dtype)


def _poisson(_: torch.Generator, dtype: torch.dtype) -> tuple[Map, Tensor]:
    return _damped(23, dtype, lambda u: _jacobi(u, torch.ones_like(u), 0, 0))


def _bratu(_: torch.Generator, dtype: torch.dtype) -> tuple[Map, Tensor]:
    return _damped(23, dtype, lambda u: _jacobi(u, 6 * torch.exp(u), 0, 0))


def _convection(_: torch.Generator, dtype: torch.dtype) -> tuple[Map, Tensor]:
    return _damped(31, dtype, lambda u: _jacobi(u, torch.ones_like(u), 40, 20))


def kelley_solution(side: int) -> Tensor:
    """``10 x y (1 - x) (1 - y) exp(x^4.5)`` on the inner points, ``(side, side)``: solves the problem below."""
    axis = torch.arange(1, side + 1, dtype=torch.float64) / (side + 1)
    x, y = axis, axis[:, None]
    return 10 * x * y * (1 - x) * (1 - y) * torch.exp(x**4.5)


def _nonlinear_convection(_: torch.Generator, dtype: torch.dtype) -> tuple[Map, Tensor]:
    """``-laplace(u) + 20 u (u_x + u_y) = source``, the source such that the solution is known on the grid itself."""
    side = 31
    known = kelley_solution(side)[None]
    without = _jacobi(known, torch.zeros_like(known), 20 * known, 20 * known)
    source = (4 * (side + 1) ** 2 * (known - without)).to(dtype)
    return _damped(side, dtype, lambda u: _jacobi(u, source, 20 * u, 20 * u))


PROBLEMS = (
    SuiteProblem(
        name="poisson",
        make=_poisson,
        source="-laplace(u) = 1, 23x23: Saad, Iterative Methods for Sparse Linear Systems, 2003, ch. 2 and 4",
        max_evals=500,
        affine=True,
        seeded=False,
    ),
    SuiteProblem(
        name="bratu",
        make=_bratu,
        source="-laplace(u) = 6 exp(u), 23x23: solid fuel ignition in the MINPACK-2 collection, Averick et al., 1992",
        max_evals=500,
        seeded=False,
    ),
    SuiteProblem(
        name="convection-diffusion",
        make=_convection,
        source="-laplace(u) + (40, 20) . grad(u) = 1, 31x31: Saad 2003, ch. 2",
        max_evals=500,
        affine=True,
        seeded=False,
    ),
    SuiteProblem(
        name="nonlinear-convection",
        make=_nonlinear_convection,
        source="-laplace(u) + 20 u (u_x + u_y) = s, 31x31: Kelley, Iterative Methods, 1995, ch. 6",
        max_evals=500,
        seeded=False,
    ),
)
