"""A training run that lives in a folder: started, interrupted, resumed, and at its end exported as a model."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fixpoint_diffusion.denoisers.protocol import CLASS_LABELS, ConditioningInput
from fixpoint_diffusion.denoisers.registry import Family, family
from fixpoint_diffusion.files import check_free, locked, write_json
from fixpoint_diffusion.options.training import TrainingConfig
from fixpoint_diffusion.processes import NoiseSchedule
from fixpoint_diffusion.processes.flow import FLOW_SCHEDULE, flow_levels, is_flow
from fixpoint_diffusion.processes.sampler_config import SCHEDULER_FILE
from fixpoint_diffusion.ranks import is_first
from fixpoint_diffusion.training.batches import check_batch
from fixpoint_diffusion.training.checkpoints import CHECKPOINT, INITIAL, load_record
from fixpoint_diffusion.training.data import ImageDataset
from fixpoint_diffusion.training.data.options import DataOptions
from fixpoint_diffusion.training.export import EXPORTED, export, prior_of
from fixpoint_diffusion.training.logs import TrainingLog
from fixpoint_diffusion.training.networks import (
    TrainableDenoiser,
    build_network,
    load_network,
    trained_otherwise,
)
from fixpoint_diffusion.training.plan import TrainingPlan, plan_of
from fixpoint_diffusion.training.presets import Preset, preset_named
from fixpoint_diffusion.training.starts import load_start, names_of_all
from fixpoint_diffusion.training.trainer import train, training_device


@dataclass(frozen=True, kw_only=True)
class TrainingRun:
    """One training of one model on one data set, in one folder.

    Make it with ``start`` or ``resume``, then call ``run``.

    Attributes:
        folder: where the checkpoint and at the end the model go.
        family: what kind of model it is.
        data_options: what it is trained on.
        schedule_config: the noise schedule, as a diffusers scheduler's configuration.
        config: settings of training.
        data: the data set.
        model: the network, with weights to start from.
        labels: the class labels that the model is told; None: none.
        class_names: names of these by number, as the data and the model to start from tell them; None: unknown.
        device: where it trains.
        workers: processes that read images.
        steps_done: steps already taken, which the folder's checkpoint holds; 0 for a new run.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from fixpoint_diffusion.training import TrainingRun
        >>> options = {"settings": {"width": 16, "heads": 2}, "training": {"steps": 2, "batch_size": 4}}
        >>> run = TrainingRun.start(Path(tempfile.mkdtemp()) / "run", kind="fpdm", **options)
        >>> run.run(progress=False).seconds > 0
        True
    """

    folder: Path
    family: Family
    data_options: DataOptions
    schedule_config: Mapping[str, Any]
    config: TrainingConfig
    data: ImageDataset
    model: TrainableDenoiser
    labels: ConditioningInput | None
    class_names: tuple[str, ...] | None = None
    device: torch.device | str = "cpu"
    workers: int = 0
    steps_done: int = 0

    @classmethod
    def start(
        cls,
        folder: str | Path,
        *,
        kind: str = "unet",
        data: DataOptions | None = None,
        classes: bool = False,
        init: str | Path | None = None,
        settings: Mapping[str, Any] | None = None,
        training: Mapping[str, Any] | None = None,
        preset: str | None = None,
        dry: bool = False,
        device: torch.device | str = "cpu",
        workers: int = 0,
    ) -> TrainingRun:
        """Prepare a new run.

        Args:
            folder: must not hold a run or a model already.
            kind: a model family's name, such as ``"unet"``, ``"dit"`` or ``"fpdm"``; unused with ``init``.
            data: what to train on; None: the digits.
            classes: make a model that is told the classes of the data.
            init: a model folder to start from, with its weights, schedule and classes; of a run that has not come to
                its end, the average of its last checkpoint. None: random weights.
            settings: settings of the architecture by name, as the model's config spells them; with ``init``, only
                those of how an FPDM's layer is trained, such as ``backward``.
            training: settings of training by name, where they differ from the family's.
            preset: name of one in ``fixpoint_diffusion.training.presets``; ``settings`` and ``training`` come on top.
            dry: make the network without weights, for ``plan`` alone. A preset then needs no data.
            device: where to train.
            workers: processes that read images; 0: this one.

        Raises:
            FileExistsError: if ``folder`` holds a run or a model.
            ValueError: for an unknown kind, unknown settings, unusable images, or a model that does not fit them.
        """
        folder = Path(folder)
        if not dry and (folder / CHECKPOINT).exists():
            raise FileExistsError(f"{folder} already holds a training run: resume it, or choose another folder")
        if not dry:
            check_free(folder, EXPORTED, "another model: choose another folder")
        known: Sequence[str] = ()
        chosen = Preset(kind=kind) if preset is None else preset_named(preset, kind)
        given = {**chosen.training, **(training or {})}
        if init is not None:
            if classes or preset is not None:
                drop = "classes" if classes else "preset"
                raise ValueError(f"a model that is trained further keeps its architecture and its classes; drop {drop}")
            network, its_family, schedule_config, known = load_start(Path(init))
            network = trained_otherwise(network, settings or {})
            along = "flow_prediction" if is_flow(schedule_config) else schedule_config["prediction_type"]
            if given.setdefault("prediction_type", along) != along:
                raise ValueError(f"the model in {init} was trained to give {along}, not {given['prediction_type']}")
            config = TrainingConfig(**{**its_family.training, **given})
            opened = (data or DataOptions()).open(seed=config.seed)
            check_batch(opened, config)
        else:
            its_family = family(kind)
            config = TrainingConfig(**{**its_family.training, **given})
            if data is not None or chosen.published is None:
                opened = (data or DataOptions()).open(seed=config.seed)
            elif dry:
                opened, data, classes = chosen.planned_data(), DataOptions(source="as published"), True
            else:
                raise ValueError(f"preset {preset!r} is for latents of ImageNet: say which data to train on")
            check_batch(opened, config)
            if classes and opened.num_classes is None:
                raise ValueError("the data has no classes: put images into one subfolder a class")
            if its_family.name in ("dit", "fpdm") and "prediction_type" in given:  # their architecture says it too
                settings = {"prediction_type": given["prediction_type"], **(settings or {})}
            network = build_network(
                its_family,
                opened,
                classes=classes,
                settings={**chosen.settings, **(settings or {})},
                seed=config.seed,
                weights=not dry,
            )
            prediction_type = getattr(network.config, "prediction_type", config.prediction_type)
            config = dataclasses.replace(config, prediction_type=prediction_type)
            # Images are known to lie in [-1, 1], and a model that has trained little predicts far outside of it.
            clipping = {"clip_sample": not opened.is_latent}
            schedule_config = {**its_family.schedule_config, "prediction_type": prediction_type, **clipping}
            if prediction_type == "flow_prediction":
                schedule_config = FLOW_SCHEDULE
        run = cls._with(
            network,
            opened,
            known,
            folder=folder,
            family=its_family,
            data_options=data or DataOptions(),
            schedule_config=schedule_config,
            config=config,
            device=device,
            workers=workers,
        )
        if "class_dropout" in (training or {}) and (run.labels is None or run.labels.null_label is None):
            what = "is told no classes" if run.labels is None else "has no class for none"
            raise ValueError(f"class_dropout (--class-dropout) has nothing to do: the model {what}")
        return run

    @classmethod
    def resume(
        cls, folder: str | Path, *, steps: int | None = None, device: torch.device | str = "cpu", workers: int = 0
    ) -> TrainingRun:
        """Prepare to continue the run in ``folder``, with the settings it was started with.

        Args:
            folder: of the run.
            steps: optimiser steps in all, to make the run longer; None: as it was started.
            device: where to train.
            workers: processes that read images; 0: this one.

        Raises:
            FileNotFoundError: if there is no checkpoint.
            ValueError: if the checkpoint is damaged, or not of such a run, ``steps`` are fewer than were taken, or the
                data has changed.
        """
        folder = Path(folder)
        record = load_record(folder / CHECKPOINT)
        try:
            options = DataOptions(**record["origin"]["data"])
            config = TrainingConfig(**record["config"])
            done, fingerprint = int(record["step"]), record["origin"]["fingerprint"]
        except (KeyError, TypeError) as error:
            raise ValueError(f"{folder / CHECKPOINT} is not from a training run in a folder: {error}") from error
        if steps is not None:
            if steps < done:
                raise ValueError(f"{folder} has taken {done} steps already; steps must be at least that, got {steps}")
            config = dataclasses.replace(config, steps=steps)
        data = options.open(seed=config.seed)
        if data.fingerprint() != fingerprint:
            raise ValueError(f"the data in {options.source} is not what the run in {folder} was started with")
        network, its_family, schedule_config = load_network(folder / INITIAL)
        return cls._with(
            network,
            data,
            record["origin"].get("class_names") or (),
            folder=folder,
            family=its_family,
            data_options=options,
            schedule_config=schedule_config,
            config=config,
            device=device,
            workers=workers,
            steps_done=done,
        )

    @classmethod
    def _with(cls, network: nn.Module, data: ImageDataset, known: Sequence[str], **fields: Any) -> TrainingRun:
        """The run, of a model whose classes have these names so far."""
        training_device(fields["device"], fields["config"])
        model = TrainableDenoiser(network, fields["family"], data.sample_shape[0])
        shape = model.denoiser.sample_shape
        if shape is not None and tuple(shape) != tuple(data.sample_shape):
            raise ValueError(f"the model is for samples of shape {shape}, the data has {tuple(data.sample_shape)}")
        others = [name for name in model.denoiser.conditioning if name != CLASS_LABELS]
        if others:
            raise ValueError(
                f"a {type(network).__name__} with these settings takes {', '.join(others)}, which no data set here has"
            )
        labels = model.denoiser.conditioning.get(CLASS_LABELS)
        # A family that always takes a class has one in a model without.
        if labels is None or labels.num_classes is None or labels.num_classes < 2:
            labels = None
        elif data.num_classes is None or data.num_classes > labels.num_classes:
            found = "none" if data.num_classes is None else data.num_classes
            raise ValueError(f"the model is told one of {labels.num_classes} classes, the data has {found}")
        names = None if labels is None else names_of_all(data.class_names or (), known)
        schedule = dict(fields.pop("schedule_config"))
        if model.denoiser.learned_variance:
            schedule["variance_type"] = "learned_range"
        return cls(data=data, model=model, labels=labels, class_names=names, schedule_config=schedule, **fields)

    def describe(self) -> str:
        """One line on what is trained on what."""
        parameters = sum(p.numel() for p in self.model.parameters())
        shape = "x".join(map(str, self.data.sample_shape))
        what = "latents" if self.data.is_latent else "images"
        classes = "" if self.labels is None else f" of {self.data.num_classes} classes"
        begin = f", from step {self.steps_done}" if self.steps_done else ""
        return (
            f"{type(self.model.network).__name__} with {parameters:,} parameters on {len(self.data)} {what} {shape}"
            f"{classes} ({self.data_options.source}), {self.config.steps} steps of {self.config.batch_size}{begin}"
        )

    def plan(self) -> TrainingPlan:
        """What the training costs, from its first step to its last."""
        return plan_of(self.model, self.config, self.data.sample_shape, len(self.data))

    def run(self, *, progress: bool = True) -> TrainingLog:
        """Train to the end and export the averaged weights into the folder; returns the log.

        Raises:
            KeyboardInterrupt: after Ctrl-C, once the checkpoint is written.
            BlockingIOError: if another process trains in the folder.
            FileExistsError: if another run has begun there in the meantime.
            FloatingPointError: as ``fixpoint_diffusion.training.train``; nothing is exported.
            ValueError, OSError: of images that cannot be read, once the checkpoint of the steps so far is written.
        """
        main = is_first()
        origin = {
            "kind": self.family.name,
            "data": dataclasses.asdict(self.data_options),
            "fingerprint": self.data.fingerprint(),
            "class_names": self.class_names,
        }
        with locked(self.folder / CHECKPOINT.parent, work="training") if main else nullcontext():
            if main and self.steps_done == 0:
                if (self.folder / CHECKPOINT).exists():
                    raise FileExistsError(f"{self.folder} already holds a training run: resume it, or choose another")
                self.family.save(self.model.network, self.folder / INITIAL, None)
                write_json(self.folder / INITIAL / SCHEDULER_FILE, self.schedule_config)
            try:
                average, log = train(
                    self.model,
                    self.data,
                    _levels(self.schedule_config),
                    self.config,
                    checkpoint=self.folder / CHECKPOINT,
                    resume=self.steps_done > 0,
                    labels=self.labels,
                    origin=origin,
                    device=self.device,
                    workers=self.workers,
                    progress=progress,
                )
            except BaseException:
                if main and not (self.folder / CHECKPOINT).exists():  # nothing to resume
                    shutil.rmtree(self.folder / INITIAL, ignore_errors=True)
                raise
            if main:
                about = {**origin, **dataclasses.asdict(self.config)}
                export(
                    average.network,  # type: ignore[arg-type]
                    self.folder,
                    family=self.family,
                    schedule_config=self.schedule_config,
                    training=about,
                    log=log,
                    prior=prior_of(self.data),
                )
        return log


def _levels(schedule_config: Mapping[str, Any]) -> Tensor:
    """The signal level at each timestep of training, ``(steps,)`` float64; along a flow the first is 1."""
    if is_flow(schedule_config):
        return flow_levels(schedule_config)
    return NoiseSchedule.from_diffusers(schedule_config).alphas_cumprod
