"""A step of Heun's method asks the network twice: as two steps of the chain, or both in one?"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

import fixpoint
from benchmarks.chains.modern import RTOL, Found, chain_of, in_parallel, solved
from fixpoint_diffusion import SamplingChain

SAMPLER = "Heun, Karras"
HOW_TO_READ = f"""\
{SAMPLER}, on the embedded U-Net, solved to rtol {RTOL:g} with CausalQuasiNewton, each sample by itself.
calls: of the network in sequence. rounds: batched calls in sequence, median/worst sample, and the median by calls; an
evaluation of steps that hold both calls makes two. rows: network rows by those of the sequential sampler, median.
error: ||x_0 - sequential|| / ||sequential||, the worst.
"""


class BothCalls:
    """A chain of Heun's method of which one step makes both calls, one after the other: half as many states."""

    def __init__(self, chain: SamplingChain) -> None:
        self.chain = chain
        self.steps = (chain.steps + 1) // 2
        self.start = chain.begin(chain.x_T)
        self.z0 = chain.guess[:, [min(2 * k + 1, chain.steps - 1) for k in range(self.steps)]]
        slopes = torch.cat([chain.slopes, torch.ones_like(chain.slopes[:1])])  # the last step makes one call
        self.slopes = slopes[0 : 2 * self.steps : 2] * slopes[1 : 2 * self.steps : 2]
        self.basis = chain.basis

    def transition(self, x: Tensor, sample: Tensor, step: Tensor) -> Tensor:
        """States after chosen steps, see :class:`fixpoint.Chain`."""
        half = self.chain.transition(x, sample, 2 * step)
        second = 2 * step + 1 < self.chain.steps
        after = half.clone()
        if second.any():
            after[second] = self.chain.transition(half[second], sample[second], 2 * step[second] + 1)
        return after


def measure(calls: Sequence[int], *, samples: int) -> list[Found]:
    """Solve both forms."""
    forms = {"two steps of the chain": in_parallel, "one step with both calls": _both_calls_at_once}
    return [
        solved(form, partial(chain_of, SAMPLER, count), solve, samples=samples)
        for count in calls
        for form, solve in forms.items()
    ]


def _both_calls_at_once(chain: SamplingChain) -> Tensor:
    """x_0 by the default solver, of the chain with half as many states."""
    solution = fixpoint.solve(
        BothCalls(chain), solver=fixpoint.CausalQuasiNewton(), backward=None, rtol=RTOL, max_evals=200
    )
    return chain.latents(solution.value[:, -1], torch.tensor([chain.steps]))
