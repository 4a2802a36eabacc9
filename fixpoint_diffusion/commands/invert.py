"""The command ``fixpoint-diffusion invert``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated

import typer

from fixpoint_diffusion.commands.shared import ChannelsName, open_model, path_option
from fixpoint_diffusion.files import check_free, check_source
from fixpoint_diffusion.ranks import require_one_process

if TYPE_CHECKING:
    from torch import Tensor

    from fixpoint_diffusion.chains import SamplingChain
    from fixpoint_diffusion.denoisers import NetworkDenoiser
    from fixpoint_diffusion.inversion import Inverse
    from fixpoint_diffusion.training.data import ImageDataset

NOISE, GRID, PLOT, RECORD = "x_T.npy", "grid.png", "errors.png", "invert.json"


def invert(
    images: Annotated[str, typer.Argument(help="'digits', a .npy file, a folder of images, or what encode wrote.")],
    model: Annotated[str, typer.Option(help="An embedded model's name or a model folder.")] = "ddpm-digits",
    steps: Annotated[int, typer.Option(min=1, help="Steps of the sampler that is inverted.")] = 50,
    channels: Annotated[ChannelsName | None, typer.Option(help="Channels (default: as all files have them).")] = None,
    num_images: Annotated[int, typer.Option(min=1, help="How many images at most, from the first on.")] = 16,
    classes: Annotated[
        str | None, typer.Option("--class", help="Class of the images, by number or name, or several in turn: 0,cats,7")
    ] = None,
    guidance: Annotated[float, typer.Option(min=0.0, help="Classifier-free guidance; 1 is none.")] = 1.0,
    rtol: Annotated[float, typer.Option(min=1e-12, max=1.0, help="RMS error of a reconstruction / RMS of it.")] = 1e-3,
    max_rounds: Annotated[int, typer.Option(min=1, help="Most rounds; what is left is tried step by step.")] = 50,
    device: Annotated[str, typer.Option(help="Where to compute: cpu, cuda, ...")] = "cpu",
    out: Annotated[Path, typer.Option(parser=path_option, help="Folder for the results.", metavar="FOLDER")] = Path(
        "runs/invert"
    ),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the results of another run.")] = False,
) -> None:
    """Find the noise from which deterministic sampling arrives at given images.

    Example: fixpoint-diffusion invert digits --steps 50 --num-images 8 --out runs/invert

    Pictures of another size than the model's are scaled, and their middle is taken. Clipping cannot be undone: a
    model that is sampled with it is inverted, and has to be sampled, without. The command ends with the one that
    samples from what was found; with another --class there, the images are edited.

    Writes x_T.npy, the images above their reconstructions (grid.png), the error against rounds (errors.png), and the
    error and status of each image (invert.json).
    """
    require_one_process("invert")
    if not overwrite:
        check_free(out, (RECORD, NOISE, GRID, PLOT), "another run; pass --overwrite to replace it")
    check_source(images)
    denoiser, folder = open_model(model, device=device)

    import numpy as np
    import torch

    from fixpoint import Status
    from fixpoint_diffusion.denoisers import FPDMDenoiser
    from fixpoint_diffusion.files import locked, write_json, written_whole
    from fixpoint_diffusion.inversion import ParallelInverse
    from fixpoint_diffusion.inversion import invert as find
    from fixpoint_diffusion.sampling.job import classes_of, labels_of
    from fixpoint_diffusion.training.export import read_class_names

    dataset = _open(images, denoiser.sample_shape, channels)
    x_0 = torch.stack([dataset[i]["images"] for i in range(min(num_images, len(dataset)))]).to(device)
    chosen = classes_of(denoiser, classes, guidance, () if classes is None else read_class_names(folder))
    labels = labels_of(chosen, range(len(x_0)))
    chain, clips = _chain(denoiser, x_0, steps, labels if labels is None else labels.to(device), guidance)
    settings = {"images": images, "model": model, "steps": steps, "class": classes, "guidance": guidance}
    settings |= {"rtol": rtol, "clipping_left_out": clips}
    with locked(out, work="inverting"):
        method = ParallelInverse(max_rounds=max_rounds)
        inverse = find(chain, x_0, method=method, rtol=rtol, on_failure="ignore", progress=True)
        with written_whole(out / NOISE) as file:
            np.save(file, inverse.x_T.cpu().numpy())
        ends = [Status(int(number)).name for number in inverse.status]
        rows = [{"error": float(e), "status": end} for e, end in zip(inverse.error, ends, strict=True)]
        write_json(out / RECORD, {**settings, "rounds": inverse.rounds, "evals": inverse.evals, "results": rows})
        written = [NOISE, RECORD, *_pictures(x_0, inverse, out)]
    for number, (error, end) in enumerate(zip(inverse.error, ends, strict=True)):
        typer.echo(f"image {number:4}  RMS error {float(error):.1e}  {end}")
    converged = f"{int(inverse.converged.sum())} of {len(x_0)} inverted"
    typer.echo(f"{converged} in {inverse.rounds} rounds, {inverse.evals} model rows")
    typer.echo(f"written to {out}: {', '.join(written)}")
    told = "" if classes is None else f" --class {quote(classes)}"
    told += "" if guidance == 1 else f" --guidance {guidance:g}"
    if isinstance(denoiser, FPDMDenoiser):  # its layer was solved to a tolerance, each time from its own start
        told += f" --layer-rtol {denoiser.rtol:g} --no-reuse"
    typer.echo(
        f"Sample from it, with these options or others:\n  fixpoint-diffusion sample --model {quote(model)} "
        f"--x-T {quote(str(out / NOISE))} --steps {steps}{told}{' --no-clip' if clips else ''}"
    )
    if missed := len(x_0) - int(inverse.converged.sum()):
        typer.echo(
            f"Warning: {missed} of {len(x_0)} images were not inverted to --rtol {rtol}; x_T.npy has the best that was "
            "found. Take more --steps, less --guidance, or a larger --rtol",
            err=True,
        )


def _open(images: str, shape: Sequence[int] | None, channels: str | None) -> ImageDataset:
    """The images, cut to the model's size if they are pictures."""
    from fixpoint_diffusion.training.data import open_dataset
    from fixpoint_diffusion.training.data.latents import INFO_FILE

    size = None
    if shape is not None and len(shape) == 3 and not (Path(images) / INFO_FILE).is_file():
        size = shape[1], shape[2]
    dataset = open_dataset(images, labels=False, channels=channels, size=size)
    if shape is not None and tuple(dataset.sample_shape) != tuple(shape):
        raise ValueError(
            f"the model takes samples {tuple(shape)}, {images} gives {tuple(dataset.sample_shape)}; "
            "a model of latents takes a folder that fixpoint-diffusion encode wrote"
        )
    return dataset


