"""Plain DDIM inversion: one evaluation a step, and no equation solved."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fixpoint import ProgressBar, Status
from fixpoint_diffusion.chains import SamplingChain
from fixpoint_diffusion.inversion.result import Found
from fixpoint_diffusion.processes import wide


@dataclass(frozen=True, kw_only=True)
class ExplicitInverse:
    """Plain DDIM inversion, as diffusers' ``DDIMInverseScheduler`` runs it: T evaluations, one after another.

    To undo step k, the denoiser should be asked about the latent before it, which is what is searched for. It is asked
    about the latent after it instead, at the timestep of step k: one step too early. So the error of x_0 shrinks with
    the number of steps alone, and is large with few steps or under guidance. It is cheap, it is what many programs for
    editing do, and it may be a start for :class:`OptimisedInverse`. A chain that clips is not refused: the predicted
    images are clipped on the way up as they are on the way down.

    Source: Dhariwal, Nichol, "Diffusion Models Beat GANs on Image Synthesis" (NeurIPS 2021), Appendix F.

    Example:
        >>> from fixpoint_diffusion import DDIMChain, NoiseSchedule
        >>> from fixpoint_diffusion.inversion import ParallelInverse, invert
        >>> chain = DDIMChain(lambda x, t: 0.5 * x, torch.zeros(1, 2), NoiseSchedule.linear(), steps=50)
        >>> x_0 = torch.tensor([[0.1, 0.2]])
        >>> plain = invert(chain, x_0, method=ExplicitInverse(), on_failure="ignore")
        >>> exact = invert(chain, x_0, method=ParallelInverse())
        >>> plain.rounds, bool(exact.error < plain.error / 10)
        (50, True)
    """

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
        before = chain.rounds, chain.evals
        x_T, _ = ddim_encoding(chain, x_0, progress=progress)
        return Found(
            x_T=x_T,
            status=torch.full((len(x_0),), int(Status.MAX_EVALS), device=x_0.device),
            rounds=chain.rounds - before[0],
            evals=chain.evals - before[1],
        )


def ddim_encoding(chain: SamplingChain, x_0: Tensor, *, progress: bool = False) -> tuple[Tensor, Tensor]:
    """Plain DDIM inversion: each step undone with the denoiser's output at the latent that it arrived at.

    The output is read at the signal level of that latent. Where that is 1 and the denoiser predicts the image, it says
    nothing of the noise there, and is read at the level before the step. Along a flow this is Euler's method backwards.

    Args:
        chain: of B samples and T steps; its x_T plays no part.
        x_0: the images, ``(B, *shape)``.
        progress: show a bar.

    Returns:
        x_T ``(B, *shape)`` and the latents after each step ``(B, T, *shape)``, the last of them the images.

    Example:
        See :class:`fixpoint_diffusion.ExplicitInverse`, which is this with a measured error.
    """
    transitions, samples = chain.transitions, torch.arange(len(x_0), device=x_0.device)
    levels = transitions.alphas_prev
    if transitions.prediction_type == "sample":
        levels = torch.where(levels < 1, levels, transitions.alphas)
    reading = replace(transitions, alphas=levels, x0_hook=None)
    shown = torch.ones(chain.steps, dtype=torch.float64, device="cpu")
    if transitions.prediction_type == "flow_prediction" and transitions.scales is not None:
        # The network is shown a latent as large as it is at its own level, not at that of the step.
        shown = transitions.scales[1:] / transitions.scales[:-1]
    latents = [x_0]
    with torch.no_grad():
        for k in ProgressBar.tqdm(range(chain.steps)[::-1], desc="inverting", unit="step", disable=not progress):
            x = latents[-1]
            step = torch.full_like(samples, k)
            out = chain.denoise((float(shown[k]) * wide(x)).to(x.dtype), samples, step)
            eps = reading.predict(wide(x), wide(out), k)[1]
            added = transitions.direction[k] * eps
            if chain.noise is not None:
                added = added + transitions.sigma[k] * wide(chain.noise[:, k])
            image = (wide(x) - added) / transitions.alphas_prev[k].sqrt()
            if transitions.x0_hook is not None:
                image = transitions.x0_hook(image, step, samples)
            a = transitions.alphas[k]
            latents.append((a.sqrt() * image + (1 - a).sqrt() * eps).to(x.dtype))
    return latents[-1], torch.stack(latents[-2::-1], dim=1)
