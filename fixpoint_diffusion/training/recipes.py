"""The kinds of model that can be trained: architecture, noise schedule, settings, and how the result is written."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fixpoint_diffusion.denoisers.checksums import write_checksums
from fixpoint_diffusion.denoisers.diffusers_models import NEEDS_DIFFUSERS, WEIGHTS
from fixpoint_diffusion.models import FPDM, FPDMConfig, save_fpdm
from fixpoint_diffusion.processes import GaussianPrior
from fixpoint_diffusion.training.trainer import TrainingConfig, TrainingLog

DIGITS_UNET = {
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 8,
    "attention_head_dim": 8,
}
LINEAR_SCHEDULE = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_schedule": "linear",
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "prediction_type": "epsilon",
    "rescale_betas_zero_snr": False,
    "timestep_spacing": "leading",
    "steps_offset": 0,
    "set_alpha_to_one": True,
    "clip_sample": False,
}
# With zero terminal SNR a sampler must start at the last timestep, which "leading" never visits; FPDM respaces with
# both ends included.
ZERO_SNR_SCHEDULE = LINEAR_SCHEDULE | {
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "linspace",
}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A kind of model that can be trained.

    Attributes:
        build: a new model from the shape of an image ``(C, H, W)`` and settings of its architecture by name.
        schedule_config: the noise schedule, as a diffusers scheduler's configuration.
        training: the settings it is trained with unless told otherwise.
    """

    build: Callable[[tuple[int, int, int], Mapping[str, Any]], nn.Module]
    schedule_config: Mapping[str, Any]
    training: TrainingConfig


def build_unet(sample_shape: tuple[int, int, int], settings: Mapping[str, Any]) -> nn.Module:
    """A diffusers ``UNet2DModel``; ``settings`` are its constructor's, the embedded model's where not given."""
    try:
        from diffusers import UNet2DModel
    except ImportError as error:
        raise ImportError(NEEDS_DIFFUSERS) from error

    channels, height, width = sample_shape
    chosen = {**DIGITS_UNET, **settings}
    factor = 2 ** (len(chosen["block_out_channels"]) - 1)
    if height % factor or width % factor:
        raise ValueError(f"this U-Net needs sides it can halve; {height} x {width} is not a multiple of {factor}")
    size = height if height == width else (height, width)
    try:
        model: Any = UNet2DModel(**{**chosen, "sample_size": size, "in_channels": channels, "out_channels": channels})
    except TypeError as error:
        raise ValueError(f"UNet2DModel does not take these settings: {error}") from error
    return model


def build_fpdm(sample_shape: tuple[int, int, int], settings: Mapping[str, Any]) -> nn.Module:
    """An ``FPDM``; ``settings`` are its config's."""
    channels, height, width = sample_shape
    if height != width:
        raise ValueError(f"an FPDM takes square images, got {height} x {width}")
    return FPDM(FPDMConfig.from_dict({**settings, "sample_size": height, "in_channels": channels}))


RECIPES: Mapping[str, Recipe] = {
    "unet": Recipe(
        build=build_unet,
        schedule_config=LINEAR_SCHEDULE,
        training=TrainingConfig(steps=9000, learning_rate=1e-3, prediction_type="epsilon"),
    ),
    "fpdm": Recipe(
        build=build_fpdm,
        schedule_config=ZERO_SNR_SCHEDULE,
        # Weight decay keeps the layer a contraction: with 0.01 plain iteration does not converge for some images.
        training=TrainingConfig(steps=8000, learning_rate=2e-3, weight_decay=0.2, prediction_type="v_prediction"),
    ),
}


def build_model(
    recipe: Recipe, sample_shape: tuple[int, int, int], settings: Mapping[str, Any], *, seed: int
) -> nn.Module:
    """A new model whose initial weights are a function of ``seed``; the global random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return recipe.build(sample_shape, settings)


def export(
    model: nn.Module,
    folder: Path,
    *,
    schedule_config: Mapping[str, Any],
    training: Mapping[str, Any],
    log: TrainingLog,
    prior: GaussianPrior,
) -> None:
    """Write a trained model as a folder that ``load_denoiser`` and diffusers read.

    ``config.json``, the weights in half precision, ``scheduler_config.json``, the prior of its images
    (``prior.safetensors``), how it was trained (``training_config.json``, ``training_log.csv``) and the checksums of
    all of them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(model, FPDM):
        save_fpdm(model, folder, dtype=torch.float16)
    else:
        # Into halves before saving, so that the file is what diffusers itself would have written.
        model.half().save_pretrained(folder, safe_serialization=True)  # type: ignore[operator]
    assert (folder / f"{WEIGHTS}.safetensors").is_file()
    _write_json(folder / "scheduler_config.json", schedule_config)
    _write_json(folder / "training_config.json", training)
    prior.save(folder)
    log.write_csv(folder / "training_log.csv")
    write_checksums(folder)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
