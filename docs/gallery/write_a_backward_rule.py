"""
Write a backward rule
=====================

A backward rule is one method. ``attach(run)`` lets the forward solve happen and returns what the
gradient is sent through, beside the outcome of the solve.

This one averages the states after 1, 2, ... recorded steps from the solution (phantom gradients),
so that late terms of the Neumann series weigh less.
"""

from dataclasses import dataclass

import matplotlib.pyplot as plt
import torch

import fixpoint


@dataclass(frozen=True, kw_only=True)
class AveragedPhantom(fixpoint.Backward):
    """The mean of the states after 1, 2, ... ``steps`` recorded steps."""

    steps: int = 4

    def attach(self, run: fixpoint.ForwardSolve):
        result = run.solve()
        states = [result.z]
        for _ in range(self.steps):
            states.append(run.f(states[-1]))
        return torch.stack(states[1:]).mean(dim=0), result


# %%
# One number
# ----------
# For :math:`f(z) = a z + 1` the derivative is :math:`1 / (1 - a)^2`. A rule that cuts the series
# gives less.

for rule in (fixpoint.JFB(), AveragedPhantom(steps=2), fixpoint.Phantom(steps=2), fixpoint.IFT()):
    a = torch.tensor(0.5, requires_grad=True)
    fixpoint.solve(lambda z, a=a: a * z + 1, torch.zeros(1), backward=rule, rtol=1e-6).value.sum().backward()
    print(f"{rule!s:60} {float(a.grad):.3f}")

# %%
# How far off is it?
# ------------------
# The error of each rule on a linear problem in 200 dimensions, against the closed form.

problem = fixpoint.load_problem("linear:rho=0.9,rows=1,dtype=float64")
target = torch.randn(1, 200, dtype=torch.float64)
exact = torch.linalg.solve(torch.eye(200, dtype=torch.float64) - problem.matrix.T, target[0])


def error(rule: fixpoint.Backward) -> float:
    offset = problem.offset.clone().requires_grad_()
    value = fixpoint.solve(lambda z: z @ problem.matrix.T + offset, problem.z0, backward=rule, rtol=1e-10).value
    (gradient,) = torch.autograd.grad((value * target).sum(), offset)
    return float((gradient[0] - exact).norm() / exact.norm())


steps = [1, 2, 4, 8, 16, 32]
axes = plt.figure().gca()
axes.plot(steps, [error(AveragedPhantom(steps=k)) for k in steps], marker="o", label="AveragedPhantom(steps=k)")
axes.plot(steps, [error(fixpoint.Phantom(steps=k)) for k in steps], marker="o", label="Phantom(steps=k)")
axes.axhline(error(fixpoint.IFT(rtol=1e-8)), color="gray", linestyle=":", label="IFT(rtol=1e-8)")
axes.set(xscale="log", yscale="log", xlabel="recorded steps k", ylabel="relative error of the gradient")
axes.legend()
plt.show()

# %%
# What ``run`` offers, and the contract suite for backward rules: :doc:`/extending`.
