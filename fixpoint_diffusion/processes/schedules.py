"""Noise schedules in float64 and the selection of timesteps."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any

import numpy as np
import torch

from fixpoint_diffusion.processes.x0_hooks import X0Hook

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
TIMESTEP_SPACINGS = ("leading", "linspace", "trailing", "quadratic")


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    r"""How much signal is left at each of the N training timesteps, and how to choose timesteps for sampling.

    The forward process is ``x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise``, where ``abar_t`` is the cumulative
    product of ``1 - beta``. Everything is kept in float64: in float32 ``1 - abar`` loses four digits near ``t = 0``.

    Args:
        alphas_cumprod: ``abar``, shape ``(N,)``, strictly decreasing within (0, 1); only the last entry may be 0
            (zero terminal signal-to-noise ratio). Converted to float64 on the CPU.
        final_alpha: the ``abar`` that the last sampling step arrives at, from ``alphas_cumprod[0]`` to 1.
            diffusers calls 1 ``set_alpha_to_one``.
        prediction_type: what a denoiser trained on this schedule predicts: ``"epsilon"``, ``"v_prediction"`` or
            ``"sample"``. Chains use it where neither they nor the denoiser say otherwise.
        timestep_spacing: the spacing that :meth:`timesteps` uses by default.
        steps_offset: added to timesteps of the ``"leading"`` spacing (diffusers' option of this name).
        x0_hook: what chains do to every predicted x_0 unless told otherwise: :class:`Clip`, :class:`DynamicThreshold`
            or a function, as for :class:`Transitions`; None: nothing.

    Raises:
        ValueError: a value outside the ranges above.

    Example:
        >>> schedule = NoiseSchedule.linear(steps=1000)
        >>> schedule.timesteps(4)
        tensor([750, 500, 250,   0])
        >>> schedule.timesteps(4, spacing="trailing")
        tensor([999, 749, 499, 249])
    """

    alphas_cumprod: torch.Tensor
    final_alpha: float = 1.0
    prediction_type: str = "epsilon"
    timestep_spacing: str = "leading"
    steps_offset: int = 0
    x0_hook: X0Hook | None = None

    def __post_init__(self) -> None:
        alphas = torch.as_tensor(self.alphas_cumprod, device="cpu").detach().to(torch.float64).clone()
        if alphas.ndim != 1 or len(alphas) == 0:
            raise ValueError(f"alphas_cumprod must have shape (N,) with N >= 1, got {tuple(alphas.shape)}")
        in_range = bool((alphas < 1).all() and (alphas[:-1] > 0).all() and alphas[-1] >= 0)
        if not in_range or not bool((alphas.diff() < 0).all()):
            raise ValueError(
                "alphas_cumprod must decrease strictly within (0, 1); only its last entry may be 0. Found "
                f"{float(alphas[0]):g} at first and {float(alphas[-1]):g} at last; NoiseSchedule.from_betas takes betas"
            )
        if not float(alphas[0]) <= self.final_alpha <= 1:
            raise ValueError(
                f"final_alpha must lie between alphas_cumprod[0] = {float(alphas[0]):g} and 1, got {self.final_alpha}"
            )
        check_choice("prediction_type", self.prediction_type, PREDICTION_TYPES)
        check_choice("timestep_spacing", self.timestep_spacing, TIMESTEP_SPACINGS)
        if self.steps_offset < 0:
            raise ValueError(f"steps_offset must not be negative, got {self.steps_offset}")
        object.__setattr__(self, "alphas_cumprod", alphas)

    def __len__(self) -> int:
        """N, the number of training timesteps."""
        return len(self.alphas_cumprod)

    @classmethod
    def from_betas(cls, betas: torch.Tensor) -> NoiseSchedule:
        """The schedule of the given per-step noise variances.

        Args:
            betas: shape ``(N,)``, each within (0, 1); the last may be 1.

        Example:
            >>> NoiseSchedule.from_betas(torch.tensor([0.25, 0.5])).alphas_cumprod
            tensor([0.7500, 0.3750], dtype=torch.float64)
        """
        return cls((1 - torch.as_tensor(betas, dtype=torch.float64, device="cpu")).cumprod(0))

    @classmethod
    def linear(cls, steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> NoiseSchedule:
        """Betas in equal steps, as in DDPM (Ho et al., 2020).

        Example:
            >>> float(NoiseSchedule.linear().alphas_cumprod[0])
            0.9999
        """
        return cls.from_betas(
            torch.linspace(beta_start, beta_end, positive("steps", steps), dtype=torch.float64, device="cpu")
        )

    @classmethod
    def scaled_linear(cls, steps: int = 1000, beta_start: float = 8.5e-4, beta_end: float = 0.012) -> NoiseSchedule:
        """Square roots of betas in equal steps, as in latent diffusion (Rombach et al., 2022; its ends by default).

        Example:
            >>> len(NoiseSchedule.scaled_linear())
            1000
        """
        roots = torch.linspace(
            beta_start**0.5, beta_end**0.5, positive("steps", steps), dtype=torch.float64, device="cpu"
        )
        return cls.from_betas(roots.square())

    @classmethod
    def cosine(cls, steps: int = 1000, max_beta: float = 0.999) -> NoiseSchedule:
        """The squared-cosine schedule of Nichol and Dhariwal (2021); diffusers' ``squaredcos_cap_v2``.

        Example:
            >>> bool(NoiseSchedule.cosine().alphas_cumprod[-1] < 1e-8)
            True
        """
        ticks = torch.arange(positive("steps", steps) + 1, dtype=torch.float64, device="cpu") / steps
        signal = torch.cos((ticks + 0.008) / 1.008 * math.pi / 2).square()
        return cls.from_betas((1 - signal[1:] / signal[:-1]).clamp(max=max_beta))

    @classmethod
    def from_diffusers(cls, scheduler: Any) -> NoiseSchedule:
        """The schedule of a diffusers scheduler, computed anew in float64 from its configuration.

        :meth:`SamplerConfig.from_diffusers` reads the same and more: steps that are the scheduler's own.

        Args:
            scheduler: as for :meth:`SamplerConfig.from_diffusers`.

        Returns:
            The schedule, with the configuration's prediction type, timestep spacing and offset, and its clipping or
            thresholding as ``x0_hook``.

        Raises:
            ValueError, FileNotFoundError, TypeError: as :meth:`SamplerConfig.from_diffusers`.

        Example:
            >>> config = {"beta_schedule": "scaled_linear", "set_alpha_to_one": False, "steps_offset": 1}
            >>> schedule = NoiseSchedule.from_diffusers(config)
            >>> schedule.timesteps(4), schedule.x0_hook
            (tensor([751, 501, 251,   1]), Clip(limit=1.0))
        """
        from fixpoint_diffusion.processes.sampler_config import SamplerConfig

        return SamplerConfig.from_diffusers(scheduler).schedule

    def zero_terminal_snr(self) -> NoiseSchedule:
        """The same schedule rescaled so that the last timestep is pure noise (Lin et al., 2023, Algorithm 1).

        ``sqrt(abar)`` is shifted to reach exactly 0 at the last timestep and scaled to keep its first value.

        Example:
            >>> float(NoiseSchedule.linear().zero_terminal_snr().alphas_cumprod[-1])
            0.0
        """
        if len(self) < 2:
            raise ValueError("zero_terminal_snr needs a schedule of at least 2 timesteps")
        roots = self.alphas_cumprod.sqrt()
        first, last = roots[0], roots[-1]
        alphas = ((roots - last) * first / (first - last)).square()
        alphas[0] = self.alphas_cumprod[0]  # exactly, so that a final_alpha equal to it stays valid
        return replace(self, alphas_cumprod=alphas)

    def shift_snr(self, scale: float) -> NoiseSchedule:
        """The same schedule with every signal-to-noise ratio divided by ``scale``, as CogVideoX does.

        Example:
            >>> shifted = NoiseSchedule(torch.tensor([0.5])).shift_snr(3.0)
            >>> float(shifted.alphas_cumprod[0])
            0.25
        """
        if not scale > 0:
            raise ValueError(f"snr_shift_scale must be a positive number, got {scale}")

        def shifted(alphas: torch.Tensor) -> torch.Tensor:
            return alphas / (scale + (1 - scale) * alphas)

        final = float(shifted(torch.tensor(self.final_alpha, dtype=torch.float64, device="cpu")))
        return replace(self, alphas_cumprod=shifted(self.alphas_cumprod), final_alpha=final)

    def timesteps(self, steps: int, spacing: str | None = None) -> torch.Tensor:
        """Timesteps for a sampling chain of the given length, from the noise end.

        ``"leading"``, ``"linspace"`` and ``"trailing"`` are the rules of diffusers' schedulers (Lin et al., 2023,
        Table 2), with this schedule's ``steps_offset`` added to ``"leading"``.

        ``"quadratic"`` is DEQ-DDIM's choice for CIFAR10 (Appendix A): ``floor(c i^2)`` with the constant that makes the
        last one exactly ``N - 1``. Where ``c`` is small the squares repeat indices, which would give steps that do
        nothing; here index i gets at least ``i``, so the smallest timesteps are consecutive and all are distinct. The
        rule in the authors' code stops at ``0.8 N`` and keeps the repetitions (688 distinct ones of 1000).

        Args:
            steps: T, from 1 to N.
            spacing: one of the four names; by default this schedule's ``timestep_spacing``.

        Returns:
            T distinct timesteps within ``0 .. N - 1``, int64, descending, shape ``(T,)``.

        Raises:
            ValueError: more steps than there are timesteps, an unknown spacing, an offset that leads beyond N - 1.

        Example:
            >>> NoiseSchedule.linear().timesteps(6, spacing="quadratic")
            tensor([999, 639, 359, 159,  39,   0])
        """
        n = len(self)
        if positive("steps", steps) > n:
            raise ValueError(f"{steps} sampling steps were asked of a schedule that has {n} timesteps")
        spacing = self.timestep_spacing if spacing is None else spacing
        check_choice("spacing", spacing, TIMESTEP_SPACINGS)
        ascending: np.ndarray
        if spacing == "leading":
            ascending = np.arange(steps) * (n // steps) + self.steps_offset
            if ascending[-1] >= n:
                raise ValueError(
                    f"steps_offset={self.steps_offset} moves the first of {steps} timesteps to {ascending[-1]}, beyond "
                    f"the last of the schedule, {n - 1}; take fewer steps, or another spacing"
                )
        elif spacing == "linspace":
            ascending = np.linspace(0, n - 1, steps).round()
        elif spacing == "trailing":
            # arange rounds its way to one entry too many (a timestep -1) for some lengths; diffusers keeps it
            ascending = (np.round(np.arange(n, 0, -n / steps))[:steps] - 1)[::-1]
        elif steps == 1:
            ascending = np.array([n - 1])
        else:
            index = np.arange(steps)
            ascending = np.maximum((n - 1) * index**2 // (steps - 1) ** 2, index)
        return torch.from_numpy(ascending[::-1].astype(np.int64))


def check_timesteps(timesteps: torch.Tensor, n: int) -> torch.Tensor:
    """The timesteps as int64 on the CPU; raises unless they are whole numbers that descend within a schedule of n."""
    # Half precision cannot tell one timestep from the next.
    refused = (torch.bool, torch.float16, torch.bfloat16)
    if not isinstance(timesteps, torch.Tensor) or timesteps.is_complex() or timesteps.dtype in refused:
        found = timesteps.dtype if isinstance(timesteps, torch.Tensor) else type(timesteps).__name__
        raise TypeError(f"timesteps must be a tensor of integers, or of whole numbers in float32 or 64, got {found}")
    given = timesteps.detach().cpu()
    if given.ndim != 1 or len(given) == 0:
        raise ValueError(f"timesteps must have shape (T,) with T >= 1, got {tuple(given.shape)}")
    fractions = (given != given.floor()) | ~given.isfinite() if given.is_floating_point() else given != given
    if bool(fractions.any()):
        k = int(fractions.nonzero()[0])
        raise ValueError(
            f"timesteps must be whole numbers, those of the schedule's table; entry {k} is {float(given[k]):g}: round "
            "them, or give Transitions.between the signal level of each"
        )
    timesteps = given.to(torch.int64)
    outside = (timesteps < 0) | (timesteps >= n)
    outside[1:] |= timesteps.diff() >= 0
    if bool(outside.any()):
        k = int(outside.nonzero()[0])
        after = f", after {int(timesteps[k - 1])}" if k else ""
        raise ValueError(
            f"timesteps must descend strictly within 0 .. {n - 1}; entry {k} of {len(timesteps)} is "
            f"{int(timesteps[k])}{after}"
        )
    return timesteps


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise a ``ValueError`` that lists the choices unless the value is one of them."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}; got {value!r}")


def refusal(name: str, key: str, value: Any, expected: str) -> ValueError:
    """The error about a value in a scheduler's configuration that cannot be honoured."""
    found = f"{name} with {key}={value!r}".replace("\n", " ")[:200]
    return ValueError(f"{found} cannot be honoured; expected {expected}")


def positive(name: str, value: int) -> int:
    """The value; a ``ValueError`` unless it is an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
    return value
