"""Sets of images are read in batches, in the range that is stated, or refused in one line."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fixpoint_diffusion.evaluation import Images
from fixpoint_diffusion.sampling.grids import to_pixels


def pixels(n: int = 5, *, channels: int = 3, size: int = 4) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, channels, size, size), dtype=np.uint8)


def read(data: object, value_range: tuple[int, int] | None = None, *, batch_size: int = 2) -> torch.Tensor:
    return torch.cat(list(Images(data, value_range).batches(batch_size)))


def symmetric(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array).float() / 127.5 - 1


def save_pictures(folder: Path, array: np.ndarray) -> None:
    folder.mkdir(exist_ok=True)
    for k, image in enumerate(array):
        Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0)).save(folder / f"{k}.png")


def write_pictures(path: Path, array: np.ndarray) -> Path:
    (path / "more").mkdir(parents=True)
    save_pictures(path, array[:3])
    save_pictures(path / "more", array[3:])
    return path


def write_npy(path: Path, array: np.ndarray) -> Path:
    np.save(path.with_suffix(".npy"), array)
    return path.with_suffix(".npy")


def write_npz(path: Path, array: np.ndarray) -> Path:
    """As the common samplers write it: channels last, labels beside the images."""
    file = path.with_suffix(".npz")
    np.savez_compressed(file, arr_0=array.transpose(0, 2, 3, 1), arr_1=np.zeros(len(array)))
    return file


def write_shards(path: Path, array: np.ndarray) -> Path:
    path.mkdir()
    np.save(path / "shard-2.npy", array[:3])
    np.savez(path / "shard-10.npz", images=array[3:])
    return path


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("write", "value_range"),
    [(write_pictures, None), (write_npy, (0, 255)), (write_npz, (0, 255)), (write_shards, (0, 255))],
)
def test_every_kind_of_set_gives_the_same_images(
    tmp_path: Path, write: Callable[[Path, np.ndarray], Path], value_range: tuple[int, int] | None, channels: int
) -> None:
    array = pixels(channels=channels)
    path = write(tmp_path / "images", array)
    torch.testing.assert_close(read(path, value_range), read(torch.from_numpy(array), (0, 255)), rtol=0, atol=2e-7)
    torch.testing.assert_close(read(path, value_range), symmetric(array))
    assert all(len(batch) <= 2 for batch in Images(path, value_range).batches(2))


def test_declared_ranges_meet_in_one() -> None:
    array = torch.from_numpy(pixels())
    unit, whole = array.float() / 255, array.float()
    assert torch.equal(to_pixels(read(unit, (0, 1))), array)
    assert torch.equal(to_pixels(read(whole, (0, 255))), array)
    assert torch.equal(to_pixels(read(2 * unit - 1)), array)
    assert torch.equal(to_pixels(read(unit, (-1, 1))), to_pixels(unit))  # said, so not judged by its values


def test_overshoot_is_clipped() -> None:
    images = torch.linspace(-1.5, 1.5, 48).reshape(1, 3, 4, 4)
    assert torch.equal(read(images), images.clamp(-1, 1))


def test_a_black_or_white_batch_after_others_is_no_other_range() -> None:
    images = torch.cat([torch.rand(2, 1, 4, 4) * 2 - 1, torch.ones(2, 1, 4, 4)])
    assert torch.equal(read(images), images)


def test_pictures_of_several_sizes_come_in_batches_of_one_size(tmp_path: Path) -> None:
    save_pictures(tmp_path / "a", pixels(3, size=4))
    save_pictures(tmp_path / "b", pixels(2, size=6))
    shapes = [tuple(batch.shape) for batch in Images(tmp_path).batches(8)]
    assert shapes == [(3, 3, 4, 4), (2, 3, 6, 6)]


def test_a_batch_is_all_that_is_read(tmp_path: Path) -> None:
    """The second image is damaged; the first is given before anyone looks at it."""
    save_pictures(tmp_path, pixels(2))
    (tmp_path / "1.png").write_bytes((tmp_path / "1.png").read_bytes()[:60])
    batches = Images(tmp_path).batches(1)
    next(batches)
    with pytest.raises(ValueError, match=r"1\.png cannot be decoded|does not open"):
        next(batches)


@pytest.mark.parametrize(
    ("images", "value_range", "message"),
    [
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), None, "holds torch.uint8 values"),
        (torch.rand(2, 3, 4, 4), None, "none negative"),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), (0, 1), r"value_range says \(0, 1\)"),
        (torch.rand(2, 3, 4, 4), (0, 255), r"value_range says \(0, 255\)"),
        (torch.rand(2, 3, 4, 4) * 255 - 0.1, None, r"expected \[-1, 1\]"),
        (torch.full((2, 3, 4, 4), torch.nan), (0, 1), "finite"),
        (torch.zeros(3, 4, 4), None, r"must be \(N, C, H, W\)"),
    ],
)
def test_images_in_another_range_are_refused(
    images: torch.Tensor, value_range: tuple[int, int] | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        read(images, value_range)


def test_symmetric_images_declared_as_positive_are_refused() -> None:
    images = torch.linspace(-1, 1, 4 * 64).reshape(4, 1, 8, 8)
    with pytest.raises(ValueError, match=r"values from -1 to 1, but value_range says \(0, 1\)"):
        next(Images(images, (0, 1)).batches(4))
    overshot = next(Images(images.abs() - 0.1, (0, 1)).batches(4))
    assert float(overshot.min()) == -1


def test_an_unknown_range_is_refused() -> None:
    with pytest.raises(ValueError, match=r"must be one of \(-1, 1\), \(0, 1\), \(0, 255\), got \(0, 2\)"):
        Images(torch.zeros(1, 1, 2, 2), value_range=(0, 2))


@pytest.mark.parametrize(("mode", "channels"), [("RGBA", 3), ("LA", 1), ("P", 3), ("1", 1), ("I;16", 1)])
def test_pictures_of_other_modes_are_read_as_for_training(tmp_path: Path, mode: str, channels: int) -> None:
    Image.new(mode, (4, 4)).save(tmp_path / "x.png")  # black, and with opacity nothing but that
    expected = 1.0 if mode in ("RGBA", "LA") else -1.0
    torch.testing.assert_close(read(tmp_path), torch.full((1, channels, 4, 4), expected))


@pytest.mark.parametrize("place", ["images.npy", "images/00000000.npy", "images/00000000-class3.png"])
def test_a_folder_that_sample_wrote_holds_its_images_and_a_grid_of_some(tmp_path: Path, place: str) -> None:
    file = tmp_path / place
    file.parent.mkdir(exist_ok=True)
    if file.suffix == ".png":
        Image.new("L", (4, 4), 255).save(file)
    else:
        np.save(file, np.ones((1, 1, 4, 4), dtype=np.float32) - 2 * np.eye(4, dtype=np.float32))
    Image.new("L", (40, 40)).save(tmp_path / "grid.png")
    (tmp_path / "sample.json").write_text("{}")
    assert read(tmp_path).shape == (1, 1, 4, 4)
    if file.parent != tmp_path:
        assert read(file.parent).shape == (1, 1, 4, 4)
        second = file.with_name("00000000.png" if file.suffix == ".png" else "0000000.npy")
        second.write_bytes(file.read_bytes())
        for path in (tmp_path, file.parent):
            with pytest.raises(FileExistsError, match=r"both hold image 0|is of no sampling run"):
                read(path)


def truncated_npy(path: Path) -> None:
    np.save(path, pixels())
    path.write_bytes(path.read_bytes()[:-10])


def two_arrays(path: Path) -> None:
    np.savez(path, a=pixels(), b=pixels())


def damaged_member(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("images.npy", b"no array")


def of_objects(path: Path) -> None:
    buffer = io.BytesIO()
    np.save(buffer, np.empty((2, 3, 4, 4), dtype=object), allow_pickle=True)
    path.write_bytes(buffer.getvalue())


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("x.npy", truncated_npy, "cut short: 5 images announced, 4 found"),
        ("x.npy", lambda path: path.write_bytes(b""), "not an array"),
        ("x.npy", lambda path: np.save(path, np.zeros((5, 4, 4))), r"an array \(5, 4, 4\)"),
        ("x.npy", lambda path: np.save(path, np.zeros((5, 4, 8, 8))), r"C 1 or 3"),
        ("x.npy", lambda path: np.save(path, np.zeros((5, 3, 8, 8), dtype=np.int64)), "holds int64"),
        ("x.npy", of_objects, "holds object"),
        ("x.npz", two_arrays, "holds a, b"),
        ("x.npz", damaged_member, "not an array"),
        ("x.npz", lambda path: path.write_bytes(b"no zip"), "damaged"),
        ("x.png", lambda path: path.write_bytes(b"no picture"), "cannot be decoded|does not open"),
        ("x.txt", lambda path: path.write_text("no picture"), "holds 0 pictures and 0 array files"),
    ],
)
def test_damaged_and_foreign_files_are_named(
    tmp_path: Path, name: str, write: Callable[[Path], object], message: str
) -> None:
    write(tmp_path / name)
    with pytest.raises(ValueError, match=message) as caught:
        read(tmp_path / name, (0, 255))
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_pictures_and_arrays_together_are_refused(tmp_path: Path) -> None:
    save_pictures(tmp_path, pixels())
    np.save(tmp_path / "images.npy", pixels())
    with pytest.raises(ValueError, match="holds 5 pictures and 1 array files"):
        read(tmp_path)


def test_nothing_at_the_path(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no images at"):
        read(tmp_path / "absent")
