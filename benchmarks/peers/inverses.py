"""Inverses of a DDIM chain as their papers describe them: each undoes one step after another by iteration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from benchmarks.peers.implicit_steps import ImplicitSteps, Step


@dataclass(frozen=True, kw_only=True)
class AIDI(ImplicitSteps):
    """Iterate ``z = f(z)`` from the latent after the step. One plain iteration is ordinary DDIM inversion.

    Args:
        acceleration: ``"none"``; ``"anderson"``, with the last m + 1 iterates of each sample; ``"mean"``: the mean of
            the last two ``f(z)``.
        memory: m.

    Source: Pan, Gherardi, Xie, Huang, "Effective Real Image Editing with Accelerated Iterative Diffusion Inversion"
        (ICCV 2023).

    Example:
        >>> from fixpoint_diffusion import DDIMChain, NoiseSchedule, invert
        >>> chain = DDIMChain(lambda x, t: 0.5 * x, torch.zeros(1, 2), NoiseSchedule.linear(), steps=50)
        >>> image = torch.tensor([[0.1, 0.2]])
        >>> [bool(invert(chain, image, method=AIDI(iterations=n), on_failure="ignore").converged) for n in (1, 5)]
        [False, True]
    """

    acceleration: Literal["none", "anderson", "mean"] = "none"
    memory: int = 3

    def undo(self, step: Step) -> tuple[Tensor, Tensor]:
        """See :class:`ImplicitSteps`."""
        z, images, residuals = step.after, list[Tensor](), list[Tensor]()
        for _ in range(self.iterations):
            fz = step.f(z)
            images.append(fz)
            residuals.append(fz - z)
            z = fz
            if self.acceleration == "mean":
                z = torch.stack(images[-2:]).mean(dim=0)
            elif self.acceleration == "anderson":
                z = anderson(images[-self.memory - 1 :], residuals[-self.memory - 1 :])
        return z, residuals[-1]


def anderson(images: list[Tensor], residuals: list[Tensor]) -> Tensor:
    """The mix of ``images`` whose weights, which add up to 1, make the mix of ``residuals`` least; row by row."""
    if len(images) == 1:
        return images[0]
    changed = torch.stack(residuals).flatten(2).diff(dim=0).movedim(0, 2)
    newest = residuals[-1].flatten(1)[..., None]
    # Differences that are nearly the same, or no numbers at all, must not stop a whole batch.
    weights = torch.linalg.pinv(changed.nan_to_num(0, 0, 0), rtol=1e-10) @ newest
    moved = torch.stack(images).flatten(2).diff(dim=0).movedim(0, 2)
    return images[-1] - (moved @ weights)[..., 0].reshape(images[-1].shape)


@dataclass(frozen=True, kw_only=True)
class ReNoise(ImplicitSteps):
    """Iterate ``z = f(z)``, and take the mean of the last iterates. Its regularisation of the noise is left out.

    Args:
        averaged: how many of them, where there are as many.

    Source: Garibi et al., "ReNoise: Real Image Inversion Through Iterative Noising" (ECCV 2024).
    """

    averaged: int = 3

    def undo(self, step: Step) -> tuple[Tensor, Tensor]:
        """See :class:`ImplicitSteps`."""
        iterates = [step.after]
        for _ in range(self.iterations):
            iterates.append(step.f(iterates[-1]))
        mean = torch.stack(iterates[1:][-self.averaged :]).mean(dim=0)
        return mean, iterates[-1] - iterates[-2]


@dataclass(frozen=True, kw_only=True)
class GNRI(ImplicitSteps):
    """Newton-Raphson steps on the scalar ``F(z) = |z - f(z)|_1``, entry by entry: ``z_i - F / (D dF/dz_i)``.

    The term that draws z to the prior is left out: F would not vanish at the root with it, and no step would be right.

    Of the iterates whose F was seen, each sample keeps that with the least: the steps may lead anywhere.

    Args:
        exact: differentiate the denoiser, at a product with its Jacobian an iteration. Without, f counts as a constant,
            and each step has the sign of the residual and the length of its mean, as in the code of the authors.
        offset: is added to the derivatives, against division by zero.

    Source: Samuel et al., "Lightning-Fast Image Inversion and Editing for Text-to-Image Diffusion Models" (ICLR 2025).
    """

    exact: bool = True
    offset: float = 1e-6

    def undo(self, step: Step) -> tuple[Tensor, Tensor]:
        """See :class:`ImplicitSteps`."""
        z = kept = step.after
        kept_residual = torch.full_like(z, torch.inf)
        for _ in range(self.iterations):
            with torch.set_grad_enabled(self.exact):
                z = z.detach().requires_grad_(self.exact)
                residual = z - step.f(z)
                total = residual.abs().flatten(1).sum(dim=1)
                slope = torch.autograd.grad(total.sum(), z)[0] if self.exact else residual.sign()
            z, residual, total = z.detach(), residual.detach(), total.detach()
            better = _rows(total < kept_residual.abs().flatten(1).sum(dim=1), z)
            kept, kept_residual = torch.where(better, z, kept), torch.where(better, residual, kept_residual)
            z = z - _rows(total, z) / z[0].numel() / (slope + self.offset)
        return kept, kept_residual


def _rows(values: Tensor, like: Tensor) -> Tensor:
    """One value a row, in a shape that goes with images."""
    return values.reshape(-1, *[1] * (like.ndim - 1))


@dataclass(frozen=True, kw_only=True)
class ForwardStep(ImplicitSteps):
    """Take back a share of what the sampling step misses ``after`` by: ``z - rate (step(z) - after)``.

    Args:
        rate: that share.

    Source: Hong et al., "On Exact Inversion of DPM-Solvers" (CVPR 2024), the forward step method.
    """

    rate: float = 0.5

    def undo(self, step: Step) -> tuple[Tensor, Tensor]:
        """See :class:`ImplicitSteps`."""
        z = step.after
        missed = torch.zeros_like(z)
        for _ in range(self.iterations):
            missed = step.forward(z) - step.after
            z = z - self.rate * missed
        return z, missed
