"""The command ``fixpoint-diffusion``: sample from a model, train one, look at one."""

from __future__ import annotations

import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

try:
    import typer
except ImportError:  # pragma: no cover
    raise SystemExit("fixpoint-diffusion needs typer: pip install 'fixpoint[diffusion]'") from None

from fixpoint_diffusion.training.command import train
from fixpoint_diffusion.training.encode_command import encode

# torch and diffusers take seconds to import: each command imports what it uses, so that --help is instant.
if TYPE_CHECKING:
    from fixpoint_diffusion.denoisers import NetworkDenoiser

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Sample from diffusion models in parallel or in sequence, train small ones, and look at model folders.",
)


class SolverName(StrEnum):
    sequential = "sequential"
    causal = "causal"
    picard = "picard"
    anderson = "anderson"
    broyden = "broyden"


app.command()(train)
app.command()(encode)


@app.command()
def info(
    model: Annotated[str | None, typer.Argument(help="An embedded model's name or a model folder.")] = None,
) -> None:
    """Say what a model folder holds; without an argument, list the embedded models.

    Example: fixpoint-diffusion info ddpm-digits
    """
    from fixpoint_diffusion.denoisers import EMBEDDED_MODELS
    from fixpoint_diffusion.denoisers.checksums import CHECKSUM_FILE, verify_checksums

    if model is None:
        for name in EMBEDDED_MODELS:
            denoiser, _ = _open_model(name)
            parameters = sum(p.numel() for p in denoiser.model.parameters())
            shape = "x".join(map(str, denoiser.sample_shape or ()))
            typer.echo(f"{name:12} {type(denoiser.model).__name__}, {parameters:,} parameters, images {shape}")
        typer.echo("\nMore of one: fixpoint-diffusion info NAME_OR_FOLDER")
        return
    denoiser, folder = _open_model(model)
    schedule = denoiser.schedule_config or {}
    betas = f"{schedule.get('beta_schedule')} {schedule.get('beta_start')}..{schedule.get('beta_end')}"
    terminal = ", zero terminal SNR" if schedule.get("rescale_betas_zero_snr") else ""
    checked = (folder / CHECKSUM_FILE).is_file()
    rows = {
        "folder": folder,
        "class": type(denoiser.model).__name__,
        "parameters": f"{sum(p.numel() for p in denoiser.model.parameters()):,}",
        "weights": f"{sum(p.stat().st_size for p in folder.rglob('*.safetensors')) / 1e6:.2f} MB",
        "images": "any size" if denoiser.sample_shape is None else "x".join(map(str, denoiser.sample_shape)),
        "predicts": denoiser.prediction_type,
        "schedule": f"{betas}, {schedule.get('num_train_timesteps')} timesteps{terminal}" if schedule else "not given",
        "checksums": f"{len(verify_checksums(folder))} files match" if checked else f"no {CHECKSUM_FILE}",
    }
    for name, value in rows.items():
        typer.echo(f"{name:10} {value}")


@app.command()
def sample(
    model: Annotated[str, typer.Option(help="An embedded model's name or a model folder.")] = "ddpm-digits",
    num_images: Annotated[int, typer.Option(min=1, help="How many images.")] = 16,
    steps: Annotated[int, typer.Option(min=1, help="Sampling steps.")] = 50,
    eta: Annotated[float, typer.Option(min=0.0, max=1.0, help="Noise per step: 0 is DDIM, 1 as DDPM.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of all noise.")] = 0,
    solver: Annotated[SolverName, typer.Option(help="sequential: step after step; others solve all steps at once.")] = (
        SolverName.sequential
    ),
    rtol: Annotated[float, typer.Option(help="Parallel solvers: relative tolerance.")] = 1e-3,
    max_rounds: Annotated[
        int | None,
        typer.Option(min=1, help="Parallel solvers: most rounds (batched model calls) (default: steps + 1)."),
    ] = None,
    max_rows: Annotated[
        int | None,
        typer.Option(min=1, help="causal: most model rows in a round (default: by the model's measured cost)."),
    ] = None,
    iterations: Annotated[int | None, typer.Option(min=1, help="FPDM: iterations per step (default: 4).")] = None,
    reuse: Annotated[
        bool | None,
        typer.Option("--reuse/--no-reuse", help="FPDM: start at the last step's solution (default: reuse)."),
    ] = None,
    device: Annotated[str, typer.Option(help="Where to sample: cpu, cuda, ...")] = "cpu",
    out: Annotated[Path, typer.Option(help="Folder for grid.png, images.npy and sample.json.")] = Path("runs/sample"),
) -> None:
    """Draw images from a model, and write them with the figures of the run.

    Example: fixpoint-diffusion sample --model ddpm-digits --num-images 16 --steps 50 --solver causal

    For the embedded models, that includes the confidence of a small classifier of real digits in the images.
    """
    denoiser, _ = _open_model(model, device=device)

    import numpy as np

    from fixpoint_diffusion.denoisers import EMBEDDED_MODELS
    from fixpoint_diffusion.metrics import digit_quality
    from fixpoint_diffusion.sampling.drawing import DrawOptions, draw
    from fixpoint_diffusion.sampling.grids import save_grid

    options = DrawOptions(
        num_images=num_images,
        steps=steps,
        eta=eta,
        seed=seed,
        solver=solver.value,
        rtol=rtol,
        max_rounds=max_rounds,
        max_rows=max_rows,
        iterations=iterations,
        reuse=reuse,
    )
    drawn = draw(denoiser, options)
    out.mkdir(parents=True, exist_ok=True)
    save_grid(drawn.images, out / "grid.png")
    np.save(out / "images.npy", drawn.images.cpu().numpy())
    figures = {"model": model, **drawn.figures}
    if model in EMBEDDED_MODELS:
        quality = digit_quality(drawn.images)
        figures |= {"digit_confidence": quality.confidence, "relative_to_real_digits": quality.relative_confidence}
    (out / "sample.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    width = max(map(len, figures))
    typer.echo("\n".join(f"{name:{width}}  {value}" for name, value in figures.items()))
    typer.echo(f"written to {out}: grid.png, images.npy, sample.json")


def _open_model(model: str, *, device: str = "cpu") -> tuple[NetworkDenoiser, Path]:
    from fixpoint_diffusion.denoisers import EMBEDDED_MODELS, embedded_folder, load_denoiser

    folder = embedded_folder(model) if model in EMBEDDED_MODELS else Path(model)
    if not folder.is_dir():
        raise FileNotFoundError(f"no model folder {model!r}; embedded models are {', '.join(EMBEDDED_MODELS)}")
    return load_denoiser(folder, device=device), folder


def main() -> None:
    """Run the command; what the user can put right ends in one line, not in a traceback."""
    try:
        app()
    except (ValueError, OSError, ImportError, ArithmeticError) as error:
        missing = isinstance(error, ModuleNotFoundError)
        hint = ": pip install 'fixpoint[diffusion]'" if missing and "pip install" not in str(error) else ""
        typer.echo(f"Error: {' '.join(str(error).split())}{hint}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
