"""
Write a solver
==============

A solver is an update rule on rows: two methods. It never sees ``f``, a tolerance, or a shape other
than ``(rows, dim)``. The loop evaluates, measures, and keeps the best state.

This one is Aitken's scheme in the vector form of Irons and Tuck (Int. J. Numer. Methods Eng. 1,
1969). It sets the damping of each row from its last two residuals.
"""

from dataclasses import dataclass

import matplotlib.pyplot as plt
import torch
from torch import Tensor

import fixpoint
from fixpoint.plotting import plot_residuals

State = tuple[Tensor, Tensor] | None  # the last residuals, and the damping that was used on them


@dataclass(frozen=True, kw_only=True)
class Aitken(fixpoint.Solver):
    """``z <- z + w g`` with ``g = f(z) - z`` and, for each row, ``w <- -w <g_old, g - g_old> / |g - g_old|^2``."""

    first: float = 0.5  # the damping of the first step

    def init(self, z: Tensor) -> State:
        return None

    def step(self, z: Tensor, fz: Tensor, state: State) -> tuple[Tensor, State]:
        g = fz - z
        if state is None:
            damping = torch.full_like(g[:, :1], self.first)
        else:
            g_old, damping = state
            change = g - g_old
            size = change.square().sum(dim=1, keepdim=True)
            moved = size > 0  # false for a row that is solved, or whose residual did not change
            ratio = (g_old * change).sum(dim=1, keepdim=True) / torch.where(moved, size, 1)
            damping = torch.where(moved, -damping * ratio, damping)
        return z + damping * g, (g, damping)


# %%
# It works wherever a solver is expected
# --------------------------------------
# Beside the library's own:

problem = fixpoint.load_problem("linear:rho=0.9")
solvers = {"Picard": fixpoint.Picard(), "Aitken": Aitken(), "Anderson": fixpoint.Anderson()}
solutions = {name: fixpoint.solve(problem, solver=s, rtol=1e-5, record=True) for name, s in solvers.items()}
for name, solution in solutions.items():
    print(f"{name:9} {solution.nfev} evaluations")
plot_residuals(solutions, plt.figure().gca())
plt.show()

# %%
# And for the gradient, as the solver of the adjoint equation. The exact derivative of :math:`z =
# 0.5 z + b` is 2.

b = torch.ones(2, 3, requires_grad=True)
rule = fixpoint.IFT(solver=Aitken())
value = fixpoint.solve(lambda z: 0.5 * z + b, torch.zeros(2, 3), solver=Aitken(), backward=rule).value
value.sum().backward()
print(b.grad)

# %%
# Is it a good solver?
# --------------------
# The contract suite asks what every solver must keep: rows stay apart, nothing that was shown is
# written to, options are values. In a test module, pytest runs this class as it stands.

from fixpoint.testing import SolverContract  # noqa: E402


class TestAitken(SolverContract):
    solver = Aitken()


names = [name for name in dir(TestAitken) if name.startswith("test_")]
print(f"{len(names)} tests, such as {names[-1]}")

# %%
# The rules that the suite holds a solver to, and the methods that a solver may have beside these
# two: :doc:`/extending`.
