"""The command ``fixpoint-diffusion info``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fixpoint_diffusion.commands.shared import open_model

if TYPE_CHECKING:
    from fixpoint_diffusion.denoisers.protocol import ConditioningInput


def info(
    model: Annotated[str | None, typer.Argument(help="An embedded model's name or a model folder.")] = None,
) -> None:
    """Say what a model folder holds and what the model takes; without an argument, list the embedded models.

    Example: fixpoint-diffusion info ddpm-digits
    """
    from fixpoint_diffusion.denoisers import EMBEDDED_MODELS, describe
    from fixpoint_diffusion.denoisers.checksums import CHECKSUM_FILE, verify_checksums

    if model is None:
        for name in EMBEDDED_MODELS:
            denoiser, _ = open_model(name)
            parameters = sum(p.numel() for p in denoiser.model.parameters())
            shape = "x".join(map(str, denoiser.sample_shape or ()))
            typer.echo(f"{name:12} {type(denoiser.model).__name__}, {parameters:,} parameters, samples {shape}")
        typer.echo("\nMore of one: fixpoint-diffusion info NAME_OR_FOLDER")
        return
    denoiser, folder = open_model(model)
    about = describe(denoiser)
    checked = (folder / CHECKSUM_FILE).is_file()
    schedule = denoiser.schedule_config
    rows = {
        "folder": folder,
        "class": type(denoiser.model).__name__,
        "parameters": f"{sum(p.numel() for p in denoiser.model.parameters()):,}",
        "weights": f"{sum(p.stat().st_size for p in folder.rglob('*.safetensors')) / 1e6:.2f} MB",
        "samples": "any size" if denoiser.sample_shape is None else "x".join(map(str, denoiser.sample_shape)),
        "classes": _classes(about.class_labels),
        "inputs": ", ".join(["x", "t", *about.conditioning]),
        "predicts": denoiser.prediction_type + (" and a variance" if about.learned_variance else ""),
        "schedule": "not given" if schedule is None else _schedule(schedule),
        "timesteps": "not given" if schedule is None else _timesteps(schedule),
        "clipping": "not given" if schedule is None else _clipping(schedule),
        "checksums": f"{len(verify_checksums(folder))} files match" if checked else f"no {CHECKSUM_FILE}",
    }
    for name, value in rows.items():
        typer.echo(f"{name:10} {value}")


def _classes(known: ConditioningInput | None) -> str:
    if known is None or known.num_classes is None:
        return "none"
    count, null = known.num_classes, known.null_label
    return f"{count}, --class 0 to {count - 1}" + ("" if null is None else f"; {null} means no class, for --guidance")


def _schedule(config: Mapping[str, Any]) -> str:
    betas = f"{config.get('beta_schedule')} {config.get('beta_start')}..{config.get('beta_end')}"
    terminal = ", zero terminal SNR" if config.get("rescale_betas_zero_snr") else ""
    return f"{betas}, {config.get('num_train_timesteps')} timesteps{terminal}"


def _timesteps(config: Mapping[str, Any]) -> str:
    offset = config.get("steps_offset", 0)
    return f"{config.get('timestep_spacing', 'leading')} spacing" + (f", offset {offset}" if offset else "")


def _clipping(config: Mapping[str, Any]) -> str:
    if config.get("thresholding"):
        return f"of predicted images, at quantile {config.get('dynamic_thresholding_ratio', 0.995)} of each"
    if config.get("clip_sample"):
        return f"of predicted images, to {config.get('clip_sample_range', 1.0)}"
    return "none"
