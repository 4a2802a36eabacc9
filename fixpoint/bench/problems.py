"""Three classical test problems."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fixpoint.bench.registry import RegisteredProblem


@dataclass(frozen=True)
class LinearProblem:
    """``f(z) = A z + b`` for each row.

    Args:
        matrix: ``A``, ``(dim, dim)``, shared by the rows.
        offset: ``b``, ``(rows, dim)``.

    Example:
        >>> problem = LinearProblem(torch.tensor([[0.5]]), torch.tensor([[1.0], [3.0]]))
        >>> problem.solution.flatten()
        tensor([2., 6.])
    """

    matrix: Tensor
    offset: Tensor

    @property
    def z0(self) -> Tensor:
        """Zeros, ``(rows, dim)``."""
        return torch.zeros_like(self.offset)

    def __call__(self, z: Tensor, /) -> Tensor:
        return z @ self.matrix.T + self.offset

    @property
    def solution(self) -> Tensor:
        """``(I - A)^-1 b``, solved in float64 for the matrix as rounded."""
        matrix = self.matrix.double()
        system = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device) - matrix
        return torch.linalg.solve(system, self.offset.double().T).T.to(self.offset.dtype)


@dataclass(frozen=True)
class TanhProblem:
    """``f(z) = tanh(W z + x)`` for each row: the smallest deep-equilibrium network.

    Args:
        weight: ``W``, ``(dim, dim)``.
        injection: ``x``, ``(rows, dim)``.

    Example:
        >>> TanhProblem(torch.zeros(2, 2), torch.zeros(1, 2))(torch.ones(1, 2))
        tensor([[0., 0.]])
    """

    weight: Tensor
    injection: Tensor

    @property
    def z0(self) -> Tensor:
        """Zeros, ``(rows, dim)``."""
        return torch.zeros_like(self.injection)

    def __call__(self, z: Tensor, /) -> Tensor:
        return torch.tanh(z @ self.weight.T + self.injection)


def _linear(
    *, rho: float = 0.9, dim: int = 200, rows: int = 4, scale: float = 1.0, seed: int = 0, dtype: str = "float32"
) -> LinearProblem:
    if not 0 < rho < 1:
        raise ValueError(f"rho must lie in (0, 1), found {rho}; try the problem 'expansive' beyond")
    generator = _generator(dim, rows, seed)
    gaussian = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
    symmetric = (gaussian + gaussian.T) / 2
    matrix = symmetric * (rho / torch.linalg.eigvalsh(symmetric).abs().max())
    offset = scale * torch.randn(rows, dim, generator=generator, dtype=torch.float64)
    return LinearProblem(matrix.to(_dtype(dtype)), offset.to(_dtype(dtype)))


def _expansive(
    *, low: float = -3.0, high: float = 0.5, dim: int = 200, rows: int = 4, seed: int = 0, dtype: str = "float32"
) -> LinearProblem:
    if not low <= high < 1:
        raise ValueError(f"expected low <= high < 1, found low={low}, high={high}")
    generator = _generator(dim, rows, seed)
    basis, _ = torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.float64))
    matrix = (basis * torch.linspace(low, high, dim, dtype=torch.float64)) @ basis.T
    offset = torch.randn(rows, dim, generator=generator, dtype=torch.float64)
    return LinearProblem(matrix.to(_dtype(dtype)), offset.to(_dtype(dtype)))


def _tanh(*, gain: float = 0.96, dim: int = 256, rows: int = 4, seed: int = 0, dtype: str = "float32") -> TanhProblem:
    generator = _generator(dim, rows, seed)
    weight = torch.randn(dim, dim, generator=generator, dtype=torch.float64) * (gain / dim**0.5)
    injection = torch.randn(rows, dim, generator=generator, dtype=torch.float64)
    return TanhProblem(weight.to(_dtype(dtype)), injection.to(_dtype(dtype)))


def _generator(dim: int, rows: int, seed: int) -> torch.Generator:
    for name, size in (("dim", dim), ("rows", rows)):
        if size < 1:
            raise ValueError(f"{name} must be at least 1, found {size}")
    return torch.Generator().manual_seed(seed)


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"dtype must name a floating point type of torch such as 'float64', found {name!r}")
    return found


linear = RegisteredProblem(_linear, "symmetric linear map with spectral radius rho, 200-d; a closed-form solution")
tanh = RegisteredProblem(_tanh, "tanh network with Gaussian weights, 256-d: the smallest deep-equilibrium model")
expansive = RegisteredProblem(_expansive, "symmetric linear map with spectrum from -3 to 0.5: plain iteration diverges")

CLASSICAL = (
    "linear",
    "linear:rho=0.99",
    "linear:rho=0.999",
    "tanh",
    "expansive",
    "linear:rho=0.99,scale=1e4",
    "linear:rho=0.99,scale=1e-4",
)
