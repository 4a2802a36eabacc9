from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits as sklearn_digits

from fixpoint_diffusion.training.data import LabelledImages, load_digits, open_dataset, split_held_out


def all_images(source: Path | str) -> torch.Tensor:
    dataset = open_dataset(source)
    return torch.stack([dataset[index]["images"] for index in range(len(dataset))])


def test_digits_are_sklearns_in_unit_range() -> None:
    digits = load_digits()
    bunch = sklearn_digits()
    assert digits.images.dtype == torch.float32
    np.testing.assert_array_equal((digits.images[:, 0].numpy() + 1) * 8, bunch.images)
    np.testing.assert_array_equal(digits.labels.numpy(), bunch.target)


def test_split_is_a_partition_with_every_label_in_its_proportion() -> None:
    digits = load_digits()
    train, held_out = split_held_out(digits, fraction=0.2)
    rows = sorted(map(tuple, torch.cat([train.images, held_out.images]).flatten(1).tolist()))
    assert rows == sorted(map(tuple, digits.images.flatten(1).tolist()))
    shares = torch.bincount(held_out.labels, minlength=10) / torch.bincount(digits.labels, minlength=10)
    assert (shares - 0.2).abs().max() < 0.01


def test_split_depends_on_the_seed_alone() -> None:
    digits = load_digits()
    first, again, other = (split_held_out(digits, seed=seed)[1].images for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_split_keeps_labels_with_their_images() -> None:
    images = torch.arange(40.0).view(40, 1, 1, 1) / 40
    train, held_out = split_held_out(LabelledImages(images=images, labels=torch.arange(40) % 4), fraction=0.25)
    for part in (train, held_out):
        assert torch.equal((part.images.flatten() * 40).round().long() % 4, part.labels)


def test_split_of_unlabelled_images() -> None:
    train, held_out = split_held_out(LabelledImages(images=torch.zeros(10, 1, 2, 2)), fraction=0.3)
    assert (len(train), len(held_out)) == (7, 3)
    assert train.labels is None


@pytest.mark.parametrize("fraction", [0.0, 1.0, -1.0, float("nan")])
def test_split_refuses_a_fraction_out_of_range(fraction: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        split_held_out(load_digits(), fraction=fraction)


def test_split_refuses_a_label_with_one_image() -> None:
    data = LabelledImages(images=torch.zeros(3, 1, 2, 2), labels=torch.tensor([0, 0, 7]))
    with pytest.raises(ValueError, match="label 7 has one image"):
        split_held_out(data)


def test_labelled_images_check_their_shapes() -> None:
    with pytest.raises(ValueError, match=r"\(N, C, H, W\)"):
        LabelledImages(images=torch.zeros(3, 8, 8))
    with pytest.raises(ValueError, match="labels of that length"):
        LabelledImages(images=torch.zeros(3, 1, 8, 8), labels=torch.zeros(2, dtype=torch.int64))


def test_npy_file_of_bytes_maps_to_unit_range(tmp_path) -> None:
    array = np.array([0, 51, 255], dtype=np.uint8).reshape(3, 1, 1, 1)
    np.save(tmp_path / "images.npy", array)
    expected = torch.tensor([-1.0, -0.6, 1.0])
    for source in (tmp_path / "images.npy", tmp_path):
        torch.testing.assert_close(all_images(source).flatten(), expected)


def test_npy_file_of_floats_is_taken_as_it_is(tmp_path) -> None:
    array = np.linspace(-1, 1, 24).reshape(2, 3, 2, 2)
    np.save(tmp_path / "a.npy", array)
    images = all_images(tmp_path)
    assert images.dtype == torch.float32
    np.testing.assert_allclose(images.numpy(), array, atol=1e-7)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((3, 8, 8), dtype=np.uint8), "shape"),
        (np.zeros((3, 8, 8, 3), dtype=np.uint8), "shape"),
        (np.full((1, 1, 2, 2), 2.0), r"\[-1, 1\]"),
        (np.full((1, 1, 2, 2), np.nan), r"\[-1, 1\]"),
        (np.zeros((1, 1, 2, 2), dtype=np.int64), "int64"),
    ],
)
def test_unusable_arrays_are_refused_with_what_was_found(tmp_path, array: np.ndarray, message: str) -> None:
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(ValueError, match=message):
        open_dataset(tmp_path)


def test_pickled_arrays_are_refused(tmp_path) -> None:
    np.save(tmp_path / "a.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="Python objects"):
        open_dataset(tmp_path)


@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("RGB", 3)])
def test_folder_of_pictures_comes_in_natural_order(tmp_path, mode: str, channels: int) -> None:
    for index in (10, 2, 1):
        grey = np.full((4, 6), index * 20, dtype=np.uint8)
        Image.fromarray(grey).convert(mode).save(tmp_path / f"{index}.png")
    images = all_images(tmp_path)
    assert images.shape == (3, channels, 4, 6)
    torch.testing.assert_close((images[:, 0, 0, 0] + 1) * 127.5, torch.tensor([20.0, 40.0, 200.0]))


def test_pictures_of_different_sizes_are_refused_by_name(tmp_path) -> None:
    for index, size in enumerate((4, 5)):
        Image.fromarray(np.zeros((size, size), dtype=np.uint8)).save(tmp_path / f"{index}.png")
    with pytest.raises(ValueError, match=r"1\.png"):
        open_dataset(tmp_path)


def test_missing_and_empty_sources_say_what_there_is(tmp_path) -> None:
    for source in ("digit", ""):
        with pytest.raises(FileNotFoundError, match="'digits'"):
            open_dataset(source)
    with pytest.raises(ValueError, match="0 image files"):
        open_dataset(tmp_path)
