"""One training loop for every denoiser: AdamW, warm-up and cosine decay, averaged weights, resumable to the bit."""

from __future__ import annotations

import csv
import dataclasses
import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from fixpoint_diffusion.training.checkpoints import (
    TrainingState,
    load_state,
    optimizer_tensors,
    restore_optimizer,
    save_state,
)

PredictionType = Literal["epsilon", "v_prediction", "sample"]
Weighting = Literal["plain", "min-snr"]


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How to train; a run is a function of this, the initial weights, the images and the schedule.

    Attributes:
        steps: optimiser steps in all.
        batch_size: images per step, drawn with replacement.
        learning_rate: the peak of AdamW's rate, reached linearly after ``warmup_steps``.
        final_learning_rate: where the cosine decay ends.
        weight_decay: AdamW's.
        max_grad_norm: gradients are clipped to this norm.
        ema_decay: of the exponential moving average of the weights; the average is what is kept.
        prediction_type: what the model's output means: the noise, ``v = sqrt(a) noise - sqrt(1 - a) x_0``, or ``x_0``.
        weighting: ``"plain"`` is the mean square error of that output; ``"min-snr"`` weighs timesteps by
            ``min(SNR, min_snr_gamma)`` in terms of x_0 (Hang et al. 2023, Efficient Diffusion Training via Min-SNR).
        min_snr_gamma: see above; unused when plain.
        seed: of everything drawn in training; step k draws the same after any interruption.
        log_every: steps per line of the log, which holds their mean loss.
        checkpoint_every: steps between checkpoints; there is another one on Ctrl-C.
    """

    steps: int = 10_000
    batch_size: int = 64
    learning_rate: float = 1e-3
    final_learning_rate: float = 1e-5
    warmup_steps: int = 200
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    ema_decay: float = 0.999
    prediction_type: PredictionType = "epsilon"
    weighting: Weighting = "plain"
    min_snr_gamma: float = 5.0
    seed: int = 0
    log_every: int = 50
    checkpoint_every: int = 1000

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "log_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("learning_rate", "max_grad_norm", "min_snr_gamma"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("final_learning_rate", "warmup_steps", "weight_decay", "seed"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must lie in [0, 1), got {self.ema_decay}")
        if self.prediction_type not in get_args(PredictionType):
            raise ValueError(f"prediction_type must be one of {get_args(PredictionType)}, got {self.prediction_type!r}")
        if self.weighting not in get_args(Weighting):
            raise ValueError(f"weighting must be one of {get_args(Weighting)}, got {self.weighting!r}")


@dataclass
class TrainingLog:
    """Lines ``(step, mean loss since the line before, learning rate, seconds so far)``, and the sum of the next one."""

    lines: list[tuple[int, float, float, float]] = field(default_factory=list)
    pending: float = 0.0
    seconds: float = 0.0

    def write_csv(self, path: Path) -> None:
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["step", "loss", "learning_rate", "seconds"])
            for step, loss, rate, seconds in self.lines:
                writer.writerow([step, f"{loss:.6g}", f"{rate:.6g}", f"{seconds:.1f}"])


def learning_rate_at(step: int, config: TrainingConfig) -> float:
    """The rate of step 0, 1, ..., ``steps - 1``: linear warm-up, then a half cosine down to the final rate."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    decayed = (step - config.warmup_steps) / max(config.steps - 1 - config.warmup_steps, 1)
    span = config.learning_rate - config.final_learning_rate
    return config.final_learning_rate + span * (1 + math.cos(math.pi * decayed)) / 2


def diffusion_loss(
    model: nn.Module, x_0: Tensor, t: Tensor, noise: Tensor, alphas_cumprod: Tensor, config: TrainingConfig
) -> Tensor:
    """The weighted mean square error of the model's prediction at ``x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise``.

    Args:
        model: ``model(x_t, t)`` returns ``(B, C', *size)`` with ``C' >= C``, or an object with that as ``.sample``;
            channels beyond the images' own (a learned variance) take no part.
        x_0: images ``(B, C, *size)``.
        t: timesteps ``(B,)``, int64.
        noise: standard normal, in the shape of ``x_0``.
        alphas_cumprod: ``(steps,)``, the schedule's cumulative product, float64.
        config: names the prediction type and the weighting.

    Source: Ho et al. 2020, Eq. 14; Salimans and Ho 2022 for v; Hang et al. 2023 for the weighting.
    """
    a = alphas_cumprod[t]
    signal_rate, noise_rate = (
        rate.to(x_0.dtype).view(-1, *[1] * (x_0.ndim - 1)) for rate in (a.sqrt(), (1 - a).sqrt())
    )
    output = model(signal_rate * x_0 + noise_rate * noise, t)
    output = (output if isinstance(output, Tensor) else output.sample)[:, : x_0.shape[1]]
    target = {
        "epsilon": lambda: noise,
        "v_prediction": lambda: signal_rate * noise - noise_rate * x_0,
        "sample": lambda: x_0,
    }[config.prediction_type]()
    errors = (output - target).square().flatten(1).mean(1)
    return (errors * loss_weight(a, config).to(errors.dtype)).mean()


def loss_weight(a: Tensor, config: TrainingConfig) -> Tensor:
    """The weight of each timestep's mean square error, given its ``alphas_cumprod``; shape of ``a``.

    ``min(SNR, gamma)`` weighs the square error of x_0; that of the noise is SNR times as large, of v SNR + 1 times.
    """
    if config.weighting == "plain":
        return torch.ones_like(a)
    snr = a / (1 - a)
    clipped = snr.clamp(max=config.min_snr_gamma)
    if config.prediction_type == "epsilon":
        return (config.min_snr_gamma / snr).clamp(max=1)  # = clipped / snr, without 0/0 where the SNR is zero
    return clipped / (snr + 1) if config.prediction_type == "v_prediction" else clipped


