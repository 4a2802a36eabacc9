"""The folder of a sampling run: images in files, and a record by which the run goes on where it stopped."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
from collections.abc import Mapping
from enum import StrEnum
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fixpoint_diffusion.files import map_array, read_json, visible_entries, write_json, written_whole
from fixpoint_diffusion.sampling.grids import to_pixels
from fixpoint_diffusion.sampling.job import SampleBatch

RECORD, GRID, ONE_FILE, IMAGES = "sample.json", "grid.png", "images.npy", "images"
_FILE = re.compile(r"(\d{8,})(?:-class\d+)?\.(npy|png)")
# What the record says of progress and cost; the rest of it are settings, which a continued run must share.
_PROGRESS = (
    *("num_images", "images_done", "seconds", "rounds", "evals", "converged"),
    *("rows_per_round", "layer_atol", "total_block_passes"),
)


class ImageFormat(StrEnum):
    npy = "npy"
    png = "png"


class RunFolder:
    """Where a sampling run writes its images: all that is there is whole, and belongs to the same settings.

    ``npy``: float32 as sampled, ``(N, C, H, W)``: ``images.npy`` where one batch is all, else a file a batch,
    ``images/00000000.npy``, named by its first image. ``png``: 8 bit, an image a file, ``images/00000042.png``, or
    ``00000042-class7.png``. ``sample.json`` holds settings, cost and progress. Every file appears whole or not at all.
    One process at a time: hold the folder by ``fixpoint_diffusion.files.locked``.

    Args:
        folder: a folder that is there. May hold the same run, whole or in part, which is then continued.
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
        FileExistsError: if the folder holds another run, images without a record, or files that no run writes there.
        OSError: if it cannot be written, or the disk has no room for the images.
        ValueError: if the images do not fit the format, or the record or a file of images is damaged or of another run.
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
        self._image_shape = tuple(image_shape)
        record = self._read_record(overwrite=overwrite)
        self.totals = {name: record[name] for name in _PROGRESS[2:] if name in record}
        self.done, to_delete = (0, [path for _, path in _numbered(self.folder)]) if overwrite else self._count()
        self.num_images = max(num_images, self.done)
        self._one_file = format == ImageFormat.npy and self.done == 0 and num_images <= batch_size
        self._check_room(to_delete)
        # From here on nothing is refused: what makes room for this run may go.
        try:
            for file in [*([self.folder / GRID] if overwrite else []), *to_delete]:
                file.unlink(missing_ok=True)
        except OSError as error:
            raise OSError(f"cannot write to {self.folder}: {error.strerror or error}") from error
        try:
            self._write_record()
        except OSError:
            self.discard_empty()
            raise

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
        if not self._one_file:
            files.mkdir(exist_ok=True)
            if (self.folder / ONE_FILE).exists():  # a finished run of one file, to which more images are added
                os.replace(self.folder / ONE_FILE, files / f"{0:08d}.npy")
        if self.format == ImageFormat.npy:
            with written_whole(self.folder / ONE_FILE if self._one_file else files / f"{batch.first:08d}.npy") as file:
                np.save(file, batch.images.numpy())
        else:
            for number, image in enumerate(batch.images):
                label = "" if batch.labels is None else f"-class{int(batch.labels[number])}"
                _write_png(files / f"{batch.first + number:08d}{label}.png", image)
        self.done += len(batch.images)
        for name, count in {**batch.counts, "seconds": round(seconds, 3)}.items():
            self.totals[name] = round(self.totals.get(name, 0) + count, 3)
        for name, value in batch.chosen.items():
            self.totals[name] = max(self.totals.get(name, 0), value)
        self._write_record()

    def discard_empty(self) -> None:
        """Where no image was written, delete the record and the folder that was made for images."""
        if self.done == 0:
            (self.folder / RECORD).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # not there, or something else is in it
                (self.folder / IMAGES).rmdir()

    def read(self, count: int) -> Tensor:
        """The first images that are there, at most so many: ``(n, *image_shape)`` float32."""
        count, parts = min(count, self.num_images), []
        if self.format == ImageFormat.png:
            from PIL import Image

            for path in run_files(self.folder)[:count]:
                with Image.open(path) as picture:
                    pixels = torch.from_numpy(np.array(picture)).to(torch.float32).div(127.5).sub(1)
                parts.append(pixels[None, None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)[None])
            return torch.cat(parts)
        for path in run_files(self.folder):
            have = sum(map(len, parts))
            if have == count:
                break
            parts.append(torch.from_numpy(np.array(map_array(path)[: count - have])))
        return torch.cat(parts)

    def finish(self, figures: Mapping[str, Any]) -> dict[str, Any]:
        """Write further figures of the run into the record, and return all of it."""
        self._write_record(figures)
        return {**self._record(), **figures}

    def _record(self) -> dict[str, Any]:
        return {**self.settings, "num_images": self.num_images, "images_done": self.done, **self.totals}

    def _write_record(self, figures: Mapping[str, Any] | None = None) -> None:
        write_json(self.folder / RECORD, {**self._record(), **(figures or {})})

    def _read_record(self, *, overwrite: bool) -> dict[str, Any]:
        """The record of the same run, empty where there is none."""
        path = self.folder / RECORD
        if not path.is_file():
            there = [name for name in (RECORD, GRID, ONE_FILE, IMAGES) if (self.folder / name).exists()]
            if there:
                raise FileExistsError(f"{self.folder} holds {there[0]} of something else: choose another --out")
            return {}
        if overwrite:
            return {}
        try:
            record = read_json(path)
        except ValueError as error:
            raise ValueError(f"{path} is damaged ({error}): choose another --out, or pass --overwrite") from error
        for name in _PROGRESS[2:]:
            count = record.get(name, 0)
            if isinstance(count, bool) or not isinstance(count, int | float) or not 0 <= count < math.inf:
                raise ValueError(
                    f"{path} is damaged: {name} is {_short(count)}; choose another --out, or pass --overwrite"
                )
        for name, value in self.settings.items():
            if record.get(name) != value:
                raise FileExistsError(
                    f"{self.folder} holds another run: {name} is {_short(record.get(name))} there and {_short(value)} "
                    f"here; choose another --out, or pass --overwrite to delete that run"
                )
        return record

    def _count(self) -> tuple[int, list[Path]]:
        """How many images are there without a gap, and array files behind a gap, which are to be made again."""
        count, behind_gap = 0, list[Path]()
        for path in run_files(self.folder):
            if path.suffix != f".{self.format.value}":
                raise FileExistsError(f"{path} is not of this run, which writes {self.format.value}: move it away")
            match = _FILE.fullmatch(path.name)
            if behind_gap or (match is not None and int(match[1]) != count):
                behind_gap.append(path)
            else:
                count += self._images_in(path)
        return count, [path for path in behind_gap if path.suffix == ".npy"]

    def _images_in(self, path: Path) -> int:
        """How many images a file holds; raises where they are not whole, or not of this run's shape."""
        from PIL import Image

        try:
            if path.suffix == ".png":
                with Image.open(path) as picture:
                    shape, dtype = (len(picture.getbands()), *picture.size[::-1]), np.dtype(np.uint8)
                fits, count = shape == self._image_shape, 1
            else:
                array = map_array(path)
                shape, dtype = array.shape, array.dtype
                fits, count = shape[1:] == self._image_shape and dtype == np.float32, len(array) if shape else 0
        except (ValueError, EOFError, OSError) as error:
            raise ValueError(f"{path} is damaged ({error}): delete it, and the run makes it again") from error
        if not fits:
            raise ValueError(
                f"{path} is not of this run: it holds {dtype} {shape}, expected images "
                f"{self._image_shape}: delete it, and the run makes it again"
            )
        return count

    def _check_room(self, to_delete: list[Path]) -> None:
        """Refuse what cannot fit on the disk; of PNG only the least size is known."""
        disk = shutil.disk_usage(self.folder)
        free = disk.free + sum(path.stat().st_size for path in to_delete)
        each = 100 if self.format == ImageFormat.png else 4 * int(np.prod(self._image_shape))
        need = (self.num_images - self.done) * each
        if need > free and disk.total:  # a file system that knows no size says 0
            raise OSError(
                f"{self.num_images} images of {'x'.join(map(str, self._image_shape))} need at least "
                f"{need / 1e9:,.3f} GB, and the disk of {self.folder} has {free / 1e9:,.3f} GB left"
            )


