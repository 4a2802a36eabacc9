"""Fixtures shared by the tests of the core."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import fixpoint
from fixpoint.solvers import compiled


@dataclass(frozen=True)
class RowProblems:
    """``z_r -> squash(W_r z_r + b_r)``: every row has a map of its own, so coupled rows cannot go unseen."""

    W: Tensor  # (rows, dim, dim)
    b: Tensor  # (rows, dim)
    squash: Callable[[Tensor], Tensor]

    @property
    def z0(self) -> Tensor:
        return torch.zeros_like(self.b)

    def __call__(self, z: Tensor) -> Tensor:
        return self.squash((self.W @ z[..., None]).squeeze(-1) + self.b)

    def rows(self, index: Any) -> RowProblems:
        return RowProblems(self.W[index], self.b[index], self.squash)

    @property
    def solution(self) -> Tensor:
        """Closed form of the linear problem."""
        return torch.linalg.solve(torch.eye(self.W.shape[1], dtype=self.W.dtype) - self.W, self.b)


def _identity(x: Tensor) -> Tensor:
    return x


def make_contraction(
    rows: int = 4,
    dim: int = 6,
    rho: float = 0.7,
    seed: int = 0,
    *,
    squash: Callable[[Tensor], Tensor] = _identity,
    dtype: torch.dtype = torch.float64,
) -> RowProblems:
    """Contractions of modulus ``rho`` in the Euclidean norm."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(rows, dim, dim, generator=generator, dtype=torch.float64)
    if W.numel():
        W = W * rho / torch.linalg.matrix_norm(W, ord=2)[:, None, None]
    b = torch.randn(rows, dim, generator=generator, dtype=torch.float64)
    return RowProblems(W.to(dtype), b.to(dtype), squash)


class Counted:
    """Counts the calls of a map and keeps what it was shown."""

    def __init__(self, f: Callable[..., Any]) -> None:
        self.f = f
        self.seen: list[Any] = []

    @property
    def calls(self) -> int:
        return len(self.seen)

    def __call__(self, z: Any, *args: Any) -> Any:
        self.seen.append(z.detach().clone() if isinstance(z, Tensor) else z)
        return self.f(z, *args)


@pytest.fixture(scope="session")
def contraction() -> Callable[..., RowProblems]:
    return make_contraction


@pytest.fixture(scope="session")
def counted() -> type[Counted]:
    return Counted


def make_normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_linear_problem(dim: int = 4, rows: int = 3, rho: float = 0.7, seed: int = 0) -> tuple[Tensor, Tensor]:
    """``A (dim, dim)`` of spectral norm rho and ``b (rows, dim)``, both leaves that require grad."""
    A = make_normal(dim, dim, seed=seed)
    A = A * rho / torch.linalg.matrix_norm(A, ord=2)
    return A.requires_grad_(), make_normal(rows, dim, seed=seed + 1).requires_grad_()


class TanhCell(torch.nn.Module):
    """``tanh(W z + x)`` with a parameter of spectral norm ``gain``; counts its calls."""

    def __init__(self, dim: int = 4, gain: float = 0.7) -> None:
        super().__init__()
        W = make_normal(dim, dim, seed=5)
        self.W = torch.nn.Parameter(W * gain / torch.linalg.matrix_norm(W, ord=2))
        self.calls = 0

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        self.calls += 1
        return torch.tanh(z @ self.W.T + x)


@pytest.fixture(scope="session")
def normal() -> Callable[..., Tensor]:
    return make_normal


@pytest.fixture(scope="session")
def linear_problem() -> Callable[..., tuple[Tensor, Tensor]]:
    return make_linear_problem


@pytest.fixture(scope="session")
def cell_class() -> type[TanhCell]:
    return TanhCell


