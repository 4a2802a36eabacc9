"""``fixpoint-diffusion encode``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fixpoint_diffusion.commands.shared import ChannelsName, CropName, check_device, path_option
from fixpoint_diffusion.files import check_source
from fixpoint_diffusion.ranks import require_one_process


def encode(
    source: Annotated[str, typer.Argument(help="A folder of images (subfolders are classes) or a .npy file.")],
    vae: Annotated[
        Path,
        typer.Option(parser=path_option, help="Folder of a diffusers AutoencoderKL, or of a pipeline that has one."),
    ],
    out: Annotated[Path, typer.Option(parser=path_option, help="Folder for the latents.")],
    size: Annotated[int | None, typer.Option(min=1, help="Side of the square to which images are cut.")] = None,
    crop: Annotated[
        CropName,
        typer.Option(help="center or random: scale to cover the square, then cut; patch: cut at random, unscaled."),
    ] = CropName.CENTER,
    channels: Annotated[ChannelsName | None, typer.Option(help="Channels (default: as all files have them).")] = None,
    labels: Annotated[bool, typer.Option("--labels/--no-labels", help="Whether subfolders are classes.")] = True,
    sample: Annotated[bool, typer.Option("--sample", help="Draw each latent; otherwise the mean is taken.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Seed of draws and of random places.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Images that are encoded together.")] = 16,
    shard_rows: Annotated[int, typer.Option(min=1, help="Latents in a file.")] = 1024,
    workers: Annotated[int, typer.Option(min=0, max=256, help="Processes that read images; 0: this one.")] = 0,
    device: Annotated[str, typer.Option(help="Where to encode: cpu, cuda, ...")] = "cpu",
) -> None:
    """Make latents of images, to train on: shards, labels, and a record of what was done.

    Example: fixpoint-diffusion encode photographs --vae path/to/vae --size 256 --out latents

    The same command again completes an encoding that was interrupted.
    """
    require_one_process("encode")
    check_source(source)
    check_device(device)

    from fixpoint_diffusion.training.data import open_dataset
    from fixpoint_diffusion.training.encode import EncodeOptions
    from fixpoint_diffusion.training.encode import encode as write_latents

    dataset = open_dataset(
        source, channels=channels and channels.value, size=size, crop=crop.value, labels=labels, seed=seed
    )
    options = EncodeOptions(
        sample=sample, seed=seed, batch_size=batch_size, shard_rows=shard_rows, workers=workers, device=device
    )
    try:
        info = write_latents(dataset, vae, out, options, source=source)
    except KeyboardInterrupt:
        typer.echo(f"\nInterrupted; the shards in {out} are kept. The same command continues.")
        raise typer.Exit(130) from None
    classes = "" if info.num_classes is None else f", {info.num_classes} classes"
    typer.echo(f"{info.rows} latents {'x'.join(map(str, info.sample_shape))}{classes} written to {out}")
