"""The command ``fixpoint-diffusion sample``."""

from __future__ import annotations

import contextlib
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fixpoint_diffusion.commands.shared import open_model, path_option, with_options
from fixpoint_diffusion.files import locked, sha256_of, sha256_of_all
from fixpoint_diffusion.options.models import EMBEDDED_MODELS
from fixpoint_diffusion.options.sampling import ImageFormat, SamplingOptions, SolverName
from fixpoint_diffusion.ranks import Ranks

if TYPE_CHECKING:
    from fixpoint_diffusion.sampling.job import SamplingJob
    from fixpoint_diffusion.sampling.run_folder import RunFolder

# Of so many images the grid is made, and the classifier's confidence taken.
_SHOWN, _JUDGED = 100, 1000


@with_options(SamplingOptions)
def sample(
    model: Annotated[str, typer.Option(help="An embedded model's name or a model folder.")] = "ddpm-digits",
    vae: Annotated[
        Path | None,
        typer.Option(parser=path_option, help="Folder of the autoencoder, for a model of latents.", metavar="FOLDER"),
    ] = None,
    x_T: Annotated[
        Path | None,
        typer.Option("--x-T", parser=path_option, help="Noise to start from: x_T.npy of invert.", metavar="FILE"),
    ] = None,
    device: Annotated[str, typer.Option(help="Where to sample: cpu, cuda, ...")] = "cpu",
    out: Annotated[
        Path, typer.Option(parser=path_option, help="Folder for images, grid.png and sample.json.", metavar="FOLDER")
    ] = Path("runs/sample"),
    format: Annotated[ImageFormat, typer.Option(help="npy: arrays as sampled. png: 8 bit, a file an image.")] = (
        ImageFormat.npy
    ),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Delete another run in --out first.")] = False,
    **given: Any,
) -> None:
    """Draw images from a model, and write them with the figures of the run.

    Example: fixpoint-diffusion sample --model ddpm-digits --num-images 1 --steps 1000 --solver causal

    The same command continues a run that was interrupted, or adds images to it if --num-images has grown. For the
    embedded models, the figures include the confidence of a small classifier of real digits in the images. On several
    devices: torchrun --nproc-per-node N -m fixpoint_diffusion sample ...
    """
    options = SamplingOptions(**given)
    with Ranks.of_torchrun() as ranks, contextlib.ExitStack() as held:
        job, settings = ranks.together(lambda: _opened(model, vae, x_T, options, ranks.device(device)))

        def claimed() -> RunFolder | None:
            from fixpoint_diffusion.sampling.run_folder import RunFolder

            if ranks.rank:
                return None
            held.enter_context(locked(out, work="sampling"))
            return RunFolder(
                out,
                settings,
                num_images=job.num_images,
                batch_size=options.batch_size,
                image_shape=job.image_shape,
                format=format,
                overwrite=overwrite,
            )

        folder = ranks.of_first(ranks.together(claimed))
        assert folder is not None
        _write_missing(job, folder, ranks)
        if ranks.rank == 0:
            _finish(model, options, folder)
            for note in job.notes():
                typer.echo(note, err=True)


