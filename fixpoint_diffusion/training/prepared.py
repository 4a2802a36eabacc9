"""A training prepared by accelerate: what a step does to its model, and what continues it."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fixpoint_diffusion.denoisers.protocol import CLASS_LABELS, ConditioningInput
from fixpoint_diffusion.options.training import ema_decay_at, learning_rate_at
from fixpoint_diffusion.training.batches import Share, draw, seed_of
from fixpoint_diffusion.training.checkpoints import TrainingState, optimizer_tensors, restore_optimizer
from fixpoint_diffusion.training.layer_states import objective_of
from fixpoint_diffusion.training.logs import LayerResidual
from fixpoint_diffusion.training.network_options import LayerPenalty, SharedDepths
from fixpoint_diffusion.training.objectives import DenoisingTask, drop_classes


class PreparedRun:
    """Model, average, optimiser and schedule of one run, prepared by accelerate."""

    def __init__(
        self,
        model: nn.Module,
        alphas_cumprod: Tensor,
        share: Share,
        accelerator: Any,
        labels: ConditioningInput | None,
        *,
        discretised: bool,
        start: int,
    ) -> None:
        config = share.config
        self.share, self.accelerator, self.labels, self.discretised = share, accelerator, labels, discretised
        self.bare = model
        self.whole = True  # no weight has been changed by a step that is not over
        self.alphas_cumprod = alphas_cumprod.to(accelerator.device)
        # Copied before accelerate puts its own forward on the model.
        self.average = AveragedModel(model, multi_avg_fn=self._average)
        optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
        self.bare_optimizer = optimizer
        peak = config.learning_rate
        self.schedule = LambdaLR(optimizer, lambda taken: learning_rate_at(start + taken, config) / peak)
        self.penalty = LayerPenalty(model) if config.jacobian_penalty else None
        self.residual = LayerResidual(model)
        self.depths = SharedDepths(model)
        self.objective = objective_of(model, config)
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.model.train()

    def _average(self, averaged: Any, current: Any, updates: Tensor | int) -> None:
        get_ema_multi_avg_fn(ema_decay_at(int(updates), self.share.config))(averaged, current, updates)

    def step(self, batches: Iterator[dict[str, Tensor]], step: int, interrupted: threading.Event) -> tuple[float, bool]:
        """One optimiser step; returns its loss, the mean over all processes, and whether any was interrupted."""
        config, accelerator = self.share.config, self.accelerator
        total = torch.zeros((), device=accelerator.device)
        for piece in range(config.accumulate):
            batch = next(batches)
            # Other seeds than that of the batch's timesteps, which would come again as the model's own draws.
            self.depths.start(seed_of(config.seed, step, 1))
            with accelerator.accumulate(self.model), _seeded(accelerator, config.seed, step, piece):
                loss = self._loss(batch, step, piece)
                accelerator.backward(loss)
                total += loss.detach().float() / config.accumulate
        most = math.inf if config.max_grad_norm is None else config.max_grad_norm
        norm = accelerator.clip_grad_norm_(self.bare.parameters(), most)
        flag = torch.tensor(float(interrupted.is_set()), device=accelerator.device)
        mean_loss, mean_norm, stop = accelerator.reduce(torch.stack([total, norm.float(), flag]), "mean").tolist()
        # Under fp16 the scaler skips a step whose gradient has overflown.
        if not math.isfinite(mean_loss) or not (math.isfinite(mean_norm) or accelerator.scaler is not None):
            what = "gradient" if math.isfinite(mean_loss) else "loss"
            raise FloatingPointError(f"the {what} became not finite at step {step}; try a lower learning rate")
        self.whole = False
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.schedule.step()
        self.average.update_parameters(self.bare)
        self.whole = True
        return mean_loss, stop > 0

    def can_be_kept(self, error: Exception) -> bool:
        """Whether what the last whole step has left is there, and worth keeping, after this error of the next one."""
        if isinstance(error, FloatingPointError):  # of weights that lead there again
            return False
        # What a GPU waits for may never come where another process has ended.
        waits = self.accelerator.num_processes > 1 and self.accelerator.device.type != "cpu"
        return self.whole and not (waits and isinstance(error, RuntimeError))

    def _loss(self, batch: dict[str, Tensor], step: int, piece: int) -> Tensor:
        x_0 = batch["images"].to(self.accelerator.device, non_blocking=True)
        drawn = draw(self.share, step, piece, tuple(x_0.shape[1:]), len(self.alphas_cumprod), x_0.device)
        conditioning = {}
        if self.labels is not None:
            given = batch["labels"].to(x_0.device)
            conditioning[CLASS_LABELS] = drop_classes(given, drawn.dropped, self.labels.null_label)
        task = DenoisingTask(
            x_0=x_0,
            t=drawn.t,
            noise=drawn.noise,
            alphas_cumprod=self.alphas_cumprod,
            config=self.share.config,
            discretised=self.discretised,
        )
        loss = self.objective(self.model, task, conditioning, step)
        return loss if self.penalty is None else loss + self.share.config.jacobian_penalty * self.penalty.take()

    def state(self, record: dict[str, Any]) -> TrainingState:
        """All that training continues from."""
        scaler = self.accelerator.scaler
        return TrainingState(
            model=self.bare.state_dict(),
            ema=self.average.state_dict(),
            optimizer=optimizer_tensors(self.bare_optimizer, self.bare),
            record={**record, "scaler": None if scaler is None else scaler.state_dict()},
        )

    def restore(self, state: TrainingState) -> None:
        """Put back what ``state`` gave."""
        try:
            self.bare.load_state_dict(state.model)
            self.average.load_state_dict(state.ema)
        except RuntimeError as error:
            raise ValueError(f"the checkpoint is of another model: {error}") from error
        restore_optimizer(self.bare_optimizer, self.bare, state.optimizer)
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state.record["scaler"])

    def close(self) -> None:
        """Take accelerate's forward off the model, and the hooks off its layer."""
        self.residual.remove()
        self.depths.remove()
        if self.penalty is not None:
            self.penalty.remove()
        self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)


@contextmanager
def _seeded(accelerator: Any, seed: int, step: int, piece: int) -> Iterator[None]:
    """The global random state is a function of step, process and piece, for what the model draws; then as it was.

    Depths of stochastic JFB, which all have in common, are drawn elsewhere: see ``SharedDepths``.
    """
    device = accelerator.device
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        torch.manual_seed(seed_of(seed, step, 1, accelerator.process_index, piece))
        if cuda:
            torch.cuda.manual_seed(seed_of(seed, step, 2, accelerator.process_index, piece))
        yield
