"""Quasi-DEER: Newton's method on the whole chain, with the diagonal of each step's Jacobian."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.peers.windows import Callback, carry, slide
from fixpoint_diffusion.chains import SamplingChain
from fixpoint_diffusion.processes import wide
from fixpoint_diffusion.sampling import SamplingResult


def quasi_deer(
    chain: SamplingChain,
    *,
    probes: int | None = 1,
    tolerance: float = 1e-3,
    spacing: float = 1e-2,
    seed: int = 0,
    window: int | None = None,
    max_rounds: int | None = None,
    callback: Callback | None = None,
) -> SamplingResult:
    """Sample by quasi-DEER: sweep along the chain with the diagonal of every step's Jacobian.

    The diagonal is estimated in the round itself, by differences along random signs (Hutchinson's estimator), so that
    it works for every denoiser and its cost is counted: ``1 + probes`` denoiser rows for each state and round.

    Args:
        chain: of B samples and T steps of D numbers.
        probes: random directions; None: all D axes, for the exact diagonal.
        tolerance: a state is good when no entry changes by more.
        spacing: of the differences.
        seed: of the signs.
        window: most states of a sample in a round; None: T.
        max_rounds: at most so many; None: T, which always suffices.
        callback: called with a ``fixpoint.Progress`` after every round, with the states that it led to; returning
            something true ends the run.

    Raises:
        ValueError: probes, window or max_rounds below 1, a negative tolerance, or a spacing that is not positive.

    Source: Gonzalez, Warrington, Smith, Linderman, "Towards Scalable and Stable Parallelization of Nonlinear RNNs"
        (NeurIPS 2024), Section 4.1; Hutchinson's estimator (1989).

    Example:
        >>> from fixpoint_diffusion import DDIMChain, NoiseSchedule
        >>> chain = DDIMChain(lambda x, t: 0.9 * x, torch.ones(1, 3), NoiseSchedule.linear(), steps=50)
        >>> result = quasi_deer(chain)  # every step is linear, its Jacobian diagonal
        >>> torch.allclose(result.images, chain.sequential()[:, -1], rtol=1e-2), result.rounds
        (True, 2)
    """
    if probes is not None and probes < 1:
        raise ValueError(f"probes must be at least 1, got {probes}")
    if not tolerance >= 0 or not spacing > 0:
        raise ValueError(f"tolerance must be at least 0 and spacing positive, got {tolerance} and {spacing}")
    size = chain.x_T[0].numel()
    generator = torch.Generator().manual_seed(seed)
    slopes = wide(chain.z0).flatten(2)

    def directions(count: int) -> Tensor:
        """``(probes, N, D)``: each entry that is not zero is a sign."""
        if probes is None:
            return torch.eye(size)[:, None].expand(-1, count, -1)
        return torch.randint(0, 2, (probes, count, size), generator=generator) * 2.0 - 1

    def evaluate(x: Tensor, sample: Tensor, step: Tensor) -> Tensor:
        probe = directions(len(x)).to(x)
        moved = x + spacing * probe.reshape(-1, *x.shape)
        out = chain.transition(torch.cat((x, moved.flatten(0, 1))), *(i.repeat(1 + len(probe)) for i in (sample, step)))
        images = out.reshape(1 + len(probe), *x.shape)
        products = wide(images[1:] - images[:1]).flatten(2) / spacing * wide(probe)
        slopes[sample, step] = products.sum(dim=0) if probes is None else products.mean(dim=0)
        return images[0]

    def update(states: Tensor, images: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
        change = carry(images - states, slopes)
        return states + change, change.abs().amax(dim=2) <= tolerance

    return slide(chain, update, evaluate=evaluate, window=window, max_rounds=max_rounds, callback=callback)
