"""The command ``fixpoint-diffusion``: sample from a model, train one, look at one."""

from __future__ import annotations

import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NoReturn

try:
    import typer
except ImportError:  # pragma: no cover
    raise SystemExit("fixpoint-diffusion needs typer: pip install 'fixpoint[diffusion]'") from None

from fixpoint_diffusion.commands.encode import encode
from fixpoint_diffusion.commands.evaluate import evaluate
from fixpoint_diffusion.commands.info import info
from fixpoint_diffusion.commands.sample import sample

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Sample from diffusion models in parallel or in sequence, train small ones, and look at model folders.",
)


app.command()(encode)
app.command()(evaluate)


class ModelKind(StrEnum):
    unet = "unet"
    fpdm = "fpdm"


class WeightingName(StrEnum):
    plain = "plain"
    min_snr = "min-snr"


@app.command()
def train(
    kind: Annotated[
        ModelKind | None, typer.Argument(help="unet: U-Net that predicts noise (default). fpdm: fixed point model.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the model, its log and the checkpoint.")] = Path("runs/train"),
    data: Annotated[str | None, typer.Option(help="'digits' (default), a .npy file or a folder of images.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimiser steps.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Images per step.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    ema_decay: Annotated[float | None, typer.Option(help="Decay of the averaged weights, which are kept.")] = None,
    weighting: Annotated[WeightingName | None, typer.Option(help="Weight of each timestep's loss.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of the initial weights and of training.")] = None,
    settings: Annotated[Path | None, typer.Option(help="JSON file with settings of the model's architecture.")] = None,
    checkpoint_every: Annotated[int | None, typer.Option(min=1, help="Steps between checkpoints.")] = None,
    device: Annotated[str, typer.Option(help="Where to train: cpu, cuda, ...")] = "cpu",
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out, with its own settings.")] = False,
) -> None:
    """Train a denoiser and write it as a model folder.

    Example: fixpoint-diffusion train unet --data digits --steps 9000 --out runs/my-unet

    Digits are trained on four fifths of scikit-learn's set; the rest is held out for judging. Ctrl-C finishes the step
    at hand and writes a checkpoint, from which --resume continues to the same result as an uninterrupted run. An option
    that is not given takes the value that the embedded model of that kind was trained with.
    """
    given: dict[str, Any] = {
        "steps": steps,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "ema_decay": ema_decay,
        "weighting": weighting and weighting.value,
        "seed": seed,
        "checkpoint_every": checkpoint_every,
    }
    given = {name: value for name, value in given.items() if value is not None}
    if resume:
        origin_options = {"kind": kind, "data": data, "settings": settings}
        clashing = [*given, *(name for name, value in origin_options.items() if value is not None)]
        if clashing:
            names = ", ".join(name if name == "kind" else "--" + name.replace("_", "-") for name in clashing)
            raise typer.BadParameter(f"a resumed run keeps its own settings; drop {names}", param_hint="--resume")

    import dataclasses

    from fixpoint_diffusion.training.recipes import RECIPES
    from fixpoint_diffusion.training.runs import TrainingRun

    if resume:
        run = TrainingRun.resume(out, device=device)
    else:
        name = (kind or ModelKind.unet).value
        run = TrainingRun.start(
            out,
            kind=name,
            data=data or "digits",
            settings=None if settings is None else _read_settings(settings),
            config=dataclasses.replace(RECIPES[name].training, **given),
            device=device,
        )
    typer.echo(run.describe())
    try:
        log = run.run()
    except KeyboardInterrupt:
        typer.echo(
            f"\nInterrupted; checkpoint written. Continue with:\n  fixpoint-diffusion train --resume --out {out}"
        )
        raise typer.Exit(130) from None
    typer.echo(f"Trained in {log.seconds:.0f} s, written to {out}. Try:\n  fixpoint-diffusion sample --model {out}")


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} must hold a JSON object of settings, got a {type(settings).__name__}")
    return settings


app.command()(sample)
app.command()(info)

# What a user can put right; anything else is a fault of ours, and its traceback is wanted.
_USER_ERRORS = (ValueError, OSError, ImportError, ArithmeticError, MemoryError, RecursionError)
# Typer has click's classes within it, or imports them, according to its version.
_UsageError: Any = typer.BadParameter.__mro__[1]


def main() -> None:
    """Run the command; what the user can put right ends in one line and exit code 2, not in a traceback."""
    try:
        code = app(standalone_mode=False)
    except _UsageError as error:
        if not error.format_message():  # no command was given, and help has been shown
            sys.exit(2)
        _stop(error.format_message())
    except typer.Abort:
        sys.exit(130)
    except _USER_ERRORS as error:
        missing = isinstance(error, ModuleNotFoundError)
        hint = ": pip install 'fixpoint[diffusion]'" if missing and "pip install" not in str(error) else ""
        _stop(f"{error}{hint}" or type(error).__name__)
    except RuntimeError as error:
        if "out of memory" not in str(error) and "allocate memory" not in str(error):
            raise
        _stop("not enough memory: take a smaller --batch-size")
    sys.exit(code if isinstance(code, int) else 0)


def _stop(message: str) -> NoReturn:
    typer.echo(f"Error: {' '.join(message.split())}", err=True)
    sys.exit(2)


if __name__ == "__main__":
    main()
