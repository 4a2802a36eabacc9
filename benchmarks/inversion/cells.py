"""Cells of a question: each is computed once, and an interrupted run goes on after the last one it has finished."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fixpoint.bench import provenance

Cell = dict[str, Any]


class Cells:
    """Finished cells by name, in a file of a line each that is only there until the question is answered.

    Cells of another commit are computed anew. Numbers that are not finite are kept as null.

    Args:
        path: of the file; None: nothing is kept.
        known: cells that were computed before.
    """

    def __init__(self, path: Path | None, known: Mapping[str, Cell] | None = None) -> None:
        self._path = path
        self._found: dict[str, Cell] = {}
        self._commit = provenance.commit()
        for line in path.read_text().splitlines() if path is not None and path.exists() else ():
            entry = json.loads(line)
            if entry["commit"] == self._commit:
                self._found[entry["name"]] = entry["cell"]
        if self._found:
            print(f"going on after the {len(self._found)} cells of {path}; delete it to begin anew", flush=True)
        self._found = {**(known or {}), **self._found}

    def __call__(self, name: str, compute: Callable[[], Cell]) -> Cell:
        """The cell of that name, computed if it is not there."""
        if name not in self._found:
            self._found[name] = plain(compute())
            if self._path is not None:
                with self._path.open("a") as file:
                    file.write(json.dumps({"commit": self._commit, "name": name, "cell": self._found[name]}) + "\n")
        return self._found[name]

    def finish(self) -> None:
        """Forget the file: the question is answered."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)


def plain(value: Any) -> Any:
    """Numbers of four digits, in lists and dicts; those that are not finite as None."""
    if isinstance(value, dict):
        return {name: plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if isinstance(value, float):
        return float(f"{value:.4g}") if math.isfinite(value) else None
    return value


def spread(errors: list[float | None]) -> tuple[float, float]:
    """Median (the upper of two middle ones) and worst; None is infinity."""
    known = sorted(math.inf if error is None else error for error in errors)
    return known[len(known) // 2], known[-1]


def pair(figures: tuple[float, float]) -> str:
    """``median/worst`` for tables; "-" for infinity."""
    return "/".join(f"{each:.1e}" if math.isfinite(each) else "-" for each in figures)
