"""
A recurrent network and an ODE, all steps at once
=================================================

A recurrent network and the steps of a differential equation are chains like a sampler's: each state
follows from the one before. :class:`fixpoint.Recurrence` poses all states as one fixed point, and
:class:`fixpoint.CausalQuasiNewton` solves it in rounds that evaluate many steps as one batch.
"""

import math
import time

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn

import fixpoint

# %%
# A recurrent network
# -------------------
# A GRU with 32 hidden units reads 1000 random inputs. The bias of its update gate makes it forget
# about a 55th of its state in a step, as is recommended for long sequences (Tallec and Ollivier,
# ICLR 2018).

cell = nn.GRUCell(8, 32)
with torch.no_grad():
    cell.bias_hh[32:64] += math.log(54)
gru = fixpoint.Recurrence(lambda hidden, x: cell(x, hidden), torch.zeros(1, 32), inputs=(torch.randn(1, 1000, 8),))

# %%
# A differential equation
# -----------------------
# A pendulum with friction, let go at an angle of 2, for 20 seconds. A step of the chain is four
# steps of the classical Runge-Kutta method.


def slope(x: Tensor) -> Tensor:
    angle, speed = x.unbind(dim=1)
    return torch.stack((speed, -angle.sin() - speed / 10), dim=1)


def advance(x: Tensor, h: float = 0.005) -> Tensor:
    for _ in range(4):
        k1 = slope(x)
        k2 = slope(x + h / 2 * k1)
        k3 = slope(x + h / 2 * k2)
        k4 = slope(x + h * k3)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return x


pendulum = fixpoint.Recurrence(advance, torch.tensor([[2.0, 0.0]], dtype=torch.float64), steps=1000)

# %%
# Both, by every method
# ---------------------
# A round is one call of the step with a batch of states; rows are the states in all calls. The last
# column is the largest relative distance of a state from the one that is found one after another.
# The tolerance is 1e-5.

SOLVERS = {
    "Picard": fixpoint.Picard(),
    "causal": fixpoint.CausalQuasiNewton(),
    "causal, window=100": fixpoint.CausalQuasiNewton(window=100),
}
found = {}
print(f"{'problem':10}{'method':20}{'rounds':>8}{'rows':>9}{'seconds':>9}{'distance':>10}")
for name, problem in {"GRU": gru, "pendulum": pendulum}.items():
    step, batches = problem.step, []

    def counted(x: Tensor, *inputs: Tensor, step=step, batches=batches) -> Tensor:
        batches.append(len(x))
        return step(x, *inputs)

    problem.step = counted
    expected = None
    for method in ("one by one", *SOLVERS):
        batches.clear()
        start = time.perf_counter()
        with torch.no_grad():
            if method == "one by one":
                states = expected = problem.sequential()
            else:
                options = {"rtol": 1e-5, "max_evals": 1001, "backward": None}
                states = fixpoint.solve(problem, solver=SOLVERS[method], **options).value
        seconds = time.perf_counter() - start
        distance = ((states - expected).norm(dim=2) / expected.norm(dim=2)).max()
        print(f"{name:10}{method:20}{len(batches):8}{sum(batches):9}{seconds:9.2f}{float(distance):10.0e}")
    problem.step, found[name] = step, states

# %%
# - Plain iteration needs about as many rounds as the chain remembers steps. The pendulum forgets
#   slowly.
# - Picard stops when nothing changes by more than the tolerance, and the small changes still to
#   come add up. The causal solver predicts the error itself, and meets the tolerance.
# - A window takes more rounds and fewer rows, and what it holds does not grow with the length of
#   the chain.
# - Whether time is saved depends on what one small call costs. A step of this GRU is a single call;
#   the pendulum's is many.

figure, (left, right) = plt.subplots(1, 2)
left.plot(found["GRU"][0, :, :4])
left.set(title="GRU: four of the hidden units", xlabel="step")
right.plot(torch.arange(1, 1001) / 50, found["pendulum"][0])
right.set(title="pendulum", xlabel="seconds")
right.legend(["angle", "speed"])
plt.show()

# %%
# How the solver works, and when its answer can be trusted: :doc:`/parallel-sampling`.
