"""What a denoiser is trained to do: plain and min-SNR losses, the bound for a learned variance, class dropout."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from fixpoint_diffusion.options.training import TrainingConfig

VLB_WEIGHT = 1e-3
_HALF_LEVEL = 1 / 255  # half the distance of two grey values, images in [-1, 1]


def diffusion_loss(
    model: nn.Module,
    x_0: Tensor,
    t: Tensor,
    noise: Tensor,
    alphas_cumprod: Tensor,
    config: TrainingConfig,
    *,
    conditioning: Mapping[str, Any] | None = None,
    discretised: bool = True,
) -> Tensor:
    """The weighted mean square error of the model's prediction at ``x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise``.

    Along a flow, ``x_t`` is that divided by ``sqrt(a_t) + sqrt(1 - a_t)``, and the model is told ``t + 1``, which is
    the share of the noise in it times the number of timesteps.

    A model with twice the images' channels learns the variance, too: ``1/1000`` of the variational bound is added, in
    which the mean is held fixed (``variational_bound``).

    Args:
        model: ``model(x_t, t, **conditioning)`` returns ``(B, C, *size)`` or ``(B, 2C, *size)``, or an object with that
            as ``.sample``.
        x_0: images ``(B, C, *size)``.
        t: timesteps ``(B,)``, int64.
        noise: standard normal, in the shape of ``x_0``.
        alphas_cumprod: ``(steps,)``, the schedule's cumulative product, float64.
        config: names the prediction type and the weighting.
        conditioning: further inputs of the model by name, one row for each image.
        discretised: whether the images are 8-bit grey values in [-1, 1]; see ``variational_bound``.

    Returns:
        The loss, a scalar.

    Raises:
        ValueError: if the model returns another number of channels, or a variance along a flow.

    Source: Ho et al. 2020, Eq. 14; Salimans and Ho 2022 for v; Lipman et al. 2023 and Liu et al. 2023 for flows; Hang
    et al. 2023 for the weighting; Nichol and Dhariwal 2021, Eq. 16 for the learned variance.

    Example:
        See :class:`fixpoint_diffusion.training.TrainingRun`, which minimises it.
    """
    task = DenoisingTask(
        x_0=x_0, t=t, noise=noise, alphas_cumprod=alphas_cumprod, config=config, discretised=discretised
    )
    return task.loss(task.ask(model, conditioning or {}))


@dataclass(frozen=True, eq=False, kw_only=True)
class DenoisingTask:
    """What a model is asked in one step of training, and how its answers are judged.

    Attributes: as the arguments of :func:`diffusion_loss`.
    """

    x_0: Tensor
    t: Tensor
    noise: Tensor
    alphas_cumprod: Tensor
    config: TrainingConfig
    discretised: bool = True

    def ask(self, model: nn.Module, conditioning: Mapping[str, Any]) -> Tensor:
        """The model's output for ``x_t``, ``(B, C, *size)`` or ``(B, 2C, *size)``; errors as :func:`diffusion_loss`."""
        output = model(self.x_t, self.t + 1 if self._flow else self.t, **conditioning)
        output = output if isinstance(output, Tensor) else output.sample
        channels = self.x_0.shape[1]
        if output.shape[1] not in (channels, 2 * channels):
            raise ValueError(
                f"the model returns {output.shape[1]} channels for images of {channels}; expected 1 or 2 each"
            )
        return output

    def loss(self, output: Tensor) -> Tensor:
        """The loss of that output: see :func:`diffusion_loss`."""
        if self.config.prediction_type == "epsilon":
            target = self.noise
        elif self.config.prediction_type == "v_prediction":
            signal_rate, noise_rate = self._rates
            target = signal_rate * self.noise - noise_rate * self.x_0
        else:
            target = self.noise - self.x_0 if self._flow else self.x_0
        loss = self.distance(output, target)
        channels = self.x_0.shape[1]
        prediction, variance = output[:, :channels], output[:, channels:]
        if variance.shape[1]:
            if self._flow:
                raise ValueError(
                    "a flow has no variance to learn: train a model with as many channels as the images have"
                )
            a = self.alphas_cumprod[self.t]
            bound = variational_bound(
                self.x_0,
                self.x_t,
                self.t,
                predicted_x_0(self.x_t, prediction.detach(), a, self.config.prediction_type),
                variance,
                self.alphas_cumprod,
                discretised=self.discretised,
            )
            # One timestep a row stands for the sum over all of them.
            loss = loss + VLB_WEIGHT * len(self.alphas_cumprod) * bound.mean()
        return loss

    def distance(self, output: Tensor, target: Tensor) -> Tensor:
        """The weighted mean square difference of two predictions; what an output says of the variance is left out."""
        channels = self.x_0.shape[1]
        errors = (output[:, :channels] - target[:, :channels]).square().flatten(1).mean(1)
        return (errors * loss_weight(self.alphas_cumprod[self.t], self.config).to(errors.dtype)).mean()

    @cached_property
    def x_t(self) -> Tensor:
        """The noisy images."""
        signal_rate, noise_rate = self._rates
        return signal_rate * self.x_0 + noise_rate * self.noise

    @property
    def _rates(self) -> tuple[Tensor, Tensor]:
        a = self.alphas_cumprod[self.t]
        size = a.sqrt() + (1 - a).sqrt() if self._flow else torch.ones_like(a)
        return _spread(a.sqrt() / size, self.x_0), _spread((1 - a).sqrt() / size, self.x_0)

    @property
    def _flow(self) -> bool:
        return self.config.prediction_type == "flow_prediction"


