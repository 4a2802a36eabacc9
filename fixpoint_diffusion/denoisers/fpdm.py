"""FPDM as a denoiser for the chains and the samplers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fixpoint import Picard, Solver
from fixpoint_diffusion.denoisers.modules import compute_dtype, execution_device
from fixpoint_diffusion.denoisers.protocol import CLASS_LABELS, ConditioningInput
from fixpoint_diffusion.models import FPDM, FPDMConfig
from fixpoint_diffusion.processes import GaussianPrior


class FPDMDenoiser:
    """An FPDM as a denoiser: ``denoiser(x, t)`` returns the network's raw output for ``x`` ``(N, C, H, W)``.

    Every call starts the layer anew from the pre blocks' output, so that a row's result depends on that row alone;
    reuse between timesteps belongs to :func:`~fixpoint_diffusion.sampling.sample_fpdm`. A model in training mode is
    called as in training: S-JFB draws the iterations.

    Args:
        model: The model.
        schedule_config: Configuration of the noise schedule it was trained with, as a diffusers scheduler's.
        depth: Iterations of the layer per call; None: solve to ``rtol``.
        rtol: Relative tolerance of the layer's solve, unused with ``depth``.
        max_evals: Bound on evaluations of that solve.
        solver: Solver of the layer. Plain iteration does not converge for every image: to a tolerance, ``Anderson()``
            is safer.
        prior: What is known of the images, from which chains predict how latents move; None: a plain guess.
        learned_variance: Whether the output keeps what the model says of the variance, ``(N, 2 C, H, W)``; for a
            model with ``learn_sigma``. False: it is dropped.

    Raises:
        ValueError: A depth or rtol that is not positive; a learned variance of a model that has none.

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
        rtol: float = 1e-3,
        max_evals: int = 50,
        solver: Solver = Picard(),  # noqa: B008 - immutable
        prior: GaussianPrior | None = None,
        learned_variance: bool = False,
    ) -> None:
        if depth is not None and depth < 1:
            raise ValueError(f"depth must be a positive number of iterations, or None, got {depth}")
        if not rtol > 0:
            raise ValueError(f"rtol must be positive, got {rtol}")
        if learned_variance and not model.config.learn_sigma:
            raise ValueError("this FPDM learned no variance (learn_sigma is False)")
        self.model = model
        self.schedule_config = None if schedule_config is None else dict(schedule_config)
        self.depth = depth
        self.rtol = rtol
        self.max_evals = max_evals
        self.solver = solver
        self.prior = prior
        self.learned_variance = learned_variance
        self.prediction_type: str = model.config.prediction_type
        self.sample_shape: tuple[int, ...] = model.config.sample_shape
        self.conditioning: Mapping[str, ConditioningInput] = class_inputs(model.config)

    @property
    def device(self) -> torch.device:
        """Where the network computes."""
        return execution_device(self.model)

    def __call__(self, x: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """Raw output ``(N, C, H, W)``, in x's dtype, for ``x`` ``(N, C, H, W)`` at timesteps ``t`` ``(N,)``.

        ``class_labels`` ``(N,)`` are those of a conditional model; None: no class.
        """
        inputs = x.to(compute_dtype(self.model, x.dtype))
        if self.depth is not None:
            output = self.model(inputs, t, class_labels, depth=self.depth, solver=self.solver)
        elif self.model.training and torch.is_grad_enabled():
            output = self.model(inputs, t, class_labels, solver=self.solver)
        else:
            output = self.model(inputs, t, class_labels, rtol=self.rtol, max_evals=self.max_evals, solver=self.solver)
        channels = x.shape[1] * (2 if self.learned_variance else 1)
        return output[:, :channels].to(x.dtype)

    def __repr__(self) -> str:
        iterations = f"rtol={self.rtol}" if self.depth is None else f"depth={self.depth}"
        return f"FPDMDenoiser({iterations}, prediction_type={self.prediction_type!r}, sample_shape={self.sample_shape})"


def class_inputs(config: FPDMConfig) -> dict[str, ConditioningInput]:
    """What an FPDM of that shape takes beside x and t: class labels, if it was made for classes."""
    classes = config.num_classes
    return {} if classes is None else {CLASS_LABELS: ConditioningInput(num_classes=classes, null_label=classes)}
