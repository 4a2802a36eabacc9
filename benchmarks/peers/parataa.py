"""ParaTAA: equations that reach k steps back, solved by Anderson acceleration that respects the order of the chain."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.peers.windows import Callback, carry, slide
from fixpoint_diffusion.chains import SamplingChain
from fixpoint_diffusion.sampling import SamplingResult


def parataa(
    chain: SamplingChain,
    *,
    order: int | None = None,
    memory: int = 3,
    tolerance: float = 1e-3,
    ridge: float = 1e-3,
    window: int | None = None,
    max_rounds: int | None = None,
    callback: Callback | None = None,
) -> SamplingResult:
    """Sample by ParaTAA: plain iteration on equations of some order, mixed by triangular Anderson acceleration.

    An equation of order k gives a state from the one k steps before it and the denoiser's outputs at all between:
    order 1 is a single step, order T the cumulative form of DEQ-DDIM. Coefficients of a state are fitted to it and the
    states before it alone. A state is good when the mean square defect of its single step is at most
    ``tolerance^2 (1 - a / a')``, the share of new noise in DDPM's step.

    Args:
        chain: of B samples and T steps.
        order: k; None: T.
        memory: m, differences that are mixed; 0 is plain iteration.
        tolerance: see above.
        ridge: added to the diagonal of the normal equations, absolute as in the authors' code.
        window: most states of a sample in a round; None: T.
        max_rounds: at most so many; None: T, which always suffices.
        callback: called with a ``fixpoint.Progress`` after every round, with the states that it led to; returning
            something true ends the run.

    Raises:
        ValueError: an option out of range.

    Source: Tang, Tang, Luo, Wang, Chang, "Accelerating Parallel Sampling of Diffusion Models" (ICML 2024), Eq. 8 and
        Theorem 3.2.

    Example:
        >>> from fixpoint_diffusion import DDIMChain, NoiseSchedule
        >>> chain = DDIMChain(lambda x, t: 0.9 * x, torch.ones(1, 3), NoiseSchedule.linear(), steps=50)
        >>> result = parataa(chain, order=20)
        >>> torch.allclose(result.images, chain.sequential()[:, -1], rtol=1e-2), result.rounds < 50
        (True, True)
    """
    order = chain.steps if order is None else order
    for name, value, least in (("order", order, 1), ("memory", memory, 0), ("tolerance", tolerance, 0)):
        if not value >= least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    if not ridge > 0:
        raise ValueError(f"ridge must be positive, got {ridge}")
    levels = chain.transitions
    factors = (levels.alphas_prev / levels.alphas).sqrt().to(chain.x_T.device)[:, None]
    # The first step starts from x_T, which is exact: its factor, infinite where there is no signal, is never used.
    factors = torch.cat((torch.ones_like(factors[:1]), factors[1:]))
    limits = tolerance * (1 - levels.alphas / levels.alphas_prev).sqrt().to(factors)
    past: list[tuple[Tensor, Tensor]] = []  # states and residuals of earlier rounds, the newest last

    def update(states: Tensor, images: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
        defects = images - states
        good = defects.square().mean(dim=2).sqrt() <= limits
        residuals = torch.where(inside[..., None], reach_back(defects, factors.to(defects), order), 0)
        past.append((states, residuals))
        del past[: -memory - 1]
        mixed = triangular_anderson(past, inside, ridge) if len(past) > 1 else residuals
        settled = (good | ~inside).cumprod(dim=1).bool()
        # The first that is not good has good inputs: its equation is right as it is.
        first = (~settled).cumsum(dim=1) == 1
        change = torch.where(first[..., None], residuals, mixed)
        return torch.where(settled[..., None], states, states + change), good

    return slide(chain, update, window=window, max_rounds=max_rounds, callback=callback)


def reach_back(defects: Tensor, factors: Tensor, order: int) -> Tensor:
    """Residuals ``(B, T, D)`` of the equations of order k, from those of order 1 and the linear factors ``(T, 1)``.

    With ``r_k(i) = F_k(x)_i - x_i``: ``r_1`` are the defects, and ``r_k(i) = defects_i + factor_i r_{k-1}(i-1)``.
    """
    total = carry(defects, factors[None])
    if order >= len(factors):
        return total
    powers = factors.cumprod(dim=0)
    total[:, order:] = total[:, order:] - powers[order:] / powers[:-order] * total.clone()[:, :-order]
    return total


def triangular_anderson(past: list[tuple[Tensor, Tensor]], inside: Tensor, ridge: float) -> Tensor:
    """Change of the newest of ``past``, ``(B, T, D)``: state i's coefficients are fitted to the window up to i."""
    states, residuals = (torch.stack(each, dim=2) for each in zip(*past, strict=True))
    moved, changed = (torch.where(inside[..., None, None], x.diff(dim=2), 0) for x in (states, residuals))
    newest = residuals[:, :, -1]
    gram = (changed @ changed.mT).cumsum(dim=1)
    target = (changed @ newest[..., None]).cumsum(dim=1)
    unit = torch.eye(gram.shape[2], dtype=gram.dtype, device=gram.device)
    coefficients = torch.linalg.solve(gram + ridge * unit, target)
    return newest - (coefficients * (moved + changed)).sum(dim=2)
