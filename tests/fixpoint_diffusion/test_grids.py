from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from fixpoint_diffusion.sampling.grids import image_grid, save_grid


def test_grid_places_images_row_by_row_between_gaps() -> None:
    values = torch.tensor([-1.0, 1.0, 0.2, 9.0, -9.0])
    grid = image_grid(values.view(5, 1, 1, 1).expand(-1, -1, 2, 3), columns=2)
    assert grid.shape == (3 * 3 + 1, 2 * 4 + 1, 3)
    assert grid[1::3, 1::4, 0].tolist() == [[0, 255], [153, 255], [0, 128]]
    gaps = grid.copy()
    for row in range(3):
        for column in range(2):
            gaps[1 + 3 * row : 3 + 3 * row, 1 + 4 * column : 4 + 4 * column] = 128
    assert (gaps == 128).all()


def test_colours_keep_their_channels() -> None:
    image = torch.tensor([1.0, -1.0, 0.0]).view(1, 3, 1, 1)
    assert image_grid(image)[1, 1].tolist() == [255, 0, 128]


def test_channels_that_are_no_colours_stand_side_by_side() -> None:
    images = torch.tensor([[-1.0, 1.0, 0.2, 0.0], [1.0, 1.0, -1.0, -1.0]]).view(2, 4, 1, 1).expand(-1, -1, 2, 1)
    grid = image_grid(images, columns=1)
    assert grid[1::3, 1:5, 0].tolist() == [[0, 255, 153, 128], [255, 255, 0, 0]]
    assert (grid[..., 0] == grid[..., 2]).all()


def test_latents_beyond_the_range_of_images_are_not_cut_off() -> None:
    latents = torch.tensor([-4.0, 2.0, 1.0, 0.0, torch.nan]).view(1, 5, 1, 1)
    assert image_grid(latents)[1, 1:5, 0].tolist() == [0, 191, 159, 128]


def test_saved_picture_is_the_grid_enlarged_without_smoothing(tmp_path) -> None:
    images = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    path = save_grid(images, tmp_path / "new" / "grid.png", smallest_side=60)
    with Image.open(path) as picture:
        np.testing.assert_array_equal(np.asarray(picture)[::3, ::3], image_grid(images))


@pytest.mark.parametrize("shape", [(0, 1, 8, 8), (1, 8, 8), (1, 0, 8, 8)])
def test_unusable_images_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"\(N, C, H, W\)"):
        image_grid(torch.zeros(shape))