def loss_weight(a: Tensor, config: TrainingConfig) -> Tensor:
    """The weight of each timestep's mean square error, given its ``alphas_cumprod``; shape of ``a``.

    ``min(SNR, gamma)`` weighs the square error of x_0; that of the noise is SNR times as large, of v SNR + 1 times.
    """
    if config.weighting == "plain":
        return torch.ones_like(a)
    if config.weighting == "fpdm":
        return a * (1 - a).sqrt()
    snr = a / (1 - a)
    clipped = snr.clamp(max=config.min_snr_gamma)
    if config.prediction_type == "epsilon":
        return (config.min_snr_gamma / snr).clamp(max=1)  # = clipped / snr, without 0/0 where the SNR is zero
    return clipped / (snr + 1) if config.prediction_type == "v_prediction" else clipped


def predicted_x_0(x_t: Tensor, prediction: Tensor, a: Tensor, prediction_type: str) -> Tensor:
    """The clean images ``(B, C, *size)`` that a prediction at signal levels ``a`` ``(B,)`` amounts to."""
    signal_rate, noise_rate = _spread(a.sqrt(), x_t), _spread((1 - a).sqrt(), x_t)
    if prediction_type == "epsilon":
        return (x_t - noise_rate * prediction) / signal_rate
    return signal_rate * x_t - noise_rate * prediction if prediction_type == "v_prediction" else prediction


