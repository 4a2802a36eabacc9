"""Every Pillow mode against values worked out by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fixpoint_diffusion.training.data import open_dataset
from fixpoint_diffusion.training.data.pictures import read_header, read_picture


def written(tmp_path: Path, image: Image.Image, name: str = "a.png", **options: Any) -> Path:
    image.save(tmp_path / name, **options)
    return tmp_path / name


def pixels(file: Path, channels: str) -> np.ndarray:
    """The picture as ``(H, W, C)`` in [0, 1]."""
    return (read_picture(file, channels).transpose(1, 2, 0) + 1) / 2


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.pgm"])
def test_sixteen_bits_keep_their_ramp(tmp_path: Path, name: str) -> None:
    ramp = np.linspace(0, 65535, 4096).round().astype(np.uint16).reshape(64, 64)
    file = written(tmp_path, Image.fromarray(ramp), name)
    assert read_header(file).channels == "L"
    grey = read_picture(file, "L")
    assert abs(grey.mean()) < 1e-4
    np.testing.assert_allclose(grey[0], ramp / 65535 * 2 - 1, atol=1e-6)
    np.testing.assert_array_equal(read_picture(file, "RGB"), np.repeat(grey, 3, axis=0))


def test_transparent_value_of_sixteen_bits(tmp_path: Path) -> None:
    file = written(tmp_path, Image.fromarray(np.array([[100, 50000]], dtype=np.uint16)), transparency=100)
    assert read_header(file).channels == "LA"
    np.testing.assert_allclose(pixels(file, "LA"), [[[100 / 65535, 0], [50000 / 65535, 1]]], atol=1e-6)
    np.testing.assert_allclose(pixels(file, "L"), [[[1], [50000 / 65535]]], atol=1e-6)


def test_one_bit_is_black_and_white(tmp_path: Path) -> None:
    file = written(tmp_path, Image.fromarray(np.array([[True, False]])))
    assert read_header(file).channels == "L"
    np.testing.assert_array_equal(read_picture(file, "L"), [[[1, -1]]])


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_grey_with_opacity_over_white(tmp_path: Path, name: str) -> None:
    image = Image.new("LA", (2, 1))
    image.putdata([(0, 51), (200, 0)])
    file = written(tmp_path, image, name)
    assert read_header(file).channels == "LA"
    np.testing.assert_allclose(pixels(file, "LA"), [[[0, 0.2], [200 / 255, 0]]], atol=1e-6)
    np.testing.assert_allclose(pixels(file, "L"), [[[0.8], [1.0]]], atol=1e-6)
    np.testing.assert_allclose(pixels(file, "RGB"), [[[0.8] * 3, [1.0] * 3]], atol=1e-6)


def test_hidden_colours_of_transparent_pixels_stay_hidden(tmp_path: Path) -> None:
    image = Image.new("RGBA", (2, 1))
    image.putdata([(255, 0, 0, 0), (255, 0, 51, 102)])
    file = written(tmp_path, image)
    assert read_header(file).channels == "RGBA"
    np.testing.assert_allclose(pixels(file, "RGB"), [[[1, 1, 1], [1, 0.6, 0.68]]], atol=1e-6)
    np.testing.assert_allclose(pixels(file, "RGBA"), [[[1, 0, 0, 0], [1, 0, 0.2, 0.4]]], atol=1e-6)


@pytest.mark.parametrize(("name", "options"), [("a.png", {}), ("a.gif", {}), ("a.bmp", {}), ("a.tif", {})])
def test_palette_gives_its_colours(tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 51, 255])
    image.putdata([0, 1])
    file = written(tmp_path, image, name, **options)
    assert read_header(file).channels == "RGB"
    np.testing.assert_allclose(pixels(file, "RGB"), [[[1, 0, 0], [0, 0.2, 1]]], atol=1e-6)
    luma = 0.587 * 0.2 + 0.114
    np.testing.assert_allclose(pixels(file, "L"), [[[0.299], [luma]]], atol=1e-6)


@pytest.mark.parametrize("name", ["a.png", "a.gif"])
def test_transparent_entry_of_a_palette(tmp_path: Path, name: str) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 51, 255])
    image.putdata([0, 1])
    file = written(tmp_path, image, name, transparency=0)
    assert read_header(file).channels == "RGBA"
    np.testing.assert_allclose(pixels(file, "RGB"), [[[1, 1, 1], [0, 0.2, 1]]], atol=1e-6)


@pytest.mark.parametrize(
    ("mode", "transparent", "values", "channels"),
    [("L", 3, [3, 102], "LA"), ("1", 0, [0, 255], "LA"), ("RGB", (1, 2, 3), [(1, 2, 3), (102, 102, 102)], "RGBA")],
)
def test_transparent_colour_of_a_picture_without_opacity(
    tmp_path: Path, mode: str, transparent: Any, values: list[Any], channels: str
) -> None:
    image = Image.new(mode, (2, 1))
    image.putdata(values)
    file = written(tmp_path, image, transparency=transparent)
    assert read_header(file).channels == channels
    opaque = 1.0 if mode == "1" else 0.4
    np.testing.assert_allclose(pixels(file, "L"), [[[1.0], [opaque]]], atol=1e-6)


def test_palette_with_opacity(tmp_path: Path) -> None:
    image = Image.new("PA", (2, 1))
    image.putpalette([255, 0, 0, 0, 51, 255])
    image.putdata([(0, 0), (1, 255)])
    file = written(tmp_path, image, "a.tif")
    assert read_header(file).channels == "RGBA"
    np.testing.assert_allclose(pixels(file, "RGB"), [[[1, 1, 1], [0, 0.2, 1]]], atol=1e-6)


def test_cmyk(tmp_path: Path) -> None:
    image = Image.new("CMYK", (2, 1))
    image.putdata([(255, 0, 0, 0), (0, 0, 0, 204)])
    np.testing.assert_allclose(pixels(written(tmp_path, image, "a.tif"), "RGB"), [[[0, 1, 1], [0.2] * 3]], atol=1e-6)


def test_ycbcr(tmp_path: Path) -> None:
    image = Image.new("YCbCr", (1, 1), (102, 128, 128))
    np.testing.assert_allclose(pixels(written(tmp_path, image, "a.tif"), "RGB"), [[[0.4] * 3]], atol=2 / 255)


def test_lab(tmp_path: Path) -> None:
    # L = 53.24, a = 80.09, b = 67.20 is pure red in sRGB; Pillow adds 128 to a and b in memory.
    image = Image.new("LAB", (1, 1), (136, 208, 195))
    np.testing.assert_allclose(pixels(written(tmp_path, image, "a.tif"), "RGB"), [[[1, 0, 0]]], atol=0.05)


def test_floats_in_unit_range_and_others_refused(tmp_path: Path) -> None:
    good = written(tmp_path, Image.fromarray(np.array([[0.25, 1.0]], dtype=np.float32)), "good.tif")
    np.testing.assert_array_equal(read_picture(good, "L"), [[[-0.5, 1.0]]])
    bad = written(tmp_path, Image.fromarray(np.array([[0.25, 7.0]], dtype=np.float32)), "bad.tif")
    with pytest.raises(ValueError, match=r"bad\.tif.*0\.25 to 7"):
        read_picture(bad, "L")


def test_integers_of_unknown_range_are_refused(tmp_path: Path) -> None:
    written(tmp_path, Image.fromarray(np.array([[0, 70000]], dtype=np.int32)), "a.tif")
    with pytest.raises(ValueError, match="32-bit"):
        open_dataset(tmp_path)


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.webp"])
def test_orientation_of_a_photograph_is_applied(tmp_path: Path, name: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: the top of the scene is on the left
    grey = np.array([[0, 51, 102], [153, 204, 255]], dtype=np.uint8)
    options: dict[str, Any] = {"a.webp": {"lossless": True}, "a.tif": {"compression": "tiff_lzw"}}.get(name, {})
    file = written(tmp_path, Image.fromarray(grey), name, exif=exif, **options)
    header = read_header(file)
    assert (header.height, header.width) == (3, 2)
    np.testing.assert_allclose(pixels(file, "L")[..., 0] * 255, [[153, 0], [204, 51], [255, 102]], atol=1e-4)


def test_lines_that_pillow_mixes_up_are_no_picture(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    grey = np.array([[0, 51, 102], [153, 204, 255]], dtype=np.uint8)
    file = written(tmp_path, Image.fromarray(grey), "a.tif", exif=exif)
    right = [[153, 0], [204, 51], [255, 102]]
    # Pillow 13 does; another version may read it as it is.
    mixed_up = sorted(np.asarray(Image.open(file)).shape) == [2, 3] and np.asarray(Image.open(file)).tolist() != right
    if not mixed_up:
        np.testing.assert_allclose(pixels(file, "L")[..., 0] * 255, right, atol=1e-4)
        return
    with pytest.raises(ValueError, match=r"a\.tif cannot be decoded: this Pillow reads it wrongly"):
        read_picture(file, "L")


@pytest.mark.parametrize("name", ["a.gif", "a.tif", "a.png", "a.webp"])
def test_several_frames_are_refused(tmp_path: Path, name: str) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    written(tmp_path, frames[0], name, save_all=True, append_images=frames[1:])
    with pytest.raises(ValueError, match=r"a\.\w+ holds 2 frames"):
        open_dataset(tmp_path)


def test_damaged_files_are_named(tmp_path: Path) -> None:
    file = written(tmp_path, Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64), dtype=np.uint8)))
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"a\.png cannot be decoded"):
        _ = open_dataset(tmp_path)[0]
    file.write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"a\.png does not open"):
        open_dataset(tmp_path)
