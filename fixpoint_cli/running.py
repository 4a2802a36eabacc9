"""How both commands end: a mistake is told in one line, with exit code 2."""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable
from typing import Any, NoReturn

import typer

# Typer has click's classes within it, or imports them, according to its version.
_UsageError: Any = typer.BadParameter.__mro__[1]


def run_app(app: typer.Typer) -> int:
    """Run the command line and return its exit code."""
    usual = warnings.formatwarning
    # Whoever runs a command has no use for the line of ours at which a warning stands.
    warnings.formatwarning = lambda message, *_, **__: f"Warning: {' '.join(str(message).split())}\n"
    try:
        code = app(standalone_mode=False)
    except _UsageError as error:
        if not error.format_message():  # no command was given, and help has been shown
            return 2
        stop(error.format_message().replace("Value error, ", ""))  # so typer starts what pydantic refuses
    except typer.Abort:
        return 130
    finally:
        warnings.formatwarning = usual
    return code if isinstance(code, int) else 0


def interruptible(command: Callable[..., None]) -> Callable[..., None]:
    """The same command; Ctrl-C where it has nothing of its own to say ends in one line too."""

    @functools.wraps(command)
    def run(*args: Any, **given: Any) -> None:
        try:
            command(*args, **given)
        except KeyboardInterrupt:
            typer.echo("\nInterrupted.", err=True)  # below a progress bar
            raise typer.Exit(130) from None

    return run


def stop(message: str) -> NoReturn:
    """End with this message in one line, whatever line breaks it has."""
    typer.echo(f"Error: {' '.join(message.split())}", err=True)
    sys.exit(2)
