"""FPDM as a denoiser for the chains and the samplers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from fixpoint import Solver
from fixpoint_diffusion.denoisers.transformer import TransformerDenoiser
from fixpoint_diffusion.models import FPDM
from fixpoint_diffusion.models.fpdm.model import check_iterations
from fixpoint_diffusion.processes import GaussianPrior


class FPDMDenoiser(TransformerDenoiser):
    """An FPDM as a denoiser: ``denoiser(x, t)`` returns the network's raw output for ``x`` ``(N, C, H, W)``.

    Every call starts the layer anew from the pre blocks' output, so that a row's result depends on that row alone;
    reuse between timesteps belongs to :func:`~fixpoint_diffusion.sampling.sample_fpdm`. A model in training mode is
    called as in training: S-JFB draws the iterations.

    Args:
        model: The model.
        schedule_config: Configuration of the noise schedule it was trained with, as a diffusers scheduler's.
        depth: Iterations of the layer per call; None: solve to ``rtol``.
        rtol: Relative tolerance of the layer's solve; None: 1e-3. Not with ``depth``. Rows that miss it are warned of.
        max_evals: Bound on evaluations of that solve; None: 50. Not with ``depth``.
        solver: Solver of the layer. None: plain iteration with ``depth``, and ``Anderson()`` to a tolerance, because
            plain iteration does not converge for every image.
        prior: What is known of the images, from which chains predict how latents move; None: a plain guess.
        learned_variance: Whether the output keeps what the model says of the variance, ``(N, 2 C, H, W)``; for a
            model with ``learn_sigma``. False: it is dropped.

    Raises:
        ValueError: A depth or rtol that is not positive; a learned variance of a model that has none.

    >>> from fixpoint_diffusion.models import FPDMConfig
    >>> denoiser = FPDMDenoiser(FPDM(FPDMConfig(width=16, heads=2, num_classes=10)).eval(), depth=4)
    >>> x, t = torch.randn(2, 1, 8, 8), torch.tensor([3, 999])
    >>> denoiser(x, t, class_labels=torch.tensor([7, 10])).shape
    torch.Size([2, 1, 8, 8])
    >>> denoiser.prediction_type, denoiser.sample_shape, denoiser.conditioning["class_labels"].null_label
    ('v_prediction', (1, 8, 8), 10)
    """

    def __init__(
        self,
        model: FPDM,
        *,
        schedule_config: Mapping[str, Any] | None = None,
        depth: int | None = None,
        rtol: float | None = None,
        max_evals: int | None = None,
        solver: Solver | None = None,
        prior: GaussianPrior | None = None,
        learned_variance: bool = False,
    ) -> None:
        if depth is not None and depth < 1:
            raise ValueError(f"depth must be a positive number of iterations, or None, got {depth}")
        if rtol is not None and not rtol > 0:
            raise ValueError(f"rtol must be positive, got {rtol}")
        check_iterations(depth, rtol=rtol, max_evals=max_evals)
        super().__init__(model, schedule_config=schedule_config, prior=prior, learned_variance=learned_variance)
        self.depth = depth
        self.rtol = 1e-3 if rtol is None and depth is None else rtol
        self.max_evals = 50 if max_evals is None and depth is None else max_evals
        self.solver = solver

    def _options(self) -> dict[str, Any]:
        if self.depth is not None:
            return {"depth": self.depth, "solver": self.solver}
        if self.model.training and torch.is_grad_enabled():
            return {"solver": self.solver}
        return {"rtol": self.rtol, "max_evals": self.max_evals, "solver": self.solver}

    def __repr__(self) -> str:
        iterations = f"rtol={self.rtol}" if self.depth is None else f"depth={self.depth}"
        return f"FPDMDenoiser({iterations}, prediction_type={self.prediction_type!r}, sample_shape={self.sample_shape})"
