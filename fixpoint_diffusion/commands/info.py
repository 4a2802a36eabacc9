"""The command ``fixpoint-diffusion info``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
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
    from fixpoint_diffusion.denoisers import describe
    from fixpoint_diffusion.denoisers.checksums import CHECKSUM_FILE, verify_checksums

    if model is None:
        _list_embedded()
        return
    denoiser, folder = open_model(model)
    about = describe(denoiser)
    checked = (folder / CHECKSUM_FILE).is_file()
    rows = {
        "folder": folder,
        "class": type(denoiser.model).__name__,
        "parameters": f"{sum(p.numel() for p in denoiser.model.parameters()):,}",
        "weights": f"{sum(p.nbytes for p in denoiser.model.parameters()) / 1e6:.2f} MB in memory",
        "samples": "any size" if denoiser.sample_shape is None else "x".join(map(str, denoiser.sample_shape)),
        "classes": _classes(about.class_labels),
        "names": _class_names(folder),
        "inputs": ", ".join(["x", "t", *about.conditioning]),
        "predicts": denoiser.prediction_type + (" and a variance" if about.learned_variance else ""),
        **_sampling(denoiser.schedule_config),
        "checksums": f"{len(verify_checksums(folder))} files match" if checked else f"no {CHECKSUM_FILE}",
    }
    for name, value in rows.items():
        if value is not None:
            typer.echo(f"{name:10} {value}")


def _list_embedded() -> None:
    """A line for each, read from its files: to build networks takes longer."""
    from math import prod

    from fixpoint_diffusion.denoisers import EMBEDDED_MODELS, embedded_folder
    from fixpoint_diffusion.denoisers.loading import model_files
    from fixpoint_diffusion.files import read_json
    from fixpoint_diffusion.models.weights import read_headers

    for name in EMBEDDED_MODELS:
        folder = embedded_folder(name)
        config = read_json(folder / "config.json")
        weights = [path for path in model_files(folder) if path.name.startswith("diffusion_pytorch_model")]
        parameters = sum(prod(each.shape) for each in read_headers(weights).values())
        side = config["sample_size"]
        about = f"{config['_class_name']}, {parameters:,} parameters, samples {config['in_channels']}x{side}x{side}"
        typer.echo(f"{name:12} {about}")
    typer.echo("\nMore of one: fixpoint-diffusion info NAME_OR_FOLDER")


def _classes(known: ConditioningInput | None) -> str:
    if known is None or known.num_classes is None:
        return "none"
    count, null = known.num_classes, known.null_label
    return f"{count}, --class 0 to {count - 1}" + ("" if null is None else "; can do without, so --guidance works")


def _class_names(folder: Path) -> str | None:
    from fixpoint_diffusion.training.export import read_class_names

    return ", ".join(f"{number} {name}" for number, name in enumerate(read_class_names(folder))) or None


def _sampling(config: Mapping[str, Any] | None) -> dict[str, str]:
    """What the scheduler's configuration says of sampling, or why it is not read."""
    from fixpoint_diffusion.processes import Clip, SamplerConfig
    from fixpoint_diffusion.processes.flow import is_flow
    from fixpoint_diffusion.processes.scheduler_tables import CLASSES

    if config is None:
        return {"schedule": "not given"}
    if is_flow(config):
        return {
            "schedule": f"a flow, {config.get('num_train_timesteps', 1000)} timesteps, shift {config.get('shift', 1.0)}"
        }
    try:
        sampler = SamplerConfig.from_diffusers(config)
    except ValueError as error:
        return {"schedule": f"cannot be sampled from here: {error}"}
    schedule, config = sampler.schedule, {**CLASSES[sampler.class_name], **config}
    betas = f"{config.get('beta_schedule')} {config.get('beta_start')}..{config.get('beta_end')}"
    terminal = ", zero terminal SNR" if config.get("rescale_betas_zero_snr") else ""
    hook = schedule.x0_hook
    clipping = f"of predicted images, to {hook.limit}" if isinstance(hook, Clip) else f"of predicted images, {hook}"
    return {
        "schedule": f"{betas}, {len(schedule)} timesteps{terminal}",
        "timesteps": f"{schedule.timestep_spacing} spacing, offset {schedule.steps_offset}",
        "clipping": "none" if hook is None else clipping,
    }
