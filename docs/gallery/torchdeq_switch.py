"""
A torchdeq model on these solvers
=================================

A project on torchdeq keeps its model, its options and its training loop. One line registers the
solvers of this library with torchdeq, and the names of the solvers change.
"""

import matplotlib.pyplot as plt
import torch
import torchdeq

import fixpoint

# %%
# One line, and another name
# --------------------------

fixpoint.interop.torchdeq.register()

weight = torch.randn(64, 64)
weight = torch.nn.Parameter(0.95 * weight / torch.linalg.matrix_norm(weight, ord=2))
x = torch.randn(16, 64)


def f(z: torch.Tensor) -> torch.Tensor:
    global calls
    calls += 1
    return torch.tanh(z @ weight.T + x)


options = {"ift": True, "f_max_iter": 100, "b_max_iter": 100, "f_tol": 1e-5, "b_tol": 1e-5, "f_stop_mode": "rel"}
gradients, counts = {}, {}
for name in ("anderson", "fixpoint_anderson"):
    deq = torchdeq.get_deq(f_solver=name, b_solver=name, **options)
    calls = 0
    (z,), info = deq(f, torch.zeros(16, 64))
    counts[name] = calls
    (gradients[name],) = torch.autograd.grad(z.square().sum(), weight)
    print(f"{name:18} {calls:3} calls of f, largest relative residual {float(info['rel_lowest'].max()):.1e}")

difference = (gradients["anderson"] - gradients["fixpoint_anderson"]).norm() / gradients["anderson"].norm()
print(f"the gradients differ by {float(difference):.0e}")

# %%
# Without torchdeq
# ----------------
# The same problem in this library's own words. A solution has its figures for each row; the
# backward solve has its own.

layer = fixpoint.FixedPointLayer(lambda z, x: torch.tanh(z @ weight.T + x), rtol=1e-5, backward=fixpoint.IFT(rtol=1e-5))
solution = layer(x, return_solution=True, record=True)
(gradient,) = torch.autograd.grad(solution.value.square().sum(), weight)
print(solution)
print(f"the backward solve took {solution.adjoint.nfev} evaluations")

# %%
# The residual of every row, after every evaluation:

fixpoint.plotting.plot_residuals(solution, plt.figure().gca())
plt.show()

# %%
# Every option of torchdeq has its counterpart in the tables of :doc:`/migrating`.
