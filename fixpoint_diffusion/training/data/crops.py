"""The cut, scale and mirroring of one image, fixed by seed, draw and index."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fixpoint_diffusion.extras import machine_memory

CROPS = ("center", "random", "patch")


@dataclass(frozen=True, kw_only=True)
class Crop:
    """How images of any size become images of one size.

    Attributes:
        size: height and width of the result; None: images keep their size.
        place: ``"center"`` scales the image until it just covers ``size`` and cuts the middle; ``"random"`` scales
            alike and cuts at a random place; ``"patch"`` cuts at a random place without scaling.
        flip: mirror left and right in half of the draws.
        seed: of places and flips.

    Raises:
        ValueError: for an unknown place, a size that is not positive, a place without a size, or a negative seed.
    """

    size: tuple[int, int] | None = None
    place: str = "center"
    flip: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.place not in CROPS:
            raise ValueError(f"crop must be one of {', '.join(CROPS)}, got {self.place!r}")
        if self.size is not None and not _is_size(self.size):
            raise ValueError(f"size must be a positive integer or two of them (height, width), got {self.size!r}")
        if self.size is None and self.place != "center":
            raise ValueError(f"crop={self.place!r} needs a size")
        if self.seed < 0:
            raise ValueError(f"seed must be at least 0, got {self.seed}")

    def check(self, height: int, width: int, name: str) -> None:
        """Raise ValueError if an image of this size cannot be cut to ``size``."""
        if self.size is None:
            return
        wanted = f"{self.size[0]}x{self.size[1]}"
        if self.place == "patch":
            if height < self.size[0] or width < self.size[1]:
                raise ValueError(
                    f"{name} is {height}x{width}, smaller than the patch {wanted}: "
                    f"take a smaller size, or crop='random', which scales"
                )
            return
        need, have = 4 * math.prod(_covering((height, width), self.size)), machine_memory()
        if need > have:
            raise ValueError(
                f"{name} is {height}x{width}; scaled to size {wanted} (--size), each channel of an image would take "
                f"{need / 1e9:,.0f} GB, and this machine has {have / 1e9:,.0f} GB: take a smaller size"
            )

    def apply(self, image: Tensor, index: int, draw: int) -> Tensor:
        """Cut one image ``(C, H, W)`` in [-1, 1]; the same ``(seed, draw, index)`` always gives the same result."""
        # A hash of the three numbers, as SeedSequence is: independent of workers, order and NumPy's version.
        words = np.random.SeedSequence([self.seed, draw, index]).generate_state(3, dtype=np.uint64)
        if self.size is not None:
            if self.place != "patch":
                image = _cover(image, self.size)
            spare = [have - want for have, want in zip(image.shape[-2:], self.size, strict=True)]
            if self.place == "center":
                top, left = (n // 2 for n in spare)
            else:
                top, left = (int(word) % (n + 1) for word, n in zip(words, spare, strict=False))
            image = image[:, top : top + self.size[0], left : left + self.size[1]]
        if self.flip and int(words[2]) % 2:
            image = image.flip(-1)
        return image.contiguous()


def _is_size(value: object) -> bool:
    """Whether it is (height, width); True counts as an int for Python, but not here."""
    return isinstance(value, tuple) and len(value) == 2 and all(type(n) is int and n > 0 for n in value)


def _cover(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Scale by one factor until the image just covers ``size``; bicubic, with antialiasing."""
    height, width = image.shape[-2:]
    if (height, width) == size:
        return image
    scaled = torch.nn.functional.interpolate(
        image[None], size=_covering((height, width), size), mode="bicubic", antialias=True, align_corners=False
    )
    return scaled[0].clamp(-1, 1)  # bicubic weights overshoot at edges


def _covering(image: tuple[int, int], size: tuple[int, int]) -> list[int]:
    """Height and width of an image once it is scaled until it just covers ``size``."""
    scale = max(size[0] / image[0], size[1] / image[1])
    return [max(round(n * scale), least) for n, least in zip(image, size, strict=True)]
