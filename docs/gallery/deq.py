r"""
A deep-equilibrium network in twenty lines
==========================================

A deep-equilibrium network (DEQ) has one layer whose output is a fixed point,

.. math:: z^\star = \tanh(W z^\star + x),

where an ordinary network applies many layers in turn. The gradient follows from the solution alone,
so training keeps no step of the solver in memory.
"""

import matplotlib.pyplot as plt
import torch
from torch import nn

import fixpoint
from fixpoint_diffusion.training.data import load_digits, split_held_out

# %%
# The model
# ---------
# The weight is divided by its spectral norm and multiplied by 0.9. Since the slope of tanh is at
# most 1, the cell is then a contraction: it has exactly one fixed point for each input.


class Classifier(nn.Module):
    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.encode, self.decode = nn.Linear(64, width), nn.Linear(width, 10)
        self.weight = nn.Parameter(torch.randn(width, width))
        self.layer = fixpoint.FixedPointLayer(lambda z, x, w: torch.tanh(z @ w.T + x), rtol=1e-3)

    def forward(self, images: torch.Tensor) -> fixpoint.Solution:
        x = self.encode(images.flatten(1))
        weight = 0.9 * self.weight / torch.linalg.matrix_norm(self.weight, ord=2)
        return self.layer(x, weight, z0=torch.zeros_like(x), return_solution=True)


# %%
# Training
# --------
# The digits of scikit-learn, a fifth of them held out. ``solution.nfev`` are the evaluations of the
# solve, and ``solution.adjoint.nfev`` those of the second solve, which backward makes for the
# gradient.

train, held_out = split_held_out(load_digits())
model = Classifier()
optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
losses, forward, backward = [], [], []
for _ in range(150):
    rows = torch.randint(len(train.images), (128,))
    solution = model(train.images[rows])
    loss = nn.functional.cross_entropy(model.decode(solution.value), train.labels[rows])
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
    losses.append(float(loss.detach()))
    forward.append(solution.nfev)
    backward.append(solution.adjoint.nfev)

with torch.no_grad():
    predicted = model.decode(model(held_out.images).value).argmax(dim=1)
print(f"accuracy on held-out digits: {float((predicted == held_out.labels).double().mean()):.3f}")
print(f"evaluations in the last step: {forward[-1]} forward, {backward[-1]} backward")

# %%
# What it cost
# ------------
# How many evaluations a step takes is decided by the tolerance, and changes as the weights do.

figure, (left, right) = plt.subplots(1, 2)
left.plot(losses)
left.set(title="loss", xlabel="step", yscale="log")
right.plot(forward, label="forward")
right.plot(backward, label="backward")
right.set(title="evaluations of f", xlabel="step", ylim=(0, None))
right.legend()
plt.show()

# %%
# Other gradients are an option of the layer: ``FixedPointLayer(..., backward=fixpoint.JFB())``.
# :doc:`/examples/digits_deq` trains this network by each of them, and :doc:`/training` says what
# they leave out.
