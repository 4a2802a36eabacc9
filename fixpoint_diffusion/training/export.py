"""A trained model as a folder that ``load_denoiser`` and diffusers read."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fixpoint_diffusion.denoisers.checksums import CHECKSUM_FILE, write_checksums
from fixpoint_diffusion.denoisers.registry import Family
from fixpoint_diffusion.files import read_json, write_json
from fixpoint_diffusion.models.checkpoint import WEIGHTS_FILE
from fixpoint_diffusion.processes import GaussianPrior
from fixpoint_diffusion.processes.prior import PRIOR_FILE
from fixpoint_diffusion.processes.sampler_config import SCHEDULER_FILE
from fixpoint_diffusion.training.data import ImageDataset
from fixpoint_diffusion.training.logs import LOG_FILE, TrainingLog

TRAINING_FILE = "training_config.json"
# What a model folder holds.
EXPORTED = ("config.json", WEIGHTS_FILE, SCHEDULER_FILE, TRAINING_FILE, LOG_FILE, PRIOR_FILE, CHECKSUM_FILE)
_PRIOR_IMAGES = 4096
_UNFINISHED = ".export-"


def read_class_names(folder: Path) -> tuple[str, ...]:
    """The names of a model folder's classes by their numbers; empty where it was not trained here on class folders.

    Raises:
        ValueError: if the file that holds them is damaged.
    """
    file = folder / TRAINING_FILE
    names = read_json(file).get("class_names") if file.is_file() else None
    if names is None:
        return ()
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{file}: class_names must be a list of names, got {repr(names)[:80]}")
    return tuple(names)


def export(
    model: nn.Module,
    folder: Path,
    *,
    family: Family,
    schedule_config: Mapping[str, Any],
    training: Mapping[str, Any],
    log: TrainingLog,
    prior: GaussianPrior | None,
) -> None:
    """Write ``config.json``, the weights and all that belongs to them; the files of an older export go last.

    The weights are in half precision if they fit into it. With them come ``scheduler_config.json``, the prior of the
    images (``prior.safetensors``), how the model was trained (``training_config.json``, ``training_log.csv``) and the
    checksums of all of them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(f"{_UNFINISHED}*"):  # by a process that was killed as it wrote
        shutil.rmtree(left, ignore_errors=True)
    largest = max((float(p.detach().abs().max()) for p in model.parameters() if p.numel()), default=0.0)
    with tempfile.TemporaryDirectory(prefix=_UNFINISHED, dir=folder) as name:
        unfinished = Path(name)
        family.save(model, unfinished, torch.float16 if largest < torch.finfo(torch.float16).max else None)
        write_json(unfinished / SCHEDULER_FILE, schedule_config)
        write_json(unfinished / TRAINING_FILE, training)
        if prior is not None:
            prior.save(unfinished)
        log.write_csv(unfinished / LOG_FILE)
        write_checksums(unfinished)
        # safetensors writes files that nobody else may read; JSON files are as the user's umask says.
        for path in unfinished.glob("*.safetensors"):
            shutil.copymode(unfinished / SCHEDULER_FILE, path)
        for path in unfinished.iterdir():
            os.replace(path, folder / path.name)


def prior_of(data: ImageDataset) -> GaussianPrior | None:
    """The prior of at most 4096 of the images; None of a single one."""
    count = len(data)
    if count < 2:
        return None
    chosen = torch.linspace(0, count - 1, min(count, _PRIOR_IMAGES), device="cpu").long().tolist()
    return GaussianPrior.of(torch.stack([data[index]["images"] for index in chosen]))
