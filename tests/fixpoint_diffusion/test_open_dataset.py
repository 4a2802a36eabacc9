from __future__ import annotations

import pickle
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from fixpoint_diffusion.training.data import EpochSampler, LabelledImages, load_digits, open_dataset, split_held_out


def grey(value: int, size: tuple[int, int] = (4, 4)) -> Image.Image:
    return Image.fromarray(np.full(size, value, dtype=np.uint8))


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    """Three classes in natural order; the grey value of a picture is 10 times its class and its number."""
    for label, name in enumerate(("2", "10", "cats")):
        for number in range(3):
            inner = tmp_path / name / ("deep/er" if number == 2 else "")
            inner.mkdir(parents=True, exist_ok=True)
            grey(10 * label + number).save(inner / f"{number}.{('png', 'gif', 'tif')[number]}")
    return tmp_path


def grey_of(item: dict) -> int:
    return round((float(item["images"][0, 0, 0]) + 1) * 127.5)


def test_subfolders_are_classes_whatever_is_in_them(classes: Path) -> None:
    dataset = open_dataset(classes, channels="L")
    assert (dataset.class_names, dataset.num_classes, len(dataset)) == (("2", "10", "cats"), 3, 9)
    items = [dataset[index] for index in range(9)]
    assert [item["labels"] for item in items] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert [grey_of(item) for item in items] == [0, 1, 2, 10, 11, 12, 20, 21, 22]
    assert dataset.labels.tolist() == [item["labels"] for item in items]


def test_without_labels_subfolders_are_no_classes(classes: Path) -> None:
    grey(99).save(classes / "top.png")
    dataset = open_dataset(classes, channels="L", labels=False)
    assert sorted(grey_of(dataset[index]) for index in range(len(dataset))) == [0, 1, 2, 10, 11, 12, 20, 21, 22, 99]
    assert (dataset.labels, dataset.num_classes, dataset.class_names) == (None, None, None)
    assert set(dataset[0]) == {"images"}


def test_pictures_beside_classes_and_empty_classes_are_refused(classes: Path) -> None:
    (classes / "dogs").mkdir()
    with pytest.raises(ValueError, match="class folder 'dogs'"):
        open_dataset(classes, channels="L")
    grey(0).save(classes / "top.png")
    with pytest.raises(ValueError, match=r"1 pictures beside class folders.*top\.png"):
        open_dataset(classes, channels="L")


def test_other_files_are_named_in_a_warning(classes: Path) -> None:
    (classes / "2" / "notes.txt").write_text("x")
    (classes / ".hidden").write_text("x")
    with pytest.warns(UserWarning, match=r"1 files are no pictures.*notes\.txt") as caught:
        open_dataset(classes, channels="L")
    assert len(caught) == 1


def test_linked_folders_are_followed_and_loops_refused(classes: Path, tmp_path_factory) -> None:
    links = tmp_path_factory.mktemp("links")
    (links / "a").symlink_to(classes / "2")
    (links / "b").symlink_to(classes / "2")
    assert open_dataset(links, channels="L").class_names == ("a", "b")
    (classes / "2" / "loop").symlink_to(classes)
    with pytest.raises(ValueError, match="link to a folder that holds it"):
        open_dataset(classes, channels="L")


def test_transparency_and_mixed_modes_ask_for_a_choice(tmp_path: Path) -> None:
    grey(3).save(tmp_path / "1.png")
    grey(3).convert("RGB").save(tmp_path / "2.png")
    with pytest.raises(ValueError, match=r"2\.png has the channels 'RGB'.*1\.png has 'L'"):
        open_dataset(tmp_path)
    assert open_dataset(tmp_path, channels="RGB").sample_shape == (3, 4, 4)
    grey(3).convert("RGBA").save(tmp_path / "1.png")
    with pytest.raises(
        ValueError, match=r"1\.png has transparency: choose the channels \(--channels\), 'RGB'.* or 'RGBA'"
    ):
        open_dataset(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channels": "rgb"}, "channels must be one of L, LA, RGB, RGBA"),
        ({"size": 0}, "positive"),
        ({"size": (4, 4, 4)}, "positive"),
        ({"size": 4.0}, "positive"),
        ({"size": True}, "positive"),
        ({"seed": -1}, "seed"),
        ({"crop": "middle", "size": 4}, "center, random, patch"),
        ({"crop": "random"}, "needs a size"),
        ({"crop": "patch", "size": 9}, "smaller than the patch"),
        ({"latents": True, "flip": True}, "latents are taken as they are"),
    ],
)
def test_unusable_options_are_refused_at_once(tmp_path: Path, options: dict, message: str) -> None:
    grey(3).save(tmp_path / "1.png")
    with pytest.raises(ValueError, match=message):
        open_dataset(tmp_path, **options)


