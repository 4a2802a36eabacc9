"""One step of a sampler, deterministic or stochastic, for every step of a chain at once, in float64."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fixpoint_diffusion.processes.ddim import ddim_weights
from fixpoint_diffusion.processes.predictions import DENOISER_PREDICTIONS, Reading
from fixpoint_diffusion.processes.schedules import NoiseSchedule, check_choice, check_timesteps
from fixpoint_diffusion.processes.step_values import StepValues, wide
from fixpoint_diffusion.processes.x0_hooks import X0Hook, apply_hook

_PART = 2**18  # entries of latents that are summed at a time: 2 MiB


@dataclass(frozen=True, eq=False, kw_only=True)
class Transitions:
    r"""The coefficients of a chain of T sampling steps (DDIM, Eq. 12 and 16; DEQ-DDIM, Eq. 20), and of other samplers.

    Step k takes a latent at signal level ``a = alphas[k]`` to one at ``a' = alphas_prev[k]``::

        x' = sqrt(a') x_0 + direction eps + sigma noise
        sigma = eta sqrt((1 - a / a') (1 - a') / (1 - a)),  direction = sqrt(1 - a' - sigma^2)

    where ``(x_0, eps)`` are what the denoiser's output says about the latent. Make one with :meth:`of`, or with
    :meth:`between` for levels that are not those of a schedule; :func:`solver_transitions` makes those of Euler,
    flow matching, DPM-Solver++ and others. Whatever the sampler, latents are ``sqrt(a) x_0 + sqrt(1 - a) eps``.

    Attributes:
        timesteps: ``(T,)``: what the denoiser is told at each step.
        alphas: ``(T,)`` float64, the signal level (cumulative alpha) that each step starts from.
        alphas_prev: ``(T,)`` float64, the one it arrives at (that of the timestep before it in the forward process).
        direction: ``(T,)`` float64, the weight of eps in the latent that each step arrives at.
        sigma: ``(T,)`` float64, standard deviation of the noise that each step adds; 0 at a last step that ends at 1.
            With a learned variance, the least that DDPM allows.
        prediction_type: what the denoiser predicts.
        x0_hook: what is done to every predicted x_0 before the step uses it, called as ``x0_hook(x_0, step, sample)``
            with rows ``(N, *shape)`` in float64 and, for each, its step and its sample, ``(N,)`` int64. It returns
            the rows to go on with. :class:`Clip` and :class:`DynamicThreshold` are two; None: as predicted.
        noise_from_clipped: whether eps is derived anew from the x_0 that the hook returned (as DDPM does, and DDIM in
            diffusers when told ``use_clipped_model_output``), or stays what the denoiser said.
        variance_type: ``"fixed_small"`` or ``"fixed_large"``: the noise has standard deviation ``sigma``. Otherwise the
            denoiser's output has twice the channels, and the second half is the variance of each entry
            (``"learned"``), or says where its logarithm lies between DDPM's two fixed ones, from -1 for the
            small to 1 for the large (``"learned_range"``; Nichol and Dhariwal, 2021, Eq. 15). No noise at timestep 0.
        history: ``(T, p)``: a multistep sampler adds ``history[k, j] (x_0 of step k - 1 - j - x_0 of step k)``, summed
            over j, to the latent after step k. None: no step looks back.
        input_scale: ``(T,)``: what latents are multiplied by before the denoiser sees them. None: 1.
        scales: ``(T + 1,)``: by how much larger a scheduler of diffusers keeps the latents, before each step and after
            the last. None: 1.
        sigma_data: as for a network of EDM, see :meth:`Reading.of`.

    Example:
        >>> from fixpoint_diffusion import NoiseSchedule, Transitions
        >>> schedule = NoiseSchedule.linear()
        >>> Transitions.of(schedule, schedule.timesteps(10)).sigma.sum()
        tensor(0., dtype=torch.float64)
    """

    timesteps: Tensor
    alphas: Tensor
    alphas_prev: Tensor
    direction: Tensor
    sigma: Tensor
    prediction_type: str = "epsilon"
    x0_hook: X0Hook | None = None
    noise_from_clipped: bool = False
    variance_type: str = "fixed_small"
    history: Tensor | None = None
    input_scale: Tensor | None = None
    scales: Tensor | None = None
    sigma_data: float | None = None

    @property
    def steps(self) -> int:
        """T, the number of steps."""
        return len(self.timesteps)

    @property
    def learned_variance(self) -> bool:
        """Whether the noise's size is in the denoiser's output."""
        return self.variance_type in ("learned", "learned_range")

    @property
    def along_flow(self) -> bool:
        """Whether the denoiser sees latents of a flow, ``(1 - sigma) x_0 + sigma eps``."""
        return self.input_scale is not None and self.sigma_data is None

    @property
    def reading(self) -> Reading:
        """What the denoiser's output means at each step."""
        return Reading.of(self.prediction_type, self.alphas, self.sigma_data)

    @classmethod
    def of(
        cls,
        schedule: NoiseSchedule,
        timesteps: Tensor,
        *,
        eta: float = 0.0,
        prediction_type: str = "epsilon",
        x0_hook: X0Hook | None = None,
        noise_from_clipped: bool = False,
        variance_type: str = "fixed_small",
    ) -> Transitions:
        """The coefficients for the given timesteps, each step arriving where the next one starts.

        Args:
            schedule: the noise schedule; its ``final_alpha`` is where the last step arrives.
            timesteps: ``(T,)`` whole numbers, descending, within the schedule; in float32 or float64 too.
            eta: share of DDPM's noise: 0 is deterministic, 1 is DDPM (where a hook changes x_0, together with
                ``noise_from_clipped=True``). More is legal as long as no step adds more noise than the latent it leads
                to may hold.
            prediction_type: ``"epsilon"``, ``"v_prediction"``, ``"sample"`` or ``"flow_prediction"``.
            x0_hook, noise_from_clipped, variance_type: the attributes of those names. The hook is by default the
                schedule's; all variance types but ``"fixed_small"`` need ``eta=1``.

        Raises:
            TypeError: timesteps that are no tensor of numbers.
            ValueError: timesteps that do not descend within the schedule or lie between its own, an eta below 0 or
                above the largest legal one (which the message names), an unknown prediction or variance type, a
                variance type that does not go with eta, or ``"epsilon"`` at a timestep without signal.

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
            torch.cat([alphas[1:], alphas.new_tensor([schedule.final_alpha])]),
            eta=eta,
            prediction_type=prediction_type,
            x0_hook=schedule.x0_hook if x0_hook is None else x0_hook,
            noise_from_clipped=noise_from_clipped,
            variance_type=variance_type,
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
        x0_hook: X0Hook | None = None,
        noise_from_clipped: bool = False,
        variance_type: str = "fixed_small",
    ) -> Transitions:
        """The coefficients of steps between given signal levels.

        A step need not arrive at the level that the next one starts from: samplers that take every
        ``N // T``-th timestep before the current one do not, when T does not divide N.

        Args:
            timesteps: what the denoiser is told; fractions too, where the levels lie between those of its training.
            alphas, alphas_prev, prediction_type, x0_hook, noise_from_clipped: the attributes of those names.
            eta, variance_type: as for :meth:`of`.

        Raises:
            ValueError: as :meth:`of`, timesteps apart.

        Example:
            >>> levels = torch.tensor([0.1, 0.5], dtype=torch.float64)
            >>> Transitions.between(torch.tensor([900, 400]), levels, torch.tensor([0.4, 1.0]).double()).direction
            tensor([0.7746, 0.0000], dtype=torch.float64)
        """
        check_choice("prediction_type", prediction_type, DENOISER_PREDICTIONS)
        if prediction_type == "epsilon" and alphas[0] == 0:
            raise ValueError(
                f"timestep {float(timesteps[0]):g} holds no signal (zero terminal SNR), where a prediction of the "
                "noise says nothing about the image: use a denoiser that predicts v or the sample, or leave that "
                "timestep out"
            )
        direction, sigma = ddim_weights(timesteps, alphas, alphas_prev, eta=eta, variance_type=variance_type)
        return cls(
            timesteps=timesteps,
            alphas=alphas,
            alphas_prev=alphas_prev,
            direction=direction,
            sigma=sigma,
            prediction_type=prediction_type,
            x0_hook=x0_hook,
            noise_from_clipped=noise_from_clipped,
            variance_type=variance_type,
        )

    def with_eta(self, eta: float) -> Transitions:
        """The same steps with another share of DDPM's noise; arguments and errors as for :meth:`of`."""
        direction, sigma = ddim_weights(
            self.timesteps, self.alphas, self.alphas_prev, eta=eta, variance_type=self.variance_type
        )
        return replace(self, direction=direction, sigma=sigma)

    def part(self, steps: slice) -> Transitions:
        """Some of these steps, one after another.

        Raises:
            ValueError: a slice with gaps, or of no step; steps that look back at predictions before the first of them.

        Example:
            >>> schedule = NoiseSchedule.linear()
            >>> Transitions.of(schedule, schedule.timesteps(4)).part(slice(2, None)).timesteps
            tensor([250,   0])
        """
        first, last, stride = steps.indices(self.steps)
        if stride != 1 or first >= last:
            raise ValueError(f"expected a slice of at least one of {self.steps} steps, without gaps; got {steps}")
        if self.history is not None and bool(self.history[first:last].triu().any()):
            raise ValueError(
                f"steps from {first} on look back at predictions before them: give solver_transitions this part"
            )
        names = ("timesteps", "alphas", "alphas_prev", "direction", "sigma", "history", "input_scale")
        given = {name: getattr(self, name) for name in names}
        cut: dict[str, Any] = {name: None if each is None else each[first:last] for name, each in given.items()}
        return replace(self, **cut, scales=None if self.scales is None else self.scales[first : last + 1])

    def as_input(self, x: Tensor, k: Tensor) -> Tensor:
        """Latents ``(N, *shape)`` before the steps k ``(N,)`` as the denoiser is to see them."""
        return x if self.input_scale is None else (self._values.at("input_scale", wide(x), k) * x).to(x.dtype)

    def predict(
        self, x: Tensor, out: Tensor, k: int | slice | Tensor, sample: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """What the denoiser's outputs say about the latents: ``(x_0, eps)`` with ``x = sqrt(a) x_0 + sqrt(1 - a) eps``.

        With a hook, x_0 is what it returned, and the equation holds only if eps is derived from that.

        Args:
            x: latents, ``(B, *shape)`` for one step k, ``(B, n, *shape)`` for a slice of n steps, ``(N, *shape)`` for
                a tensor of N steps, one for each row.
            out: the denoiser's outputs for them, of the same shape, or with twice the channels, of which the second
                half is about the variance.
            k: which step or steps.
            sample: for the hook, which sample each row belongs to: ``(N,)`` int64, or ``(B,)`` for a slice; None:
                they are samples 0, 1, 2, ...
        """
        out, _ = self._split(x, out, k)
        # What the output is itself takes no memory.
        plain = "" if self.sigma_data is not None else self.prediction_type
        x_0 = out if plain == "sample" else self._read("image", x, out, k)
        eps = out if plain == "epsilon" else self._read("noise", x, out, k)
        if self.x0_hook is not None:
            x_0 = apply_hook(self.x0_hook, x_0, k, self.steps, sample)
            if self.noise_from_clipped:
                eps = (x - self._values.at("signal", x, k) * x_0) / self._values.at("noise", x, k)
        return x_0, eps

    def output(self, x: Tensor, image: Tensor, k: int | Tensor) -> Tensor:
        """The denoiser's outputs ``(N, *shape)`` that predict these images for the latents x, before any hook."""
        of_x, of_out, divisor = (self._values.at(f"image_{name}", image, k) for name in ("of_x", "of_out", "divisor"))
        return (divisor * image - of_x * x) / of_out

    def image(self, x: Tensor, out: Tensor, k: Tensor) -> Tensor:
        """The images ``(N, *shape)`` that outputs predict for the latents x, before any hook."""
        return self._read("image", x, out, k)

    def step(
        self,
        x: Tensor,
        out: Tensor,
        k: int | slice | Tensor,
        noise: Tensor | None = None,
        sample: Tensor | None = None,
    ) -> Tensor:
        """The latents after step (or steps) k, each from the one before it.

        Args:
            x, out, k, sample: as for :meth:`predict`.
            noise: standard normal, of the shape of x; None where sigma is 0.

        Raises:
            ValueError: noise and a learned variance, but an output that holds none; a hook that returns another shape;
                steps that look back.
        """
        if self.history is not None:
            raise ValueError("these steps look back at earlier predictions: MultistepChain takes them")
        return self._arrive(x, out, k, noise, *self.predict(x, out, k, sample))

    def step_back(
        self, x: Tensor, out: Tensor, k: Tensor, earlier: Tensor, noise: Tensor | None, sample: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The latents after steps k that look back, and the predictions x_0 of these steps, ``(N, *shape)`` both.

        Args:
            x, out, k, noise, sample: as for :meth:`step`, with a step for each row.
            earlier: the predictions x_0 of the p steps before, ``(N, p, *shape)``, the latest first.
        """
        x_0, eps = self.predict(x, out, k, sample)
        weights = self._values.whole("history", x)[k].reshape(*earlier.shape[:2], *[1] * (x.ndim - 1))
        looked_back = (weights * (earlier - x_0.unsqueeze(1))).sum(dim=1)
        return self._arrive(x, out, k, noise, x_0, eps) + looked_back, x_0

    def cumulative(self, x: Tensor, out: Tensor, noise: Tensor | None = None, sample: Tensor | None = None) -> Tensor:
        """All latents, each as the sum of all steps before it (DEQ-DDIM, Eq. 10; stochastic: Eq. 22 and 23).

        A step is ``x' = sqrt(a' / a) x + change``. Divided by the product of all those factors so far, it is
        ``y' = y + change / product``: the equations are one cumulative sum. It starts after the first step, whose
        input x_T is known, because that factor is infinite where there is no signal. The sum is taken in ``wide``, of
        a few steps at a time: copies of all in float64 would be most of what a solver holds.

        Args:
            x: the latents that each step starts from, ``(B, T, *shape)``; the first is x_T.
            out, noise, sample: as for :meth:`step`, for all steps.

        Returns:
            The latents after each step, ``(B, T, *shape)`` in the dtype of x.
        """
        size = max(1, _PART // max(x[:, :1].numel(), 1))
        latents, total = list[Tensor](), None
        for first in range(0, self.steps, size):
            k = slice(first, first + size)
            before, outputs = wide(x[:, k]), wide(out[:, k])
            after = self.step(before, outputs, k, None if noise is None else wide(noise[:, k]), sample)
            known = int(first == 0)
            changed = slice(first + known, first + size)
            change = after[:, known:] - self._values.at("factor", before, changed) * before[:, known:]
            product = self._values.at("product", before, k)
            sums = torch.cat([after[:, :known], change], dim=1) / product
            if total is not None:
                sums = torch.cat([sums[:, :1] + total, sums[:, 1:]], dim=1)
            sums = sums.cumsum(dim=1)
            total = sums[:, -1:]
            latents.append((product * sums).to(x.dtype))
        return latents[0] if len(latents) == 1 else torch.cat(latents, dim=1)

    def _arrive(
        self, x: Tensor, out: Tensor, k: int | slice | Tensor, noise: Tensor | None, x_0: Tensor, eps: Tensor
    ) -> Tensor:
        after = self._values.at("signal_prev", x, k) * x_0 + self._values.at("direction", x, k) * eps
        return after if noise is None else after + self._noise_scale(x, out, k) * noise

    def _read(self, part: str, x: Tensor, out: Tensor, k: int | slice | Tensor) -> Tensor:
        """x_0 (``"image"``) or eps (``"noise"``), as :class:`Reading` has them."""
        weighed = self._values.at(f"{part}_of_x", x, k) * x + self._values.at(f"{part}_of_out", x, k) * out
        return weighed / self._values.at(f"{part}_divisor", x, k)

    def _noise_scale(self, x: Tensor, out: Tensor, k: int | slice | Tensor) -> Tensor:
        """Standard deviation of the noise of the steps k."""
        if not self.learned_variance:
            return self._values.at("sigma", x, k)
        _, values = self._split(x, out, k)
        if values is None:
            raise ValueError(
                f"variance_type={self.variance_type!r} needs a denoiser that predicts variances too, with twice the "
                f"channels of x; for x of shape {tuple(x.shape)} it returned {tuple(out.shape)}"
            )
        if self.variance_type == "learned":
            scale = values.sqrt()
        else:
            share = (values + 1) / 2
            scale = (
                (share * self._values.at("log_large", x, k) + (1 - share) * self._values.at("log_small", x, k)) / 2
            ).exp()
        return torch.where(self._values.at("timestep", x, k) > 0, scale, 0)

    @staticmethod
    def _split(x: Tensor, out: Tensor, k: int | slice | Tensor) -> tuple[Tensor, Tensor | None]:
        """The denoiser's prediction, and what it says about the variance; None where it says nothing."""
        if out.shape == x.shape:
            return out, None
        prediction, values = out.chunk(2, dim=2 if isinstance(k, slice) else 1)
        return prediction, values

    @cached_property
    def _values(self) -> StepValues:
        factor = (self.alphas_prev / self.alphas).sqrt()
        # DDPM's largest and smallest variance of a step, between which a learned one lies.
        large = 1 - self.alphas / self.alphas_prev
        small = (large * (1 - self.alphas_prev) / (1 - self.alphas)).clamp(min=1e-20)
        optional = {"history": self.history, "input_scale": self.input_scale}
        return StepValues(
            {
                "timestep": self.timesteps,
                "log_large": large.log(),
                "log_small": small.log(),
                "signal": self.alphas.sqrt(),
                "noise": (1 - self.alphas).sqrt(),
                "signal_prev": self.alphas_prev.sqrt(),
                **self.reading._asdict(),
                **{name: each for name, each in optional.items() if each is not None},
                "direction": self.direction,
                "sigma": self.sigma,
                "factor": factor,
                "product": torch.cat([self.alphas_prev[:1].sqrt(), factor[1:]]).cumprod(0),
            }
        )
