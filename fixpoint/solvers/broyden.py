"""Broyden's method with limited memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fixpoint.solvers.base import Solver, gram_dtype, require_count, small_dtype
from fixpoint.solvers.history import History, require_history_dtype
from fixpoint.solvers.small import TORCH, Small, arithmetic


class BroydenState(NamedTuple):
    """The ``memory`` steps taken last, the first ``held`` of them in use.

    ``system`` ``(rows, memory, memory)`` is lower triangular, from the products of steps: row j holds ``|s_j|^2`` on
    the diagonal and ``-s_j . s_{i+1}`` before it. ``use`` ``(rows, memory)`` is zero for what a row has given up.
    """

    steps: History
    system: Small
    use: Small
    held: int = 0
    g: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Broyden(Solver):
    """Broyden's good method on ``g(z) = f(z) - z``: a rank-one secant update of the inverse Jacobian each step.

    It starts from minus the identity, so the first step is Picard's. The inverse Jacobian is a product of factors
    ``I + s_{j+1} s_j^T / |s_j|^2`` of the steps alone, so one state per row is held for each, and applying it takes one
    small triangular system. When ``memory`` steps are held, it starts over from the last one: overwriting the oldest
    leaves factors that were built on one no longer there. A row whose next factor would be singular, or is not finite,
    starts over too, by itself.

    Args:
        memory: Number of steps between restarts; one state per row is held for each.
        history_dtype: Precision of the held steps, such as ``torch.bfloat16`` to halve their memory; None takes the
            state's own.

    Raises:
        TypeError, ValueError: If an option is out of range.

    Source: C. G. Broyden, Math. Comp. 19 (1965); the form in steps alone from Kelley, Iterative Methods for Linear and
    Nonlinear Equations (1995), 7.3.

    Example:
        >>> import torch, fixpoint
        >>> sol = fixpoint.solve(torch.cos, torch.tensor(1.0), solver=fixpoint.Broyden(), rtol=1e-6)
        >>> bool(sol.converged), sol.nfev < 10
        (True, True)
    """

    memory: int = 20
    history_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        require_count("memory", self.memory)
        require_history_dtype(self.history_dtype)

    def init(self, z: Tensor) -> BroydenState:
        rows = len(z)
        steps = History.empty(self.memory, z, self.history_dtype or z.dtype)
        system = torch.eye(self.memory, dtype=small_dtype(z), device=z.device).repeat(rows, 1, 1)
        xp = arithmetic(system)
        use = torch.ones(rows, self.memory, dtype=small_dtype(z), device=z.device)
        return BroydenState(steps, xp.take(system), xp.take(use))

    def step(self, z: Tensor, fz: Tensor, state: BroydenState) -> tuple[Tensor, BroydenState]:
        wide = gram_dtype(z)
        start = z.to(wide)
        g = fz.to(wide) - start
        if state.held == self.memory:
            state = self._restart(g, state)
        steps, system, use, held, _ = state
        xp = arithmetic(g, steps.states, kept=use)
        system, use = xp.own(system), xp.own(use)
        direction = g
        if held == 0:
            scale = torch.ones_like(g[:, :1])
        else:
            products = xp.take(steps.dots(g[:, None], slice(held)))[:, 0]
            with xp.quiet():
                factors = xp.solve_triangular(system[:, :held, :held], products * use[:, :held], upper=False)
                pivot = 1 - factors[:, -1:]
                # Not where a factor is infinite or NaN: those after it are, too.
                size = abs(pivot)
                sound = (size > torch.finfo(wide).eps ** 0.5) & (size < float("inf"))
                if not xp.holds(sound):
                    use = use * sound
                    system = xp.where(sound[..., None], system, xp.identity(system, self.memory))
                factors = xp.where(sound, -factors[:, :-1], 0)
                scale = xp.tensor(xp.reciprocal(xp.where(sound, pivot, 1.0))).to(wide)
            if held > 1:
                direction = steps.subtract(g[:, None], xp.tensor(factors[:, None]).to(wide), slice(1, held))[:, 0]
        steps = steps.put(held, torch.mul, direction, scale)
        newest = xp.take(steps.dots(direction[:, None], slice(held + 1))[:, 0] * scale)
        system, use = xp.writable(system, newest), xp.writable(use, newest)
        system[:, held, :held] = -newest[:, 1:]
        system[:, held, held] = xp.where(newest[:, -1] > 0, newest[:, -1], 1)
        use[:, held] = 1
        z_next = torch.addcmul(start, direction, scale)
        return z_next.to(z.dtype), BroydenState(steps, system, use, held + 1, g)

    def forget(self, state: BroydenState, rows: Tensor) -> BroydenState:
        xp = arithmetic(kept=state.use)
        return state._replace(use=xp.where(xp.take(rows)[:, None], 0, state.use))

    def _restart(self, g: Tensor, state: BroydenState) -> BroydenState:
        """Keep the last secant alone: slot 0 its step s, slot 1 the vector that s is paired with."""
        if state.g is None or self.memory < 3:
            return state._replace(held=0)
        step = state.steps.slots[-1].to(g.dtype)
        change = g - state.g
        product = (step * change).sum(dim=1)
        square = step.square().sum(dim=1)
        sound = product.abs() > torch.finfo(g.dtype).eps ** 0.5 * step.norm(dim=1) * change.norm(dim=1)
        sound &= (
            arithmetic(g).tensor(arithmetic(g).own(state.use))[:, -1] > 0
        )  # not where the row has just forgotten all
        scale = torch.where(sound, square / torch.where(sound, product, 1), 0)
        # The step after a restart writes slot 2, where the last step must stay if this state is stepped from again.
        steps = state.steps if self.memory > 3 else History(state.steps.states.clone())
        steps = steps.put(0, torch.mul, step, torch.ones_like(scale)[:, None])
        steps = steps.put(1, torch.mul, -(step + change), scale[:, None])
        xp = arithmetic(g, steps.states, kept=state.use)
        system, use = xp.writable(xp.own(state.system), square), xp.writable(xp.own(state.use), square)
        system[:, 0, 0] = xp.take(torch.where(square > 0, square, 1))
        system[:, 1, 0], system[:, 1, 1] = 0, 1
        use[:, 0], use[:, 1] = xp.take(sound), 0
        return BroydenState(steps, system, use, 2, g)

    def transposed_inverse(self, state: BroydenState, x: Tensor) -> Tensor:
        """``H^T x`` for each row of ``x`` ``(rows, dim)``, where ``H`` is the ``(I - J)^-1`` of the last step."""
        system, use = TORCH.own(state.system), TORCH.own(state.use)
        product = x.to(gram_dtype(x))
        for j in reversed(range(state.held - 1)):
            step, following = (slot.to(product.dtype) for slot in state.steps.slots[j : j + 2])
            share = (following * product).sum(dim=1) * (use[:, j] / system[:, j, j]).to(product.dtype)
            product = torch.addcmul(product, step, share[:, None])
        return product.to(x.dtype)
