"""A folder of crops of photographs, one subfolder a class, from pictures that come with other packages.

Run it as ``python docs/examples/photographs.py FOLDER``. The photographs are scikit-learn's two, and three of
scikit-image's where that is installed; nothing is downloaded.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images


def photographs() -> dict[str, Image.Image]:
    """The photographs in RGB, by the name of their class."""
    bunch = load_sample_images()
    found = {Path(name).stem: Image.fromarray(array) for name, array in zip(bunch.filenames, bunch.images, strict=True)}
    try:
        from skimage import data
    except ImportError:
        return found
    return found | {name: Image.fromarray(getattr(data, name)()) for name in ("astronaut", "chelsea", "coffee")}


def write_crops(folder: Path, *, per_class: int = 500, size: int = 64, seed: int = 0) -> list[str]:
    """Write square crops ``size`` wide, cut at random places and scales, as ``FOLDER/CLASS/0000.png``.

    Returns:
        The names of the classes.
    """
    rng = np.random.default_rng(seed)
    pictures = photographs()
    for name, picture in pictures.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(per_class):
            side = int(rng.integers(size, min(picture.size), endpoint=True))
            left, top = (int(rng.integers(0, extent - side, endpoint=True)) for extent in picture.size)
            crop = picture.resize((size, size), Image.Resampling.BICUBIC, (left, top, left + side, top + side))
            crop.save(folder / name / f"{number:04d}.png")
    return list(pictures)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--per-class", type=int, default=500)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    classes = write_crops(given.folder, per_class=given.per_class, size=given.size, seed=given.seed)
    print(f"{given.per_class} crops of each of {', '.join(classes)} in {given.folder}")
