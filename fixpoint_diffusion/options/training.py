"""How a denoiser is trained, as data that is written beside its weights."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from fixpoint_diffusion.options.kinds import check_kinds
from fixpoint_diffusion.options.sampling import option

PredictionType = Literal["epsilon", "v_prediction", "sample", "flow_prediction"]
Weighting = Literal["plain", "min-snr", "fpdm"]
Precision = Literal["no", "bf16", "fp16"]
StateLoss = Literal["none", "supervised", "self-distilled"]
_COUNTS = ("steps", "batch_size", "accumulate", "log_every", "checkpoint_every")
_POSITIVE = ("learning_rate", "min_snr_gamma")
# One step of AdamW changes each weight by about the rate; torch's generators take seeds of 63 bits.
_LARGEST = {"learning_rate": 1000, "batch_size": 2**20, "seed": 2**63 - 1}
_NOT_NEGATIVE = ("final_learning_rate", "warmup_steps", "weight_decay", "seed", "jacobian_penalty")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How to train; a run is a function of this, the initial weights, the images and the schedule.

    A model family may have other defaults. What is an ``option`` can be set on the command line.

    Attributes:
        steps: optimiser steps in all.
        batch_size: images per optimiser step, those of all processes together. Every image comes once in an epoch.
        accumulate: parts that a process takes its images in, one after the other, to save memory.
        gradient_checkpointing: keep the inputs of blocks alone and run each again in the backward pass: less memory,
            more time, the same gradient.
        compile_blocks: run the blocks through ``torch.compile``; needs a C++ compiler, or on GPUs Triton.
        precision: ``"bf16"`` or ``"fp16"`` run the model under autocast; the weights stay in float32.
        learning_rate: the peak of AdamW's rate, reached linearly after ``warmup_steps``.
        final_learning_rate: where the cosine decay ends; at most ``learning_rate``.
        warmup_steps: steps to the peak; a tenth of the run if that is fewer.
        weight_decay: AdamW's.
        max_grad_norm: gradients are clipped to this norm; None: they are not.
        ema_decay: of the exponential moving average of the weights; the average is what is kept. The decay after ``k``
            steps is at most ``(1 + k) / (10 + k)``, so that a short run forgets where it began.
        prediction_type: what the model's output means: the noise, ``v = sqrt(a) noise - sqrt(1 - a) x_0``, ``x_0``, or
            ``noise - x_0`` along a flow (``"flow_prediction"``), whose noisy images are straight between both.
        weighting: ``"plain"`` is the mean square error of that output; ``"min-snr"`` weighs timesteps by
            ``min(SNR, min_snr_gamma)`` in terms of x_0 (Hang et al. 2023, Efficient Diffusion Training via Min-SNR);
            ``"fpdm"`` by ``a sqrt(1 - a)`` with ``a`` the schedule's cumulative product, as FPDM's released code does:
            where the signal is zero, nothing is learned.
        min_snr_gamma: see above; unused when plain.
        class_dropout: share of the labels that are replaced by the null class, for guidance; unused without labels.
        jacobian_penalty: weight of ``|J|_F^2 / dim`` in the loss, with J the Jacobian of a fixed point layer's map at
            its solution (:func:`fixpoint.jacobian_penalty`); for a model with such a layer.
        state_loss: another loss, on a state of a fixed point layer on its way; see ``training.layer_states``. The model
            is then called twice in a step, and goes on in the second call from the state that the first one reached.
            ``"supervised"`` adds the loss of the first output to that of the second. ``"self-distilled"`` replaces
            it, from the first step of the run to the last, by the square distance of the two outputs (ELT).
        seed: of everything drawn in training; step k draws the same after any interruption.
        log_every: steps per line of the log, which holds their mean loss.
        checkpoint_every: steps between checkpoints; there is another one on Ctrl-C.

    Raises:
        ValueError: if a value is of another kind or out of range; the message names it.

    Example:
        See :class:`fixpoint_diffusion.training.TrainingRun`, whose ``start`` takes its fields as ``training``.
    """

    steps: int = option(10_000, "Optimiser steps in all.", low=1)
    batch_size: int = option(64, "Images per step, over all processes.", low=1)
    accumulate: int = option(1, "Parts that a process takes its images in.", low=1)
    gradient_checkpointing: bool = option(False, "Run blocks again in the backward pass, to save memory.")
    compile_blocks: bool = option(False, "Run blocks through torch.compile.")
    precision: Precision = option("no", "Mixed precision.")  # noqa: RUF009 - it returns a field
    learning_rate: float = option(1e-3, "Peak learning rate.")
    final_learning_rate: float = 1e-5
    warmup_steps: int = 200
    weight_decay: float = option(0.01, "Weight decay.")
    max_grad_norm: float | None = 1.0
    ema_decay: float = option(0.999, "Decay of the averaged weights, which are kept.")
    prediction_type: PredictionType = "epsilon"
    weighting: Weighting = option("plain", "Weight of each timestep's loss.")  # noqa: RUF009
    min_snr_gamma: float = 5.0
    class_dropout: float = option(0.1, "Share of the labels replaced by 'no class', for guidance.")
    jacobian_penalty: float = option(0.0, "Weight of the fixed point layer's squared Jacobian in the loss.")
    state_loss: StateLoss = option("none", "Loss on a fixed point layer's state on its way.")  # noqa: RUF009
    seed: int = option(0, "Seed of the initial weights and of training.", low=0)
    log_every: int = 50
    checkpoint_every: int = option(1000, "Steps between checkpoints.", low=1)

    def __post_init__(self) -> None:
        check_kinds(self)
        for name in _COUNTS:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in _POSITIVE:
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {getattr(self, name)}")
        if self.max_grad_norm is not None and not 0 < self.max_grad_norm < math.inf:
            raise ValueError(f"max_grad_norm must be positive and finite, or None, got {self.max_grad_norm}")
        for name, largest in _LARGEST.items():
            if getattr(self, name) > largest:
                raise ValueError(f"{name} must be at most {largest}, got {getattr(self, name)}")
        for name in _NOT_NEGATIVE:
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be finite and not negative, got {getattr(self, name)}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must lie in [0, 1), got {self.ema_decay}")
        if not 0 <= self.class_dropout < 1:
            raise ValueError(f"class_dropout must lie in [0, 1), got {self.class_dropout}")
        if self.prediction_type == "flow_prediction" and self.weighting != "plain":
            raise ValueError(f"a flow is trained with weighting 'plain', got {self.weighting!r}")
        if self.batch_size % self.accumulate:
            raise ValueError(f"batch_size {self.batch_size} is not a multiple of accumulate {self.accumulate}")


def learning_rate_at(step: int, config: TrainingConfig) -> float:
    """The rate of step 0, 1, ..., ``steps - 1``: linear warm-up, then a half cosine down to the final rate."""
    warmup = min(config.warmup_steps, config.steps // 10)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    decayed = (step - warmup) / max(config.steps - 1 - warmup, 1)
    final = min(config.final_learning_rate, config.learning_rate)
    return final + (config.learning_rate - final) * (1 + math.cos(math.pi * decayed)) / 2


def ema_decay_at(updates: int, config: TrainingConfig) -> float:
    """The decay of the average once it holds ``updates`` states: it warms up, as in TensorFlow's moving averages."""
    return min(config.ema_decay, (1 + updates) / (10 + updates))
