"""One training loop for every denoiser: AdamW, warm-up and cosine decay, averaged weights, resumable to the bit."""

from __future__ import annotations

import dataclasses
import signal
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fixpoint import ProgressBar
from fixpoint_diffusion.denoisers.protocol import ConditioningInput
from fixpoint_diffusion.extras import needed_for
from fixpoint_diffusion.options.training import TrainingConfig, learning_rate_at
from fixpoint_diffusion.ranks import others_there
from fixpoint_diffusion.training.batches import Share, StepSampler
from fixpoint_diffusion.training.checkpoints import (
    TrainingState,
    load_state,
    require_finite,
    save_state,
)
from fixpoint_diffusion.training.data import ImageDataset
from fixpoint_diffusion.training.data.dataset import batches_of
from fixpoint_diffusion.training.logs import LOG_FILE, TrainingLog, tensorboard_writer
from fixpoint_diffusion.training.network_options import trained_as
from fixpoint_diffusion.training.prepared import PreparedRun

KEPT = "the checkpoint holds the steps before this one"  # a note to an error


def train(
    model: nn.Module,
    data: ImageDataset,
    alphas_cumprod: Tensor,
    config: TrainingConfig,
    *,
    checkpoint: str | Path,
    resume: bool = False,
    labels: ConditioningInput | None = None,
    origin: dict[str, Any] | None = None,
    device: torch.device | str = "cpu",
    workers: int = 0,
    progress: bool = True,
) -> tuple[nn.Module, TrainingLog]:
    """Train ``model`` in place and return its averaged copy.

    Ctrl-C lets the current step end, writes the checkpoint and then raises ``KeyboardInterrupt``; a second Ctrl-C stops
    at once. Before an error, such as that of a picture that cannot be read, the checkpoint of the last whole step is
    written, unless numbers are no longer finite. A resumed run ends with the very bits of an uninterrupted one (on the
    same machine and thread count): the random numbers of a step are a function of ``(config.seed, step)``.

    Several processes, started by ``accelerate launch`` or ``torchrun``, share each step's batch, and end with what one
    process would have, to rounding. All draw the same depths of stochastic JFB, and each its own dropout and noise.

    Args:
        model: called as ``model(x_t, t)``, with labels as ``model(x_t, t, class_labels=...)``; see ``diffusion_loss``.
        data: what ``open_dataset`` gives.
        alphas_cumprod: ``(steps,)`` of the noise schedule, float64.
        config: see ``TrainingConfig``.
        checkpoint: the file to write checkpoints to, and to resume from. The log is beside it, as CSV, and for
            tensorboard if that is installed.
        resume: continue from ``checkpoint``; its config must equal ``config``, but for ``steps``, which may be more.
            The learning rate is then that of a run of so many steps.
        labels: what the model takes as class labels, of which it gets those of ``data``; None: it gets none.
        origin: JSON-able facts kept in the checkpoint for whoever resumes (which recipe, which data).
        device: where to train. Under ``accelerate launch`` any name but ``"cpu"`` means each process's own device.
        workers: processes that read images; 0: this one. No result depends on it.
        progress: show a tqdm bar.

    Returns:
        ``(average, log)``: a copy of the model with the averaged weights in evaluation mode, and the log.

    Raises:
        TypeError: data or a noise schedule of another kind.
        FileNotFoundError: resuming without a checkpoint.
        ValueError: resuming with another config or model, or from a damaged checkpoint; a config that asks of the model
            what it cannot do; an ``epsilon`` model on a
            zero-terminal-SNR schedule; a batch that does not divide among processes.
        FloatingPointError: if the loss, the gradient or the weights stop being finite; the last checkpoint stays.
        ChildProcessError: if another of the processes has ended; the last checkpoint stays.

    Example:
        See :class:`fixpoint_diffusion.training.TrainingRun`, which calls it with what a folder needs.
    """
    if not isinstance(data, ImageDataset):
        raise TypeError(f"data must be a data set from open_dataset(...), got a {type(data).__name__}")
    if not isinstance(alphas_cumprod, Tensor):
        found = type(alphas_cumprod).__name__
        raise TypeError(f"alphas_cumprod must be a tensor (steps,), as schedule.alphas_cumprod, got a {found}")
    if config.prediction_type == "epsilon" and float(alphas_cumprod.min()) <= 0:
        raise ValueError("with zero terminal SNR the noise says nothing of x_0: use prediction_type 'v_prediction'")
    state = _load(Path(checkpoint), config) if resume else None
    start = 0 if state is None else state.record["step"]
    log = TrainingLog() if state is None else TrainingLog(**state.record["log"])
    with trained_as(model, config), _accelerator(config, device) as accelerator:
        share = Share(config=config, process=accelerator.process_index, processes=accelerator.num_processes)
        loader = DataLoader(
            data,
            batch_sampler=StepSampler(len(data), share, start=start),
            num_workers=workers,
            generator=torch.Generator(),  # for the workers' seeds, which would come from the global one
        )
        model.to(accelerator.device)
        run = PreparedRun(
            model, alphas_cumprod, share, accelerator, labels, discretised=not data.is_latent, start=start
        )
        try:
            if state is not None:
                run.restore(state)
            with others_there("training can be resumed from its last checkpoint, if it had come to one"):
                _loop(run, batches_of(loader), start, log, Path(checkpoint), origin, progress)
        finally:
            run.close()
    average = run.average.module
    require_finite(average.state_dict(), "the trained model is not kept")
    return average.eval(), log


