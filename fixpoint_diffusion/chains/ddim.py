"""The DDIM chain: deterministic steps through the timesteps of a noise schedule."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from fixpoint_diffusion.chains.chain import SamplingChain
from fixpoint_diffusion.denoisers.protocol import describe
from fixpoint_diffusion.processes import Clip, NoiseSchedule, Transitions, X0Hook


class DDIMChain(SamplingChain):
    """All latents of deterministic DDIM sampling as the unknown of one fixed point problem: a :class:`SamplingChain`.

    Args:
        denoiser, x_T, conditioning, max_rows: as for :class:`SamplingChain`.
        schedule: the noise schedule that the denoiser was trained on.
        steps: T, from 1 to the schedule's length; 50 unless ``timesteps`` are given.
        timesteps: ``(T,)`` integers, descending, instead of ``steps`` and ``spacing``.
        spacing: rule that selects the timesteps; by default the schedule's.
        prediction_type: ``"epsilon"``, ``"v_prediction"`` or ``"sample"``; by default the denoiser's attribute of that
            name, or else the schedule's.
        clip_sample: largest absolute value that a predicted image may have (diffusers' ``clip_sample_range``); infinity
            for no clipping. By default the schedule's ``x0_hook`` decides.
        x0_hook: what is done to every predicted image before the step uses it, instead of the schedule's, as for
            :class:`Transitions`.
        noise_from_clipped: whether eps is derived anew from what clipping or the hook returned, as for
            :class:`Transitions`.

    Attributes:
        transitions: the coefficients of every step.

    Raises:
        TypeError: a schedule of another kind.
        ValueError: inconsistent options or shapes; at its first call, a denoiser that returns another shape, dtype or
            device than it was given.

    Source: Pokle, Geng, Kolter, "Deep Equilibrium Approaches to Diffusion Models" (NeurIPS 2022), Eq. 7 to 13; Song,
        Meng, Ermon, "Denoising Diffusion Implicit Models" (ICLR 2021).

    Example:
        >>> import fixpoint, torch
        >>> schedule = NoiseSchedule.linear()
        >>> def denoiser(x, t):  # exact for standard normal data
        ...     a = schedule.alphas_cumprod.to(x)[t].reshape(-1, 1)
        ...     return (1 - a).sqrt() * x
        >>> chain = DDIMChain(denoiser, torch.ones(2, 3), schedule, steps=20)
        >>> solution = fixpoint.solve(chain, rtol=1e-5)
        >>> solution.value.shape, solution.nfev < 20
        (torch.Size([2, 20, 3]), True)
        >>> torch.allclose(solution.value, chain.sequential(), rtol=1e-3)
        True
    """

    def __init__(
        self,
        denoiser: Callable[..., Tensor],
        x_T: Tensor,
        schedule: NoiseSchedule,
        *,
        steps: int | None = None,
        timesteps: Tensor | None = None,
        spacing: str | None = None,
        prediction_type: str | None = None,
        clip_sample: float | None = None,
        x0_hook: X0Hook | None = None,
        noise_from_clipped: bool = False,
        conditioning: Mapping[str, Tensor] | None = None,
        max_rows: int | None = None,
    ) -> None:
        if not isinstance(schedule, NoiseSchedule):
            raise TypeError(
                f"schedule must be a NoiseSchedule, got a {type(schedule).__name__}: make one by "
                "NoiseSchedule.from_betas(betas) or NoiseSchedule.from_diffusers(scheduler)"
            )
        if timesteps is not None and (steps is not None or spacing is not None):
            raise ValueError("pass either timesteps, or steps and spacing")
        if clip_sample is not None and x0_hook is not None:
            raise ValueError("pass either clip_sample or x0_hook; a hook may clip too")
        if prediction_type is None:
            prediction_type = describe(denoiser).prediction_type or schedule.prediction_type
        if timesteps is None:
            timesteps = schedule.timesteps(50 if steps is None else steps, spacing)
        transitions = Transitions.of(
            schedule,
            timesteps,
            prediction_type=prediction_type,
            x0_hook=x0_hook if clip_sample is None else Clip(clip_sample),
            noise_from_clipped=noise_from_clipped,
        )
        super().__init__(denoiser, x_T, transitions, conditioning=conditioning, max_rows=max_rows)
        self.schedule = schedule
