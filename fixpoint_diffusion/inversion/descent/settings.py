"""The settings that DEQ-DDIM's inversion was run with, as published and as released."""

from __future__ import annotations

from functools import partial
from typing import Literal, get_args

import torch

from fixpoint import Anderson, Blockwise, Phantom, Solver
from fixpoint_diffusion.chains import SamplingChain
from fixpoint_diffusion.inversion.descent.gradients import Gradient, LinearTerm
from fixpoint_diffusion.inversion.descent.optimised import OptimisedInverse

Dataset = Literal["cifar10", "celeba", "lsun-bedroom", "lsun-church"]
Reading = Literal["paper", "released-code"]
# Epochs with the parallel chain, with the sequential one, and with the stochastic one.
_EPOCHS: dict[str, tuple[int, int, int]] = {
    "cifar10": (400, 1000, 1000),
    "celeba": (400, 2500, 1500),
    "lsun-bedroom": (500, 2000, 500),
    "lsun-church": (500, 2000, 500),
}


def deq_ddim_inversion_settings(
    chain: SamplingChain,
    reading: Reading = "paper",
    *,
    dataset: Dataset = "cifar10",
    baseline: bool = False,
) -> OptimisedInverse:
    """The inversion with which DEQ-DDIM (Pokle et al., 2022, Appendix A) found the noise behind images.

    Both readings minimise the squared distance (Eq. 14) by Adam with a learning rate of 0.01. They differ in this:

    - Solver: Anderson acceleration with a history of 5 to a tolerance of 1e-3, one set of coefficients for a sample's
      trajectory; in the code a history of 3, damping 0.9, a ridge of 1e-3, one set for each latent, to 1e-2.
    - Gradient: a damped one-step gradient; in the code, through the linear term of the chain alone.
    - Start: noise, and every latent equal to it; in the code, what plain DDIM inversion finds, latents too.
    - A sample is done at a loss of 0.5 for CIFAR10 and 2 for the others; in the code, of 0.5.

    The paper gives no damping for its gradient: 0.1 is that of the code, and Adam's steps hardly depend on it. At most
    15 evaluations a solve, 50 for a stochastic chain.

    Three things are this package's: each solve starts from the latents of the epoch before, the ridge weighs the
    coefficients of an orthonormal basis of the differences (the authors' is absolute), and what is kept is the x_T that
    had the least loss (theirs is the one after it).

    Args:
        chain: the chain that is to be inverted.
        reading: ``"paper"`` or ``"released-code"``.
        dataset: whose number of epochs and whose stopping loss. The losses are sums over the entries of an image, so
            for images of another size scale ``stop``.
        baseline: the method to compare with: backpropagation through the sequential sampler (Algorithm 1).

    Returns:
        The method, for :func:`~fixpoint_diffusion.invert` or its own ``descend``; ``dataclasses.replace`` changes
        options of it.

    Raises:
        ValueError: another reading or dataset.

    Example:
        >>> from fixpoint_diffusion import DDIMChain, NoiseSchedule
        >>> chain = DDIMChain(lambda x, t: 0.9 * x, torch.ones(1, 3), NoiseSchedule.linear(), steps=100)
        >>> method = deq_ddim_inversion_settings(chain)
        >>> method.epochs, method.stop, method.gradient
        (400, 0.5, Phantom(steps=1, damping=0.1))
    """
    if reading not in get_args(Reading):
        raise ValueError(f"reading must be 'paper' or 'released-code', got {reading!r}")
    if dataset not in _EPOCHS:
        raise ValueError(f"dataset must be one of {', '.join(_EPOCHS)}, got {dataset!r}")
    parallel, sequential, stochastic = _EPOCHS[dataset]
    if dataset == "cifar10" and chain.steps <= 10:
        sequential = 3000
    paper = reading == "paper"
    anderson = Anderson(memory=5) if paper else Anderson(memory=3, damping=0.9, ridge=1e-3)
    solver: Solver = anderson if paper else Blockwise(anderson, blocks=chain.steps)
    gradient: Gradient = Phantom(steps=1, damping=0.1) if paper else LinearTerm(damping=0.1)
    return OptimisedInverse(
        gradient="sequential" if baseline else gradient,
        solver=solver,
        rtol=1e-3 if paper else 1e-2,
        max_evals=15 if chain.noise is None else 50,
        optimiser=partial(torch.optim.Adam, lr=0.01),
        epochs=sequential if baseline else parallel if chain.noise is None else stochastic,
        stop=0.5 if dataset == "cifar10" or not paper else 2.0,
        start="noise" if paper else "encoded",
    )
