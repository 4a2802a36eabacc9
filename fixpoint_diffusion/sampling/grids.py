"""Images side by side in one picture."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


def image_grid(images: Tensor, *, columns: int | None = None, gap: int = 1) -> np.ndarray:
    """Lay out images row by row, with gaps between them.

    Args:
        images: ``(N, C, H, W)`` in [-1, 1] (clipped to it). One channel is grey and three are RGB; of any other number,
            such as latents have, the channels are grey tiles from left to right without a gap, and where values
            leave [-1, 1], the largest in absolute value is black or white.
        columns: images in a row; None: as square as can be.
        gap: pixels between images and around them, mid-grey.

    Returns:
        uint8 ``(height, width, 3)``.

    Raises:
        ValueError: for another shape, or no images.

    >>> image_grid(torch.zeros(6, 1, 8, 8), columns=3).shape
    (19, 28, 3)
    >>> image_grid(torch.zeros(6, 4, 8, 8), columns=3).shape
    (19, 100, 3)
    """
    if images.ndim != 4 or 0 in images.shape:
        raise ValueError(f"images must be (N, C, H, W), none of them 0, got {tuple(images.shape)}")
    if images.shape[1] not in (1, 3):
        images = torch.cat(images.detach().split(1, dim=1), dim=3)
        images = images / images.nan_to_num(0, 0, 0).abs().max().clamp(min=1)
    count, _, height, width = images.shape
    columns = columns or math.ceil(math.sqrt(count * height / width))
    rows = math.ceil(count / columns)
    tiles = to_pixels(images).cpu().expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()
    grid = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, 3), 128, dtype=np.uint8)
    for index, tile in enumerate(tiles):
        top, left = (gap + (index // columns) * (height + gap)), (gap + (index % columns) * (width + gap))
        grid[top : top + height, left : left + width] = tile
    return grid


def to_pixels(images: Tensor) -> Tensor:
    """Images in [-1, 1] (clipped to it) as uint8, rounded to the nearest of 256 values.

    >>> to_pixels(torch.tensor([-1.0, 0.0, 1.0, 9.0]))
    tensor([  0, 128, 255, 255], dtype=torch.uint8)
    """
    return images.detach().to(torch.float32).clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)


def save_grid(images: Tensor, path: str | Path, *, columns: int | None = None, smallest_side: int = 512) -> Path:
    """Write ``image_grid(images)`` as a PNG, small images enlarged by whole factors without smoothing.

    Args:
        images: see ``image_grid``.
        path: the file to write; its folder is made.
        columns: see ``image_grid``.
        smallest_side: enlarge until the picture's shorter side has about this many pixels.

    Returns:
        The path.
    """
    from PIL import Image

    grid = image_grid(images, columns=columns)
    factor = max(1, smallest_side // min(grid.shape[:2]))
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(grid).resize((grid.shape[1] * factor, grid.shape[0] * factor), Image.Resampling.NEAREST).save(path)
    return path
