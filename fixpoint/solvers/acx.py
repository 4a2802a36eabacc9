"""Alternating cyclic extrapolation: a memory of two states, and hardly any arithmetic."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fixpoint.solvers.base import Solver, gram_dtype
from fixpoint.solvers.small import arithmetic
from fixpoint.solvers.states import State, states_for

# Evaluations of each cycle, in turn. In a cycle of three, two states are held.
_CYCLES = (3, 3, 2)


class ACXState(NamedTuple):
    """What a step remembers.

    Attributes:
        cycle: Which of ``_CYCLES`` this is.
        differences: Of the states of the cycle, at its first one, of first order and so on; each ``(rows, dim)``, in at
            least float32.
    """

    cycle: int = 0
    differences: tuple[State, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ACX(Solver):
    """Alternating cyclic extrapolation: two plain steps and a jump, the same again, one plain step and a jump.

    The jump that ends a cycle uses the differences of its states ``z0, z1 = f(z0), z2 = f(z1) ...``: ``d1 = z1 - z0``,
    ``d2 = z2 - 2 z1 + z0``, and so on. Of three evaluations it goes to ``z0 + 3 s d1 + 3 s^2 d2 + s^3 d3`` with
    ``s = |d3 . d2| / |d3|^2``, of two to ``z0 + 2 s d1 + s^2 d2`` with ``s = |d2 . d1| / |d2|^2``. Each row has an s of
    its own. Where that is zero or out of range, the row takes a plain step.

    It holds two states per row, or four of float16 and bfloat16, and a step is a few sums. It saves memory always, and
    time where states are large and f is cheap. ``Anderson`` takes fewer evaluations and solves more problems.

    Source: N. Lepage-Saucier, "Alternating cyclic extrapolation methods for optimization algorithms",
    arXiv:2104.04974, with orders 3, 3, 2. That a row without an s takes a plain step is this project's own.

    Example:
        >>> import torch, fixpoint
        >>> sol = fixpoint.solve(torch.cos, torch.tensor(1.0), solver=fixpoint.ACX(), rtol=1e-6)
        >>> bool(sol.converged), sol.nfev < 15
        (True, True)
    """

    def init(self, z: Tensor) -> ACXState:
        return ACXState()

    def step(self, z: Tensor, fz: Tensor, state: ACXState) -> tuple[Tensor, ACXState]:
        wide, cycle = gram_dtype(z), state.cycle
        xp = arithmetic(z, fz)
        states = states_for(xp, fz, wide)
        here, image = states.take(z.to(wide)), states.take(fz.to(wide))
        with xp.quiet():
            before = [states.take(x) for x in state.differences]
            highest, done = image - here, len(before)
            for order, difference in enumerate(before):
                highest = states.plus(highest, -math.comb(done, order), difference, into=highest)
            differences, length = (*before, highest), _CYCLES[cycle]
            if len(differences) < length:
                return fz, ACXState(cycle, differences)
            square, product = (xp.take(states.dots(highest[:, None], x[:, None]))[:, 0] for x in (highest, before[-1]))
            measured = (square > torch.finfo(wide).tiny) & (square < math.inf)
            s = abs(product / xp.where(measured, square, 1.0))  # a gradient needs a quotient that is finite everywhere
            s = xp.where(measured & (s > 0) & (s < math.inf), s, 1.0)  # with 1, the jump below is the plain step
            jump = here
            for order in range(length, 0, -1):
                # The differences are those of the cycle's first state, and lead from there to the last one, too.
                weight = math.comb(length, order) * s**order - math.comb(length - 1, order)
                jump = states.plus(jump, states.take(weight), differences[order - 1], into=highest)
        return states.tensor(jump).to(fz.dtype), ACXState((cycle + 1) % len(_CYCLES))