def _loop(
    run: PreparedRun,
    batches: Iterator[dict[str, Tensor]],
    start: int,
    log: TrainingLog,
    checkpoint: Path,
    origin: dict[str, Any] | None,
    progress: bool,
) -> None:
    config, main = run.share.config, run.accelerator.is_main_process
    board = tensorboard_writer(checkpoint.parent / "tensorboard", first_step=start) if main else None

    def save(step: int) -> None:
        if main:
            record = {"step": step, "config": dataclasses.asdict(config), "log": dataclasses.asdict(log)}
            save_state(checkpoint, run.state({**record, "origin": origin}))
            log.write_csv(checkpoint.parent / LOG_FILE)

    with (
        _interrupts() as interrupted,
        nullcontext() if board is None else closing(board),
        ProgressBar.tqdm(
            total=config.steps, initial=start, desc="training", unit="step", disable=not (progress and main)
        ) as bar,
    ):
        for step in range(start, config.steps):
            done = step + 1
            run.residual.wanted = done % config.log_every == 0
            try:
                loss, stop = run.step(batches, step, interrupted)
            except Exception as error:
                if step > start and run.can_be_kept(error):
                    with suppress(Exception):  # what has stopped the training is what is to be told
                        save(step)
                        error.add_note(KEPT)
                raise
            if log.add(done, loss, learning_rate_at(step, config), config.log_every, run.residual.latest):
                _, mean_loss, rate, _, residual = log.lines[-1]
                bar.set_postfix(loss=f"{mean_loss:.4f}", refresh=False)
                if board is not None:
                    board.add_scalar("loss", mean_loss, done)
                    board.add_scalar("learning_rate", rate, done)
                    if residual is not None:
                        board.add_scalar("layer_residual", residual, done)
            bar.update()
            if stop or done % config.checkpoint_every == 0 or done == config.steps:
                save(done)
                run.accelerator.wait_for_everyone()
            if stop:
                raise KeyboardInterrupt


def _load(checkpoint: Path, config: TrainingConfig) -> TrainingState:
    state = load_state(checkpoint)
    now = dataclasses.asdict(config)
    # A checkpoint of an earlier version was trained without what its config does not name.
    kept = {**dataclasses.asdict(TrainingConfig()), **state.record["config"]}
    if config.steps < state.record["step"]:
        raise ValueError(f"{checkpoint} is of step {state.record['step']}, beyond the {config.steps} steps asked for")
    kept["steps"] = now["steps"]
    changed = {name: (kept.get(name), value) for name, value in now.items() if kept.get(name) != value}
    if changed:
        listed = ", ".join(f"{name} was {old!r}, now {new!r}" for name, (old, new) in changed.items())
        raise ValueError(f"a resumed run keeps its settings; {listed}")
    return state


def training_device(name: torch.device | str, config: TrainingConfig) -> torch.device:
    """The device of that name; ValueError where it cannot train in the config's precision."""
    device = torch.device(name)
    if config.precision == "fp16" and device.type == "cpu":
        raise ValueError("precision 'fp16' needs a GPU; on a CPU there is 'bf16'")
    return device


@contextmanager
def _accelerator(config: TrainingConfig, device: torch.device | str) -> Iterator[Any]:
    """An ``Accelerator`` for this run alone, unless the process has one already."""
    with needed_for("training"):
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState, GradientState
        from accelerate.utils import GradientAccumulationPlugin

    device = training_device(device, config)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    own, before = AcceleratorState._shared_state == {}, dict(GradientState._shared_state)
    accelerator = Accelerator(
        cpu=device.type == "cpu",
        mixed_precision=config.precision,
        # As a plain number, it would give way to one in the environment, and most steps would change no weight.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=config.accumulate),
    )
    try:
        if accelerator.device.type != device.type:
            raise ValueError(f"asked to train on {device}, but accelerate gives this process {accelerator.device}")
        yield accelerator
    finally:
        if own:
            # It holds for the whole process: the next run may want another precision, or another device.
            AcceleratorState._reset_state(reset_partial_state=accelerator.num_processes == 1)
            GradientState._reset_state()
        else:
            GradientState._shared_state.update(before)


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
