"""What ``fixpoint`` does: compare solvers on problems, list the problems, draw a report again."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Annotated

from fixpoint_cli.names import check_names

DISTRIBUTION = "fixpoint-torch"
EXTRA = f'pip install "{DISTRIBUTION}[bench]"'

try:
    import tqdm  # noqa: F401 - missed here, before anything is run
    import typer

    from fixpoint_cli.running import interruptible, stop
except ModuleNotFoundError as error:
    raise SystemExit(f"the command fixpoint needs {error.name}: {EXTRA}") from None

app = typer.Typer(
    help="Solve fixed-point problems by name, side by side with every solver.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False) -> None:
    if version:
        typer.echo(metadata.version(DISTRIBUTION))
        raise typer.Exit()


@app.command("bench")
@interruptible
def bench_command(
    problems: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="PROBLEM",
            help="Names from 'fixpoint problems', or module:name, or file.py:name, with options as in "
            "linear:rho=0.99,dim=50. None: the classical ones.",
            show_default=False,
        ),
    ] = None,
    solver: Annotated[
        list[str] | None,
        typer.Option(
            help="picard, anderson, broyden, acx, gmres (for affine maps) or causal (for chains), or module:Class, or "
            "file.py:Class, with options as in anderson:memory=10,blocks=50 (blocks: parts of a row with coefficients "
            "of their own). "
            "Repeat to compare several; without it, a problem that has a study of its own runs that.",
            show_default=False,
        ),
    ] = None,
    rtol: Annotated[
        list[float] | None, typer.Option(min=0, help="Relative tolerance [1e-5]; repeat for several.")
    ] = None,
    max_evals: Annotated[int, typer.Option(min=1, help="Evaluations of f granted to each solve.")] = 300,
    out: Annotated[Path, typer.Option(file_okay=False, help="Folder for results.json, pictures and page.")] = Path(
        "runs"
    ),
    quick: Annotated[bool, typer.Option("--quick", help="Small versions of the problems' own studies.")] = False,
) -> None:
    """Run problems and write results.json, pictures and one self-contained report.html.

    The exit code is 1 if a study failed; the others are written all the same. If all failed, nothing is written.
    """
    if importlib.util.find_spec("matplotlib") is None:
        stop(f"drawing needs matplotlib: {EXTRA}")

    sys.path.append(os.getcwd())  # for module:name, last so that it hides nothing
    try:
        check_names(problems or (), solver or ())
        from fixpoint import bench  # PyTorch, which takes seconds
        from fixpoint.bench import report

        bench.check(problems or (), solver or ())
    except (LookupError, TypeError, ValueError) as error:
        stop(str(error))
    _check_writable(out)
    results = bench.run(
        problems or (), solver or (), rtols=rtol or (1e-5,), max_evals=max_evals, quick=quick, progress=_bar
    )
    for failure in results["failures"]:
        typer.echo(f"failed: {failure['name']}: {failure['error']}", err=True)
    if not results["studies"]:
        raise typer.Exit(1)  # what stood in the folder stays
    path = bench.write(results, out)
    typer.echo(report.main_tables(results) + "\n")
    for reason in report.reasons(results):
        typer.echo(reason, err=True)
    typer.echo(f"results: {path}")
    typer.echo(f"report:  {report.render(results, out)}")
    raise typer.Exit(1 if results["failures"] else 0)


@app.command("problems")
@interruptible
def problems_command() -> None:
    """List the registered problems."""
    import fixpoint

    entries = fixpoint.available_problems()
    width = max(map(len, entries), default=0)
    for name, entry in entries.items():
        typer.echo(f"{name.ljust(width)}  {entry.summary}")


@app.command("report")
@interruptible
def report_command(
    results: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="A results.json of 'fixpoint bench'.")],
    out: Annotated[Path | None, typer.Option(file_okay=False, help="Folder [that of the results].")] = None,
) -> None:
    """Draw pictures and page again from results alone."""
    from fixpoint.bench import report

    _check_writable(out or results.parent)
    try:
        data = json.loads(results.read_text(encoding="utf-8"))
        page = report.render(data, out or results.parent)
    except (ValueError, KeyError, AttributeError) as error:
        stop(f"{results} does not hold results of fixpoint bench: {error}")
    except ModuleNotFoundError as error:
        stop(str(error))
    typer.echo(f"report:  {page}")


def _bar(names: Sequence[str]) -> Iterator[str]:
    """A progress bar over the studies that names the one that runs."""
    import fixpoint

    with fixpoint.ProgressBar.tqdm(total=len(names), unit="study") as bar:
        for name in names:
            bar.set_description(name)
            yield name
            bar.update()


def _check_writable(folder: Path) -> None:
    """Make the folder, and refuse one that cannot be written before there is anything to lose."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise typer.BadParameter(f"cannot write to {folder}: {error.strerror or error}", param_hint="--out") from None
