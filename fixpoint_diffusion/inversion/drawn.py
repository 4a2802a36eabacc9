"""The inverse of a stochastic chain in which the noise is free: a trajectory is drawn, and the noise follows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fixpoint import Status
from fixpoint_diffusion.chains import SamplingChain
from fixpoint_diffusion.inversion.problem import InverseProblem
from fixpoint_diffusion.inversion.result import Found
from fixpoint_diffusion.inversion.stepwise import StepwiseInverse
from fixpoint_diffusion.processes import initial_noise, step_noise, wide


@dataclass(frozen=True, kw_only=True)
class DrawnInverse:
    """For a stochastic chain: draw the latents from the forward process, and find the noise that joins them.

    Each latent is the image at its noise level with noise of its own, and the noise of a step is what it takes to get
    from one to the next: exact by construction, in two rounds. Only the last step, which adds no noise, is solved for.
    ``Inverse.noise`` is to be given to a chain in which to edit: :class:`StochasticDDIMChain` with another condition.

    Args:
        seed: of the latents; sample b of the batch draws as sample b of any batch does.
        last: how the last step is undone.

    Raises:
        ValueError: at ``run``, for a chain in which a step before the last adds no noise.

    Source: Huberman-Spiegelglas, Kulikov, Michaeli, "An Edit Friendly DDPM Noise Space" (CVPR 2024), Sec. 3.

    Example:
        >>> from fixpoint_diffusion import NoiseSchedule, StochasticDDIMChain
        >>> from fixpoint_diffusion.inversion import invert
        >>> chain = StochasticDDIMChain(lambda x, t: 0.5 * x, torch.zeros(2, 3), NoiseSchedule.linear(), steps=10)
        >>> inverse = invert(chain, torch.full((2, 3), 0.3), method=DrawnInverse())
        >>> inverse.converged.tolist(), inverse.noise.shape
        ([True, True], torch.Size([2, 10, 3]))
    """

    seed: int = 0
    last: StepwiseInverse = field(default_factory=StepwiseInverse)

    def run(
        self,
        chain: SamplingChain,
        x_0: Tensor,
        *,
        tolerance: Tensor,
        progress: bool = False,
        callback: Callable[[Any], object] | None = None,
    ) -> Found:
        """See :class:`InverseMethod`; the history is empty."""
        transitions, steps = chain.transitions, chain.steps
        silent = [k for k in range(steps - 1) if float(transitions.sigma[k]) == 0]
        if chain.noise is None or silent:
            where = "no step of this chain does" if chain.noise is None else f"step {silent[0]} of this chain does not"
            raise ValueError(f"DrawnInverse needs every step but the last to add noise, and {where}")
        before = chain.rounds, chain.evals
        samples = torch.arange(len(x_0), device=x_0.device)
        latents = self._draw(chain, x_0)
        if float(transitions.sigma[-1]) == 0:
            problem = InverseProblem(chain, x_0)
            allowed = tolerance * problem.x_0.shape[1] ** 0.5 / 2
            undone = self.last.undo(problem, samples, steps - 1, problem.x_0, allowed).value
            latents[:, -1] = problem.from_coordinates(undone)
        after = torch.cat((latents[:, 1:], wide(x_0)[:, None]), dim=1)
        every = slice(None)
        out = wide(chain.denoise_all(latents.to(x_0.dtype)))
        mean = transitions.step(latents, out, every)
        scale = transitions.step(latents, out, every, torch.ones_like(latents)) - mean
        noise = torch.where(scale > 0, (after - mean) / scale, 0)
        return Found(
            x_T=latents[:, 0].to(x_0.dtype),
            status=torch.full((len(x_0),), int(Status.MAX_EVALS), device=x_0.device),
            rounds=chain.rounds - before[0],
            evals=chain.evals - before[1],
            noise=noise.to(x_0.dtype),
        )

    def _draw(self, chain: SamplingChain, x_0: Tensor) -> Tensor:
        """The latent before each step, ``(B, T, *shape)``, each with noise of its own."""
        samples, shape = range(len(x_0)), x_0.shape[1:]
        own = step_noise(self.seed, samples, range(chain.steps), shape, dtype=torch.float64, device=x_0.device)
        own[:, 0] = initial_noise(self.seed, samples, shape, dtype=torch.float64, device=x_0.device)
        a = chain.transitions.alphas.to(x_0.device).reshape(-1, *[1] * len(shape))
        return wide(a.sqrt() * wide(x_0)[:, None] + (1 - a).sqrt() * own)