SOLVERS = (
    fixpoint.Picard(),
    fixpoint.Picard(damping=0.75),
    fixpoint.ACX(),
    fixpoint.Anderson(),
    fixpoint.Anderson(memory=2, damping=0.75),
    fixpoint.Anderson(memory=20, ridge=0.0),
    fixpoint.Broyden(),
    fixpoint.Broyden(memory=3),
    fixpoint.Blockwise(fixpoint.Picard(), blocks=3),
    fixpoint.Blockwise(fixpoint.Anderson(memory=2), blocks=2),
)


@pytest.fixture(scope="session", params=SOLVERS, ids=repr)
def solver(request: pytest.FixtureRequest) -> fixpoint.Solver:
    """Every solver; states must have a row length that 6 divides."""
    return request.param


@pytest.fixture(scope="session")
def all_solvers() -> tuple[fixpoint.Solver, ...]:
    return SOLVERS


RULES = (
    fixpoint.IFT(rtol=1e-10, max_evals=200),
    fixpoint.JFB(),
    fixpoint.Phantom(steps=3, damping=0.6),
    fixpoint.Neumann(terms=3),
    fixpoint.SHINE(refine=1),
    fixpoint.MultiStepJFB(no_grad=3, grad=2),
    fixpoint.StochasticJFB(max_no_grad=3, max_grad=2, min_no_grad=1, seed=0),
    fixpoint.Reversible(steps=12, damping=0.8),
    fixpoint.Unroll(),
)


@pytest.fixture(scope="session", params=RULES, ids=lambda rule: repr(rule).partition("(")[0] + str(RULES.index(rule)))
def rule(request: pytest.FixtureRequest) -> fixpoint.Backward:
    """Every backward rule. Give a copy to each solve: one that is random then draws the same depths every time."""
    return request.param


@pytest.fixture(scope="session")
def all_rules() -> tuple[fixpoint.Backward, ...]:
    return RULES


@pytest.fixture(scope="session")
def solve_from_zeros() -> Callable[..., Tensor]:
    """``solve_from_zeros(f, x, rule=...)`` is the value of ``z = f(z, x)`` by a copy of the rule."""

    def solve(f: Callable[..., Tensor], x: Tensor, *, rule: fixpoint.Backward | None, **options: Any) -> Tensor:
        # Updates of Broyden, differentiated near convergence, magnify rounding.
        solver = fixpoint.Broyden(memory=40) if isinstance(rule, fixpoint.SHINE) else fixpoint.Picard()
        options = {"solver": solver, "rtol": 1e-6, "max_evals": 200, **options}
        return fixpoint.solve(f, torch.zeros_like(x), (x,), backward=copy.deepcopy(rule), **options).value

    return solve


class Formula(torch.nn.Module):
    """``formula(W, z, x)`` with a parameter W: what another f should amount to."""

    def __init__(self, W: torch.nn.Parameter, formula: Callable[..., Tensor]) -> None:
        super().__init__()
        self.W, self.formula = W, formula

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return self.formula(self.W, z, x)


@pytest.fixture(scope="session")
def formula() -> type[Formula]:
    return Formula


@pytest.fixture(name="A")
def weight() -> Tensor:
    """Of the map in ``differentiated``."""
    return 0.3 * make_normal(3, 3, seed=3)


@pytest.fixture(name="b")
def bias() -> Tensor:
    """Of the map in ``differentiated``."""
    return make_normal(2, 3, seed=4)


@pytest.fixture
def x() -> Tensor:
    """What a cell of four is fed; a leaf."""
    return make_normal(6, 4).requires_grad_()


@pytest.fixture(scope="class")
def steps_are_traced() -> Iterator[None]:
    """``Compiled`` traces steps as for a GPU, but runs what was traced as it is: to compile it takes too long."""
    with pytest.MonkeyPatch.context() as patch:
        # Whole: a step that torch gives up on would be taken uncompiled, and nothing would show it.
        whole = functools.partial(torch.compile, backend="eager", fullgraph=True)
        patch.setattr(compiled.torch, "compile", whole)
        compiled._compiled_step.cache_clear()
        # Torch remembers by file and line which sizes changed, and makes fewer versions of a step it has seen before.
        torch.compiler.reset()
        yield
    compiled._compiled_step.cache_clear()
