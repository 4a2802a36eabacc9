"""One step of sampling from an FPDM: the model, guidance, and what leads to the next latent."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fixpoint import Solution
from fixpoint_diffusion.denoisers.modules import compute_dtype
from fixpoint_diffusion.models.fpdm import FPDM
from fixpoint_diffusion.processes import NoiseSchedule, Transitions, step_noise, wide


def transitions_of(
    model: FPDM, schedule: NoiseSchedule, *, steps: int, eta: float, variance_type: str, spacing: str
) -> Transitions:
    """The steps of a sampling run; arguments as for :func:`~fixpoint_diffusion.sampling.sample_fpdm`."""
    return Transitions.of(
        schedule,
        schedule.timesteps(steps, spacing),
        eta=eta,
        prediction_type=model.config.prediction_type,
        variance_type=variance_type,
    )


@dataclass(frozen=True, eq=False, kw_only=True)
class StepFunction:
    """The steps of a sampling run as a function of latents and starting states of the layer.

    Attributes:
        model: The model.
        transitions: The coefficients of every step.
        y: Classes ``(B,)`` of a conditional model; None: no class.
        guidance: Classifier-free guidance; 1 is none.

    Raises:
        ValueError: If guidance is not finite or asked for without classes, or a learned variance of a model that has
            none.
    """

    model: FPDM
    transitions: Transitions
    y: Tensor | None = None
    guidance: float = 1.0

    def __post_init__(self) -> None:
        if self.transitions.learned_variance and not self.model.config.learn_sigma:
            raise ValueError(
                f"variance_type={self.transitions.variance_type!r} needs a model that learned a variance, and this "
                "FPDM did not (learn_sigma is False)"
            )
        if not math.isfinite(self.guidance):
            raise ValueError(f"guidance must be finite, got {self.guidance}")
        if self.guidance != 1 and (self.y is None or self.model.config.num_classes is None):
            raise ValueError("guidance needs the classes y, and a model that has classes")

    def check_start(self, x_T: Tensor) -> None:
        """Refuse noise that is none, and classes that are not those of its images or of the model.

        Raises:
            ValueError: Names what was found and what is expected.
        """
        shape, classes, y = self.model.config.sample_shape, self.model.config.num_classes, self.y
        if not x_T.is_floating_point() or x_T.shape[1:] != shape or not len(x_T):
            expected = f"(N, {', '.join(map(str, shape))}), N at least 1"
            raise ValueError(f"x_T must be floats {expected}; got {x_T.dtype} {tuple(x_T.shape)}")
        if y is None or classes is None:  # classes of an unconditional model are refused by the model
            return
        if not isinstance(y, Tensor) or y.shape != x_T.shape[:1] or y.dtype not in (torch.int64, torch.int32):
            found = f"{y.dtype} {tuple(y.shape)}" if isinstance(y, Tensor) else repr(y)
            raise ValueError(f"y must be int64 with one class for each of {len(x_T)} images, got {found}")
        if not bool(((y >= 0) & (y <= classes)).all()):
            raise ValueError(f"y must be from 0 to {classes} ({classes}: no class), got {y.tolist()}"[:200])

    @property
    def halves(self) -> int:
        """Rows of the network for each image: 2 with guidance."""
        return 1 if self.guidance == 1 else 2

    def inputs(
        self, latent: Tensor, k: int | Tensor, rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """What the network is called with: images, timesteps and classes, with guidance for both halves.

        Args:
            latent: ``(N, C, H, W)``.
            k: The step of all rows, or one for each ``(N,)``.
            rows: The sample of each row ``(N,)``; None: 0, 1, 2, ...
        """
        images, t = latent.to(compute_dtype(self.model, latent.dtype)), self.transitions.timesteps.to(latent.device)[k]
        y = self.y if self.y is None or rows is None else self.y[rows]
        if self.halves == 1:
            return images, t, y
        assert y is not None
        without = torch.full_like(y, self.model.config.num_classes or 0)
        return torch.cat([images, images]), t if t.ndim == 0 else torch.cat([t, t]), torch.cat([without, y])

    def __call__(
        self,
        latent: Tensor,
        z0: Tensor | None,
        k: int | Tensor,
        noise: Tensor | None,
        rows: Tensor | None = None,
        **solve_options: Any,
    ) -> tuple[Tensor, Solution]:
        """The latents after the steps, and the layer's solution.

        Args:
            latent, k, rows: As for :meth:`inputs`.
            z0: Where the layer starts, a state for each row of the network, with guidance those without class first.
            noise: Standard normal ``(N, C, H, W)``; None where the steps add none.
            **solve_options: Of the layer, as for ``FPDM.forward``.
        """
        images, t, y = self.inputs(latent, k, rows)
        z0 = None if z0 is None else z0.to(images.dtype)
        output, solution = self.model(images, t, y, z0, return_solution=True, **solve_options)
        channels = self.model.config.in_channels
        if self.halves == 2:
            # What is said of the variance is that of the rows with a class, as in Guided.
            without, output = output.chunk(2)
            guided = without[:, :channels] + self.guidance * (output[:, :channels] - without[:, :channels])
            output = torch.cat([guided, output[:, channels:]], dim=1)
        if not self.transitions.learned_variance:
            output = output[:, :channels]
        after = self.transitions.step(wide(latent), wide(output), k, noise, rows)
        return after.to(latent.dtype), solution

    def noise(self, x_T: Tensor, steps: list[int], seed: int, first_sample: int) -> Tensor | None:
        """The noise of the given steps ``(B, len(steps), C, H, W)``; None where the transitions add none."""
        if not (self.transitions.learned_variance or bool((self.transitions.sigma > 0).any())):
            return None
        samples = range(first_sample, first_sample + len(x_T))
        return step_noise(seed, samples, steps, x_T.shape[1:], dtype=wide(x_T[:0]).dtype, device=x_T.device)
