"""The command ``fixpoint-diffusion``: sample from a model, train one, look at one."""

from __future__ import annotations

import sys
import time
from importlib import metadata
from typing import Annotated

from fixpoint_diffusion.extras import DISTRIBUTION, install_line
from fixpoint_diffusion.ranks import FailedElsewhereError

try:
    import typer

    from fixpoint_cli.running import interruptible, run_app, stop
    from fixpoint_diffusion.commands.encode import encode
    from fixpoint_diffusion.commands.evaluate import evaluate
    from fixpoint_diffusion.commands.experiments import app as experiments
    from fixpoint_diffusion.commands.info import info
    from fixpoint_diffusion.commands.invert import invert
    from fixpoint_diffusion.commands.sample import sample
    from fixpoint_diffusion.commands.train import train
except ModuleNotFoundError as error:
    raise SystemExit(f"the command fixpoint-diffusion needs {error.name}: {install_line()}") from None

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Sample from diffusion models in parallel or in sequence, train small ones, look at model folders, reproduce "
    "both papers.",
)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False) -> None:
    if version:
        typer.echo(metadata.version(DISTRIBUTION))
        raise typer.Exit()


for command in (train, encode, evaluate, sample, info, invert):
    app.command()(interruptible(command))
app.add_typer(experiments, name="experiments")

# What a user can put right; anything else is a fault of ours, and its traceback is wanted.
_USER_ERRORS = (ValueError, OSError, ImportError, ArithmeticError, MemoryError, RecursionError)
# Seconds for the process that has failed to say why: torchrun ends all others as soon as one has ended with an error.
_SECONDS_TO_REPORT = 5.0


def main() -> None:
    """Run the command; what the user can put right ends in one line and exit code 2, not in a traceback."""
    try:
        sys.exit(run_app(app))
    except FailedElsewhereError:  # that process says what it was
        time.sleep(_SECONDS_TO_REPORT)
        sys.exit(2)
    except _USER_ERRORS as error:
        missing = isinstance(error, ModuleNotFoundError)
        hint = f": {install_line()}" if missing and "pip install" not in str(error) else ""
        stop(f"{error}{hint}" or type(error).__name__)
    except RuntimeError as error:
        if "out of memory" not in str(error) and "allocate memory" not in str(error):
            raise
        stop("not enough memory: take a smaller --batch-size, or smaller images")


if __name__ == "__main__":
    main()
