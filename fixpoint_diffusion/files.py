"""Files: whole or not there, damage named in one clear error, and folders that one process at a time writes to."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.lib.format import MAGIC_PREFIX

_LITTER = ("Thumbs.db", "desktop.ini", "__MACOSX")


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
    """Write a JSON object to a file, indented; whole or not at all."""
    with written_whole(path) as file:
        file.write((json.dumps(dict(content), indent=2) + "\n").encode())


def map_array(path: Path) -> np.ndarray:
    """A ``.npy`` file without reading it into memory; pickled objects are refused.

    Raises:
        ValueError: If the file is damaged or holds something else.
    """
    with path.open("rb") as file:
        if file.read(len(MAGIC_PREFIX)) != MAGIC_PREFIX:  # NumPy would take it for a pickle, and say how to allow these
            raise ValueError(f"{path} is no .npy file")
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} does not open as an array: {error}") from error


_PART = re.compile(r"\.[0-9a-f]{32}\.part$")  # as written_whole calls them


@contextlib.contextmanager
def written_whole(path: str | Path) -> Iterator[BinaryIO]:
    """A file to write to, which gets its name when it is complete, whoever else writes there.

    Raises:
        OSError: If it cannot be written; what was at ``path`` stays.
    """
    path = Path(path)
    part = path.with_name(f".{uuid.uuid4().hex}.part")  # no longer than a name may be, however long the file's is
    try:
        # Opened for reading too: to a file for writing alone NumPy writes by C's streams, and does not notice when the
        # last bytes of an array find no room.
        with part.open("w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        # NumPy's own says of a full disk how many items were written, and no more.
        reason = error.strerror or f"{error}; is the disk full?"
        raise OSError(f"cannot write to {path}: {reason}") from error
    finally:
        part.unlink(missing_ok=True)


def check_writable(path: Path) -> None:
    """Refuse, before there is anything to lose, a file that could not be written; nothing is left behind.

    Raises:
        OSError: If its folder, or where that would be made, takes no file.
    """
    there = next(each for each in path.absolute().parents if each.exists())
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        raise OSError(f"cannot write to {path}: {error.strerror or error}") from error


def check_free(folder: Path, names: Iterable[str], told: str | None = None) -> None:
    """Refuse a folder that holds a file of one of these names.

    Args:
        folder: where files are to be written.
        names: of these files.
        told: the end of the message: whose file it is, and what to do; None: nobody knows whose it is.

    Raises:
        FileExistsError: "FOLDER holds NAME of TOLD", for the first that is there.
    """
    for name in names:
        if (folder / name).exists():
            whose = f" of {told}" if told else ", which this command has not written: choose another --out"
            raise FileExistsError(f"{folder} holds {name}{whose}")


def check_replaceable(path: Path, is_own: Callable[[Path], bool]) -> None:
    """Refuse a file to write that is there already, unless ``is_own`` knows it as one that the same command wrote.

    Raises:
        FileExistsError: for such a file.
        IsADirectoryError: for a folder.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; expected the name of a file to write")
    if path.exists() and not is_own(path):
        raise FileExistsError(
            f"{path.parent} holds {path.name}, which this command has not written: choose another name"
        )


def check_source(source: str | Path) -> None:
    """Refuse a data set that is not there: no file, no folder, and not the built-in ``"digits"``.

    Raises:
        FileNotFoundError: If there is none.
    """
    if str(source) != "digits" and not (str(source) and Path(source).exists()):
        raise FileNotFoundError(f"no data set, .npy file or folder {str(source)!r}; the built-in set is 'digits'")


def visible_entries(folder: Path) -> list[Path]:
    """What lies in a folder, but for hidden files and what file managers leave behind; in no order."""
    return [path for path in folder.iterdir() if not path.name.startswith(".") and path.name not in _LITTER]


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_all(paths: Iterable[Path]) -> str:
    """One SHA-256 of several files: that of their checksums, in the order of their names."""
    total = hashlib.sha256()
    for path in sorted(paths):
        total.update(sha256_of(path).encode())
    return total.hexdigest()


@contextlib.contextmanager
def locked(folder: Path, *, work: str) -> Iterator[None]:
    """Hold a folder alone; the lock ends with the process, however that ends.

    The folder is made if absent, and deleted again if nothing has been put there. Parts of files that a process left
    there when it was killed as it wrote are deleted.

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
        for part in folder.glob(".*.part"):
            if _PART.search(part.name):  # another program may call its own unfinished files so
                part.unlink(missing_ok=True)
        yield
    finally:
        # While it is held: who gets it in between would hold a file that is gone. Who has opened that by then opens
        # another, as filelock sees to.
        with contextlib.suppress(OSError):  # something else is in there
            for path in new:
                path.rmdir() if path.is_dir() else path.unlink()
        lock.release()