def test_center_crop_scales_as_pillow_does(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 256, (37, 91), dtype=np.uint8)
    Image.fromarray(values).save(tmp_path / "1.png")
    image = open_dataset(tmp_path, size=(16, 20))[0]["images"][0].numpy()
    floats = Image.fromarray(values.astype(np.float32) / 127.5 - 1)
    expected = np.asarray(floats.resize((39, 16), Image.Resampling.BICUBIC))[:, 9:29]
    np.testing.assert_allclose(image, np.clip(expected, -1, 1), atol=1e-5)


def test_scaling_does_not_leave_the_range(tmp_path: Path) -> None:
    values = np.zeros((9, 9), dtype=np.uint8)
    values[:, 4:] = 255  # bicubic weights overshoot at such an edge
    Image.fromarray(values).save(tmp_path / "1.png")
    image = open_dataset(tmp_path, size=20)[0]["images"]
    assert (float(image.min()), float(image.max())) == (-1, 1)


@pytest.fixture
def ramp(tmp_path: Path) -> Path:
    """Four images 1x12x10 whose every pixel has a value of its own."""
    np.save(tmp_path / "ramp.npy", np.linspace(-1, 1, 480).reshape(4, 1, 12, 10).astype(np.float32))
    return tmp_path / "ramp.npy"


def test_patches_are_windows_and_depend_on_seed_draw_and_index(ramp: Path) -> None:
    whole = torch.from_numpy(np.load(ramp))
    seen: dict[int, set[tuple[int, int, bool]]] = {}
    for seed in (0, 1):
        dataset = open_dataset(ramp, size=8, crop="patch", flip=True, seed=seed)
        again = open_dataset(ramp, size=8, crop="patch", flip=True, seed=seed)
        for draw in range(60):
            image = dataset[2, draw]["images"]
            assert torch.equal(image, again[2, draw]["images"])
            places = [
                (top, left, flip)
                for top in range(5)
                for left in range(3)
                for flip in (False, True)
                if torch.equal(whole[2, :, top : top + 8, left : left + 8].flip(-1 if flip else ()), image)
            ]
            assert len(places) == 1
            seen.setdefault(seed, set()).add(places[0])
    assert {top for top, _, _ in seen[0]} == set(range(5))
    assert {left for _, left, _ in seen[0]} == set(range(3))
    assert {flip for _, _, flip in seen[0]} == {False, True}
    firsts = [open_dataset(ramp, size=8, crop="patch", seed=seed)[0, 0]["images"] for seed in range(8)]
    assert any(not torch.equal(firsts[0], other) for other in firsts[1:])


def test_a_random_cut_covers_the_whole_image(ramp: Path) -> None:
    dataset = open_dataset(ramp, size=(6, 5), crop="random")
    assert all(torch.equal(dataset[0, draw]["images"], dataset[0]["images"]) for draw in range(4))  # nothing to spare
    tall = open_dataset(ramp, size=5, crop="random")
    assert len({float(tall[0, draw]["images"].sum()) for draw in range(8)}) == 2  # 6 rows for 5


def test_order_and_cuts_do_not_depend_on_workers_and_resume_to_the_bit(ramp: Path) -> None:
    dataset = open_dataset(ramp, size=8, crop="patch", flip=True, seed=3)

    def batches(workers: int, start: int = 0) -> list[torch.Tensor]:
        sampler = EpochSampler(len(dataset), seed=5, start=start)
        loader = DataLoader(dataset, batch_size=3, sampler=sampler, num_workers=workers)
        return [batch["images"] for batch in islice(loader, 6)]

    alone, shared = batches(0), batches(2)
    assert all(map(torch.equal, alone, shared))
    assert all(map(torch.equal, batches(0, start=6), alone[2:]))


def test_an_epoch_sees_every_row_once_in_changing_order() -> None:
    pairs = list(islice(EpochSampler(10, seed=1), 30))
    for epoch in range(3):
        part = pairs[10 * epoch : 10 * epoch + 10]
        assert sorted(part) == [(index, epoch) for index in range(10)]
    orders = [[index for index, _ in pairs[i : i + 10]] for i in (0, 10, 20)]
    assert orders[0] != orders[1] != orders[2]


def test_arrays_of_sixteen_bits_and_labels_beside(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.array([0, 65535, 13107], dtype=np.uint16).reshape(3, 1, 1, 1))
    np.save(tmp_path / "labels.npy", np.array([2, 0, 1]))
    dataset = open_dataset(tmp_path)
    torch.testing.assert_close(
        torch.cat([dataset[i]["images"].flatten() for i in range(3)]), torch.tensor([-1, 1, -0.6])
    )
    assert ([dataset[i]["labels"] for i in range(3)], dataset.num_classes) == ([2, 0, 1], 3)
    np.save(tmp_path / "labels.npy", np.array([2, 0]))
    with pytest.raises(ValueError, match=r"labels\.npy holds int64 \(2,\)"):
        open_dataset(tmp_path)


