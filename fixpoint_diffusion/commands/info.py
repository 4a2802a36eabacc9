"""The command ``fixpoint-diffusion info``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fixpoint_diffusion.commands.shared import model_folder
from fixpoint_diffusion.options.models import EMBEDDED_MODELS

if TYPE_CHECKING:
    from fixpoint_diffusion.denoisers.protocol import ConditioningInput, Description


def info(
    model: Annotated[str | None, typer.Argument(help="An embedded model's name or a model folder.")] = None,
) -> None:
    """Say what a model folder holds and what the model takes; without an argument, list the embedded models.

    Example: fixpoint-diffusion info ddpm-digits
    """
    if model is None:
        _list_embedded()
        return
    folder = model_folder(model)
    from fixpoint_diffusion.denoisers.checksums import CHECKSUM_FILE, verify_checksums

    checked = verify_checksums(folder) if (folder / CHECKSUM_FILE).is_file() else None
    network, parameters, size, about = (checked and _from_files(folder, checked)) or _from_network(folder)
    rows = {
        "folder": folder,
        "class": network,
        "parameters": f"{parameters:,}",
        "weights": f"{size / 1e6:.2f} MB in memory",
        "samples": "any size" if about.sample_shape is None else "x".join(map(str, about.sample_shape)),
        "classes": _classes(about.class_labels),
        "names": _class_names(folder),
        "inputs": ", ".join(["x", "t", *about.conditioning]),
        "predicts": f"{about.prediction_type}{' and a variance' if about.learned_variance else ''}",
        **_sampling(about.schedule_config),
        "checksums": f"no {CHECKSUM_FILE}" if checked is None else f"{len(checked)} files match",
    }
    for name, value in rows.items():
        if value is not None:
            typer.echo(f"{name:10} {value}")


def _from_network(folder: Path) -> tuple[str, int, int, Description]:
    """Class, parameters, bytes in memory and description of the network in a folder."""
    from fixpoint_diffusion.denoisers import describe, load_denoiser

    denoiser = load_denoiser(folder)
    weights = list(denoiser.model.parameters())
    count, size = sum(each.numel() for each in weights), sum(each.nbytes for each in weights)
    return type(denoiser.model).__name__, count, size, describe(denoiser)


def _from_files(folder: Path, checked: Sequence[str]) -> tuple[str, int, int, Description] | None:
    """The same without the network, whose imports take seconds; None where checksums do not vouch for the files.

    None as well where the weights are not in one file of safetensors, or are packed: the loader knows of these.
    """
    from fixpoint_diffusion.denoisers.loading import describe_files, model_files
    from fixpoint_diffusion.files import read_json

    files = model_files(folder)
    weights = [path.name for path in _weights(files)] == ["diffusion_pytorch_model.safetensors"]
    if not weights or not set(files) <= {folder / name for name in checked}:
        return None
    config, about = read_json(files[0]), describe_files(folder)
    if about is None or "quantization_config" in config:
        return None
    count = _parameters(files)
    return config["_class_name"], count, 4 * count, about  # in float32, as it is loaded


def _parameters(files: Iterable[Path]) -> int:
    """How many numbers the weights among these files hold, by their headers."""
    from math import prod

    from fixpoint_diffusion.models.weights import read_headers

    return sum(prod(each.shape) for each in read_headers(_weights(files)).values())


def _weights(files: Iterable[Path]) -> list[Path]:
    return [path for path in files if path.name.startswith("diffusion_pytorch_model")]


def _list_embedded() -> None:
    """A line for each, read from its files: to build networks takes longer."""
    from fixpoint_diffusion.denoisers import embedded_folder
    from fixpoint_diffusion.denoisers.loading import model_files
    from fixpoint_diffusion.files import read_json

    for name in EMBEDDED_MODELS:
        folder = embedded_folder(name)
        config = read_json(folder / "config.json")
        parameters = _parameters(model_files(folder))
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
        count, shift = config.get("num_train_timesteps", 1000), config.get("shift", 1.0)
        return {"schedule": f"a flow, {count} timesteps, shift {shift}", "steps": "Euler's"}
    try:
        sampler = SamplerConfig.from_diffusers(config)
    except ValueError as error:
        return {"schedule": f"cannot be sampled from here: {error}"}
    schedule, config = sampler.schedule, {**CLASSES[sampler.class_name], **config}
    betas = str(config.get("beta_schedule")) if config.get("trained_betas") is None else "trained_betas"
    if betas in ("linear", "scaled_linear"):  # others do not use the two numbers
        betas += f" {config.get('beta_start')}..{config.get('beta_end')}"
    terminal = ", zero terminal SNR" if config.get("rescale_betas_zero_snr") else ""
    hook = schedule.x0_hook
    others = "" if sampler.own_steps else f", not those of {sampler.class_name}"
    clipping = f"of predicted images, to {hook.limit}" if isinstance(hook, Clip) else f"of predicted images, {hook}"
    return {
        "schedule": f"{betas}, {len(schedule)} timesteps{terminal}",
        "steps": f"DDIM's, or with --eta 1 DDPM's{others}",
        "timesteps": f"{schedule.timestep_spacing} spacing, offset {schedule.steps_offset}",
        "clipping": "none" if hook is None else clipping,
    }
