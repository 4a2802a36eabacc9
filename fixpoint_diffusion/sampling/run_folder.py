"""The folder of a sampling run: images in files, and a record by which the run goes on where it stopped."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fixpoint_diffusion.files import (
    check_free,
    map_array,
    read_json,
    sha256_of,
    visible_entries,
    write_json,
    written_whole,
)
from fixpoint_diffusion.options.sampling import ImageFormat
from fixpoint_diffusion.sampling.grids import to_pixels
from fixpoint_diffusion.sampling.job import SampleBatch

RECORD, GRID, ONE_FILE, IMAGES, BATCHES = "sample.json", "grid.png", "images.npy", "images", "batches"
_FILE = re.compile(r"(\d{8,})(?:-class\d+)?\.(npy|png)")


@dataclass(frozen=True, kw_only=True)
class _Batch:
    """The record of images that are there: ``batches/00000000.json``, which is written behind them."""

    first: int
    images: int
    files: dict[str, str]  # with their SHA-256
    seconds: float
    counts: dict[str, float]
    chosen: dict[str, float]

    @property
    def end(self) -> int:
        return self.first + self.images

    @classmethod
    def read(cls, path: Path) -> _Batch:
        try:
            batch = cls(**read_json(path))
            numbers = [batch.first, batch.images, batch.seconds, *batch.counts.values(), *batch.chosen.values()]
            names = [name == ONE_FILE or _FILE.fullmatch(name) is not None for name in batch.files]
            if not names or not all(names) or not all(map(_is_count, numbers)) or path.stem != f"{batch.first:08d}":
                raise ValueError("it is of no batch of images")
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is damaged ({error}): delete it, and the run makes its images again") from error
        return batch


class RunFolder:
    """Where a sampling run writes its images: all that is there is whole, and belongs to the same settings.

    ``npy``: float32 as sampled, ``(N, C, H, W)``: ``images.npy`` where one batch is all, else a file a batch,
    ``images/00000000.npy``, named by its first image. ``png``: 8 bit, an image a file, ``images/00000042.png``, or
    ``00000042-class7.png``. For each batch, ``batches/00000000.json`` holds the checksums of its files and what it
    cost; images count as there once it is written. ``sample.json`` holds the settings, and at the end the sums. Every
    file appears whole or not at all.

    One process makes it, holding the folder by ``fixpoint_diffusion.files.locked``. Others of the same run may get a
    pickled copy and write batches too.

    Args:
        folder: a folder that is there. May hold the same run, whole or in part, which is then continued.
        settings: JSON-able; what the images depend on.
        num_images: how many there are to be; more that are there already stay.
        batch_size: images in a batch.
        image_shape: of one image.
        format: of the files.
        overwrite: delete the images of another run in the folder.

    Attributes:
        num_images: how many there will be.
        missing: the batches that are to be sampled, as ranges of images.

    Raises:
        FileExistsError: if the folder holds another run, images without a record, or files that no run writes there.
        OSError: if it cannot be written, or the disk has no room for the images.
        ValueError: if the images do not fit the format, a record is damaged, or a file is not what its checksum says.
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
        self._check_record(overwrite=overwrite)
        kept = [] if overwrite else self._kept()
        self.num_images = max(num_images, kept[-1].end if kept else 0)
        self._one_file = format == ImageFormat.npy and not kept and num_images <= batch_size
        to_delete = self._not_of(kept)
        self._check_room(self.num_images - sum(batch.images for batch in kept), tuple(image_shape), to_delete)
        self.missing = _gaps(kept, self.num_images, batch_size)
        # From here on nothing is refused: what makes room for this run may go.
        try:
            for file in [*([self.folder / GRID] if overwrite else []), *to_delete]:
                file.unlink(missing_ok=True)
            (self.folder / BATCHES).mkdir(exist_ok=True)
            if self.missing and not self._one_file:
                (self.folder / IMAGES).mkdir(exist_ok=True)
                if (self.folder / ONE_FILE).exists():  # of a finished run, to which images are added
                    os.replace(self.folder / ONE_FILE, self.folder / IMAGES / f"{0:08d}.npy")
            self._write_record()
        except OSError as error:
            self.discard_empty()
            raise OSError(f"cannot write to {self.folder}: {error.strerror or error}") from error

    @property
    def done(self) -> int:
        """How many images are there, of all processes."""
        return sum(batch.images for batch in self._batches())

    @property
    def totals(self) -> dict[str, float]:
        """What these images cost, and what was chosen by measuring."""
        totals = dict[str, float]()
        for batch in self._batches():
            for name, count in {**batch.counts, "seconds": batch.seconds}.items():
                totals[name] = round(totals.get(name, 0) + count, 3)
            for name, value in batch.chosen.items():
                totals[name] = max(totals.get(name, 0), value)
        return totals

    def write(self, batch: SampleBatch, *, seconds: float) -> None:
        """Add one of the missing batches.

        Args:
            batch: the images.
            seconds: what they took.

        Raises:
            OSError: if the disk is full or the folder has gone; what was there before still is.
        """
        files = self.folder / IMAGES
        if self.format == ImageFormat.npy:
            written = [self.folder / ONE_FILE if self._one_file else files / f"{batch.first:08d}.npy"]
            with written_whole(written[0]) as file:
                np.save(file, batch.images.numpy())
        else:
            classes = [""] * len(batch.images)
            if batch.labels is not None:
                classes = [f"-class{label}" for label in batch.labels.tolist()]
            written = [files / f"{batch.first + n:08d}{label}.png" for n, label in enumerate(classes)]
            for path, image in zip(written, batch.images, strict=True):
                _write_png(path, image)
        record = _Batch(
            first=batch.first,
            images=len(batch.images),
            files={path.name: sha256_of(path) for path in written},
            seconds=round(seconds, 3),
            counts=batch.counts,
            chosen=batch.chosen,
        )
        write_json(self.folder / BATCHES / f"{batch.first:08d}.json", asdict(record))

    def discard_empty(self) -> None:
        """Where no image was written, delete the record and the folders that were made for images."""
        if self.done == 0:
            (self.folder / RECORD).unlink(missing_ok=True)
            for name in (IMAGES, BATCHES):
                with contextlib.suppress(OSError):  # not there, or something else is in it
                    (self.folder / name).rmdir()

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
        """Write the sums and further figures of the run into the record, and return all of it."""
        return self._write_record(figures)

    def _write_record(self, figures: Mapping[str, Any] | None = None) -> dict[str, Any]:
        progress = {"num_images": self.num_images, "images_done": self.done}
        record = {**self.settings, **progress, **self.totals, **(figures or {})}
        write_json(self.folder / RECORD, record)
        return record

    def _check_record(self, *, overwrite: bool) -> None:
        """Refuse a folder of something else, or of another run."""
        path = self.folder / RECORD
        if not path.is_file():
            check_free(self.folder, (RECORD, GRID, ONE_FILE, IMAGES, BATCHES))
            return
        if overwrite:
            return
        try:
            record = read_json(path)
        except ValueError as error:
            raise ValueError(f"{path} is damaged ({error}): choose another --out, or pass --overwrite") from error
        for name, value in self.settings.items():
            if record.get(name) != value:
                raise FileExistsError(
                    f"{self.folder} holds another run: {name} is {_short(record.get(name))} there and {_short(value)} "
                    f"here; choose another --out, or pass --overwrite to delete that run"
                )
        if _numbered(self.folder) and not (self.folder / BATCHES).is_dir():
            raise FileExistsError(
                f"{self.folder} holds images without checksums, of an earlier version: choose another --out, "
                f"or pass --overwrite to delete them"
            )

    def _batches(self) -> list[_Batch]:
        """What the records say, in the order of the images."""
        folder = self.folder / BATCHES
        paths = [path for path in visible_entries(folder) if path.suffix == ".json"] if folder.is_dir() else []
        return sorted(map(_Batch.read, paths), key=lambda batch: batch.first)

    def _kept(self) -> list[_Batch]:
        """The batches whose files are all there, checked; of two with the same image, the one that begins first."""
        for path in run_files(self.folder):
            if path.suffix != f".{self.format.value}":
                raise FileExistsError(f"{path} is not of this run, which writes {self.format.value}: move it away")
        kept, end = list[_Batch](), 0
        for batch in self._batches():
            paths = self._paths(batch)
            if batch.first < end or not all(path.is_file() for path in paths):
                continue
            for path, checksum in zip(paths, batch.files.values(), strict=True):
                if sha256_of(path) != checksum:
                    raise ValueError(
                        f"{path} is damaged: its checksum is not the one in {BATCHES}/{batch.first:08d}.json; "
                        f"delete it, and the run makes it again"
                    )
            kept.append(batch)
            end = batch.end
        return kept

    def _paths(self, batch: _Batch) -> list[Path]:
        """The files of a batch, where they are now: ``images.npy`` moves when more images are added."""
        if list(batch.files) == [ONE_FILE] and (self.folder / ONE_FILE).exists():
            return [self.folder / ONE_FILE]
        return [self.folder / IMAGES / (f"{0:08d}.npy" if name == ONE_FILE else name) for name in batch.files]

    def _not_of(self, kept: list[_Batch]) -> list[Path]:
        """Files of images and batches that do not count, and what was left when a process was killed as it wrote."""
        counted = {path for batch in kept for path in self._paths(batch)}
        counted |= {self.folder / BATCHES / f"{batch.first:08d}.json" for batch in kept}
        folders = [self.folder, self.folder / IMAGES, self.folder / BATCHES]
        there = [path for _, path in _numbered(self.folder)] + list((self.folder / BATCHES).glob("*.json"))
        return [path for path in there if path not in counted] + [p for each in folders for p in each.glob(".*.part")]

    def _check_room(self, count: int, image_shape: tuple[int, ...], to_delete: list[Path]) -> None:
        """Refuse what cannot fit on the disk; of PNG only the least size is known."""
        disk = shutil.disk_usage(self.folder)
        free = disk.free + sum(path.stat().st_size for path in to_delete)
        each = 100 if self.format == ImageFormat.png else 4 * int(np.prod(image_shape))
        need = count * each
        if need > free and disk.total:  # a file system that knows no size says 0
            raise OSError(
                f"{count} images of {'x'.join(map(str, image_shape))} need at least "
                f"{need / 1e9:,.3f} GB, and the disk of {self.folder} has {free / 1e9:,.3f} GB left"
            )


def _gaps(kept: list[_Batch], num_images: int, batch_size: int) -> list[range]:
    """What lies between the batches that are there, in pieces of at most ``batch_size`` images."""
    ends = [0, *(batch.end for batch in kept)]
    starts = [*(batch.first for batch in kept), num_images]
    pieces = list[range]()
    for end, start in zip(ends, starts, strict=True):
        pieces += [range(first, min(first + batch_size, start)) for first in range(end, start, batch_size)]
    return pieces


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


def _is_count(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."
