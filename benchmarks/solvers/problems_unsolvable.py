"""Maps where no point meets any tolerance of the suite, so that no solver may claim success.

Each keeps ``||f(z) - z||`` above a tenth of ``||f(z)||`` everywhere; ``z -> z + 1`` would not do, for its relative
residual falls as z grows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.solvers.cases import Map, SuiteProblem, normal, uniform

DIM = 50


def _relay(generator: torch.Generator, dtype: torch.dtype) -> tuple[Map, Tensor]:
    z0 = normal(generator, 1, DIM).to(dtype)
    return (lambda z: torch.where(z > 0, -1.0, 1.0).to(z.dtype)), z0


def _circle_rotation(generator: torch.Generator, dtype: torch.dtype) -> tuple[Map, Tensor]:
    turn = 0.3 + 0.2 * uniform(generator, 1, DIM).to(dtype)
    return (lambda z: torch.remainder(z + turn, 1)), uniform(generator, 1, DIM).to(dtype)


def _chaotic(generator: torch.Generator, dtype: torch.dtype) -> tuple[Map, Tensor]:
    def f(z: Tensor) -> Tensor:
        """The logistic map at 4 with each value that would stay nearly in place thrown half a turn away."""
        inside = torch.remainder(z, 1)
        image = 4 * inside * (1 - inside)
        return torch.where((image - inside).abs() < 0.2, torch.remainder(image + 0.5, 1), image)

    return f, uniform(generator, 1, DIM).to(dtype)


def _runaway(generator: torch.Generator, dtype: torch.dtype) -> tuple[Map, Tensor]:
    direction = torch.nn.functional.normalize(normal(generator, 1, DIM), dim=1).to(dtype)
    return (lambda z: z + (1 + z.square().sum(dim=1, keepdim=True)).sqrt() * direction), torch.zeros_like(direction)


def _no_real_root(generator: torch.Generator, dtype: torch.dtype) -> tuple[Map, Tensor]:
    return (lambda z: z * z + 1), normal(generator, 1, DIM).to(dtype)


PROBLEMS = tuple(
    SuiteProblem(name=name, make=make, source=source, solvable=False)
    for name, make, source in (
        (
            "none-relay",
            _relay,
            "ideal relay in negative feedback, z -> -sign(z): Tsypkin, Relay Control Systems, 1984; discontinuous",
        ),
        (
            "none-circle-rotation",
            _circle_rotation,
            "rotation of the circle, z -> z + a mod 1: Katok & Hasselblatt, 1995, sec. 1.3; discontinuous on R",
        ),
        (
            "none-chaotic",
            _chaotic,
            "logistic map at 4 (May, Nature 261, 1976) with its neighbourhoods of fixed points cut out",
        ),
        (
            "none-runaway",
            _runaway,
            "z + sqrt(1 + |z|^2) u: continuous without a fixed point, since Brouwer's theorem needs a bounded set",
        ),
        (
            "none-real-root",
            _no_real_root,
            "z -> z^2 + 1 has complex fixed points only; it overflows within a dozen steps",
        ),
    )
)