def variational_bound(
    x_0: Tensor,
    x_t: Tensor,
    t: Tensor,
    predicted: Tensor,
    variance: Tensor,
    alphas_cumprod: Tensor,
    *,
    discretised: bool = True,
) -> Tensor:
    """The term of the variational bound at each image's timestep, in bits per entry.

    At t > 0 it is the divergence of the true step back, given x_0, from the model's, both Gaussian. At t = 0 it is the
    negative log-likelihood of x_0 under the model's last step.

    Args:
        x_0: images ``(B, C, *size)``.
        x_t: noisy images, of the same shape.
        t: timesteps ``(B,)``, int64.
        predicted: the model's x_0, from which its mean follows; of the same shape.
        variance: the model's variance values ``v``, of the same shape: the log variance is that of the forward step
            times ``(v + 1) / 2`` plus that of the true step back times ``(1 - v) / 2``.
        alphas_cumprod: ``(steps,)``, float64.
        discretised: the likelihood at t = 0 is that of the 8-bit grey value in [-1, 1] that x_0 is; if False, the
            density at x_0, as for latents.

    Returns:
        ``(B,)``.

    Source: Nichol and Dhariwal 2021, Eq. 4 to 7 and 15; Ho et al. 2020, Eq. 6, 7 and 13.

    Example:
        See :func:`fixpoint_diffusion.training.diffusion_loss`, which adds it for a learned variance.
    """
    forward, backward, from_x_0, from_x_t = _step_back(alphas_cumprod, t)
    mean = _spread(from_x_0, x_0) * predicted + _spread(from_x_t, x_0) * x_t
    share = (variance + 1) / 2
    log_variance = share * _spread(forward.log(), x_0) + (1 - share) * _spread(backward.log(), x_0)
    true_log_variance = _spread(backward.log(), x_0)
    # x_t enters both means alike and drops out of their difference.
    difference = (_spread(from_x_0, x_0) * (x_0 - predicted)).square() * (-log_variance).exp()
    divergence = (log_variance - true_log_variance + (true_log_variance - log_variance).exp() + difference - 1) / 2
    if discretised:
        likelihood = grey_value_log_likelihood(x_0, mean, log_variance)
    else:
        likelihood = -((x_0 - mean).square() * (-log_variance).exp() + log_variance + math.log(2 * math.pi)) / 2
    first = (t == 0).view(-1, *[1] * (x_0.ndim - 1))
    terms = torch.where(first, -likelihood, divergence)
    return terms.flatten(1).mean(1) / math.log(2)


def grey_value_log_likelihood(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """The log of the probability that a Gaussian gives to the grey value x, of 256 in [-1, 1]; all of one shape.

    A grey value stands for the interval half way to its neighbours; those at the ends stand for all beyond.

    Source: Ho et al. 2020, Eq. 13.
    """
    log_ndtr = torch.special.log_ndtr
    scale = (-log_variance / 2).exp()
    up_to = log_ndtr((x - mean + _HALF_LEVEL) * scale)
    from_there = log_ndtr(-(x - mean - _HALF_LEVEL) * scale)
    # On the side of the mean where both tails are small, so that their difference keeps its digits.
    distance = (x - mean).abs()
    near, far = log_ndtr(-(distance - _HALF_LEVEL) * scale), log_ndtr(-(distance + _HALF_LEVEL) * scale)
    inside = near + torch.log(-torch.expm1((far - near).clamp(max=-1e-12)))
    return torch.where(x < -0.999, up_to, torch.where(x > 0.999, from_there, inside))


def drop_classes(labels: Tensor, dropped: Tensor, null_label: int | None) -> Tensor:
    """``labels`` ``(B,)`` with the null class where ``dropped`` ``(B,)`` is true; as they are without a null class.

    >>> drop_classes(torch.tensor([3, 1, 2]), torch.tensor([True, False, True]), 10)
    tensor([10,  1, 10])
    """
    return labels if null_label is None else torch.where(dropped, null_label, labels)


def _step_back(alphas_cumprod: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Variances of the step forward and of the true step back, and the weights of x_0 and x_t in its mean; ``(B,)``."""
    before = torch.cat([torch.ones_like(alphas_cumprod[:1]), alphas_cumprod[:-1]])
    a, a_before = alphas_cumprod[t], before[t]
    kept = a / a_before
    forward = 1 - kept
    backward = (1 - a_before) / (1 - a) * forward
    # The first step's true variance is zero, its logarithm is not finite: it takes the second's.
    second = ((1 - before) / (1 - alphas_cumprod) * (1 - alphas_cumprod / before))[min(1, len(before) - 1)]
    backward = torch.where(t == 0, second if len(before) > 1 else forward, backward)
    return forward, backward, a_before.sqrt() * forward / (1 - a), kept.sqrt() * (1 - a_before) / (1 - a)


def _spread(values: Tensor, like: Tensor) -> Tensor:
    """One value a row, in the dtype of ``like`` and shaped to multiply it."""
    return values.to(like.dtype).view(-1, *[1] * (like.ndim - 1))
