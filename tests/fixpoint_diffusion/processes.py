"""Several processes of one command, as ``torchrun`` starts them."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]


def start_ranks(size: int, *command: object) -> list[subprocess.Popen]:
    """Start ``python COMMAND`` as ``size`` ranks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = []
    for rank in range(size):
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
        environment = {**os.environ, **{name: str(value) for name, value in names.items()}, "MASTER_ADDR": "127.0.0.1"}
        ranks.append(
            subprocess.Popen(
                [sys.executable, *map(str, command)],
                env=environment,
                cwd=ROOT,  # so that the package beside these tests is used
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
        )
    return ranks


def ended(ranks: list[subprocess.Popen]) -> list[tuple[int, str, str]]:
    """Exit code, output and errors of each, of errors only lines of ours: no bars, and nothing that gloo says."""
    try:
        found = [(*process.communicate(timeout=240), process.returncode) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    return [(code, out, "\n".join(_ours(error))) for out, error, code in found]


def run_in_turn(commands: Sequence[Sequence[str]], prepare: Callable[[int], None]) -> None:
    """In one rank: run the command line again and again, and print each exit code with the threads of gloo left.

    Processes take long to start. ``prepare`` is called before each command with its number.
    """
    from fixpoint_diffusion.cli import main

    for turn, words in enumerate(commands):
        sys.argv[1:] = words
        os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + turn)
        prepare(turn)
        try:
            main()
        except SystemExit as stop:
            print("code", stop.code, *threads_of_gloo(), flush=True)


def threads_of_gloo() -> list[str]:
    """Those that stay in this process: one that is left when the interpreter ends may abort it."""
    end = time.monotonic() + 5
    while (found := _names_of_gloo()) and time.monotonic() < end:
        time.sleep(0.05)  # a thread that has been joined is listed for a moment more
    return found


def _names_of_gloo() -> list[str]:
    tasks = Path("/proc/self/task")
    names = []
    for task in tasks.iterdir() if tasks.exists() else ():
        with contextlib.suppress(OSError):  # it has ended in the meantime
            names.append((task / "comm").read_text().strip())
    return [name for name in names if "gloo" in name]


def _ours(error: str) -> list[str]:
    return [line for line in error.splitlines() if line.startswith(("Error", "Warning", "Traceback"))]


def wait_for(path: Path) -> None:
    """Until there is such a file."""
    end = time.monotonic() + 240
    while not path.exists():
        assert time.monotonic() < end, f"no {path}"
        time.sleep(0.05)
