"""Records of runs: one JSON file each, found again by what was run and with which code."""

from __future__ import annotations

import datetime
import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from fixpoint import bench
from fixpoint_diffusion.denoisers import EMBEDDED_MODELS, embedded_folder
from fixpoint_diffusion.files import locked, read_json, sha256_of, written_whole

Config = Mapping[str, Any]
Measures = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Record:
    """One run.

    Attributes:
        kind: of the run.
        config: what was run; its seed is in it.
        code: version of the code that ran, as ``fixpoint.bench.code_version`` gives it.
        weights: of the embedded model that the configuration names, the start of their SHA-256; empty: it names none.
        measures: what came out, as plain values; what is not finite is None.
        seconds: how long it took.
        date: when it ended.
        machine: where.
    """

    kind: str
    config: Config
    code: str
    weights: str
    measures: Measures
    seconds: float
    date: str
    machine: Mapping[str, Any]


class Records:
    """The records in a folder.

    Files are written whole, and a run that one process is at is left alone by others: several may work on one folder.

    Args:
        folder: has a subfolder for each kind.
        any_code: whether records count that another version of the code has made, with the embedded weights of today.

    >>> import tempfile
    >>> records = Records(Path(tempfile.mkdtemp()))
    >>> records.compute("sum", {"a": 1, "b": 2}, lambda config: {"value": config["a"] + config["b"]}).measures
    {'value': 3}
    >>> records.find("sum", {"b": 2, "a": 1}).measures  # not computed again
    {'value': 3}
    """

    def __init__(self, folder: str | Path, *, any_code: bool = False) -> None:
        self.folder = Path(folder)
        self.any_code = any_code
        self.code = bench.code_version("fixpoint", "fixpoint_diffusion")

    def find(self, kind: str, config: Config) -> Record | None:
        """The record of that run by this version of the code; else, if any counts, the newest.

        Raises:
            ValueError: if a file is damaged.
        """
        own = self._path(kind, config)
        if own.is_file():
            return _read(own, config)
        if not self.any_code:
            return None
        earlier = [_read(path, config) for path in self.folder.glob(f"{kind}/{_key(config)}-*.json")]
        fitting = [record for record in earlier if record.weights == _weights(config)]
        return max(fitting, key=lambda record: record.date, default=None)

    def compute(self, kind: str, config: Config, run: Callable[[Config], Measures]) -> Record:
        """The record of that run, which is made if it is not there.

        Raises:
            BlockingIOError: if another process is at it.
        """
        path = self._path(kind, config)
        with locked(path.parent / f".{path.stem}", work="at this run"):
            found = self.find(kind, config)
            if found is not None:
                return found
            start = time.perf_counter()
            measures = _rounded(bench.plain(run(config)))
            record = Record(
                kind=kind,
                config=bench.plain(dict(config)),
                code=self.code,
                weights=_weights(config),
                measures=measures,
                seconds=round(time.perf_counter() - start, 2),
                date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                machine=bench.machine(),
            )
            with written_whole(path) as file:  # on one line: curves are long
                file.write((json.dumps(asdict(record), allow_nan=False) + "\n").encode())
            return record

    def _path(self, kind: str, config: Config) -> Path:
        return self.folder / kind / f"{_key(config)}-{self.code}.json"


def _key(config: Config) -> str:
    text = json.dumps(bench.plain(dict(config)), sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _weights(config: Config) -> str:
    model = config.get("model")
    if model not in EMBEDDED_MODELS:
        return ""
    return _start_of_sha256(embedded_folder(model) / "diffusion_pytorch_model.safetensors")


@cache
def _start_of_sha256(path: Path) -> str:
    return sha256_of(path)[:12]


def _read(path: Path, config: Config) -> Record:
    try:
        record = Record(**read_json(path))
    except TypeError as error:
        raise ValueError(f"{path} is no record of a run: {error}; delete it to run again") from None
    if record.config != bench.plain(dict(config)):
        raise ValueError(f"{path} is the record of another run; delete it to run again")
    return record


def _rounded(value: Any) -> Any:
    """Six digits: more are noise, and take room."""
    if isinstance(value, dict):
        return {name: _rounded(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_rounded(each) for each in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value
