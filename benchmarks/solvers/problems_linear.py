"""Affine maps ``f(z) = A z + b``: symmetric, not symmetric, far from normal, expansive, and scaled."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from benchmarks.solvers.cases import Map, SuiteProblem, normal, spectral_radius


def affine(matrix: Tensor, offset: Tensor, dtype: torch.dtype) -> tuple[Map, Tensor]:
    """``z -> z A^T + b`` on rows, started at zero."""
    transposed, shift = matrix.T.to(dtype).contiguous(), offset.to(dtype)[None]

    def f(z: Tensor) -> Tensor:
        return z @ transposed + shift

    return f, torch.zeros_like(shift)


def _symmetric(
    generator: torch.Generator, dtype: torch.dtype, *, rho: float, scale: float = 1.0, dim: int = 200
) -> tuple[Map, Tensor]:
    gaussian = normal(generator, dim, dim)
    matrix = gaussian + gaussian.T
    return affine(matrix * (rho / spectral_radius(matrix)), scale * normal(generator, dim), dtype)


def _nonsymmetric(generator: torch.Generator, dtype: torch.dtype, *, rho: float) -> tuple[Map, Tensor]:
    matrix = normal(generator, 200, 200)
    return affine(matrix * (rho / spectral_radius(matrix)), normal(generator, 200), dtype)


def _nonnormal(generator: torch.Generator, dtype: torch.dtype) -> tuple[Map, Tensor]:
    dim = 100
    basis, _ = torch.linalg.qr(normal(generator, dim, dim))
    triangular = normal(generator, dim, dim).triu(1) * (2 / dim**0.5) + torch.linspace(-0.8, 0.8, dim).double().diag()
    return affine(basis @ triangular @ basis.T, normal(generator, dim), dtype)


def _rotation(generator: torch.Generator, dtype: torch.dtype) -> tuple[Map, Tensor]:
    basis, _ = torch.linalg.qr(normal(generator, 200, 200))
    return affine(0.9 * basis, normal(generator, 200), dtype)


def _expansive(generator: torch.Generator, dtype: torch.dtype) -> tuple[Map, Tensor]:
    basis, _ = torch.linalg.qr(normal(generator, 200, 200))
    matrix = (basis * torch.linspace(-3, 0.5, 200, dtype=torch.float64)) @ basis.T
    return affine(matrix, normal(generator, 200), dtype)


_SEMICIRCLE = "Gaussian symmetric matrix (semicircle law: Wigner, Ann. Math. 67, 1958) scaled to its spectral radius"
_CIRCULAR = "Gaussian matrix (circular law: Ginibre, J. Math. Phys. 6, 1965) scaled to its spectral radius"

_Affine = partial(SuiteProblem, affine=True)

PROBLEMS = (
    _Affine(name="linear-symmetric-0.9", make=partial(_symmetric, rho=0.9), source=_SEMICIRCLE),
    _Affine(name="linear-symmetric-0.99", make=partial(_symmetric, rho=0.99), source=_SEMICIRCLE),
    _Affine(name="linear-symmetric-0.999", make=partial(_symmetric, rho=0.999), source=_SEMICIRCLE),
    _Affine(
        name="linear-scaled-1e4", make=partial(_symmetric, rho=0.99, scale=1e4), source=_SEMICIRCLE + ", b times 1e4"
    ),
    _Affine(
        name="linear-scaled-1e-4", make=partial(_symmetric, rho=0.99, scale=1e-4), source=_SEMICIRCLE + ", b times 1e-4"
    ),
    _Affine(name="linear-nonsymmetric-0.95", make=partial(_nonsymmetric, rho=0.95), source=_CIRCULAR),
    _Affine(name="linear-nonsymmetric-0.99", make=partial(_nonsymmetric, rho=0.99), source=_CIRCULAR),
    _Affine(
        name="linear-nonnormal",
        make=_nonnormal,
        source="eigenvalues in [-0.8, 0.8] under a large triangle: Trefethen & Embree, Spectra and Pseudospectra, 2005",
    ),
    _Affine(
        name="linear-rotation",
        make=_rotation,
        source="0.9 times a random orthogonal matrix: little to gain; Nachtigal et al., SIMAX 13, 1992",
    ),
    _Affine(
        name="linear-expansive",
        make=_expansive,
        source="spectrum evenly spread over [-3, 0.5], as of an explicit scheme with too long a step; Picard diverges",
    ),
)
