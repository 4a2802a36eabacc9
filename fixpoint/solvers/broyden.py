"""Broyden's method with limited memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fixpoint.solvers.base import Solver, gram_dtype, require_count, require_history_dtype, small_dtype
from fixpoint.solvers.small import TORCH, NumPyArithmetic, Small, arithmetic
from fixpoint.solvers.states import TORCH_STATES, State, TorchStates, states_for

# Where H dg, of the change of the residual after a step s, is nearly at a right angle to s, the next factor would be
# singular. So a pivot, which is s . H dg / |s|^2, is at least this share of |H dg| / |s|, or of 1 where that is less.
# The factor is then off from the secant's by a few percent.
_LEAST_PIVOT = 0.03


class BroydenState(NamedTuple):
    """The ``memory`` steps taken last, the first ``held`` of them in use.

    Attributes:
        steps: Each step ``(rows, memory, dim)``.
        system: ``-s_j . s_{i+1} / |s_j|^2`` in row j and column i < j, and ``-1 / |s_j|^2`` on the diagonal; zero for
            what a row has given up ``(rows, memory, memory)``.
        held: Number of steps in use.
        g: The last residual.
    """

    steps: State
    system: Small
    held: int = 0
    g: State = None


@dataclass(frozen=True, kw_only=True)
class Broyden(Solver):
    """Broyden's good method on ``g(z) = f(z) - z``: a rank-one secant update of the inverse Jacobian each step.

    It starts from minus the identity, so the first step is Picard's. The inverse Jacobian is a product of factors
    ``I + s_{j+1} s_j^T / |s_j|^2`` of the steps alone, so one state per row is held for each, and applying it takes one
    small triangular system. When ``memory`` steps are held, it starts over from the last one: overwriting the oldest
    leaves factors that were built on one no longer there. A row whose next factor would be singular, or is not finite,
    starts over too, by itself. Where the host can read it (on the CPU, unless autograd, torch.func or a compiler
    follows), a factor is kept from being singular when the residual changes at right angles to the step, as it does
    where f turns about its solution.

    Args:
        memory: Number of steps between restarts; one state per row is held for each. Below 3 there is no room for the
            last secant, and it starts over from nothing: with 1, every step is Picard's.
        history_dtype: Precision of the held steps, such as ``torch.bfloat16`` to halve their memory; None takes the
            state's own.

    Raises:
        TypeError, ValueError: If an option is out of range.

    Source: C. G. Broyden, Math. Comp. 19 (1965); the form in steps alone from Kelley, Iterative Methods for Linear and
    Nonlinear Equations (1995), 7.3; that factors must be kept from being singular, J. J. Moré, J. A. Trangenstein,
    Math. Comp. 30 (1976), who do it by another update.

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
        rows, dim = z.shape
        steps = torch.zeros(rows, self.memory, dim, dtype=self.history_dtype or z.dtype, device=z.device)
        system = torch.zeros(rows, self.memory, self.memory, dtype=small_dtype(z), device=z.device)
        return BroydenState(steps, arithmetic(steps).take(system))

    def step(self, z: Tensor, fz: Tensor, state: BroydenState) -> tuple[Tensor, BroydenState]:
        dtype, wide = z.dtype, gram_dtype(z)
        limits = torch.finfo(wide)
        if dtype != wide:
            z, fz = z.to(wide), fz.to(wide)
        xp = arithmetic(z, fz, kept=state.system)
        states = states_for(xp, fz, self.history_dtype or dtype)
        now = states.take(z)
        with xp.quiet():
            g = states.take(fz) - now
            if state.held == self.memory:
                state = self._restart(xp, states, g, state, limits.eps)
            steps, held = states.take(state.steps), state.held
            system, step = xp.own(state.system), g
            if held > 0:
                products = xp.take(states.dots(g[:, None], states.among(steps, 0, held)))[:, 0]
                use = system[:, :held, :held]
                factors = xp.solve_triangular(use, products * use.diagonal(0, 1, 2), upper=False, unit=True)
                pivot = factors[:, -1:] + 1
                # Where the host cannot read pivots, this would have to be done in every step.
                if xp.readable and not xp.absent(abs(pivot) < _LEAST_PIVOT):
                    applied = self._applied(states, steps, g, factors, held)
                    square = xp.take(states.dots(applied[:, None], applied[:, None]))[:, 0]
                    turned = xp.sqrt(xp.maximum(2 * pivot - 1 - square * use[:, -1:, -1], 0.0))  # |H dg| / |s|
                    least = _LEAST_PIVOT * xp.minimum(turned, 1.0)
                    pivot = xp.where(abs(pivot) < least, xp.where(pivot < 0, -least, least), pivot)
                # Not where a factor is infinite or NaN: those after it are, too.
                lost = xp.outside(abs(pivot), limits.eps**0.5, limits.max)
                if not xp.absent(lost):
                    system = xp.put_where(lost[..., None], 0.0, system)
                    factors, pivot = xp.put_where(lost, 0.0, factors), xp.put_where(lost, 1.0, pivot)
                step = self._applied(states, steps, g, factors, held)
                steps, step = states.put_quotient(steps, held, step, states.like(pivot, g))
            else:
                steps = states.put(steps, 0, g, first=True)
            newest = xp.take(states.dots(step[:, None], states.among(steps, 0, held + 1)))[:, 0]
            # In the precision of the system: the last entry before the diagonal must be -1, for pivots depend on it.
            square = xp.like(newest[:, -1:], system)
            inverse = xp.reciprocal(xp.plus(square <= limits.tiny, square, -1))
            if held == 0:  # later steps of tensors have a new one since put_where
                system = xp.writable(system, newest)
            system = xp.put_row(system, held, xp.concatenate((newest[:, 1:] * inverse, inverse), 1))
            z_next = states.tensor(now + step)
        return z_next.to(dtype), BroydenState(steps, system, held + 1, g)

    @staticmethod
    def _applied(states: TorchStates, steps: State, g: State, factors: Small, held: int) -> State:
        """All factors but the last, applied to ``g`` ``(rows, dim)``."""
        if held == 1:
            return g
        weights = states.like(factors[:, None, :-1], g)
        return states.less(g[:, None], weights, states.among(steps, 1, held), keep=True)[:, 0]

    def forget(self, state: BroydenState, rows: Tensor) -> BroydenState:
        xp = arithmetic(kept=state.system)
        return state._replace(system=xp.put_where(xp.take(rows)[:, None, None], 0.0, state.system))

    def _restart(
        self, xp: NumPyArithmetic, states: TorchStates, g: State, state: BroydenState, eps: float
    ) -> BroydenState:
        """Keep the last secant alone: place 0 its step s, place 1 the vector that s is paired with."""
        if state.g is None or self.memory < 3:
            return state._replace(held=0)
        # Places 0 to 2 are written before this state can be stepped from again; it reads the last.
        steps = states.take(state.steps) if self.memory > 3 else states.copy(states.take(state.steps))
        step, change = states.like(states.place(steps, -1), g), g - states.take(state.g)
        pairs = ((step, change), (step, step), (change, change))
        product, square, change_square = (xp.take(states.dots(x[:, None], y[:, None]))[:, 0, 0] for x, y in pairs)
        sound = abs(product) > eps**0.5 * xp.sqrt(square) * xp.sqrt(change_square)
        system = xp.own(state.system)
        sound = sound & (system[:, -1, -1] != 0)  # not where the row has just forgotten all
        lost = ~sound
        scale = xp.put_where(lost, 0.0, square / xp.put_where(lost, 1.0, product))
        # Place 1 first: where autograd records it, nothing is written any more to the last step, which it has saved.
        steps = states.put(steps, 1, (step + change) * states.like(-scale[:, None], g))
        steps = states.put(steps, 0, step)
        # In the precision of the system: the derivative of a reciprocal leaves the range of float32 before that does.
        inverse = xp.put_where(lost, 0.0, -1 / xp.put_where(lost, 1.0, xp.like(square, system)))
        system = xp.put_row(xp.writable(xp.zeros_like(system), inverse), 0, inverse[:, None])
        return BroydenState(steps, system, 2, state.g)

    def transposed_inverse(self, state: BroydenState, x: Tensor) -> Tensor:
        """``H^T x`` for each row of ``x`` ``(rows, dim)``, where ``H`` is the ``(I - J)^-1`` of the last step."""
        inverse, states = -TORCH.own(state.system).diagonal(0, 1, 2), TORCH_STATES
        steps, product = states.take(state.steps), x.to(gram_dtype(x))
        for j in reversed(range(state.held - 1)):
            step, following = (states.place(steps, each).to(product.dtype) for each in (j, j + 1))
            share = (following * product).sum(dim=1) * inverse[:, j].to(product.dtype)
            product = torch.addcmul(product, step, share[:, None])
        return product.to(x.dtype)
