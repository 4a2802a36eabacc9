"""The folder of a sampling run: images in files, and a record by which the run goes on where it stopped."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from enum import StrEnum
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from fixpoint_diffusion.sampling.grids import to_pixels
from fixpoint_diffusion.sampling.job import SampleBatch

RECORD, GRID, ONE_FILE, IMAGES = "sample.json", "grid.png", "images.npy", "images"
_FILE = re.compile(r"(\d{8,})(?:-class\d+)?\.(npy|png)")
# What the record says of progress and cost; the rest of it are settings, which a continued run must share.
_PROGRESS = ("num_images", "images_done", "seconds", "rounds", "evals", "converged")


class ImageFormat(StrEnum):
    npy = "npy"
    png = "png"


class RunFolder:
    """Where a sampling run writes its images: all that is there is whole, and belongs to the same settings.

    ``npy``: float32 as sampled, ``(N, C, H, W)``: ``images.npy`` where one batch is all, else a file a batch,
    ``images/00000000.npy``, named by its first image. ``png``: 8 bit, an image a file, ``images/00000042.png``, or
    ``00000042-class7.png``. ``sample.json`` holds settings, cost and progress. Every file is written under another name
    and then renamed.

    Args:
        folder: made if absent. May hold the same run, whole or in part, which is then continued.
        settings: JSON-able; what the images depend on.
        num_images: how many there are to be; more that are there already stay.
        batch_size: images in a file, if ``npy``.
        image_shape: of one image.
        format: of the files.
        overwrite: delete the images of another run in the folder.

    Attributes:
        done: how many images are there, from the first without a gap.
        num_images: how many there will be.
        totals: what they cost so far.

    Raises:
        FileExistsError: if the folder holds another run, or images without a record.
        NotADirectoryError: if it is a file.
        OSError: if it cannot be written, or the disk has no room for the images.
        ValueError: if the images do not fit the format, or the record is damaged.
    """

    def __init__(
        self,
        folder: str | Path,
        settings: Mapping[str, Any],
        *,
        num_images: int,
        batch_size: int,
        image_shape: tuple[int, ...],
        format: ImageFormat = ImageFormat.npy,
        overwrite: bool = False,
    ) -> None:
        self.folder = Path(folder)
        self.format = format
        self.settings = json.loads(json.dumps({**settings, "format": format.value}))
        if format == ImageFormat.png and (len(image_shape) != 3 or image_shape[0] not in (1, 3)):
            shape = "x".join(map(str, image_shape))
            raise ValueError(f"PNG holds images of 1 or 3 channels, and these are {shape}: use --format npy")
        if self.folder.exists() and not self.folder.is_dir():
            raise NotADirectoryError(f"{self.folder} is a file; --out takes a folder")
        record = self._read_record(overwrite=overwrite)
        self.totals = {name: record[name] for name in _PROGRESS[2:] if name in record}
        self.done = self._count()
        self.num_images = max(num_images, self.done)
        self._one_file = format == ImageFormat.npy and self.done == 0 and num_images <= batch_size
        self._check_room(image_shape)
        self._made = _make_folder(self.folder)
        try:
            self._write_record()
        except OSError as error:
            self.discard_empty()
            raise _plain(error, self.folder) from error

    def write(self, batch: SampleBatch, *, seconds: float) -> None:
        """Add a batch that follows those that are there.

        Args:
            batch: the images, with ``batch.first == done``.
            seconds: what they took.

        Raises:
            OSError: if the disk is full or the folder has gone; what was there before still is.
        """
        assert batch.first == self.done
        files = self.folder / IMAGES
        try:
            if not self._one_file:
                files.mkdir(exist_ok=True)
                if (self.folder / ONE_FILE).exists():  # a finished run of one file, to which more images are added
                    os.replace(self.folder / ONE_FILE, files / f"{0:08d}.npy")
            if self.format == ImageFormat.npy:
                path = self.folder / ONE_FILE if self._one_file else files / f"{batch.first:08d}.npy"
                array = batch.images.numpy()
                _write(path, lambda file: np.lib.format.write_array(file, array, allow_pickle=False))
            else:
                for number, image in enumerate(batch.images):
                    label = "" if batch.labels is None else f"-class{int(batch.labels[number])}"
                    _write_png(files / f"{batch.first + number:08d}{label}.png", image)
            self.done += len(batch.images)
            for name, count in {**batch.counts, "seconds": round(seconds, 3)}.items():
                self.totals[name] = round(self.totals.get(name, 0) + count, 3)
            self._write_record()
        except OSError as error:
            raise _plain(error, self.folder) from error

    def discard_empty(self) -> None:
        """Where no image was written, delete the record and the folders that were made for it."""
        if self.done == 0:
            (self.folder / RECORD).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # something else is in there
                for folder in [self.folder / IMAGES, *self._made]:
                    if folder.exists():
                        folder.rmdir()

    def read(self, count: int) -> Tensor:
        """The first images that are there, at most so many: ``(n, *image_shape)`` float32."""
        count, parts = min(count, self.num_images), []
        if self.format == ImageFormat.png:
            from PIL import Image

            for path in self._files()[:count]:
                with Image.open(path) as picture:
                    pixels = torch.from_numpy(np.array(picture)).to(torch.float32).div(127.5).sub(1)
                parts.append(pixels[None, None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)[None])
            return torch.cat(parts)
        for path in self._files():
            have = sum(map(len, parts))
            if have == count:
                break
            parts.append(torch.from_numpy(np.array(np.load(path, mmap_mode="r")[: count - have])))
        return torch.cat(parts)

    def finish(self, figures: Mapping[str, Any]) -> dict[str, Any]:
        """Write further figures of the run into the record, and return all of it."""
        self._write_record(figures)
        return {**self._record(), **figures}

    def _record(self) -> dict[str, Any]:
        return {**self.settings, "num_images": self.num_images, "images_done": self.done, **self.totals}

    def _write_record(self, figures: Mapping[str, Any] | None = None) -> None:
        text = json.dumps({**self._record(), **(figures or {})}, indent=2) + "\n"
        _write(self.folder / RECORD, lambda file: file.write(text.encode()))

    def _read_record(self, *, overwrite: bool) -> dict[str, Any]:
        """The record of the same run, empty where there is none."""
        path = self.folder / RECORD
        if not path.is_file():
            there = [name for name in (RECORD, GRID, ONE_FILE, IMAGES) if (self.folder / name).exists()]
            if there:
                raise FileExistsError(f"{self.folder} holds {there[0]} of something else: choose another --out")
            return {}
        if overwrite:
            for file in (self.folder / ONE_FILE, self.folder / GRID, *self._files(), path):
                file.unlink(missing_ok=True)
            return {}
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is damaged: choose another --out, or pass --overwrite") from error
        if not isinstance(record, dict):
            raise ValueError(f"{path} is damaged: choose another --out, or pass --overwrite")
        for name, value in self.settings.items():
            if record.get(name) != value:
                raise FileExistsError(
                    f"{self.folder} holds another run: {name} is {_short(record.get(name))} there and {_short(value)} "
                    f"here; choose another --out, or pass --overwrite to delete that run"
                )
        return record

    def _files(self) -> list[Path]:
        """The files with images, in the order of these."""
        if (self.folder / ONE_FILE).is_file():
            return [self.folder / ONE_FILE]
        folder = self.folder / IMAGES
        named = [(match, path) for path in folder.glob("*") if (match := _FILE.fullmatch(path.name))]
        return [path for match, path in sorted(named, key=lambda pair: int(pair[0][1]))]

    def _count(self) -> int:
        """How many images are there without a gap; array files behind a gap are deleted, to be made again."""
        count, gap = 0, False
        for path in self._files():
            match = _FILE.fullmatch(path.name)
            gap = gap or (match is not None and int(match[1]) != count)
            if not gap:
                count += 1 if path.suffix == ".png" else len(_open_array(path))
            elif path.suffix == ".npy":
                path.unlink()
        return count

    def _check_room(self, image_shape: tuple[int, ...]) -> None:
        """Refuse what cannot fit on the disk; of PNG only the least size is known."""
        existing = next(
            folder for folder in (self.folder.absolute(), *self.folder.absolute().parents) if folder.exists()
        )
        disk = shutil.disk_usage(existing)
        each = 100 if self.format == ImageFormat.png else 4 * int(np.prod(image_shape))
        need = (self.num_images - self.done) * each
        if need > disk.free and disk.total:  # a file system that knows no size says 0
            raise OSError(
                f"{self.num_images} images of {'x'.join(map(str, image_shape))} need at least {need / 1e9:,.3f} GB, "
                f"and the disk of {self.folder} has {disk.free / 1e9:,.3f} GB left"
            )


def _make_folder(folder: Path) -> list[Path]:
    """Make a folder and its parents; return those that are new, the innermost first."""
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _plain(error, folder) from error
    return new


def _write(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Write a file under another name, and give it its own when it is whole."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            write(file)
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def _write_png(path: Path, image: Tensor) -> None:
    from PIL import Image

    pixels = to_pixels(image).permute(1, 2, 0).numpy()
    picture = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    _write(path, lambda file: picture.save(file, format="png"))


def _open_array(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} is damaged ({error}): delete it, and the run makes it again") from error


def _plain(error: OSError, folder: Path) -> OSError:
    """The error with the folder, in words; NumPy's own says of a full disk how many items were written, and no more."""
    reason = error.strerror or f"{error}; is the disk full?"
    return OSError(f"cannot write to {folder}: {reason}")


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."
