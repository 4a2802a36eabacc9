"""How a denoiser is trained, as data that is written beside its weights."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from fixpoint_diffusion.sampling.options import option

PredictionType = Literal["epsilon", "v_prediction", "sample"]
Weighting = Literal["plain", "min-snr"]
Precision = Literal["no", "bf16", "fp16"]
_COUNTS = ("steps", "batch_size", "accumulate", "log_every", "checkpoint_every")
_POSITIVE = ("learning_rate", "max_grad_norm", "min_snr_gamma")
# One step of AdamW changes each weight by about the rate; torch's generators take seeds of 63 bits.
_LARGEST = {"learning_rate": 1000, "batch_size": 2**20, "seed": 2**63 - 1}
_NOT_NEGATIVE = ("final_learning_rate", "warmup_steps", "weight_decay", "seed")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How to train; a run is a function of this, the initial weights, the images and the schedule.

    A model family may have other defaults. What is an ``option`` can be set on the command line.

    Attributes:
        steps: optimiser steps in all.
        batch_size: images per optimiser step, those of all processes together. Every image comes once in an epoch.
        accumulate: parts that a process takes its images in, one after the other, to save memory.
        precision: ``"bf16"`` or ``"fp16"`` run the model under autocast; the weights stay in float32.
        learning_rate: the peak of AdamW's rate, reached linearly after ``warmup_steps``.
        final_learning_rate: where the cosine decay ends; at most ``learning_rate``.
        warmup_steps: steps to the peak; a tenth of the run if that is fewer.
        weight_decay: AdamW's.
        max_grad_norm: gradients are clipped to this norm.
        ema_decay: of the exponential moving average of the weights; the average is what is kept. The decay after ``k``
            steps is at most ``(1 + k) / (10 + k)``, so that a short run forgets where it began.
        prediction_type: what the model's output means: the noise, ``v = sqrt(a) noise - sqrt(1 - a) x_0``, or ``x_0``.
        weighting: ``"plain"`` is the mean square error of that output; ``"min-snr"`` weighs timesteps by
            ``min(SNR, min_snr_gamma)`` in terms of x_0 (Hang et al. 2023, Efficient Diffusion Training via Min-SNR).
        min_snr_gamma: see above; unused when plain.
        class_dropout: share of the labels that are replaced by the null class, for guidance; unused without labels.
        seed: of everything drawn in training; step k draws the same after any interruption.
        log_every: steps per line of the log, which holds their mean loss.
        checkpoint_every: steps between checkpoints; there is another one on Ctrl-C.

    Raises:
        ValueError: if a value is out of range; the message names it.
    """

    steps: int = option(10_000, "Optimiser steps in all.", low=1)
    batch_size: int = option(64, "Images per step, over all processes.", low=1)
    accumulate: int = option(1, "Parts that a process takes its images in.", low=1)
    precision: Precision = option("no", "Mixed precision.")  # noqa: RUF009 - it returns a field
    learning_rate: float = option(1e-3, "Peak learning rate.")
    final_learning_rate: float = 1e-5
    warmup_steps: int = 200
    weight_decay: float = option(0.01, "Weight decay.")
    max_grad_norm: float = 1.0
    ema_decay: float = option(0.999, "Decay of the averaged weights, which are kept.")
    prediction_type: PredictionType = "epsilon"
    weighting: Weighting = option("plain", "Weight of each timestep's loss.")  # noqa: RUF009
    min_snr_gamma: float = 5.0
    class_dropout: float = option(0.1, "Share of the labels replaced by 'no class', for guidance.")
    seed: int = option(0, "Seed of the initial weights and of training.", low=0)
    log_every: int = 50
    checkpoint_every: int = option(1000, "Steps between checkpoints.", low=1)

    def __post_init__(self) -> None:
        for name in _COUNTS:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in _POSITIVE:
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {getattr(self, name)}")
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
        for name, choices in (("prediction_type", PredictionType), ("weighting", Weighting), ("precision", Precision)):
            if getattr(self, name) not in get_args(choices):
                raise ValueError(f"{name} must be one of {get_args(choices)}, got {getattr(self, name)!r}")
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
