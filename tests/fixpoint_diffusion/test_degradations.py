"""Degradations against explicit matrices and NumPy's pseudo-inverse."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.ndimage
import torch
from torch import Tensor

from fixpoint_diffusion.restoration import (
    BlockMean,
    Blur,
    Degradation,
    Grey,
    LinearMap,
    Mask,
    check_degradation,
    project,
)

SHAPE = (3, 4, 6)
KERNEL = torch.tensor([[0.0, 0.1, 0.0], [0.2, 0.4, 0.1], [0.0, 0.2, 0.0]], dtype=torch.float64)
MATRIX = torch.randn(5, 72, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
MATRIX[4] = MATRIX[0] - 2 * MATRIX[1]  # a rank below the number of rows
DEGRADATIONS: dict[str, Degradation] = {
    "mask": Mask(torch.arange(24).reshape(4, 6) % 3 > 0),
    "block mean": BlockMean(2),
    "blur": Blur(KERNEL),
    "blur that loses frequencies": Blur(torch.ones(1, 3) / 3),
    "grey": Grey(),
    "matrix": LinearMap(MATRIX, SHAPE),
}


def images(count: int = 5, seed: int = 0) -> Tensor:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def as_matrix(degradation: Degradation) -> np.ndarray:
    unit = torch.eye(72, dtype=torch.float64).reshape(72, *SHAPE)
    return degradation.apply(unit).flatten(1).T.numpy()


@pytest.mark.parametrize("name", DEGRADATIONS)
def test_pseudo_inverse_is_numpys(name: str) -> None:
    degradation, x = DEGRADATIONS[name], images()
    measured = degradation.apply(x)
    found = degradation.pinv(measured).flatten(1).numpy()
    expected = measured.flatten(1).numpy() @ np.linalg.pinv(as_matrix(degradation), rcond=1e-6).T
    np.testing.assert_allclose(found, expected, atol=1e-9)
    check_degradation(degradation, x)


@pytest.mark.parametrize("name", DEGRADATIONS)
def test_what_is_measured_of_the_projection_is_what_was_measured(name: str) -> None:
    degradation, x = DEGRADATIONS[name], images()
    torch.testing.assert_close(degradation.apply(project(degradation, x)), degradation.apply(x))


def test_blur_is_scipys_convolution_that_wraps() -> None:
    x = images(2)
    expected = scipy.ndimage.convolve(x.numpy(), KERNEL.numpy()[None, None], mode="wrap")
    np.testing.assert_allclose(Blur(KERNEL).apply(x).numpy(), expected, atol=1e-12)


def test_blur_takes_damped_frequencies_for_lost() -> None:
    blur = Blur(torch.ones(1, 3, dtype=torch.float64) / 3)  # width 6: one frequency is 0, the highest is a third
    assert np.linalg.matrix_rank(as_matrix(blur), tol=1e-6) == 72 * 4 // 6
    coarse = Blur(blur.kernel, cutoff=0.5)
    unit = torch.eye(72, dtype=torch.float64).reshape(72, *SHAPE)
    assert round(float(project(coarse, unit).flatten(1).trace())) == 72 * 3 // 6


def test_block_mean_and_grey_are_means() -> None:
    x = images(2)
    blocks = x.unfold(2, 2, 2).unfold(3, 2, 2).mean(dim=(4, 5))
    torch.testing.assert_close(BlockMean(2).apply(x), blocks)
    weights = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    torch.testing.assert_close(
        Grey((0.2, 0.3, 0.5)).apply(x), torch.einsum("nchw,c->nhw", x, weights)[:, None], rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", DEGRADATIONS)
def test_half_precision_is_rounded_and_nothing_else(name: str, dtype: torch.dtype) -> None:
    degradation, x = DEGRADATIONS[name], images().to(dtype)
    measured = degradation.apply(x)
    assert measured.dtype == degradation.pinv(measured).dtype == dtype
    close = {"rtol": 0.02, "atol": 0.1, "check_dtype": False}
    torch.testing.assert_close(measured, degradation.apply(x.double()), **close)
    torch.testing.assert_close(project(degradation, x), project(degradation, x.double()), **close)


@pytest.mark.parametrize("degradation", [BlockMean(2), Blur(KERNEL), Grey()])
def test_videos_are_images_side_by_side(degradation: Degradation) -> None:
    frames = torch.stack([images(2, seed) for seed in range(3)], dim=2)  # (N, C, T, H, W)
    found = degradation.apply(frames)
    torch.testing.assert_close(found, torch.stack([degradation.apply(x) for x in frames.unbind(2)], dim=2))
    torch.testing.assert_close(
        degradation.pinv(found), torch.stack([degradation.pinv(y) for y in found.unbind(2)], dim=2)
    )


class Scaled:
    """A map whose 'pseudo-inverse' is wrong by a factor, or turned."""

    def __init__(self, back: Tensor) -> None:
        self.back = back

    def apply(self, x: Tensor) -> Tensor:
        return x

    def pinv(self, y: Tensor) -> Tensor:
        return (y.flatten(1) @ self.back).reshape(y.shape)


class Centred:
    """An orthogonal projection of a whole batch, and of no image alone."""

    def apply(self, x: Tensor) -> Tensor:
        return x - x.mean(0)

    def pinv(self, y: Tensor) -> Tensor:
        return y


def test_what_mixes_images_or_lacks_a_method_is_refused() -> None:
    with pytest.raises(ValueError, match="mixes the rows of a batch"):
        check_degradation(Centred(), torch.zeros(3, 4))
    with pytest.raises(TypeError, match="needs the methods apply and pinv, and object has no apply"):
        check_degradation(object(), torch.zeros(1, 4))  # type: ignore[arg-type]


def test_masks_and_kernels_of_another_kind_are_refused() -> None:
    for known in (torch.ones(4, 6), [True, False]):
        with pytest.raises(TypeError, match=r"a mask must be a tensor of torch\.bool.*got (torch\.float32|list)"):
            Mask(known)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="kernel must be a tensor of shape"):
        Blur(1.5)  # type: ignore[arg-type]
    for shape in ((3, 6), (2, 3, 3, 4, 6)):
        with pytest.raises(ValueError, match="does not fit images of"):
            Mask(torch.ones(shape, dtype=torch.bool)).apply(images())


def test_what_is_no_orthogonal_projection_is_refused() -> None:
    unit = torch.eye(4, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"no projection, applied twice it differs by 0\.5"):
        check_degradation(Scaled(0.5 * unit), torch.zeros(1, 4))
    slanted = torch.zeros(4, 4, dtype=torch.float64)
    slanted[0, :2] = 1.0  # idempotent, and not symmetric
    with pytest.raises(ValueError, match="no orthogonal projection"):
        check_degradation(Scaled(slanted), torch.zeros(1, 4))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BlockMean(0), "factor must be at least 1"),
        (lambda: BlockMean(4).apply(images()), "do not divide"),
        (lambda: Blur(torch.ones(3)), "shape \\(h, w\\)"),
        (lambda: Blur(torch.ones(5, 5)).apply(images()), "larger than images"),
        (lambda: Blur(torch.ones(1, 1), cutoff=0.0), "cutoff"),
        (lambda: Grey((0.0, 0.0)), "not all be 0"),
        (lambda: Grey((1.0, 1.0)).apply(images()), "one a channel"),
        (lambda: LinearMap(MATRIX, (2, 2)), r"shape \(m, D\) = \(m, 4\)"),
    ],
)
def test_bad_degradations_are_refused(make: object, message: str) -> None:
    assert callable(make)
    with pytest.raises(ValueError, match=message):
        make()
