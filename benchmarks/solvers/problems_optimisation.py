"""First-order methods as fixed-point maps: gradient, proximal, projected, splitting and consensus steps."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.solvers.cases import Map, SuiteProblem, normal


def _least_squares(generator: torch.Generator, rows: int, dim: int, *, spread: float) -> tuple[Tensor, Tensor, float]:
    """A Gaussian matrix whose columns' sizes span ``spread``, noisy data of a sparse vector, and a step ``1/L``."""
    matrix = normal(generator, rows, dim) / rows**0.5 * torch.logspace(0, -1, dim, base=spread, dtype=torch.float64)
    sparse = normal(generator, dim) * (torch.rand(dim, generator=generator) < 0.1)
    data = matrix @ sparse + 0.01 * normal(generator, rows)
    return matrix, data, float(1 / torch.linalg.matrix_norm(matrix, 2) ** 2)


def _gradient_step(matrix: Tensor, data: Tensor, step: float, dtype: torch.dtype) -> Map:
    """``z - step * A^T (A z - data)``."""
    forward, shift, b = matrix.to(dtype), step * matrix.T.to(dtype), data.to(dtype)
    return lambda z: z - (z @ forward.T - b) @ shift.T


def _ista(generator: torch.Generator, dtype: torch.dtype) -> tuple[Map, Tensor]:
    matrix, data, step = _least_squares(generator, 100, 200, spread=2)
    threshold = step * 0.02 * float((matrix.T @ data).abs().max())
    descend = _gradient_step(matrix, data, step, dtype)
    return (lambda z: functional.softshrink(descend(z), threshold)), torch.zeros(1, 200, dtype=dtype)


def _nnls(generator: torch.Generator, dtype: torch.dtype) -> tuple[Map, Tensor]:
    matrix, data, step = _least_squares(generator, 200, 150, spread=3)
    descend = _gradient_step(matrix, data + 0.3 * normal(generator, 200), step, dtype)
    return (lambda z: torch.relu(descend(z))), torch.zeros(1, 150, dtype=dtype)


def _logistic(generator: torch.Generator, dtype: torch.dtype) -> tuple[Map, Tensor]:
    count, dim, weight = 200, 100, 1e-3
    features = normal(generator, count, dim) * torch.logspace(0, -1, dim, dtype=torch.float64)
    label = torch.sign(features @ normal(generator, dim) + 0.3 * normal(generator, count))
    signed = (features * label[:, None]).to(dtype)
    step = 1 / (float(torch.linalg.matrix_norm(features, 2)) ** 2 / (4 * count) + weight)

    def f(z: Tensor) -> Tensor:
        slope = torch.sigmoid(-z @ signed.T) @ signed / count
        return z + step * (slope - weight * z)

    return f, torch.zeros(1, dim, dtype=dtype)


def _douglas_rachford(generator: torch.Generator, dtype: torch.dtype) -> tuple[Map, Tensor]:
    rows, dim = 60, 200
    matrix = normal(generator, rows, dim)
    sparse = normal(generator, dim) * (torch.rand(dim, generator=generator) < 0.06)
    inverse = torch.linalg.pinv(matrix)
    shift, forward, back = (inverse @ (matrix @ sparse)).to(dtype), matrix.to(dtype), inverse.to(dtype)

    def f(z: Tensor) -> Tensor:
        """``z + P(2 S(z) - z) - S(z)``: S shrinks, P projects on ``A x = b``."""
        shrunk = functional.softshrink(z, 0.3)
        mirrored = 2 * shrunk - z
        return z - shrunk + mirrored - (mirrored @ forward.T) @ back.T + shift

    return f, torch.zeros(1, dim, dtype=dtype)


def _admm(generator: torch.Generator, dtype: torch.dtype) -> tuple[Map, Tensor]:
    rows, dim, penalty = 80, 100, 1.0
    matrix, data, _ = _least_squares(generator, rows, dim, spread=3)
    inverse = torch.linalg.inv(matrix.T @ matrix + penalty * torch.eye(dim, dtype=torch.float64))
    threshold = 0.02 * float((matrix.T @ data).abs().max()) / penalty
    constant, smooth = (inverse @ (matrix.T @ data)).to(dtype), (penalty * inverse).T.to(dtype)

    def f(z: Tensor) -> Tensor:
        """The state is the second block and the scaled multiplier."""
        second, multiplier = z.chunk(2, dim=1)
        first = constant + (second - multiplier) @ smooth
        second = functional.softshrink(first + multiplier, threshold)
        return torch.cat([second, multiplier + first - second], dim=1)

    return f, torch.zeros(1, 2 * dim, dtype=dtype)


def _consensus(generator: torch.Generator, dtype: torch.dtype) -> tuple[Map, Tensor]:
    agents, dim, count = 20, 10, 15
    features = normal(generator, agents, count, dim)
    label = torch.sign(features @ normal(generator, dim) + normal(generator, agents, count))
    signed = (features * label[..., None]).to(dtype)
    ring = torch.eye(agents, dtype=dtype)
    mixing = ring / 2 + (ring.roll(1, 0) + ring.roll(-1, 0)) / 4

    def f(z: Tensor) -> Tensor:
        own = z.view(-1, agents, dim)
        slope = torch.einsum("ban,and->bad", torch.sigmoid(-torch.einsum("bad,and->ban", own, signed)), signed)
        return (mixing @ own + 0.2 * (slope / count - 0.01 * own)).flatten(1)

    return f, torch.zeros(1, agents * dim, dtype=dtype)


PROBLEMS = (
    SuiteProblem(
        name="ista-lasso",
        make=_ista,
        source="Daubechies, Defrise & De Mol, Commun. Pure Appl. Math. 57, 2004; not smooth",
    ),
    SuiteProblem(
        name="projected-gradient-nnls",
        make=_nnls,
        source="non-negative least squares by Goldstein-Levitin-Polyak steps: Levitin & Polyak, 1966; not smooth",
    ),
    SuiteProblem(
        name="gradient-logistic",
        make=_logistic,
        source="gradient steps on regularised logistic loss: Zhang, O'Donoghue & Boyd, SIOPT 30, 2020, sec. 5",
    ),
    SuiteProblem(
        name="douglas-rachford",
        make=_douglas_rachford,
        source="basis pursuit: Douglas & Rachford, Trans. AMS 82, 1956; Eckstein & Bertsekas, 1992; not smooth",
    ),
    SuiteProblem(
        name="admm-lasso",
        make=_admm,
        source="Boyd, Parikh, Chu, Peleato & Eckstein, Found. Trends Mach. Learn. 3, 2011, sec. 6.4; not smooth",
    ),
    SuiteProblem(
        name="consensus",
        make=_consensus,
        source="distributed gradient descent on a ring: Nedić & Ozdaglar, IEEE TAC 54, 2009; Yuan, Ling & Yin, 2016",
    ),
)
