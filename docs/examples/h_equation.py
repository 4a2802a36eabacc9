"""Chandrasekhar's H-equation: three solvers, SciPy beside them, and a known integral as the judge.

Run it as ``python docs/examples/h_equation.py``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.optimize
import torch
from torch import Tensor

import fixpoint

ALBEDOS = (0.5, 0.9, 0.99, 0.999)
SOLVERS = {
    "Picard": fixpoint.Picard(),
    "Anderson": fixpoint.Anderson(),
    "Anderson, damped": fixpoint.Anderson(damping=0.5),
    "Broyden": fixpoint.Broyden(),
}


@dataclass(frozen=True, eq=False)
class HEquation:
    """``H(mu) = 1 / (1 - c/2 * integral_0^1 mu H(nu) / (mu + nu) dnu)`` at Gauss-Legendre nodes.

    One row for each ``c`` in ``albedo`` ``(rows,)``, each below 1. ``fixpoint.solve`` takes it as it is.
    """

    albedo: Tensor
    nodes: int = 64

    def __post_init__(self) -> None:
        points, weights = np.polynomial.legendre.leggauss(self.nodes)
        mu = torch.tensor((points + 1) / 2, dtype=self.albedo.dtype)
        weight = torch.tensor(weights / 2, dtype=self.albedo.dtype)
        object.__setattr__(self, "weight", weight)
        object.__setattr__(self, "kernel", mu[:, None] / (mu[:, None] + mu) * weight)

    @property
    def z0(self) -> Tensor:
        return torch.ones(len(self.albedo), self.nodes, dtype=self.albedo.dtype)

    def __call__(self, h: Tensor) -> Tensor:
        return 1 / (1 - self.albedo[:, None] / 2 * (h @ self.kernel.T))

    def mean(self, h: Tensor) -> Tensor:
        """The integral of H over [0, 1], one per row."""
        return h @ self.weight


def exact_mean(albedo: Tensor, sign: int = -1) -> Tensor:
    """``2 (1 - sqrt(1 - c)) / c``: exact for the integral, and for any quadrature whose weights sum to 1.

    ``sign=1`` gives that of the equation's second solution, which is not the physical one.
    """
    return 2 * (1 + sign * torch.sqrt(1 - albedo)) / albedo


def scipy_solution(problem: HEquation, row: int, method: str, rtol: float) -> tuple[np.ndarray, int]:
    """One row by ``scipy.optimize.root``, and how often it evaluated f."""
    single = HEquation(problem.albedo[row : row + 1], problem.nodes)
    calls = 0

    def g(h: np.ndarray) -> np.ndarray:
        nonlocal calls
        calls += 1
        z = torch.from_numpy(h)[None]
        return (single(z) - z)[0].numpy()

    start = single.z0[0].numpy()
    size = float(torch.linalg.vector_norm(fixpoint.solve(single, solver=fixpoint.Picard(), max_evals=1000).value))
    limits = {"maxiter": 500, "fatol": rtol * size, "tol_norm": np.linalg.norm}
    return scipy.optimize.root(g, start, method=method, options=limits).x, calls


def cell(evals: int, mean: Tensor, albedo: Tensor) -> str:
    """Evaluations, and the error of the integral; a star says that it is the second solution's."""
    errors = {sign: float((mean - exact_mean(albedo, sign)).abs()) for sign in (-1, 1)}
    nearest = min(errors, key=errors.__getitem__)
    return f"{evals} ({errors[nearest]:.0e}{'*' if nearest == 1 else ''})"


def main() -> None:
    """Print evaluations and errors, SciPy's beside ours, then the derivative of the integral by c."""
    albedo = torch.tensor(ALBEDOS, dtype=torch.float64)
    problem = HEquation(albedo)
    print("evaluations of f to a relative residual of 1e-8, and the error of the integral (*: second solution)")
    print(f"{'solver':18}" + "".join(f"{f'c = {c}':>16}" for c in ALBEDOS))
    for name, solver in SOLVERS.items():
        solution = fixpoint.solve(problem, solver=solver, rtol=1e-8, max_evals=1000)
        row = zip(solution.evals.tolist(), problem.mean(solution.value), albedo, strict=True)
        print(f"{name:18}" + "".join(f"{cell(*figures):>16}" for figures in row))
    for method in ("anderson", "broyden1", "krylov"):
        solved = [scipy_solution(problem, row, method, rtol=1e-8) for row in range(len(albedo))]
        cells = [cell(n, torch.from_numpy(h) @ problem.weight, c) for (h, n), c in zip(solved, albedo, strict=True)]
        print(f"{'SciPy ' + method:18}" + "".join(f"{text:>16}" for text in cells))
    slope, exact = slopes(albedo)
    print(f"\n{'d(integral)/dc':18}" + "".join(f"{value:16.6f}" for value in slope))
    print(f"{'closed form':18}" + "".join(f"{value:16.6f}" for value in exact))


def slopes(albedo: Tensor) -> tuple[Tensor, Tensor]:
    """The derivative of the integral by c: through the solution by IFT, and in closed form."""
    albedo = albedo.clone().requires_grad_()
    problem = HEquation(albedo)
    rule = fixpoint.IFT(rtol=1e-10)
    solution = fixpoint.solve(problem, solver=fixpoint.Broyden(), backward=rule, rtol=1e-10, max_evals=1000)
    (slope,) = torch.autograd.grad(problem.mean(solution.value).sum(), albedo)
    (exact,) = torch.autograd.grad(exact_mean(albedo).sum(), albedo)
    return slope, exact


if __name__ == "__main__":
    main()
