"""Running experiments: what is missing is computed, and all that is there becomes one report."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fixpoint import ProgressBar, bench
from fixpoint_diffusion.experiments.experiment import Experiment, Kind, Scale, Verdict
from fixpoint_diffusion.experiments.plans import command
from fixpoint_diffusion.experiments.records import Config, Record, Records
from fixpoint_diffusion.experiments.resources import Resources
from fixpoint_diffusion.files import written_whole

TITLE = "Both papers, reproduced"


@dataclass(frozen=True)
class Outcome:
    """What a sitting has done: runs that failed, with their error, and how many were left for another sitting."""

    failures: Sequence[dict[str, str]]
    left: int


def compute(
    experiments: Sequence[Experiment],
    scale: Scale,
    resources: Resources,
    *,
    minutes: float | None = None,
    progress: bool = False,
) -> Outcome:
    """Run what has no record yet, each run once, in the order of the experiments.

    A run that raises is noted and does not stop the others. One that another process is at is left to it.

    Args:
        experiments: which.
        scale: of their grids.
        resources: what they are run with.
        minutes: no run is begun after so many; None: all are.
        progress: show a bar.
    """
    start, failures, left = time.perf_counter(), [], 0
    missing = list(_missing(experiments, scale, resources.records))
    with ProgressBar.tqdm(total=len(missing), unit="run", disable=not (progress and missing)) as bar:
        for kind, config in missing:
            bar.set_description(f"{kind.name} {_short(config)}")
            if minutes is not None and time.perf_counter() - start > 60 * minutes:
                left += 1
            else:
                try:
                    resources.records.compute(kind.name, config, kind.with_resources(resources))
                except BlockingIOError:
                    left += 1
                except (FileNotFoundError, ImportError):  # what the user has to give: the same in every run
                    raise
                except Exception as error:
                    logging.getLogger("fixpoint").exception("run %s of %s failed", dict(config), kind.name)
                    failures.append(
                        {"name": f"{kind.name} {_short(config)}", "error": f"{type(error).__name__}: {error}"}
                    )
            bar.update()
    return Outcome(failures, left)


def report(
    experiments: Sequence[Experiment],
    scale: Scale,
    records: Records,
    folder: Path,
    *,
    failures: Sequence[dict[str, str]] = (),
) -> Path:
    """Write ``results.json``, ``report.html`` with its pictures, and ``summary.md`` from the records that are there.

    Returns:
        Path: of the page.
    """
    studies: list[bench.Study] = []
    spent: dict[tuple[str, str], float] = {}  # a run that several share counts once
    for experiment in experiments:
        found, missing = _found(experiment, scale, records)
        studies.append(experiment.study(found, missing))
        spent |= {(each.kind, str(each.config)): each.seconds for each in found}
    results = bench.document(
        studies, seconds=sum(spent.values()), quick=scale == "quick", failures=failures, title=f"{TITLE} ({scale})"
    )
    bench.write(results, folder)
    with written_whole(folder / "summary.md") as file:
        file.write(summary(experiments, scale, records).encode())
    return bench.render(results, folder)


def summary(experiments: Sequence[Experiment], scale: Scale, records: Records) -> str:
    """A Markdown table with a row for each claim: theirs, ours, the verdict, and what to type."""
    lines = ["| | the paper's claim | theirs | ours | verdict | command |", "|---|---|---|---|---|---|"]
    for experiment, verdict in verdicts(experiments, scale, records):
        cells = (
            experiment.name,
            experiment.claim,
            experiment.theirs or "pictures",
            verdict.found,
            verdict.word,
            f"`{command(experiment.name, scale)}`",
        )
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def verdicts(experiments: Sequence[Experiment], scale: Scale, records: Records) -> Iterator[tuple[Experiment, Verdict]]:
    """Each experiment with its verdict."""
    for experiment in experiments:
        yield experiment, experiment.judge(*_found(experiment, scale, records))


def of_other_versions(experiments: Sequence[Experiment], scale: Scale, records: Records) -> int:
    """How many of the missing runs have records that other versions of the code made."""
    others = Records(records.folder, any_code=True)
    return sum(others.find(kind.name, config) is not None for kind, config in _missing(experiments, scale, records))


def _found(experiment: Experiment, scale: Scale, records: Records) -> tuple[list[Record], int]:
    each = [records.find(experiment.kind.name, config) for config in experiment.grid[scale]]
    found = [record for record in each if record is not None]
    return found, len(each) - len(found)


def _missing(experiments: Sequence[Experiment], scale: Scale, records: Records) -> Iterator[tuple[Kind, Config]]:
    seen: list[tuple[str, Any]] = []
    for experiment in experiments:
        for config in experiment.grid[scale]:
            name = (experiment.kind.name, dict(config))
            if name not in seen and records.find(experiment.kind.name, config) is None:
                seen.append(name)
                yield experiment.kind, config


def _short(config: Config) -> str:
    return " ".join(str(value) for value in config.values() if isinstance(value, str | int | float))
