"""Picture files of any Pillow mode as float arrays with the channels that were asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

# Grey, grey with opacity, colour, colour with opacity; Pillow's names.
CHANNELS = {"L": 1, "LA": 2, "RGB": 3, "RGBA": 4}
LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)


@dataclass(frozen=True)
class PictureHeader:
    """What a file says of its picture before it is decoded: natural channels (a key of ``CHANNELS``) and size."""

    channels: str
    height: int
    width: int


def picture_suffixes() -> frozenset[str]:
    """The file name endings that Pillow opens, in lower case."""
    from PIL import Image

    Image.init()
    return frozenset(suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN)


def read_header(file: Path) -> PictureHeader:
    """Look at a file without decoding it.

    Raises:
        ValueError: if Pillow cannot open it, if it holds several frames, or if its mode has no agreed black and white.
    """
    with _open(file) as image:
        # A phone's .mpo photograph keeps previews behind the picture; frames elsewhere are pictures of equal standing.
        if getattr(image, "is_animated", False) and image.format != "MPO":
            raise ValueError(f"{file} holds {getattr(image, 'n_frames', 'several')} frames; save each as one picture")
        return PictureHeader(_natural_channels(image, file), *_shown_size(image))


def read_picture(file: Path, channels: str) -> np.ndarray:
    """Decode one file.

    The EXIF orientation is applied. 8 and 16 bits are scaled by their full range; floating-point pictures must lie in
    [0, 1].

    Args:
        file: a picture that ``read_header`` accepts.
        channels: a key of ``CHANNELS``; see ``convert_channels``.

    Returns:
        float32 ``(C, H, W)`` in [-1, 1].

    Raises:
        ValueError: if the file is damaged, or holds floats beyond [0, 1].
    """
    with _open(file) as image:
        natural, size = _natural_channels(image, file), _shown_size(image)
        try:
            planes = _decode(image, natural)
        except (OSError, SyntaxError, ValueError, MemoryError) as error:
            raise ValueError(f"{file} cannot be decoded: {error}") from error
    if planes.shape[1:] != size:  # Pillow 13 mixes up the lines of a .tif that lies on its side and is not compressed
        raise ValueError(f"{file} cannot be decoded: this Pillow reads it wrongly; save it upright, or compressed")
    return convert_channels(planes, natural, channels) * 2 - 1


def convert_channels(planes: np.ndarray, have: str, want: str) -> np.ndarray:
    """Change the channels of float planes ``(C, H, W)`` in [0, 1].

    Where opacity is given up, colours are laid over white, so that the hidden colours of transparent pixels stay
    hidden. Colour becomes grey by luma (ITU-R BT.601). Grey is repeated for colour. New opacity is 1.
    """
    alpha = planes[-1:] if have.endswith("A") else None
    colour = planes if alpha is None else planes[:-1]
    if alpha is not None and not want.endswith("A"):
        colour = colour * alpha + (1 - alpha)
    if want.startswith("L") and len(colour) == 3:
        colour = np.tensordot(LUMA, colour, axes=1)[None]
    elif want.startswith("RGB") and len(colour) == 1:
        colour = np.repeat(colour, 3, axis=0)
    if want.endswith("A"):
        colour = np.concatenate([colour, np.ones_like(colour[:1]) if alpha is None else alpha])
    return np.ascontiguousarray(colour)


def _open(file: Path) -> Image.Image:
    from PIL import Image, UnidentifiedImageError

    try:
        return Image.open(file)
    except FileNotFoundError:
        raise
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{file} does not open as a picture: {error}") from error


def _natural_channels(image: Image.Image, file: Path) -> str:
    """The channels that lose nothing of the picture."""
    mode = image.mode
    # Pillow stretches .pgm and 16-bit .png to 0..65535 in mode I; elsewhere it is 32 bits of unknown range.
    if mode == "I" and image.format not in ("PNG", "PPM"):
        raise ValueError(f"{file} holds 32-bit integers, whose white is not known; save it with 8 or 16 bits")
    grey = mode in ("1", "L", "LA", "La", "I", "F") or mode.startswith("I;16")
    transparent = mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info
    return ("L" if grey else "RGB") + ("A" if transparent else "")


def _orientation(image: Image.Image) -> int:
    """EXIF's number of how the picture is turned; 1: as it is stored."""
    # For a .png without EXIF at its beginning, Pillow would decode all of it to look for EXIF at its end.
    if image.format == "PNG" and "exif" not in image.info:
        return 1
    return int(image.getexif().get(0x0112, 1))


def _shown_size(image: Image.Image) -> tuple[int, int]:
    """Height and width as the picture is to be shown."""
    width, height = image.size
    if image.format == "TIFF":  # of which some versions of Pillow turn the size by themselves
        tags: Any = image.tag_v2  # type: ignore[attr-defined]
        width, height = int(tags[256]), int(tags[257])
    return (width, height) if _orientation(image) >= 5 else (height, width)  # 5 to 8 lie on their side


def _decode(image: Image.Image, natural: str) -> np.ndarray:
    """Planes ``(C, H, W)``, float32 in [0, 1], in the picture's natural channels."""
    from PIL import ImageOps

    transparent: Any = image.info.get("transparency")
    if _orientation(image) != 1:
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode == "F":
        grey = np.asarray(image, dtype=np.float32)
        if not (grey.min() >= 0 and grey.max() <= 1):  # also true of NaN
            raise ValueError(f"values from {grey.min():g} to {grey.max():g}; floats must lie in [0, 1]")
        return grey[None]
    if image.mode.startswith("I"):
        values = np.asarray(image)
        planes = [values.astype(np.float32) / 65535]
        if natural == "LA":
            planes.append((values != transparent).astype(np.float32))
        return np.stack(planes)
    array = np.asarray(image.convert(natural), dtype=np.float32) / 255
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)