def _opened(
    model: str, vae: Path | None, x_T: Path | None, options: SamplingOptions, device: str
) -> tuple[SamplingJob, dict[str, Any]]:
    """What is sampled, and the settings on which the images depend."""
    denoiser, model_folder = open_model(model, device=device)

    from fixpoint_diffusion.denoisers.loading import model_files
    from fixpoint_diffusion.models.autoencoder import LatentDecoder, autoencoder_files, load_autoencoder
    from fixpoint_diffusion.sampling.job import SamplingJob, read_noise
    from fixpoint_diffusion.training.export import read_class_names

    decoder = None if vae is None else LatentDecoder(load_autoencoder(vae, device=device))
    names = () if options.classes is None else read_class_names(model_folder)
    noise = None if x_T is None else read_noise(x_T, tuple(denoiser.sample_shape or ()))
    job = SamplingJob(denoiser, options, decoder=decoder, class_names=names, x_T=noise)
    settings: dict[str, Any] = {"model": model, "weights_sha256": sha256_of_all(model_files(model_folder))}
    if vae is not None:
        settings |= {"vae": str(vae), "vae_sha256": sha256_of_all(autoencoder_files(vae))}
    if x_T is not None:
        settings |= {"x_T": str(x_T), "x_T_sha256": sha256_of(x_T)}
    # The images do not depend on these. The ordinary sampler has no tolerance; records of earlier versions name one.
    not_recorded = {"num_images", "batch_size"} | ({"rtol"} if options.solver == SolverName.sequential else set())
    recorded = asdict(options) | {"rtol": options.tolerance}
    settings |= {name: value for name, value in recorded.items() if name not in not_recorded}
    return job, settings | job.settings | {"classes": None if job.classes is None else list(job.classes)}


def _write_missing(job: SamplingJob, folder: RunFolder, ranks: Ranks) -> None:
    """Sample and write what is missing, on each rank its share."""
    main = ranks.rank == 0
    if main and folder.done:
        typer.echo(f"{folder.done} images are there already")

    def write_share() -> None:
        began = time.perf_counter()
        for batch in job.batches(ranks.share(folder.missing), progress=main):
            folder.write(batch, seconds=time.perf_counter() - began)
            began = time.perf_counter()

    try:
        ranks.together(write_share)
    except BaseException as error:
        if main:
            folder.discard_empty()
        if not isinstance(error, KeyboardInterrupt):
            raise
        if main:
            there = f"{folder.done} of {folder.num_images} images"
            typer.echo(f"\nInterrupted; {there} are in {folder.folder}. The same command goes on.")
        raise typer.Exit(130) from None


def _finish(model: str, options: SamplingOptions, folder: RunFolder) -> None:
    """Write what the run came to, and say it."""
    from fixpoint_diffusion.sampling.run_folder import IMAGES, ONE_FILE, RECORD

    out, totals = folder.folder, folder.totals
    figures = folder.finish(_mean_cost(folder) | _judge(model, folder))
    width = max(map(len, figures))
    typer.echo("\n".join(f"{name:{width}}  {value}" for name, value in figures.items() if value is not None))
    written = [_save_grid(folder), ONE_FILE if (out / ONE_FILE).exists() else f"{IMAGES}/", RECORD]
    typer.echo(f"written to {out}: {', '.join(name for name in written if name)}")
    missed = folder.num_images - totals.get("converged", folder.num_images)
    if missed > 0:
        layers = options.solver == "sequential"  # which has no other tolerance
        to = f"--layer-rtol {options.layer_rtol}" if layers else f"--rtol {options.tolerance}"
        typer.echo(f"Warning: {missed} of {folder.num_images} images did not converge to {to}", err=True)


def _mean_cost(folder: RunFolder) -> dict[str, float]:
    """Block passes of an image, where they became known with the images."""
    total = folder.totals.get("total_block_passes")
    return {} if total is None or not folder.done else {"mean_block_passes": round(total / folder.done, 3)}


def _judge(model: str, folder: RunFolder) -> dict[str, float]:
    """What the classifier of digits says of the first images of an embedded model."""
    from fixpoint_diffusion.evaluation import digit_quality

    if model not in EMBEDDED_MODELS:
        return {}
    quality = digit_quality(folder.read(_JUDGED))
    return {"digit_confidence": quality.confidence, "relative_to_real_digits": quality.relative_confidence}


def _save_grid(folder: RunFolder) -> str | None:
    """Show the first images; what is no picture (a sequence, a volume) has no grid."""
    from fixpoint_diffusion.sampling.grids import save_grid
    from fixpoint_diffusion.sampling.run_folder import GRID

    images = folder.read(_SHOWN)
    if images.ndim != 4:
        return None
    save_grid(images, folder.folder / GRID)
    return GRID
