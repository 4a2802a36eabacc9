"""One step of DDIM, deterministic or stochastic, for every step of a chain at once, in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fixpoint_diffusion.schedules import PREDICTION_TYPES, NoiseSchedule, check_choice


def wide(x: Tensor) -> Tensor:
    """x in float64 (float32 on devices without it): sums over a chain cancel, 1 / sqrt(alpha_T) is about 157."""
    return x.to(torch.float32 if x.device.type == "mps" else torch.float64)


@dataclass(frozen=True, eq=False)
class Transitions:
    r"""The coefficients of a chain of T sampling steps (DDIM, Eq. 12 and 16; DEQ-DDIM, Eq. 20).

    Step k takes a latent at signal level ``a = alphas[k]`` to one at ``a' = alphas_prev[k]``::

        x' = sqrt(a') x_0 + sqrt(1 - a' - sigma^2) eps + sigma noise
        sigma = eta sqrt((1 - a / a') (1 - a') / (1 - a))

    where ``(x_0, eps)`` are what the denoiser's output says about the latent. Make one with :meth:`of`.

    Attributes:
        timesteps: ``(T,)`` int64, descending: what the denoiser is told at each step.
        alphas: ``(T,)`` float64, the signal level (cumulative alpha) that each step starts from.
        alphas_prev: ``(T,)`` float64, the one it arrives at (that of the timestep before it in the forward process).
        sigma: ``(T,)`` float64, standard deviation of the noise that each step adds; 0 at a last step that ends at 1.
        prediction_type: what the denoiser predicts.
    """

    timesteps: Tensor
    alphas: Tensor
    alphas_prev: Tensor
    sigma: Tensor
    prediction_type: str

    @classmethod
    def of(
        cls, schedule: NoiseSchedule, timesteps: Tensor, *, eta: float = 0.0, prediction_type: str = "epsilon"
    ) -> Transitions:
        """The coefficients for the given timesteps.

        Args:
            schedule: the noise schedule; its ``final_alpha`` is where the last step arrives.
            timesteps: ``(T,)`` integers, descending, within the schedule.
            eta: share of DDPM's noise: 0 is deterministic, 1 is DDPM. More is legal as long as no step adds more noise
                than the latent it leads to may hold.
            prediction_type: ``"epsilon"``, ``"v_prediction"`` or ``"sample"``.

        Raises:
            TypeError: timesteps that are no tensor of integers.
            ValueError: timesteps that do not descend within the schedule, an eta below 0 or above the largest legal one
                (which the message names), an unknown prediction type, or ``"epsilon"`` at a timestep without signal.

        Example:
            >>> schedule = NoiseSchedule.linear()
            >>> steps = Transitions.of(schedule, schedule.timesteps(4), eta=1.0)
            >>> steps.sigma
            tensor([0.9413, 0.6645, 0.0100, 0.0000], dtype=torch.float64)
        """
        check_choice("prediction_type", prediction_type, PREDICTION_TYPES)
        timesteps = _check_timesteps(timesteps, len(schedule))
        alphas = schedule.alphas_cumprod[timesteps]
        alphas_prev = torch.cat([alphas[1:], torch.tensor([schedule.final_alpha], dtype=torch.float64)])
        if prediction_type == "epsilon" and alphas[0] == 0:
            raise ValueError(
                f"timestep {int(timesteps[0])} holds no signal (zero terminal SNR), where a prediction of the noise "
                "says nothing about the image: use a denoiser that predicts v or the sample, or leave that timestep out"
            )
        share = 1 - alphas / alphas_prev
        if not eta >= 0:
            raise ValueError(f"eta must be a number of at least 0, got {eta}")
        # 1 - a' - sigma^2 >= 0 for every step that arrives at a noisy latent.
        bounds = ((1 - alphas) / share).sqrt()[alphas_prev < 1]
        largest = float(bounds.min()) if len(bounds) else float("inf")
        if eta > largest * (1 + 1e-12):
            raise ValueError(
                f"eta={eta:g} asks a step for more noise than its latent may hold (a negative variance for what is "
                f"left of the old noise); the largest legal eta for these timesteps is {largest:.6g}"
            )
        sigma = eta * (share * (1 - alphas_prev) / (1 - alphas)).sqrt()
        return cls(timesteps, alphas, alphas_prev, sigma, prediction_type)

    def predict(self, x: Tensor, out: Tensor, k: int | slice | Tensor) -> tuple[Tensor, Tensor]:
        """What the denoiser's outputs say about the latents: ``(x_0, eps)`` with ``x = sqrt(a) x_0 + sqrt(1 - a) eps``.

        Args:
            x: latents, ``(B, *shape)`` for one step k, ``(B, n, *shape)`` for a slice of n steps, ``(N, *shape)`` for
                a tensor of N steps, one for each row.
            out: the denoiser's outputs for them, of the same shape.
            k: which step or steps.
        """
        signal, noise = self._like(self.alphas.sqrt(), x, k), self._like((1 - self.alphas).sqrt(), x, k)
        if self.prediction_type == "epsilon":
            return (x - noise * out) / signal, out
        if self.prediction_type == "v_prediction":
            return signal * x - noise * out, signal * out + noise * x
        return out, (x - signal * out) / noise

    def step(self, x: Tensor, out: Tensor, k: int | slice | Tensor, noise: Tensor | None = None) -> Tensor:
        """The latents after step (or steps) k, each from the one before it.

        Args:
            x, out, k: as for :meth:`predict`.
            noise: standard normal, of the same shape; None where sigma is 0.
        """
        x_0, eps = self.predict(x, out, k)
        after = self._like(self.alphas_prev.sqrt(), x, k) * x_0 + self._like(self._direction(), x, k) * eps
        return after if noise is None else after + self._like(self.sigma, x, k) * noise

    def cumulative(self, x: Tensor, out: Tensor, noise: Tensor | None = None) -> Tensor:
        """All latents, each as the sum of all steps before it (DEQ-DDIM, Eq. 10; stochastic: Eq. 22 and 23).

        With ``y = x / sqrt(a)`` a step is ``y' = y + (r - s) eps + q noise``, where ``s = sqrt((1 - a) / a)``,
        ``r = sqrt((1 - a' - sigma^2) / a')`` and ``q = sigma / sqrt(a')``: the equations are one cumulative sum.
        It starts after the first step, whose input x_T is known, because y does not exist where there is no signal.

        Args:
            x: the latents that each step starts from, ``(B, T, *shape)``; the first is x_T.
            out: the denoiser's outputs for them, of the same shape.
            noise: standard normal, of the same shape; None where sigma is 0.

        Returns:
            The latents after each step, ``(B, T, *shape)``.
        """
        rest = slice(1, None)
        begin = self.step(x[:, :1], out[:, :1], slice(0, 1), None if noise is None else noise[:, :1])
        start = begin / self._like(self.alphas_prev.sqrt(), x, slice(0, 1))
        _, eps = self.predict(x[:, rest], out[:, rest], rest)
        before = ((1 - self.alphas) / self.alphas).sqrt()
        change = self._like(self._direction() / self.alphas_prev.sqrt() - before, x, rest) * eps
        if noise is not None:
            change = change + self._like(self.sigma / self.alphas_prev.sqrt(), x, rest) * noise[:, rest]
        sums = torch.cat([start, change], dim=1).cumsum(dim=1)
        return self._like(self.alphas_prev.sqrt(), x, slice(None)) * sums

    def _direction(self) -> Tensor:
        """Weight of eps in the latent that each step arrives at; rounding must not make it the root of -1e-17."""
        return (1 - self.alphas_prev - self.sigma.square()).clamp(min=0).sqrt()

    @staticmethod
    def _like(coefficients: Tensor, x: Tensor, k: int | slice | Tensor) -> Tensor:
        """The coefficients of the steps k, shaped to multiply x."""
        chosen = coefficients.to(device=x.device, dtype=x.dtype)[k]
        if isinstance(k, int):
            return chosen
        leading = 1 if isinstance(k, Tensor) else 2
        return chosen.reshape(-1, *[1] * (x.ndim - leading))


def _check_timesteps(timesteps: Tensor, n: int) -> Tensor:
    if not isinstance(timesteps, Tensor) or timesteps.is_floating_point() or timesteps.dtype == torch.bool:
        found = timesteps.dtype if isinstance(timesteps, Tensor) else type(timesteps).__name__
        raise TypeError(f"timesteps must be a tensor of integers, got {found}")
    timesteps = timesteps.detach().to("cpu", torch.int64)
    if timesteps.ndim != 1 or len(timesteps) == 0:
        raise ValueError(f"timesteps must have shape (T,) with T >= 1, got {tuple(timesteps.shape)}")
    if timesteps[0] >= n or timesteps[-1] < 0 or not bool((timesteps.diff() < 0).all()):
        raise ValueError(f"timesteps must descend strictly within 0 .. {n - 1}, got {timesteps.tolist()}")
    return timesteps
