"""What a problem of the suite is, and what a case is: one problem at one seed, dtype and tolerance."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Map = Callable[[Tensor], Tensor]
Make = Callable[[torch.Generator, torch.dtype], tuple[Map, Tensor]]
Level = tuple[torch.dtype, float]

LEVELS: tuple[Level, ...] = (
    (torch.float32, 1e-3),
    (torch.float32, 1e-5),
    (torch.float64, 1e-7),
    (torch.float64, 1e-10),
)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One run of the suite: ``f`` maps ``(rows, dim)`` to the same, ``z0`` is ``(1, dim)``.

    A point solves it when ``||f(z) - z|| <= rtol ||f(z)||``, at one of the first ``max_evals`` evaluations. No point
    does where ``solvable`` is false.
    """

    name: str
    problem: str
    seed: int
    f: Map
    z0: Tensor
    rtol: float
    max_evals: int
    solvable: bool
    affine: bool
    source: str


@dataclass(frozen=True, kw_only=True)
class SuiteProblem:
    """A problem of the suite. Its parameters are drawn in float64, so that both dtypes pose the same problem.

    Args:
        name: Lower case with hyphens.
        make: ``make(generator, dtype)`` gives f and z0.
        source: Where the problem comes from.
        levels: Pairs of dtype and relative tolerance.
        max_evals: Evaluations allowed.
        solvable: False where no point meets any of the tolerances.
        affine: True for ``f(z) = A z + b``, where GMRES gives a floor.
        seeded: False where nothing is drawn: it is then posed for the first seed alone.
    """

    name: str
    make: Make
    source: str
    levels: tuple[Level, ...] = LEVELS
    max_evals: int = 300
    solvable: bool = True
    affine: bool = False
    seeded: bool = True

    def cases(self, seeds: Sequence[int]) -> Iterable[Case]:
        """One case for each seed and level."""
        for seed in seeds if self.seeded else seeds[:1]:
            for dtype, rtol in self.levels:
                f, z0 = self.make(torch.Generator().manual_seed(seed), dtype)
                bits = torch.finfo(dtype).bits
                yield Case(
                    name=f"{self.name}/f{bits}/{rtol:.0e}/s{seed}",
                    problem=self.name,
                    seed=seed,
                    f=f,
                    z0=z0,
                    rtol=rtol,
                    max_evals=self.max_evals,
                    solvable=self.solvable,
                    affine=self.affine,
                    source=self.source,
                )


def grouped(cases: Sequence[Case]) -> list[list[Case]]:
    """The cases that one run answers, loosest first: those that differ in tolerance alone and can be solved."""
    groups: dict[tuple[object, ...], list[Case]] = {}
    for case in cases:
        key = (case.problem, case.seed, case.z0.dtype, None if case.solvable else case.rtol)
        groups.setdefault(key, []).append(case)
    return [sorted(group, key=lambda case: -case.rtol) for group in groups.values()]


def normal(generator: torch.Generator, *size: int) -> Tensor:
    """Standard normal numbers in float64."""
    return torch.randn(*size, generator=generator, dtype=torch.float64)


def uniform(generator: torch.Generator, *size: int) -> Tensor:
    """Numbers in [0, 1) in float64."""
    return torch.rand(*size, generator=generator, dtype=torch.float64)


def spectral_radius(matrix: Tensor) -> float:
    """Largest modulus of an eigenvalue."""
    return float(torch.linalg.eigvals(matrix).abs().max())
