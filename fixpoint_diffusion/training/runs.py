"""A training run that lives in a folder: started, interrupted, resumed, and at its end exported as a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fixpoint_diffusion.processes import GaussianPrior, NoiseSchedule
from fixpoint_diffusion.training.checkpoints import load_record
from fixpoint_diffusion.training.data import load_images, split_held_out
from fixpoint_diffusion.training.recipes import RECIPES, build_model, export
from fixpoint_diffusion.training.trainer import TrainingConfig, TrainingLog, train

CHECKPOINT = Path("checkpoint") / "state.safetensors"


@dataclass(frozen=True, kw_only=True)
class TrainingRun:
    """One training of one recipe on one set of images, in one folder.

    Make it with ``start`` or ``resume``, then call ``run``.

    Attributes:
        folder: where the checkpoint and at the end the model go.
        kind: the recipe, a key of ``fixpoint_diffusion.training.recipes.RECIPES``.
        data: what ``fixpoint_diffusion.training.data.load_images`` takes.
        settings: settings of the model's architecture, beyond the recipe's.
        config: settings of training.
        images: what is trained on, ``(N, C, H, W)``.
        model: the model, on its device.
        steps_done: steps already taken, which the folder's checkpoint holds; 0 for a new run.
    """

    folder: Path
    kind: str
    data: str
    settings: Mapping[str, Any]
    config: TrainingConfig
    images: Tensor
    model: nn.Module
    steps_done: int = 0

    @classmethod
    def start(
        cls,
        folder: str | Path,
        *,
        kind: str = "unet",
        data: str = "digits",
        settings: Mapping[str, Any] | None = None,
        config: TrainingConfig | None = None,
        device: torch.device | str = "cpu",
    ) -> TrainingRun:
        """Prepare a new run; labelled images are trained on without the part that ``split_held_out`` holds out.

        Args:
            folder: must not hold a run already.
            kind: ``"unet"`` or ``"fpdm"``.
            data: ``"digits"``, a ``.npy`` file or a folder of images.
            settings: settings of the architecture by name, as the model's config spells them.
            config: settings of training; None: the recipe's.
            device: where to train.

        Raises:
            FileExistsError: if ``folder`` holds a run.
            ValueError: for an unknown kind, unknown settings, or unusable images.
        """
        folder = Path(folder)
        if (folder / CHECKPOINT).exists():
            raise FileExistsError(f"{folder} already holds a training run: resume it, or choose another folder")
        if kind not in RECIPES:
            raise ValueError(f"no recipe {kind!r}; there are {', '.join(RECIPES)}")
        return cls._prepare(folder, kind, data, settings or {}, config or RECIPES[kind].training, device, steps_done=0)

    @classmethod
    def resume(cls, folder: str | Path, *, device: torch.device | str = "cpu") -> TrainingRun:
        """Prepare to continue the run in ``folder``, with the settings it was started with.

        Raises:
            FileNotFoundError: if there is no checkpoint.
            ValueError: if the checkpoint is damaged, or not of such a run.
        """
        folder = Path(folder)
        record = load_record(folder / CHECKPOINT)
        origin = record.get("origin") or {}
        if origin.get("kind") not in RECIPES:
            raise ValueError(f"{folder / CHECKPOINT} is not from a training run of a recipe: {sorted(origin)}")
        config = TrainingConfig(**record["config"])
        return cls._prepare(
            folder, origin["kind"], origin["data"], origin["settings"], config, device, steps_done=record["step"]
        )

    @classmethod
    def _prepare(
        cls,
        folder: Path,
        kind: str,
        data: str,
        settings: Mapping[str, Any],
        config: TrainingConfig,
        device: torch.device | str,
        *,
        steps_done: int,
    ) -> TrainingRun:
        loaded = load_images(data)
        if loaded.labels is not None:
            loaded, _ = split_held_out(loaded)
        _, channels, height, width = loaded.images.shape
        model = build_model(RECIPES[kind], (channels, height, width), settings, seed=config.seed).to(device)
        built_for = getattr(model.config, "prediction_type", config.prediction_type)
        if built_for != config.prediction_type:
            raise ValueError(f"settings make a model for {built_for!r}, but training is for {config.prediction_type!r}")
        images = loaded.images.to(device)
        return cls(
            folder=folder,
            kind=kind,
            data=data,
            settings=settings,
            config=config,
            images=images,
            model=model,
            steps_done=steps_done,
        )

    def describe(self) -> str:
        """One line on what is trained on what."""
        parameters = sum(p.numel() for p in self.model.parameters())
        shape = "x".join(map(str, self.images.shape[1:]))
        begin = f", from step {self.steps_done}" if self.steps_done else ""
        return (
            f"{type(self.model).__name__} with {parameters:,} parameters on {len(self.images)} images {shape} "
            f"({self.data}), {self.config.steps} steps of {self.config.batch_size}{begin}"
        )

    def run(self, *, progress: bool = True) -> TrainingLog:
        """Train to the end and export the averaged weights into the folder; returns the log.

        Raises:
            KeyboardInterrupt: after Ctrl-C, once the checkpoint is written.
            FloatingPointError: as ``fixpoint_diffusion.training.trainer.train``.
        """
        schedule_config = RECIPES[self.kind].schedule_config
        origin = {"kind": self.kind, "data": self.data, "settings": dict(self.settings)}
        average, log = train(
            self.model,
            self.images,
            NoiseSchedule.from_diffusers(schedule_config).alphas_cumprod,
            self.config,
            checkpoint=self.folder / CHECKPOINT,
            resume=self.steps_done > 0,
            origin=origin,
            progress=progress,
        )
        export(
            average,
            self.folder,
            schedule_config={**schedule_config, "prediction_type": self.config.prediction_type},
            training={**origin, **dataclasses.asdict(self.config)},
            log=log,
            prior=GaussianPrior.of(self.images),
        )
        return log
