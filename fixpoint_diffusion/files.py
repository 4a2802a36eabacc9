"""Files that are whole or not there, folders that one process at a time writes to, and JSON with clear errors."""

from __future__ import annotations

import contextlib
import json
import os
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


def read_json(path: str | Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not valid JSON in UTF-8, is nested too deep, or holds something else than an object.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no {path.name} in {path.parent}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError(f"{path} is not valid JSON: it is nested too deep") from None
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got a {type(content).__name__}")
    return content


def write_json(path: str | Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object to a file, indented."""
    with whole_file(path) as part:
        part.write_text(json.dumps(dict(content), indent=2) + "\n", encoding="utf-8")


@contextlib.contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """A name beside ``path`` to write a file to; it becomes ``path`` if the block ends well, else it is deleted.

    No other process or thread is given the same name.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        yield part
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def locked(folder: Path, *, work: str) -> Iterator[None]:
    """Hold a folder alone; the lock ends with the process, however that ends.

    The folder is made if absent, and deleted again if nothing has been put there.

    Args:
        folder: what to hold.
        work: what is done there, for the message, such as ``"sampling"``.

    Raises:
        BlockingIOError: if another process holds it.
        NotADirectoryError: if it is a file.
        OSError: if it cannot be made.
    """
    from filelock import FileLock, Timeout

    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file; expected a folder")
    new = [path for path in (folder / ".lock", folder, *folder.parents) if not path.exists()]
    lock = FileLock(folder / ".lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=False)
    except Timeout:
        raise BlockingIOError(f"another run is {work} in {folder}: wait for it, or choose another folder") from None
    except OSError as error:
        raise OSError(f"cannot write to {folder}: {error.strerror or error}") from error
    try:
        yield
    finally:
        lock.release()
        with contextlib.suppress(OSError):  # something else is in there
            for path in new:
                path.rmdir() if path.is_dir() else path.unlink()