def train(
    model: nn.Module,
    images: Tensor,
    alphas_cumprod: Tensor,
    config: TrainingConfig,
    *,
    checkpoint: str | Path,
    resume: bool = False,
    origin: dict[str, Any] | None = None,
    progress: bool = True,
) -> tuple[nn.Module, TrainingLog]:
    """Train ``model`` in place and return its averaged copy.

    Ctrl-C lets the current step end, writes the checkpoint and then raises ``KeyboardInterrupt``; a second Ctrl-C stops
    at once. A resumed run ends with the very bits of an uninterrupted one (on the same machine and thread count):
    the random numbers of a step are a function of ``(config.seed, step)``.

    Args:
        model: called as ``model(x_t, t)``; see ``diffusion_loss``.
        images: ``(N, C, H, W)`` float32 in [-1, 1], on the model's device.
        alphas_cumprod: ``(steps,)`` of the noise schedule, float64.
        config: see ``TrainingConfig``.
        checkpoint: the file to write checkpoints to, and to resume from.
        resume: continue from ``checkpoint``; its config must equal ``config``.
        origin: JSON-able facts kept in the checkpoint for whoever resumes (which recipe, which data).
        progress: show a tqdm bar.

    Returns:
        ``(average, log)``: a copy of the model with the averaged weights in evaluation mode, and the log.

    Raises:
        FileNotFoundError: resuming without a checkpoint.
        ValueError: resuming with another config or model; an ``epsilon`` model on a zero-terminal-SNR schedule.
        FloatingPointError: if the loss stops being finite; the last checkpoint stays.
    """
    checkpoint = Path(checkpoint)
    if config.prediction_type == "epsilon" and float(alphas_cumprod.min()) <= 0:
        raise ValueError("with zero terminal SNR the noise says nothing of x_0: use prediction_type 'v_prediction'")
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay))
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    log = TrainingLog()
    start = 0
    if resume:
        start, log = _restore(load_state(checkpoint), model, average, optimizer, config)
    schedule = alphas_cumprod.to(device=images.device)

    def save(step: int) -> None:
        record = {"step": step, "config": dataclasses.asdict(config), "log": dataclasses.asdict(log), "origin": origin}
        state = TrainingState(
            model=model.state_dict(),
            ema=average.state_dict(),
            optimizer=optimizer_tensors(optimizer, model),
            record=record,
        )
        save_state(checkpoint, state)

    began = time.perf_counter() - log.seconds
    model.train()
    with (
        _interrupts() as interrupted,
        tqdm(total=config.steps, initial=start, desc="training", unit="step", disable=not progress) as bar,
    ):
        for step in range(start, config.steps):
            loss = _step(model, images, schedule, optimizer, config, step)
            if not math.isfinite(loss):
                raise FloatingPointError(f"the loss became {loss} at step {step}; try a lower learning rate")
            average.update_parameters(model)
            done = step + 1
            log.pending += loss
            log.seconds = time.perf_counter() - began
            if done % config.log_every == 0:
                mean_loss = log.pending / config.log_every
                log.lines.append((done, mean_loss, learning_rate_at(step, config), log.seconds))
                log.pending = 0.0
                bar.set_postfix(loss=f"{mean_loss:.4f}", refresh=False)
            bar.update()
            if interrupted.is_set():
                save(done)
                raise KeyboardInterrupt
            if done % config.checkpoint_every == 0 or done == config.steps:
                save(done)
    return average.module.eval(), log


def _step(
    model: nn.Module,
    images: Tensor,
    schedule: Tensor,
    optimizer: torch.optim.Optimizer,
    config: TrainingConfig,
    step: int,
) -> float:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate_at(step, config)
    seed = int(np.random.SeedSequence((config.seed, step)).generate_state(1)[0])
    # The fork also covers what the model itself draws (dropout, the depths of stochastic JFB).
    with torch.random.fork_rng(devices=[images.device] if images.is_cuda else []):
        torch.manual_seed(seed)
        x_0 = images[torch.randint(len(images), (config.batch_size,)).to(images.device)]
        t = torch.randint(len(schedule), (config.batch_size,)).to(images.device)
        noise = torch.randn(x_0.shape).to(x_0)
        loss = diffusion_loss(model, x_0, t, noise, schedule, config)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimizer.step()
    return float(loss.detach())


def _restore(
    state: TrainingState,
    model: nn.Module,
    average: AveragedModel,
    optimizer: torch.optim.Optimizer,
    config: TrainingConfig,
) -> tuple[int, TrainingLog]:
    kept = state.record["config"]
    changed = {k: (kept.get(k), v) for k, v in dataclasses.asdict(config).items() if kept.get(k) != v}
    if changed:
        listed = ", ".join(f"{name} was {old!r}, now {new!r}" for name, (old, new) in changed.items())
        raise ValueError(f"a resumed run keeps its settings; {listed}")
    try:
        model.load_state_dict(state.model)
        average.load_state_dict(state.ema)
    except RuntimeError as error:
        raise ValueError(f"the checkpoint is of another model: {error}") from error
    restore_optimizer(optimizer, model, state.optimizer)
    log = state.record["log"]
    lines = [(int(step), loss, rate, seconds) for step, loss, rate, seconds in log["lines"]]
    return state.record["step"], TrainingLog(lines=lines, pending=log["pending"], seconds=log["seconds"])


@contextmanager
def _interrupts() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C sets; from the second on Ctrl-C acts as usual."""
    interrupted = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield interrupted  # Python delivers signals to the main thread alone
        return
    before = signal.getsignal(signal.SIGINT)

    def on_interrupt(*_: object) -> None:
        interrupted.set()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, before)
