"""
Plot how a solve converges
==========================

``record=True`` keeps the residual of every row after every evaluation, and
:func:`fixpoint.plotting.plot_residuals` draws it.
"""

import matplotlib.pyplot as plt
import torch

import fixpoint
from fixpoint import bench
from fixpoint.plotting import plot_residuals

# %%
# Solvers side by side
# --------------------
# A linear problem that contracts slowly, in 16 rows. The line is the median row; the bands hold the
# middle half of the rows, and all of them.

problem = fixpoint.load_problem("linear:rho=0.99,rows=16")
solvers = {"Picard": fixpoint.Picard(), "Anderson": fixpoint.Anderson(), "Broyden": fixpoint.Broyden()}
options = {"rtol": 1e-5, "max_evals": 150, "on_failure": "ignore", "record": True}
solutions = {name: fixpoint.solve(problem, solver=solver, **options) for name, solver in solvers.items()}
for name, solution in solutions.items():
    print(f"{name:9} {solution}")

plot_residuals(solutions, plt.figure().gca())
plt.show()

# %%
# What the curve tells
# --------------------
# A curve that falls steadily needs more evaluations. A flat one needs another solver, or there is
# no fixed point. Here is a map that goes around its fixed point: plain iteration keeps its
# distance, and half a step brings it in.

turn = torch.tensor([[0.0, -1.0], [1.0, 0.0]])


def around(z: torch.Tensor) -> torch.Tensor:
    return z @ turn.T + 1


options = {"rtol": 1e-5, "max_evals": 40, "on_failure": "ignore", "record": True}
plain = fixpoint.solve(around, torch.zeros(1, 2), solver=fixpoint.Picard(), **options)
damped = fixpoint.solve(around, torch.zeros(1, 2), solver=fixpoint.Picard(damping=0.5), **options)
plot_residuals({"Picard()": plain, "Picard(damping=0.5)": damped}, plt.figure().gca())
plt.show()

# %%
# The backward solve
# ------------------
# The adjoint equation has a trace of its own, once backward has run.

weight = torch.nn.Parameter(0.95 * torch.linalg.qr(torch.randn(50, 50)).Q)
x = torch.randn(8, 50)
solution = fixpoint.solve(lambda z: torch.tanh(z @ weight + x), torch.zeros(8, 50), record=True)
solution.value.sum().backward()
plot_residuals({"solve": solution, "adjoint": solution.adjoint}, plt.figure().gca())
plt.show()

# %%
# A table instead
# ---------------
# :func:`fixpoint.bench.compare` counts, times and measures afresh. ``fixpoint bench`` does the same
# from the command line and writes a report.

print(bench.compare(problem, solvers, rtols=[1e-3]))

# %%
# What to change when a solve does not converge is one list: :doc:`/convergence`.
