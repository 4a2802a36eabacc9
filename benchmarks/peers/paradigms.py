"""ParaDiGMS: Picard iteration in windows that slide as far as the states have settled."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.peers.windows import Callback, carry, slide
from fixpoint_diffusion.chains import SamplingChain
from fixpoint_diffusion.processes import Transitions
from fixpoint_diffusion.sampling import SamplingResult


def paradigms(
    chain: SamplingChain,
    *,
    tolerance: float = 0.1,
    window: int | None = None,
    max_rounds: int | None = None,
    callback: Callback | None = None,
) -> SamplingResult:
    """Sample by ParaDiGMS: each state is the window's first input plus the sum of all steps' changes up to it.

    A state is good when its mean square change is at most ``tolerance^2 sigma^2``, ``sigma`` being DDPM's noise in the
    step that leaves it; the last state, which none leaves, is good when all before it are. Each sample has a window of
    its own, where the authors' code has one for the whole batch.

    The chain's noise is always added. In diffusers' ParaDiGMS pipelines a scheduler of the DDIM kind adds none,
    whatever eta is: they return what this returns for the chain without noise.

    Args:
        chain: of B samples and T steps.
        tolerance: see above; the authors use 0.1, and less for pixels.
        window: most states of a sample in a round; None: T.
        max_rounds: at most so many; None: T, which always suffices.
        callback: called with a ``fixpoint.Progress`` after every round, with the states that it led to; returning
            something true ends the run.

    Raises:
        ValueError: a window or max_rounds below 1, or a negative tolerance.

    Source: Shih, Belkhale, Ermon, Sadigh, Anari, "Parallel Sampling of Diffusion Models" (NeurIPS 2023), Algorithm 1.

    Example:
        >>> from fixpoint_diffusion import DDIMChain, NoiseSchedule
        >>> chain = DDIMChain(lambda x, t: 0.9 * x, torch.ones(1, 3), NoiseSchedule.linear(), steps=50)
        >>> result = paradigms(chain, tolerance=1e-3, window=30)
        >>> torch.allclose(result.images, chain.sequential()[:, -1], rtol=1e-2), result.rounds < 50
        (True, True)
    """
    if not tolerance >= 0:
        raise ValueError(f"tolerance must not be negative, got {tolerance}")
    steps = chain.transitions
    ancestral = Transitions.between(
        steps.timesteps, steps.alphas, steps.alphas_prev, eta=1.0, prediction_type=steps.prediction_type
    )
    sigma = ancestral.sigma.to(chain.x_T.device)
    # Of the step that leaves each state; none leaves the last.
    limits = torch.cat((tolerance * sigma[1:], sigma.new_full((1,), torch.inf)))

    def update(states: Tensor, images: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
        change = carry(images - states, torch.ones_like(states[:1, :, :1]))
        return states + change, change.square().mean(dim=2).sqrt() <= limits

    return slide(chain, update, window=window, max_rounds=max_rounds, callback=callback)
