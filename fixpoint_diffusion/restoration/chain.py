"""Restoration with a whole sampling chain as one fixed point (DeqIR): each predicted image is made to fit what was
measured, and range and null space of the degradation have slopes of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from fixpoint_diffusion.chains import DDIMChain
from fixpoint_diffusion.chains.chain import all_rows
from fixpoint_diffusion.processes import GaussianPrior, NoiseSchedule, step_noise, wide
from fixpoint_diffusion.restoration.degradations import Degradation, check_degradation, project

# Share of the prior's variance that a latent and a measurement leave open, about; found on the digits. From 0.1 to 1,
# it changes the number of rounds by a few.
_LEFT = 0.5


class RestorationChain(DDIMChain):
    r"""The latents of a sampler whose every predicted x_0 is made to agree with a measurement ``y = A x``.

    Step k predicts x_0 and eps, replaces what the measurement determines of x_0, and arrives at::

        x' = sqrt(a') (A^+ y + (I - A^+ A) x_0) + sqrt(1 - a') (eta noise + sqrt(1 - eta^2) eps)

    Args:
        denoiser, x_T, conditioning, max_rows: as for :class:`~fixpoint_diffusion.SamplingChain`.
        schedule: the noise schedule that the denoiser was trained on. Where it clips predicted images, they are clipped
            before they are made to fit.
        degradation: A; one of this package's, or your own :class:`Degradation`.
        measurement: y, ``(B, *measured)`` in the dtype and on the device of x_T.
        steps, timesteps, spacing: which steps, as for :class:`~fixpoint_diffusion.DDIMChain`; 25 by default.
        eta: share of fresh noise in each latent, from 0 to 1. Not DDIM's eta: here it is a share of all noise that the
            latent holds.
        seed, noise, first_sample: of the noise, as for :class:`~fixpoint_diffusion.StochasticDDIMChain`.
        prediction_type: as for :class:`~fixpoint_diffusion.DDIMChain`.

    Raises:
        ValueError: as :class:`~fixpoint_diffusion.DDIMChain`; an eta outside [0, 1], a degradation whose ``A^+ A`` is
            no orthogonal projection, a measurement of another shape, dtype or device.

    Source: Wang, Yu, Zhang (ICLR 2023, DDNM) for the step; Cao et al. (CVPR 2024, DeqIR) for the chain as a fixed
    point. The slopes, one for the range of ``A^+`` and one for the null space of A, are this package's.

    Example:
        >>> from fixpoint_diffusion.restoration import BlockMean, restore
        >>> x_T, y = torch.ones(1, 1, 4, 4), torch.zeros(1, 1, 2, 2)
        >>> chain = RestorationChain(lambda x, t: 0.9 * x, x_T, NoiseSchedule.linear(), BlockMean(2), y, steps=10)
        >>> image = restore(chain).images
        >>> bool(BlockMean(2).apply(image).abs().max() < 1e-5)  # agrees with y
        True
    """

    def __init__(
        self,
        denoiser: Callable[..., Tensor],
        x_T: Tensor,
        schedule: NoiseSchedule,
        degradation: Degradation,
        measurement: Tensor,
        *,
        steps: int | None = None,
        timesteps: Tensor | None = None,
        spacing: str | None = None,
        eta: float = 0.85,
        seed: int = 0,
        noise: Tensor | None = None,
        first_sample: int = 0,
        prediction_type: str | None = None,
        conditioning: Mapping[str, Tensor] | None = None,
        max_rows: int | None = None,
    ) -> None:
        if not 0 <= eta <= 1:
            raise ValueError(f"eta is a share of the noise and must lie in [0, 1], got {eta}")
        self.degradation, self.measurement = degradation, measurement
        self._hook_before = schedule.x0_hook
        super().__init__(
            denoiser,
            x_T,
            schedule,
            steps=25 if steps is None and timesteps is None else steps,
            timesteps=timesteps,
            spacing=spacing,
            prediction_type=prediction_type,
            x0_hook=self._fit_measurement,
            conditioning=conditioning,
            max_rows=max_rows,
        )
        level = (1 - self.transitions.alphas_prev).sqrt()
        self.transitions = replace(self.transitions, sigma=eta * level, direction=(1 - eta**2) ** 0.5 * level)
        check_degradation(degradation, x_T)
        with torch.no_grad():
            expected = degradation.apply(x_T)
        for name in ("shape", "dtype", "device"):
            found, wanted = getattr(measurement, name, None), getattr(expected, name)
            if found != wanted:
                wanted, found = (tuple(each) if name == "shape" and each else each for each in (wanted, found))
                raise ValueError(f"measurement must have the {name} of degradation.apply(x_T), {wanted}, got {found}")
        if not bool(measurement.isfinite().all()):
            raise ValueError("measurement must be finite, got NaN or infinity")
        if noise is not None:
            self.noise = self._check_noise(noise)
        elif eta > 0:
            samples = range(first_sample, first_sample + len(x_T))
            self.noise = step_noise(seed, samples, range(self.steps), x_T.shape[1:], dtype=x_T.dtype, device=x_T.device)

    def _fit_measurement(self, x_0: Tensor, step: Tensor, sample: Tensor) -> Tensor:
        """Predicted images ``(N, *shape)`` with the measured part in the place of theirs."""
        if self._hook_before is not None:
            x_0 = self._hook_before(x_0, step, sample)
        pinv, measurement = self.degradation.pinv, self.measurement
        # The pseudo-inverse of each sample's measurement or of each row's, whatever is less.
        fewer = len(sample) < len(measurement)
        measured = pinv(wide(measurement[sample])) if fewer else pinv(wide(measurement))[sample]
        return x_0 - project(self.degradation, x_0) + measured

    @property
    def guess(self) -> Tensor:
        """What this sampler would do if the data were the prior's Gaussian: its denoiser is linear and costs little."""
        transitions, prior = self.transitions, self.prior
        x, latents = wide(self.x_T.detach()), []
        with torch.no_grad():
            for k in range(self.steps):
                noise = None if self.noise is None else wide(self.noise[:, k])
                x = transitions.step(x, prior.denoise(x, transitions, k), k, noise)
                latents.append(x)
        return torch.stack(latents, dim=1).to(self.x_T.dtype)


class SplitChain:
    """A restoration chain whose states are split into range and null space: ``(B, T, 2, *shape)`` in float64.

    The two parts of a latent sum to it. A step does very different things to them: what it does to a small change of
    the null space's part is about ``mu_k``, on the range ``nu_k``, and these are the slopes of the entries here.

    The denoiser sees latents in the dtype of x_T. Were the states rounded to it too, the last rounds would measure
    rounding instead of the steps, and take several times as many.
    """

    batch_dims = 1

    def __init__(self, chain: RestorationChain) -> None:
        self.chain = chain
        self.steps = chain.steps

    @property
    def start(self) -> Tensor:
        return self._split(wide(self.chain.x_T))

    @property
    def z0(self) -> Tensor:
        guess = wide(self.chain.guess)
        return self._split(guess.flatten(0, 1)).unflatten(0, guess.shape[:2])

    @property
    def slopes(self) -> Tensor:
        """``(T, 2 D)``: of each entry of the range's part, then of the null space's."""
        transitions = self.chain.transitions
        prior = GaussianPrior.isotropic(float(_LEFT * self.chain.prior.variances.mean()))
        mu = prior.slopes(transitions)
        nu = prior.slopes(replace(transitions, alphas_prev=torch.zeros_like(transitions.alphas_prev)))
        return torch.cat((nu, mu), dim=1).repeat_interleave(self.chain.x_T[0].numel(), dim=1)

    @property
    def noise_scale(self) -> Tensor:
        """That of the latents: the two parts of a noise are orthogonal."""
        return self.chain.noise_scale

    def transition(self, x: Tensor, sample: Tensor, step: Tensor) -> Tensor:
        chain, latents = self.chain, x.sum(dim=1)
        sample, step = sample.to(x.device), step.to(x.device)
        out = chain.denoise(latents.to(chain.x_T.dtype), sample, step)
        noise = None if chain.noise is None else wide(chain.noise[sample, step])
        return self._split(chain.transitions.step(latents, wide(out), step, noise, sample))

    def __call__(self, z: Tensor) -> Tensor:
        x = torch.cat((self.start.unsqueeze(1), z[:, :-1]), dim=1)
        rows = all_rows(torch.arange(len(z), device=z.device), self.steps)
        return self.transition(x.flatten(0, 1), *rows).unflatten(0, z.shape[:2])

    def _split(self, x: Tensor) -> Tensor:
        """Latents ``(N, *shape)`` as ``(N, 2, *shape)``."""
        seen = project(self.chain.degradation, x)
        return torch.stack((seen, x - seen), dim=1)
