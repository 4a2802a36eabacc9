"""Loss and gradient of one epoch of DEQ-DDIM's inversion: run the chain from x_T, then differentiate."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from fixpoint import IFT, Backward, CausalQuasiNewton, Picard, solve
from fixpoint_diffusion.chains import SamplingChain
from fixpoint_diffusion.processes import wide


@dataclass(frozen=True, kw_only=True)
class LinearTerm:
    """The gradient through the linear part of the chain alone, as DEQ-DDIM's released code takes it.

    In the cumulative form of the chain, x_0 is a multiple of x_T plus what the denoiser adds. This rule differentiates
    the multiple and takes the rest for constants, so the network's Jacobian plays no part, and no product with it is
    needed. A true one-step gradient, ``JFB()``, also differentiates the denoiser's first call.

    Args:
        damping: factor of the gradient, in (0, 1]. Adam's steps hardly depend on it.

    Raises:
        ValueError: a damping outside (0, 1].

    Source: the code that Pokle, Geng, Kolter (NeurIPS 2022) released.

    Example:
        >>> LinearTerm()
        LinearTerm(damping=0.1)
    """

    damping: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.damping <= 1:
            raise ValueError(f"damping must lie in (0, 1], got {self.damping}")


Gradient = Backward | LinearTerm | Literal["sequential"]


@dataclass(frozen=True, eq=False, kw_only=True)
class Epoch:
    """What one epoch found, and what it cost.

    Attributes:
        loss: ``(B,)``, squared distance of the chain's x_0 from the image; the last known of samples that had ended.
        rounds: batched denoiser calls, those of the solve and those that were recorded for the gradient.
        evals: denoiser rows of these calls.
        products: batched products with the denoiser's Jacobian (each about as dear as two calls).
        product_rows: rows of these products.

    Example:
        See :class:`fixpoint_diffusion.inversion.OptimisedInverse`, whose history has one an epoch.
    """

    loss: Tensor
    rounds: int
    evals: int
    products: int
    product_rows: int


@dataclass(frozen=True, eq=False, kw_only=True)
class LossAndGradient:
    """Of the samples that were asked for, in their order."""

    loss: Tensor  # (N,)
    gradient: Tensor  # (N, *shape), of the loss by x_T; 0 where the loss is not finite
    trajectory: Tensor | None  # (N, T, *shape), where a parallel solve made it


def loss_and_gradient(
    chain: SamplingChain, x_0: Tensor, gradient: Gradient, solve_chain: Callable[[SamplingChain], Tensor]
) -> LossAndGradient:
    """The loss of each sample of ``chain``, and its gradient by x_T.

    Args:
        chain: the samples that are worked on, with an x_T that requires no gradient yet.
        x_0: their images, ``(N, *shape)``.
        gradient: as for :class:`OptimisedInverse`.
        solve_chain: finds all latents of the chain, without gradient; NaN for samples that are lost.
    """
    x_T = chain.x_T = chain.x_T.detach().requires_grad_()
    trajectory = None if gradient == "sequential" else solve_chain(chain)
    if isinstance(gradient, LinearTerm):
        assert trajectory is not None
        difference = wide(trajectory[:, -1]) - wide(x_0)
        slope = 2 * gradient.damping * linear_factor(chain)
        return LossAndGradient(
            loss=_squared(difference),
            gradient=(slope * difference).nan_to_num(0, 0, 0).to(x_T.dtype),
            trajectory=trajectory,
        )
    with torch.enable_grad():
        if trajectory is None:
            reached = chain.sequential()[:, -1]
        else:
            # Sweeps, the adjoint's too, want single steps. But through one step of one latent no gradient comes from
            # x_0 to x_T: rules of a few steps take the cumulative form.
            assert isinstance(gradient, Backward)
            form: SamplingChain | OneStepForm = chain
            if isinstance(gradient, IFT) and (
                gradient.solver is None or isinstance(gradient.solver, CausalQuasiNewton)
            ):
                form = OneStepForm(chain)
                gradient = replace(gradient, solver=gradient.solver or CausalQuasiNewton())
            known = torch.isfinite(trajectory)
            start = torch.where(known, trajectory, 0)
            solved = solve(form, start, solver=Picard(), backward=gradient, depth=0).value[:, -1]
            reached = torch.where(known[:, -1], solved, torch.nan)
        difference = wide(reached) - wide(x_0)
        loss = _squared(difference.detach())
        # The derivative of a square at infinity would be no number even where nothing asks for it.
        (found,) = torch.autograd.grad(_squared(difference[torch.isfinite(loss)]).sum(), x_T)
    return LossAndGradient(loss=loss, gradient=found.nan_to_num(0, 0, 0), trajectory=trajectory)


def _squared(difference: Tensor) -> Tensor:
    """Squared norm of each row; rows may be numbers."""
    return difference.reshape(len(difference), difference.shape[1:].numel()).square().sum(dim=1)


def linear_factor(chain: SamplingChain) -> Tensor:
    """By what x_0 grows with x_T where the denoiser's outputs are constants: ``sqrt(1 / alpha_T)`` for DDIM."""
    transitions = chain.transitions
    if float(transitions.alphas[0]) == 0:
        raise ValueError("LinearTerm needs an x_T that holds signal: this chain starts at zero terminal SNR")
    return (transitions.alphas_prev / transitions.alphas).prod().sqrt()


class OneStepForm:
    """A chain as the map that takes one step from every latent, with the slopes that sweeps over it start from."""

    batch_dims = 1

    def __init__(self, chain: SamplingChain) -> None:
        self._chain = chain
        self.slopes, self.basis = chain.slopes, chain.basis

    def __call__(self, z: Tensor) -> Tensor:
        return self._chain.one_step(z)


def part_of(chain: SamplingChain, x_T: Tensor, rows: Tensor, products: list[int]) -> SamplingChain:
    """The samples ``rows`` ``(N,)`` of a chain, started from ``x_T`` ``(N, *shape)``; counts calls from zero.

    The rows of each product with the denoiser's Jacobian are appended to ``products``.
    """
    part = copy.copy(chain)
    part.x_T = x_T
    part.noise = None if chain.noise is None else chain.noise[rows]
    part.conditioning = {name: value[rows] for name, value in chain.conditioning.items()}
    hook = chain.transitions.x0_hook
    if hook is not None:
        part.transitions = replace(chain.transitions, x0_hook=lambda x, step, sample: hook(x, step, rows[sample]))
    part.reset_counters()

    def denoise(x: Tensor, sample: Tensor, step: Tensor) -> Tensor:
        out = type(part).denoise(part, x, sample, step)
        if out.requires_grad:
            out.register_hook(lambda gradient: products.append(len(gradient)))
        return out

    vars(part)["denoise"] = denoise
    return part
