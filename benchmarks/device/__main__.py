"""Run the parts in order of worth, each in a process and a time of its own; sum up what they wrote.

    benchmarks/device/run.sh [--wheels DIR] [--out DIR] [--minutes 8] [--rehearse]

``run.sh`` sets up the paths and calls this. A part that fails or runs out of time does not stop the next.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.device import report
from benchmarks.device.common import Part, jsonable, machine, write_json

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Job:
    """A part by name, its share of the time, and what is called for it; None: this module, told its name."""

    name: str
    share: float
    command: tuple[str, ...] | None = None


# In order of worth. What a part leaves of its time goes to those after it.
JOBS = (Job("correct", 2.2), Job("overhead", 1.8), Job("chains", 4.0), Job("batch_cost", 1.0), Job("fpdm", 1.0))


def conduct(jobs: Sequence[Job], folder: Path, seconds: float, arguments: Sequence[str] = ()) -> dict[str, Any]:
    """Run the jobs in turn within ``seconds`` in all; how each ended, by name."""
    outcomes: dict[str, Any] = {}
    end = time.monotonic() + seconds
    for number, job in enumerate(jobs):
        limit = max((end - time.monotonic()) * job.share / sum(each.share for each in jobs[number:]), 1.0)
        own = [sys.executable, "-m", "benchmarks.device", "--part", job.name, "--seconds", f"{limit:.1f}"]
        start = time.monotonic()
        status = _run(job.command or (*own, "--out", str(folder), *arguments), limit)
        path = folder / f"{job.name}.json"
        document = json.loads(path.read_text()) if path.is_file() else {}
        if status == "done" and document.get("errors"):
            status = "done, with errors"
        outcomes[job.name] = {
            "status": status,
            "seconds": time.monotonic() - start,
            "limit": limit,
            "errors": document.get("errors", []),
            "left_out": document.get("left_out", []),
        }
        print(f"== {job.name}: {status} after {time.monotonic() - start:.1f} s of {limit:.0f} s", flush=True)
    return outcomes


def _run(command: Sequence[str], limit: float) -> str:
    """Whether it was done, failed or was stopped; with all processes that it started."""
    process = subprocess.Popen(command, start_new_session=True)
    try:
        code = process.wait(limit)
    except subprocess.TimeoutExpired:
        return "out of time"
    finally:
        # Compilers run in processes of their own, which may outlive the one that started them.
        _end(process)
    return "done" if code == 0 else f"failed (exit status {code})"


def _end(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all parts, or the one that is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for the results; by default one named by the date")
    parser.add_argument("--minutes", type=float, default=8.0, help="for all parts together")
    parser.add_argument("--rehearse", action="store_true", help="the same code with tiny sizes on the CPU")
    parser.add_argument("--only", nargs="+", choices=[job.name for job in JOBS], help="these parts alone")
    parser.add_argument("--commit", help="of the tree, where it is a copy without its history")
    parser.add_argument("--wheels", help="read by run.sh")
    parser.add_argument("--part", choices=[job.name for job in JOBS], help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if not options.rehearse and not torch.cuda.is_available():
        print("no CUDA device: nothing measured (--rehearse runs tiny sizes on the CPU)")
        return 0
    if options.part:
        if options.rehearse:
            torch.set_num_threads(1)  # of tiny operations, which more threads only slow down
        part = Part(options.part, options.out, options.seconds, options.rehearse)
        importlib.import_module(f"benchmarks.device.{options.part}").main(part)
        return 0
    today = datetime.date.today().isoformat()
    default = ROOT / "runs" / "device-rehearsal" if options.rehearse else report.RESULTS / today
    folder = (options.out or default).resolve()
    start = time.monotonic()
    jobs = [job for job in JOBS if not options.only or job.name in options.only]
    summary = {"date": today, "rehearsal": options.rehearse, **machine(options.commit)}
    write_json(folder / "summary.json", jsonable(summary))
    summary["parts"] = conduct(jobs, folder, 60 * options.minutes, ["--rehearse"] if options.rehearse else [])
    summary["seconds"] = time.monotonic() - start
    write_json(folder / "summary.json", jsonable(summary))
    text = report.table(folder)
    (folder / "summary.txt").write_text(text + "\n")
    print(text)
    return int(any(part["status"].startswith("failed") for part in summary["parts"].values()))


if __name__ == "__main__":
    sys.exit(main())
