"""One step of DDIM, deterministic or stochastic, for every step of a chain at once, in float64."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fixpoint_diffusion.processes.schedules import PREDICTION_TYPES, NoiseSchedule, check_choice


def wide(x: Tensor) -> Tensor:
    """x in float64 (float32 on devices without it): sums over a chain cancel, 1 / sqrt(alpha_T) is about 157."""
    return x.to(torch.float32 if x.device.type == "mps" else torch.float64)


@dataclass(frozen=True, eq=False, kw_only=True)
class Transitions:
    r"""The coefficients of a chain of T sampling steps (DDIM, Eq. 12 and 16; DEQ-DDIM, Eq. 20).

    Step k takes a latent at signal level ``a = alphas[k]`` to one at ``a' = alphas_prev[k]``::

        x' = sqrt(a') x_0 + direction eps + sigma noise
        sigma = eta sqrt((1 - a / a') (1 - a') / (1 - a)),  direction = sqrt(1 - a' - sigma^2)

    where ``(x_0, eps)`` are what the denoiser's output says about the latent. Make one with :meth:`of`, or with
    :meth:`between` for levels that are not those of a schedule.

    Attributes:
        timesteps: ``(T,)`` int64: what the denoiser is told at each step.
        alphas: ``(T,)`` float64, the signal level (cumulative alpha) that each step starts from.
        alphas_prev: ``(T,)`` float64, the one it arrives at (that of the timestep before it in the forward process).
        direction: ``(T,)`` float64, the weight of eps in the latent that each step arrives at.
        sigma: ``(T,)`` float64, standard deviation of the noise that each step adds; 0 at a last step that ends at 1.
        prediction_type: what the denoiser predicts.
        clip_sample: largest absolute value of a predicted x_0; None: as predicted.
        noise_from_clipped: whether eps is derived anew from the clipped x_0 (as DDPM does, and diffusers' DDIM when
            told ``use_clipped_model_output``), or stays what the denoiser said.
    """

    timesteps: Tensor
    alphas: Tensor
    alphas_prev: Tensor
    direction: Tensor
    sigma: Tensor
    prediction_type: str = "epsilon"
    clip_sample: float | None = None
    noise_from_clipped: bool = False
    _tables: dict[tuple[str, torch.device, torch.dtype], Tensor] = field(default_factory=dict, init=False, repr=False)

    @property
    def steps(self) -> int:
        """T, the number of steps."""
        return len(self.timesteps)

    @classmethod
    def of(
        cls,
        schedule: NoiseSchedule,
        timesteps: Tensor,
        *,
        eta: float = 0.0,
        prediction_type: str = "epsilon",
        clip_sample: float | None = None,
    ) -> Transitions:
        """The coefficients for the given timesteps, each step arriving where the next one starts.

        Args:
            schedule: the noise schedule; its ``final_alpha`` is where the last step arrives.
            timesteps: ``(T,)`` integers, descending, within the schedule.
            eta: share of DDPM's noise: 0 is deterministic, 1 is DDPM. More is legal as long as no step adds more noise
                than the latent it leads to may hold.
            prediction_type: ``"epsilon"``, ``"v_prediction"`` or ``"sample"``.
            clip_sample: largest absolute value of a predicted x_0; None: as predicted.

        Raises:
            TypeError: timesteps that are no tensor of integers.
            ValueError: timesteps that do not descend within the schedule, an eta below 0 or above the largest legal one
                (which the message names), an unknown prediction type, ``"epsilon"`` at a timestep without signal, or a
                clip_sample that is not positive.

        Example:
            >>> schedule = NoiseSchedule.linear()
            >>> steps = Transitions.of(schedule, schedule.timesteps(4), eta=1.0)
            >>> steps.sigma
            tensor([0.9413, 0.6645, 0.0100, 0.0000], dtype=torch.float64)
        """
        timesteps = check_timesteps(timesteps, len(schedule))
        alphas = schedule.alphas_cumprod[timesteps]
        return cls.between(
            timesteps,
            alphas,
            torch.cat([alphas[1:], torch.tensor([schedule.final_alpha], dtype=torch.float64)]),
            eta=eta,
            prediction_type=prediction_type,
            clip_sample=clip_sample,
        )

    @classmethod
    def between(
        cls,
        timesteps: Tensor,
        alphas: Tensor,
        alphas_prev: Tensor,
        *,
        eta: float = 0.0,
        prediction_type: str = "epsilon",
        clip_sample: float | None = None,
        noise_from_clipped: bool = False,
    ) -> Transitions:
        """The coefficients of steps between given signal levels.

        A step need not arrive at the level that the next one starts from: samplers that take every
        ``N // T``-th timestep before the current one do not, when T does not divide N.

        Args:
            timesteps, alphas, alphas_prev, prediction_type, clip_sample, noise_from_clipped: the attributes of those
                names.
            eta: as for :meth:`of`.

        Raises:
            ValueError: as :meth:`of`, timesteps apart.

        Example:
            >>> levels = torch.tensor([0.1, 0.5], dtype=torch.float64)
            >>> Transitions.between(torch.tensor([900, 400]), levels, torch.tensor([0.4, 1.0]).double()).direction
            tensor([0.7746, 0.0000], dtype=torch.float64)
        """
        check_choice("prediction_type", prediction_type, PREDICTION_TYPES)
        if clip_sample is not None and not clip_sample > 0:
            raise ValueError(f"clip_sample must be a positive number or None, got {clip_sample}")
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
        kept = alphas / alphas_prev * (1 - alphas_prev) / (1 - alphas)
        return cls(
            timesteps=timesteps,
            alphas=alphas,
            alphas_prev=alphas_prev,
            # 1 - a' - sigma^2, written so that nothing cancels at eta = 1; above, rounding must not leave -1e-17.
            direction=((1 - alphas_prev) * (1 - eta**2 + eta**2 * kept)).clamp(min=0).sqrt(),
            sigma=eta * (share * (1 - alphas_prev) / (1 - alphas)).sqrt(),
            prediction_type=prediction_type,
            clip_sample=clip_sample,
            noise_from_clipped=noise_from_clipped,
        )

    def predict(self, x: Tensor, out: Tensor, k: int | slice | Tensor) -> tuple[Tensor, Tensor]:
        """What the denoiser's outputs say about the latents: ``(x_0, eps)`` with ``x = sqrt(a) x_0 + sqrt(1 - a) eps``.

        With ``clip_sample``, x_0 is clipped, and the equation holds only if eps is derived from the clipped x_0.

        Args:
            x: latents, ``(B, *shape)`` for one step k, ``(B, n, *shape)`` for a slice of n steps, ``(N, *shape)`` for
                a tensor of N steps, one for each row.
            out: the denoiser's outputs for them, of the same shape.
            k: which step or steps.
        """
        signal, noise = self._like("signal", x, k), self._like("noise", x, k)
        if self.prediction_type == "epsilon":
            x_0, eps = (x - noise * out) / signal, out
        elif self.prediction_type == "v_prediction":
            x_0, eps = signal * x - noise * out, signal * out + noise * x
        else:
            x_0, eps = out, (x - signal * out) / noise
        if self.clip_sample is not None:
            x_0 = x_0.clamp(-self.clip_sample, self.clip_sample)
            if self.noise_from_clipped:
                eps = (x - signal * x_0) / noise
        return x_0, eps

    def step(self, x: Tensor, out: Tensor, k: int | slice | Tensor, noise: Tensor | None = None) -> Tensor:
        """The latents after step (or steps) k, each from the one before it.

        Args:
            x, out, k: as for :meth:`predict`.
            noise: standard normal, of the same shape; None where sigma is 0.
        """
        x_0, eps = self.predict(x, out, k)
        after = self._like("signal_prev", x, k) * x_0 + self._like("direction", x, k) * eps
        return after if noise is None else after + self._like("sigma", x, k) * noise

    def cumulative(self, x: Tensor, out: Tensor, noise: Tensor | None = None) -> Tensor:
        """All latents, each as the sum of all steps before it (DEQ-DDIM, Eq. 10; stochastic: Eq. 22 and 23).

        A step is ``x' = sqrt(a' / a) x + change``. Divided by the product of all those factors so far, it is
        ``y' = y + change / product``: the equations are one cumulative sum. It starts after the first step, whose
        input x_T is known, because that factor is infinite where there is no signal.

        Args:
            x: the latents that each step starts from, ``(B, T, *shape)``; the first is x_T.
            out: the denoiser's outputs for them, of the same shape.
            noise: standard normal, of the same shape; None where sigma is 0.

        Returns:
            The latents after each step, ``(B, T, *shape)``.
        """
        every, rest = slice(None), slice(1, None)
        product = self._like("product", x, every)
        after = self.step(x, out, every, noise)
        change = after[:, rest] - self._like("factor", x, rest) * x[:, rest]
        return product * (torch.cat([after[:, :1], change], dim=1) / product).cumsum(dim=1)

    def _like(self, name: str, x: Tensor, k: int | slice | Tensor) -> Tensor:
        """A coefficient of the steps k, shaped to multiply x."""
        chosen = self._table(name, x)[k]
        if isinstance(k, int):
            return chosen
        leading = 1 if isinstance(k, Tensor) else 2
        return chosen.reshape(-1, *[1] * (x.ndim - leading))

    def _table(self, name: str, x: Tensor) -> Tensor:
        """A coefficient of all steps ``(T,)`` where x is; copied there once."""
        key = name, x.device, x.dtype
        if key not in self._tables:
            factor = (self.alphas_prev / self.alphas).sqrt()
            values = {
                "signal": self.alphas.sqrt(),
                "noise": (1 - self.alphas).sqrt(),
                "signal_prev": self.alphas_prev.sqrt(),
                "direction": self.direction,
                "sigma": self.sigma,
                "factor": factor,
                "product": torch.cat([self.alphas_prev[:1].sqrt(), factor[1:]]).cumprod(0),
            }
            self._tables[key] = values[name].to(device=x.device, dtype=x.dtype)
        return self._tables[key]


def check_timesteps(timesteps: Tensor, n: int) -> Tensor:
    """The timesteps as int64 on the CPU; raises unless they descend within a schedule of n."""
    if not isinstance(timesteps, Tensor) or timesteps.is_floating_point() or timesteps.dtype == torch.bool:
        found = timesteps.dtype if isinstance(timesteps, Tensor) else type(timesteps).__name__
        raise TypeError(f"timesteps must be a tensor of integers, got {found}")
    timesteps = timesteps.detach().to("cpu", torch.int64)
    if timesteps.ndim != 1 or len(timesteps) == 0:
        raise ValueError(f"timesteps must have shape (T,) with T >= 1, got {tuple(timesteps.shape)}")
    if timesteps[0] >= n or timesteps[-1] < 0 or not bool((timesteps.diff() < 0).all()):
        raise ValueError(f"timesteps must descend strictly within 0 .. {n - 1}, got {timesteps.tolist()}")
    return timesteps
