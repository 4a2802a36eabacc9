"""What all parts share: where they run and for how long, the JSON that they write, clocks, and what machine it is."""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fixpoint
from fixpoint.bench import provenance

# What the checkout does not bring along, with what needs it. `run.sh --wheels` installs it.
WHEELS = {"diffusers": "the U-Nets", "torchdeq": "the peer's solvers"}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
_PACKAGES = ("torchdeq", "triton", "transformers", "accelerate", "huggingface_hub")
_MARGIN = 5.0  # seconds to write and to end in, before the part is stopped from outside


@dataclass
class Part:
    """A part at work: its device, its time, and the document that is written anew with every figure.

    Attributes:
        name: Of the part and of its file.
        folder: Where the file goes.
        seconds: How long it may take; it is stopped from outside after that.
        rehearse: Tiny sizes on the CPU.
    """

    name: str
    folder: Path
    seconds: float
    rehearse: bool
    document: dict[str, Any] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.document |= {"part": self.name, "rehearsal": self.rehearse, "left_out": [], "errors": []}
        self.write()

    @property
    def device(self) -> str:
        return "cpu" if self.rehearse else "cuda"

    @property
    def left(self) -> float:
        """Seconds that may still be spent."""
        return self.seconds - _MARGIN - (time.monotonic() - self.started)

    def add(self, table: str, **row: Any) -> None:
        """Append a row to one of the document's tables, and write it."""
        self.document.setdefault(table, []).append({name: jsonable(value) for name, value in row.items()})
        shown = " ".join(f"{name}={_short(value)}" for name, value in row.items())
        print(f"[{self.name}] {table}: {shown}", flush=True)
        self.write()

    def leave_out(self, what: str, why: str) -> None:
        """Say by name what was not measured."""
        self.document["left_out"].append({"what": what, "why": why})
        print(f"[{self.name}] left out: {what}: {why}", flush=True)
        self.write()

    def has(self, package: str) -> bool:
        """Whether a package can be imported; where not, what needs it is left out by name."""
        try:
            importlib.import_module(package)
        except Exception as error:  # a package for another version of Python or torch fails in ways of its own
            why = f"needs {package}, which cannot be imported ({type(error).__name__}: {error}): run.sh --wheels DIR"
            self.leave_out(WHEELS.get(package, package), why)
            return False
        return True

    @contextlib.contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """What fails is written down, and does not stop what comes after it."""
        try:
            yield
        except Exception as error:
            message = str(error).strip().partition("\n")[0][:300]
            self.document["errors"].append({"what": what, "error": f"{type(error).__name__}: {message}"})
            print(f"[{self.name}] failed: {what}: {type(error).__name__}: {message}", flush=True)
            self.write()
            if self.device == "cuda":
                torch.cuda.empty_cache()

    def write(self) -> None:
        write_json(self.folder / f"{self.name}.json", self.document)

    def wait(self) -> None:
        """Until the device has done what it was given."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def time(self, work: Callable[[], object], *, repeats: int = 3, warm_up: bool = True) -> float:
        """Least seconds of ``work``, the device's included."""
        least = math.inf
        for turn in range(repeats + warm_up):
            self.wait()
            start = time.perf_counter()
            work()
            self.wait()
            if turn >= warm_up:
                least = min(least, time.perf_counter() - start)
        return least

    def peak(self, work: Callable[[], object]) -> int | None:
        """Most bytes of the device that ``work`` held beyond what was there before; None on a CPU."""
        if self.device != "cuda":
            work()
            return None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before


def write_json(path: Path, document: dict[str, Any]) -> None:
    """All at once, so that a part that is stopped leaves its last whole document."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")
    draft.replace(path)


def jsonable(value: Any) -> Any:
    """Numbers that are not finite become None, so that any reader of JSON can read them."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {name: jsonable(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(each) for each in value]
    return value


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest entry; NaN if one is not finite."""
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-300))


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Gaussian numbers on the CPU, the same everywhere."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def machine(commit: str | None) -> dict[str, Any]:
    """Device, driver, versions and commit; "unknown" where the tree is a copy without its history."""
    versions = {"fixpoint": fixpoint.__version__, **provenance.versions()}
    for name in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    versions |= {"cuda": torch.version.cuda or "none", "torch": torch.__version__}
    cuda = torch.cuda.is_available()
    properties = torch.cuda.get_device_properties(0) if cuda else None
    return {
        "device": properties.name if properties else f"CPU ({platform.machine()})",
        "device_memory": properties.total_memory if properties else None,
        "driver": _driver() if cuda else None,
        "machine": provenance.machine(),
        "processors": os.cpu_count(),
        "versions": versions,
        "commit": commit or provenance.commit() or "unknown",
    }


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return None