def _chain(
    denoiser: NetworkDenoiser, x_0: Tensor, steps: int, labels: Tensor | None, guidance: float
) -> tuple[SamplingChain, bool]:
    """The deterministic chain that ``sample`` takes, without clipping; and whether ``sample`` would clip."""
    import torch

    from fixpoint_diffusion.chains import chain_from_scheduler
    from fixpoint_diffusion.processes import Clip, SamplerConfig
    from fixpoint_diffusion.sampling.job import sampler_of, with_labels

    if denoiser.schedule_config is None:
        raise ValueError("the model folder has no scheduler_config.json, so its schedule is not known")
    config = sampler_of(denoiser.schedule_config)
    told, conditioning = with_labels(denoiser, labels, guidance)
    chain = chain_from_scheduler(
        told,
        torch.zeros_like(x_0),
        config,
        steps=steps,
        eta=0.0 if isinstance(config, SamplerConfig) else None,
        x0_hook=Clip(float("inf")),
        conditioning=conditioning,
    )
    return chain, isinstance(config, SamplerConfig) and config.schedule.x0_hook is not None


def _pictures(x_0: Tensor, inverse: Inverse, out: Path) -> list[str]:
    """Images above their reconstructions, where they are pictures; and the predicted errors against rounds."""
    import torch

    from fixpoint_diffusion.sampling.grids import save_grid

    written = []
    if x_0.ndim == 4:
        save_grid(torch.cat([x_0, inverse.reconstruction]), out / GRID, columns=len(x_0))
        written.append(GRID)
    try:
        from matplotlib.figure import Figure
    except ImportError:  # it belongs to another extra
        typer.echo(f"no {PLOT}: it needs matplotlib", err=True)
        return written
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    errors = torch.stack([entry.predicted_error for entry in inverse.history]).cpu()
    axes.semilogy(range(1, len(errors) + 1), errors.clamp(min=1e-12).numpy(), alpha=0.7)
    axes.set(xlabel="rounds", ylabel="predicted RMS error", title="One line an image, until it is done")
    figure.savefig(out / PLOT, dpi=120)
    return [*written, PLOT]