def test_arrays_with_opacity_ask_for_a_choice(tmp_path: Path) -> None:
    array = np.array([255, 0, 51, 102], dtype=np.uint8).reshape(1, 4, 1, 1)
    np.save(tmp_path / "x.npy", array)
    with pytest.raises(ValueError, match=r"4 channels: choose 'RGBA'.* or 'RGB'"):
        open_dataset(tmp_path)
    torch.testing.assert_close(
        open_dataset(tmp_path, channels="RGB")[0]["images"].flatten(), torch.tensor([1, 0.2, 0.36])
    )
    assert open_dataset(tmp_path, channels="RGBA").sample_shape == (4, 1, 1)
    np.save(tmp_path / "x.npy", np.zeros((2, 5, 8, 8), dtype=np.float32))
    with pytest.raises(ValueError, match="C from 1 to 4"):
        open_dataset(tmp_path)


def test_latents_of_any_range_and_shape(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(3, 16, 2, 4, 4)).astype(np.float16) * 9
    np.save(tmp_path / "z.npy", values)
    dataset = open_dataset(tmp_path / "z.npy", latents=True)
    assert dataset.is_latent
    assert dataset.sample_shape == (16, 2, 4, 4)
    np.testing.assert_array_equal(dataset[1]["images"].numpy(), values[1].astype(np.float32))
    values[2, 0, 0, 0, 0] = np.inf
    np.save(tmp_path / "z.npy", values)
    with pytest.raises(ValueError, match="row 2 holds values that are not finite"):
        open_dataset(tmp_path / "z.npy", latents=True)


def test_a_row_beyond_the_range_is_refused_when_it_is_read(tmp_path: Path) -> None:
    images = np.zeros((1000, 1, 2, 2), dtype=np.float32)
    images[1] = 3
    np.save(tmp_path / "x.npy", images)
    dataset = open_dataset(tmp_path)
    with pytest.raises(ValueError, match=r"row 1 holds values from 3 to 3.*latents=True"):
        dataset[1]


@pytest.mark.parametrize("array", [np.zeros((0, 1, 4, 4), np.uint8), np.zeros((2, 1, 4, 4), bool), np.zeros(3)])
def test_empty_and_foreign_arrays_are_refused(tmp_path: Path, array: np.ndarray) -> None:
    np.save(tmp_path / "x.npy", array)
    for latents in (False, True):
        with pytest.raises(ValueError, match=r"x\.npy holds"):
            open_dataset(tmp_path, latents=latents)


def test_a_data_set_travels_without_its_array(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros((1000, 3, 16, 16), dtype=np.uint8))
    dataset = open_dataset(tmp_path)
    dataset[0]
    assert len(pickle.dumps(dataset)) < 10_000
    assert torch.equal(pickle.loads(pickle.dumps(dataset))[7]["images"], dataset[7]["images"])


def test_held_out_part_of_a_folder(classes: Path) -> None:
    train, held_out = split_held_out(open_dataset(classes, channels="L"), fraction=0.3)
    assert held_out.labels.tolist() == [0, 1, 2]
    assert len(train) == 6
    for part in (train, held_out):
        assert all(grey_of(part[index]) // 10 == part[index]["labels"] for index in range(len(part)))
    assert train.class_names == ("2", "10", "cats")


def test_a_part_is_cut_as_the_whole(ramp: Path) -> None:
    dataset = open_dataset(ramp, size=8, crop="patch")
    part = dataset.subset(torch.tensor([3, 1])).subset(torch.tensor([1]))
    assert torch.equal(part[0, 4]["images"], dataset[1, 4]["images"])
    with pytest.raises(IndexError):
        part[1]


def test_images_in_memory() -> None:
    digits = load_digits()
    dataset = open_dataset(LabelledImages(images=digits.images, labels=digits.labels))
    assert torch.equal(dataset[5]["images"], digits.images[5])
    assert dataset.num_classes == 10
    assert torch.equal(open_dataset("digits", channels="RGB")[5]["images"], digits.images[5].repeat(3, 1, 1))


def test_pictures_are_not_held_in_memory(tmp_path: Path) -> None:
    for index in range(20):
        grey(index, (256, 256)).save(tmp_path / f"{index}.png")
    dataset = open_dataset(tmp_path)
    for index in range(20):
        dataset[index]
    assert len(pickle.dumps(dataset)) < 20_000  # names; one picture alone is 65536 bytes