def run_files(folder: Path) -> list[Path]:
    """The files with images in the folder of a sampling run, in the order of the images.

    Raises:
        FileExistsError: if a file is there that no run writes, or two hold the same image: one of them is of another
            run, and nobody can tell which.
    """
    files = _numbered(folder)
    for (number, path), (other, second) in pairwise(files):
        if number == other:
            raise FileExistsError(f"{path} and {second.name} both hold image {number}: delete the wrong one of them")
    return [path for _, path in files]


def _numbered(folder: Path) -> list[tuple[int, Path]]:
    """The same, each behind the number of its first image; files of the same image stand side by side."""
    files = [(0, folder / ONE_FILE)] if (folder / ONE_FILE).is_file() else []
    for path in visible_entries(folder / IMAGES) if (folder / IMAGES).is_dir() else ():
        match = _FILE.fullmatch(path.name)
        if match is None or not path.is_file() or match[1] != f"{int(match[1]):08d}":
            raise FileExistsError(f"{path} is of no sampling run: move it out of the folder of images")
        files.append((int(match[1]), path))
    return sorted(files)


def _write_png(path: Path, image: Tensor) -> None:
    from PIL import Image

    pixels = to_pixels(image).permute(1, 2, 0).numpy()
    picture = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    with written_whole(path) as file:
        picture.save(file, format="png")


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."
