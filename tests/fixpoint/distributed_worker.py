"""One process of a distributed run: the gradients of every rule, trained on this rank's share of the rows.

``python -m tests.fixpoint.distributed_worker RANK WORLD_SIZE STORE OUT``; imported, the same run without processes.
"""

from __future__ import annotations

import sys

import torch

import fixpoint
from fixpoint_diffusion.ranks import ending_group

D = torch.float64
ROWS, DIM = 6, 4


class Cell(torch.nn.Module):
    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        W = torch.randn(DIM, DIM, generator=generator, dtype=D)
        self.W = torch.nn.Parameter(0.7 * W / torch.linalg.matrix_norm(W, ord=2))

    def forward(self, z, x):
        return torch.tanh(z @ self.W.T + x)


def rules():
    return [
        fixpoint.IFT(rtol=1e-10, max_evals=200),
        fixpoint.JFB(),
        fixpoint.Phantom(steps=3, damping=0.6),
        fixpoint.Neumann(terms=3),
        fixpoint.SHINE(refine=1),
        fixpoint.MultiStepJFB(no_grad=3, grad=2),
        fixpoint.StochasticJFB(max_no_grad=5, max_grad=4, seed=3),
        fixpoint.Reversible(steps=12, damping=0.8),
        fixpoint.Unroll(),
    ]


class Network(torch.nn.Module):
    """A linear layer, a fixed point, and a linear layer."""

    def __init__(self, rule):
        super().__init__()
        solver = fixpoint.Broyden(memory=40)
        options = {"solver": solver, "rtol": 1e-10, "max_evals": 200}
        self.before, self.after = (torch.nn.Linear(DIM, DIM, dtype=D) for _ in range(2))
        for index, parameter in enumerate(self.parameters()):
            torch.nn.init.normal_(parameter, 0, 0.5, generator=torch.Generator().manual_seed(index))
        self.layer = fixpoint.FixedPointLayer(Cell(), backward=rule, **options)

    def forward(self, x):
        return self.after(self.layer(self.before(x)))


def steps(rows, wrap):
    """For each rule, the gradients of the parameters in two steps after each other, on some rows of the data."""
    x = torch.randn(ROWS, DIM, generator=torch.Generator().manual_seed(1), dtype=D)[rows]
    found = []
    for rule in rules():
        network = Network(rule)
        model = wrap(network)
        for _ in range(2):
            network.zero_grad()
            model(x).square().mean().backward()
            found.append([parameter.grad.clone() for parameter in network.parameters()])
    return found


if __name__ == "__main__":
    rank, size, store, out = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
    torch.set_num_threads(1)
    share = slice(rank * ROWS // size, (rank + 1) * ROWS // size)
    with ending_group():
        torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
        torch.save(steps(share, torch.nn.parallel.DistributedDataParallel), out)
