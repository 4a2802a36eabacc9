"""Three small sets of grey pictures beside the digits: crops of photographs, textures and shapes, 8 x 8 each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from fixpoint_diffusion.extras import needed_for
from fixpoint_diffusion.files import written_whole

SIDE, COUNT = 8, 2000


def drawn_pictures(name: str, folder: Path) -> Path:
    """The set of that name as a file ``(COUNT, 1, SIDE, SIDE)`` uint8, made if it is not there; the same everywhere.

    ``crops``: square parts of the two photographs that come with scikit-learn, at random places and scales.
    ``textures``: the product of two waves of random direction, length and phase. ``shapes``: a disc, a rectangle or a
    triangle at a random place, in random greys.

    >>> import tempfile
    >>> np.load(drawn_pictures("shapes", Path(tempfile.mkdtemp()))).shape
    (2000, 1, 8, 8)
    """
    path = folder / "pictures.npy"
    if not path.is_file():
        rng = np.random.default_rng(0)
        pictures = PICTURES[name](rng)
        folder.mkdir(parents=True, exist_ok=True)
        with written_whole(path) as file:
            np.save(file, pictures[:, None].clip(0, 255).round().astype(np.uint8))
    return path


def _crops(rng: np.random.Generator) -> np.ndarray:
    with needed_for("crops of photographs"):
        from PIL import Image
        from sklearn.datasets import load_sample_images

    photographs = [Image.fromarray(array).convert("L") for array in load_sample_images().images]
    found = []
    for number in range(COUNT):
        picture = photographs[number % len(photographs)]
        side = int(rng.integers(4 * SIDE, 16 * SIDE, endpoint=True))
        left, top = (int(rng.integers(0, extent - side, endpoint=True)) for extent in picture.size)
        box = (left, top, left + side, top + side)
        found.append(np.asarray(picture.resize((SIDE, SIDE), Image.Resampling.BOX, box), dtype=np.float64))
    return np.stack(found)


def _textures(rng: np.random.Generator) -> np.ndarray:
    y, x = np.mgrid[:SIDE, :SIDE]
    waves = np.ones((COUNT, SIDE, SIDE))
    for _ in range(2):
        angle, length, phase = (
            rng.uniform(low, high, (COUNT, 1, 1)) for low, high in ((0, np.pi), (3, 12), (0, 2 * np.pi))
        )
        waves *= np.cos(2 * np.pi * (x * np.cos(angle) + y * np.sin(angle)) / length + phase)
    return 127.5 * (1 + waves)


def _shapes(rng: np.random.Generator) -> np.ndarray:
    y, x = np.mgrid[:SIDE, :SIDE]
    centre_x, centre_y = rng.uniform(2, SIDE - 3, (2, COUNT, 1, 1))
    half = rng.uniform(1, 3, (COUNT, 1, 1))
    across, down = abs(x - centre_x), y - centre_y
    masks = (
        across**2 + down**2 <= half**2,
        (across <= half) & (abs(down) <= half),
        (abs(down) <= half) & (across <= (half + down) / 2),
    )
    kind = rng.integers(0, 3, (COUNT, 1, 1))
    inside = np.select([kind == k for k in range(3)], masks)
    dark, light = rng.uniform(0, 80, (COUNT, 1, 1)), rng.uniform(150, 255, (COUNT, 1, 1))
    return np.where(inside, light, dark)


PICTURES: dict[str, Callable[[np.random.Generator], np.ndarray]] = {
    "crops": _crops,
    "textures": _textures,
    "shapes": _shapes,
}
