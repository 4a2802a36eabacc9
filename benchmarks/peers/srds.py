"""SRDS: parareal, a coarse sampler corrected by the fine one, which runs in all blocks of the chain at once."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from benchmarks.peers.windows import Callback, Record
from fixpoint_diffusion.chains import SamplingChain
from fixpoint_diffusion.processes import Transitions, wide
from fixpoint_diffusion.sampling import SamplingResult


@torch.no_grad()
def srds(
    chain: SamplingChain,
    *,
    tolerance: float = 1e-3,
    max_iterations: int | None = None,
    callback: Callback | None = None,
) -> SamplingResult:
    """Sample by SRDS: about sqrt(T) blocks of sqrt(T) steps; one step over a block is the coarse sampler.

    An iteration runs the fine sampler in all blocks at once, a round for each step of a block, and then the coarse one
    through the blocks, a round for each. A sample is done when the mean absolute change of its image is at most the
    tolerance, and at the latest after as many iterations as there are blocks. ``solution.nfev`` counts iterations; with
    p of them, S steps a block and N blocks, ``result.rounds`` is ``N + p (S + N)``, of which an implementation that
    overlaps the two samplers needs to wait for ``N + p (S - 1)``.

    Args:
        chain: of B samples and T steps, without noise.
        tolerance: see above.
        max_iterations: at most so many; None: the number of blocks, after which the images are exact.
        callback: called with a ``fixpoint.Progress`` after every iteration; returning something true ends the run. In
            its trajectory, every state of a block is that at the end of the block.

    Raises:
        ValueError: a chain with noise, a negative tolerance, or max_iterations below 1.

    Source: Selvam, Merchant, Ermon, "Self-Refining Diffusion Samplers: Enabling Parallelization via Parareal
        Iterations" (NeurIPS 2024), Algorithm 1.

    Example:
        >>> from fixpoint_diffusion import DDIMChain, NoiseSchedule
        >>> chain = DDIMChain(lambda x, t: 0.9 * x, torch.ones(1, 3), NoiseSchedule.linear(), steps=49)
        >>> result = srds(chain)
        >>> torch.allclose(result.images, chain.sequential()[:, -1], rtol=1e-2), result.solution.nfev < 7
        (True, True)
    """
    if bool((chain.transitions.sigma > 0).any()):
        raise ValueError("srds needs a chain without noise: its coarse steps have none that matches the fine ones'")
    if not tolerance >= 0 or (max_iterations is not None and max_iterations < 1):
        raise ValueError(f"tolerance must be at least 0, max_iterations 1; got {tolerance} and {max_iterations}")
    steps = chain.steps
    length = math.ceil(math.sqrt(steps))
    first = torch.arange(0, steps, length)
    last = torch.clamp(first + length, max=steps) - 1
    fine = chain.transitions
    coarse = Transitions.between(
        fine.timesteps[first],
        fine.alphas[first],
        fine.alphas_prev[last],
        prediction_type=fine.prediction_type,
        x0_hook=fine.x0_hook,
        noise_from_clipped=fine.noise_from_clipped,
    )
    blocks = len(first)
    record = Record(chain, blocks if max_iterations is None else min(max_iterations, blocks), callback)
    running = torch.arange(len(chain.x_T))
    # Where blocks start (one more is the image), and what the coarse sampler last made of each start.
    starts = wide(chain.x_T).unsqueeze(1).repeat(1, blocks + 1, *[1] * (chain.x_T.ndim - 1))
    predicted = starts[:, 1:].clone()

    def leap(block: int) -> Tensor:
        x = starts[running, block].to(chain.x_T.dtype)
        out = chain.denoise(x, running, torch.full_like(running, int(first[block])))
        return coarse.step(wide(x), wide(out), block, sample=running)

    def walk() -> Tensor:
        """The fine sampler from all starts of the samples that are running."""
        x = starts[running, :-1].clone()
        for offset in range(length):
            here = torch.nonzero(first + offset <= last).flatten()
            pairs = running.repeat_interleave(len(here)), (first[here] + offset).repeat(len(running))
            before = x[:, here].to(chain.x_T.dtype)
            x[:, here] = wide(chain.transition(before.flatten(0, 1), *pairs)).reshape(before.shape)
        return x

    for block in range(blocks):
        predicted[running, block] = starts[running, block + 1] = leap(block)
    done, iterations = torch.zeros(len(starts), dtype=torch.bool), 0
    while not record.ended:
        before = starts.clone()
        corrected = walk()
        for block in range(blocks):
            again = leap(block)
            starts[running, block + 1] = again + corrected[:, block] - predicted[running, block]
            predicted[running, block] = again
        change = starts - before
        iterations += 1
        done |= (change[:, -1].abs().flatten(1).mean(dim=1) <= tolerance).cpu() | (iterations == blocks)
        spread = starts[:, 1:].flatten(2).repeat_interleave((last - first + 1).to(starts.device), dim=1)
        record.round(spread, change.flatten(1).norm(dim=1), done.to(starts.device))
        running = torch.nonzero(~done).flatten()
    return record.result()
