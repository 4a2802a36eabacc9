"""``fixpoint-diffusion experiments``: the tables and figures of both papers."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fixpoint_cli.running import interruptible
from fixpoint_diffusion.commands.shared import check_device, path_option
from fixpoint_diffusion.experiments.names import NAMES, names_meant
from fixpoint_diffusion.files import check_replaceable, check_writable, read_json

if TYPE_CHECKING:
    from fixpoint_diffusion.experiments.experiment import Experiment, Scale
    from fixpoint_diffusion.experiments.records import Records

app = typer.Typer(no_args_is_help=True, help="Tables and figures of DEQ-DDIM and FPDM: list them, run them, report.")


class ScaleName(StrEnum):
    MINI = "mini"
    PAPER = "paper"


Names = Annotated[
    list[str] | None,
    typer.Argument(metavar="NAME", help="As list shows them; deq-ddim or fpdm for a whole paper.", show_default=False),
]
All = Annotated[bool, typer.Option("--all", help="All of them.")]
ScaleOption = Annotated[ScaleName, typer.Option("--scale", help="mini: bundled models and data; paper: theirs.")]
Quick = Annotated[bool, typer.Option("--quick", help="Seconds: sees that it runs, and shows nothing.")]
Out = Annotated[
    Path, typer.Option(parser=path_option, help="Folder for records, trained models and the report.", metavar="FOLDER")
]
AnyCommit = Annotated[bool, typer.Option("--any-commit", help="Count records that other versions of the code made.")]
OUT = Path("runs/experiments")


@app.command("list")
@interruptible
def list_command() -> None:
    """List all experiments: what the paper claims there, and about how long the mini scale takes on one core."""
    from fixpoint_diffusion.experiments.registry import EXPERIMENTS

    width = max(map(len, EXPERIMENTS))
    for name, entry in EXPERIMENTS.items():
        typer.echo(f"{name.ljust(width)}  {entry.minutes:4.0f} min  {entry.claim}")


@app.command("run")
@interruptible
def run_command(
    names: Names = None,
    all_of_them: All = False,
    scale: ScaleOption = ScaleName.MINI,
    quick: Quick = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it takes, and do nothing.")] = False,
    minutes: Annotated[
        float | None,
        typer.Option(min=0, help="Begin no run after so many; the same command goes on (default: no end)."),
    ] = None,
    any_commit: AnyCommit = False,
    models: Annotated[
        Path | None, typer.Option(parser=path_option, help="Folder of model folders.", metavar="FOLDER")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(parser=path_option, help="Folder of data sets.", metavar="FOLDER")
    ] = None,
    features: Annotated[
        Path | None, typer.Option(parser=path_option, help="Weights of Inception, for distances.", metavar="FILE")
    ] = None,
    device: Annotated[str, typer.Option(help="Where models run: cpu, cuda, ...")] = "cpu",
    out: Out = OUT,
) -> None:
    """Run what has no record yet, then print each verdict and write the report.

    Every run is one JSON file, so that a long grid goes on in another sitting; several processes may share the folder.
    The exit code is 1 if a run failed.
    """
    chosen, size = _chosen(names, all_of_them), _scale(scale, quick)
    from fixpoint_diffusion.experiments.plans import plan
    from fixpoint_diffusion.experiments.resources import Resources
    from fixpoint_diffusion.experiments.running import compute

    records = _records(out, any_commit)
    _tell_of_other_versions(chosen, size, records)
    if dry_run:
        for entry in chosen:
            missing = sum(records.find(entry.kind.name, config) is None for config in entry.grid[size])
            todo = f"{entry.name}: {missing} of {len(entry.grid[size])} runs to do"
            time = f"; all of them take about {entry.minutes:g} minutes on one core" * (size == "mini")
            typer.echo(plan(entry) if size == "paper" else todo + time)
        return
    check_device(device)
    _check_out(out)
    _check_drawing()
    resources = Resources(
        records=records, scratch=out / "models", models=models, data=data, features=features, device=device
    )
    try:
        outcome = compute(chosen, size, resources, minutes=minutes, progress=True)
    except KeyboardInterrupt:
        typer.echo(
            f"\nInterrupted; finished runs are kept in {records.folder}, checkpoints of a training in "
            f"{resources.scratch}. The same command goes on."
        )
        raise typer.Exit(130) from None
    _tell(chosen, size, records, out, outcome.failures)
    if outcome.left:
        typer.echo(f"{outcome.left} runs are left: the same command goes on with them")
    for failure in outcome.failures:
        typer.echo(f"failed: {failure['name']}: {failure['error']}", err=True)
    raise typer.Exit(1 if outcome.failures else 0)


@app.command("report")
@interruptible
def report_command(
    names: Names = None,
    all_of_them: All = False,
    scale: ScaleOption = ScaleName.MINI,
    quick: Quick = False,
    any_commit: AnyCommit = False,
    out: Out = OUT,
) -> None:
    """Write the report of the records that are there, and run nothing."""
    chosen, size = _chosen(names, all_of_them), _scale(scale, quick)
    _check_out(out)
    _check_drawing()
    records = _records(out, any_commit)
    _tell_of_other_versions(chosen, size, records)
    _tell(chosen, size, records, out, [])


def _chosen(names: list[str] | None, all_of_them: bool) -> list[Experiment]:
    if bool(names) == all_of_them:
        raise typer.BadParameter("name experiments, or take --all; fixpoint-diffusion experiments list shows them")
    meant = names_meant(names or NAMES)
    from fixpoint_diffusion.experiments.registry import EXPERIMENTS  # PyTorch, which takes seconds

    return [EXPERIMENTS[name] for name in meant]


def _scale(scale: ScaleName, quick: bool) -> Scale:
    if quick and scale is ScaleName.PAPER:
        raise typer.BadParameter("--quick is a scale of its own; drop --scale paper")
    return "quick" if quick else scale.value


def _records(out: Path, any_commit: bool) -> Records:
    from fixpoint_diffusion.experiments.records import Records

    return Records(out / "records", any_code=any_commit)


def _check_out(out: Path) -> None:
    """Refuse a folder that takes no file, or that holds the results of fixpoint bench."""
    from fixpoint_diffusion.experiments.running import TITLE

    def is_own(path: Path) -> bool:
        return str(read_json(path).get("title")).startswith(TITLE)

    check_replaceable(out / "results.json", is_own)
    check_writable(out / "report.html")


def _check_drawing() -> None:
    """Before anything is run: the report at the end has pictures."""
    from fixpoint_diffusion.extras import needed_for

    with needed_for("the report"):
        import matplotlib  # noqa: F401


def _tell_of_other_versions(chosen: list[Experiment], scale: Scale, records: Records) -> None:
    """Before hours are spent on what is there."""
    from fixpoint_diffusion.experiments.running import of_other_versions

    if count := of_other_versions(chosen, scale, records):
        typer.echo(f"Note: {count} missing runs have records of other versions of the code; --any-commit counts these")


def _tell(
    chosen: list[Experiment], scale: Scale, records: Records, out: Path, failures: Sequence[dict[str, str]]
) -> None:
    from fixpoint_diffusion.experiments.running import report, verdicts

    for entry, verdict in verdicts(chosen, scale, records):
        typer.echo(f"{verdict.word:7}  {entry.name}: {entry.claim}")
        typer.echo(f"         theirs: {entry.theirs or 'pictures'}\n         ours:   {verdict.found}")
    if scale == "quick":
        typer.echo("Note: --quick only checks that everything runs; its verdicts mean nothing")
    typer.echo(f"report:  {report(chosen, scale, records, out, failures=failures)}")
