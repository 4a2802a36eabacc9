"""The files of a folder of pictures, with the classes that its subfolders name."""

from __future__ import annotations

import os
import re
import warnings
from dataclasses import dataclass
from pathlib import Path

from fixpoint_diffusion.files import visible_entries
from fixpoint_diffusion.training.data.pictures import picture_suffixes


@dataclass(frozen=True, kw_only=True)
class PictureFolder:
    """Pictures in natural order (``2.png`` before ``10.png``), with one class number each where there are classes."""

    files: list[Path]
    labels: list[int] | None
    class_names: tuple[str, ...] | None


def scan_folder(folder: Path, *, labels: bool) -> PictureFolder:
    """Find all pictures under ``folder``; each subfolder is a class, whatever folders are inside it.

    A file that is no picture is named in a warning. Hidden files are left out without one.

    Args:
        folder: the folder.
        labels: False: the subfolders mean nothing.

    Raises:
        ValueError: if there is no picture, a class is empty, or pictures lie beside class folders.
    """
    files = visible_files(folder)
    suffixes = picture_suffixes()
    pictures = [file for file in files if file.suffix.lower() in suffixes]
    others = [str(file.relative_to(folder)) for file in files if file.suffix.lower() not in suffixes]
    if not pictures:
        raise ValueError(f"{folder} holds no picture: 0 image files and {len(others)} others {others[:3]}")
    if others:
        more = ", ..." if len(others) > 3 else ""
        warnings.warn(
            f"{folder}: {len(others)} files are no pictures and are left out: {', '.join(others[:3])}{more}",
            stacklevel=4,
        )
    own_class = [file.relative_to(folder).parts[0] if file.parent != folder else None for file in pictures]
    if not labels or own_class.count(None) == len(pictures):
        return PictureFolder(files=pictures, labels=None, class_names=None)
    if None in own_class:
        raise ValueError(
            f"{folder} holds {own_class.count(None)} pictures beside class folders, such as "
            f"{pictures[own_class.index(None)].name}: move them into a class, or open it without labels"
        )
    names = tuple(p.name for p in sorted(visible_entries(folder), key=_natural_order) if p.is_dir())
    empty = [name for name in names if name not in own_class]
    if empty:
        raise ValueError(f"{folder}: no picture in the class folder {empty[0]!r}: fill it or remove it")
    number = {name: index for index, name in enumerate(names)}
    return PictureFolder(files=pictures, labels=[number[name or ""] for name in own_class], class_names=names)


def visible_files(folder: Path, seen: frozenset[str] = frozenset()) -> list[Path]:
    """All files that are not hidden, in natural order, each folder's own before those of its subfolders.

    Raises:
        ValueError: if a link leads to a folder that it lies in (``seen``: those above).
    """
    real = os.path.realpath(folder)
    if real in seen:
        raise ValueError(f"{folder} is a link to a folder that holds it")
    entries = sorted(visible_entries(folder), key=_natural_order)
    files = [path for path in entries if not path.is_dir()]
    for path in entries:
        if path.is_dir():
            files += visible_files(path, seen | {real})
    return files


def _natural_order(path: Path) -> tuple[list[tuple[int, int, str]], str]:
    """``2.png`` before ``10.png``, numbers before words; the name itself decides between ``1`` and ``01``."""
    parts = re.findall(r"(\d+)|(\D+)", path.name)
    return [(0, int(number), "") if number else (1, 0, text) for number, text in parts], path.name
