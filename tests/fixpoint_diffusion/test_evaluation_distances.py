"""Distances against independent implementations on the same features, and against closed forms."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor, nn

from fixpoint_diffusion.evaluation import (
    FeatureStatistics,
    frechet_distance,
    kernel_distance,
    precision_recall,
    sliced_wasserstein,
)


def draw(n: int, d: int, *, seed: int, shift: float = 0.0, scale: float = 1.0) -> Tensor:
    """Features with correlations and very different variances."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(d, d, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    rows = torch.randn(n, d, generator=generator, dtype=torch.float64) * torch.logspace(-2, 1, d)
    return scale * rows @ mixing + shift


def frechet_by_sqrtm(x: Tensor, y: Tensor) -> float:
    (m, C), (n, D) = ((z.numpy().mean(0), np.cov(z.numpy().T)) for z in (x, y))
    return float(((m - n) ** 2).sum() + np.trace(C + D - 2 * scipy.linalg.sqrtm(C @ D).real))


@pytest.mark.parametrize(("n", "m", "d"), [(200, 300, 16), (500, 90, 40)])
def test_frechet_distance_equals_the_matrix_square_root_of_scipy(n: int, m: int, d: int) -> None:
    x, y = draw(n, d, seed=0), draw(m, d, seed=1, shift=0.3, scale=1.2)
    assert frechet_distance(x, y) == pytest.approx(frechet_by_sqrtm(x, y), rel=1e-6)


def test_frechet_distance_has_the_closed_form_of_gaussians() -> None:
    """With a common basis the trace is the sum of squared differences of deviations."""
    basis = torch.linalg.qr(draw(8, 8, seed=0)).Q
    one, other = torch.logspace(-3, 2, 8, dtype=torch.float64), torch.logspace(1, -2, 8, dtype=torch.float64)
    mean = torch.arange(8, dtype=torch.float64)
    a = FeatureStatistics(mean=mean, cov=basis @ torch.diag(one) @ basis.T)
    b = FeatureStatistics(mean=2 * mean, cov=basis @ torch.diag(other) @ basis.T)
    expected = mean.square().sum() + (one.sqrt() - other.sqrt()).square().sum()
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-12)


@pytest.mark.parametrize("n", [5, 30, 500])
def test_frechet_distance_of_a_set_to_itself_is_zero_and_never_less(n: int) -> None:
    """Also with fewer images than features, where the roots of rounding errors would show."""
    for seed in range(5):
        x = draw(n, 24, seed=seed)
        assert 0 <= frechet_distance(x, x) < 1e-8 * float(x.var(0).sum())


def test_frechet_distance_keeps_its_digits_where_a_covariance_is_nearly_singular() -> None:
    """Deviations from 1 to 1e-7 in both."""
    deviations = torch.logspace(0, -7, 200, dtype=torch.float64)
    basis = torch.linalg.qr(draw(200, 200, seed=0)).Q
    cov = basis @ torch.diag(deviations.square()) @ basis.T
    zero = torch.zeros(200, dtype=torch.float64)
    one, other = (FeatureStatistics(mean=zero, cov=scale * (cov + cov.T) / 2) for scale in (1, 4))
    assert frechet_distance(one, other) == pytest.approx(float(deviations.square().sum()), rel=1e-7)


def test_frechet_distance_with_fewer_images_than_features() -> None:
    """The trace by the singular values of the centred features themselves."""
    x, y = draw(10, 32, seed=0), draw(300, 32, seed=1, shift=0.1)
    centred = [(z - z.mean(0)) / (len(z) - 1) ** 0.5 for z in (x, y)]
    trace = torch.linalg.svdvals(centred[0] @ centred[1].T).sum()
    expected = (x.mean(0) - y.mean(0)).square().sum() + x.var(0).sum() + y.var(0).sum() - 2 * trace
    assert frechet_distance(x, y) == pytest.approx(float(expected), rel=1e-9)


def test_frechet_distance_of_points_is_that_of_their_means() -> None:
    assert frechet_distance(torch.zeros(3, 2), torch.ones(4, 2)) == 2


def test_torchmetrics_takes_an_extractor_and_agrees() -> None:
    """It needs neither torchvision nor torch-fidelity for that."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    class Flat(nn.Module):
        num_features = 12

        def forward(self, images: Tensor) -> Tensor:
            return images.flatten(1).double()

    x, y = draw(200, 12, seed=0).reshape(-1, 3, 2, 2), draw(200, 12, seed=1, shift=0.5).reshape(-1, 3, 2, 2)
    metric = FrechetInceptionDistance(feature=Flat())
    metric.update(x, real=False)
    metric.update(y, real=True)
    assert frechet_distance(x.flatten(1), y.flatten(1)) == pytest.approx(float(metric.compute()), rel=1e-4)


def kernel_by_hand(x: np.ndarray, y: np.ndarray) -> float:
    """The unbiased estimator, term by term."""
    d, n, m = x.shape[1], len(x), len(y)

    def k(a: np.ndarray, b: np.ndarray) -> float:
        return float((a @ b / d + 1) ** 3)

    within = sum(k(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j) / (n * (n - 1))
    other = sum(k(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j) / (m * (m - 1))
    return within + other - 2 * sum(k(a, b) for a in x for b in y) / (n * m)


def test_kernel_distance_equals_brute_force() -> None:
    """Over all subsets of half of the images, the mean is that of the whole; over many, nearly."""
    x, y = draw(40, 3, seed=0) * 0.1, draw(40, 3, seed=1, shift=1.0) * 0.1 + 0.5
    found = kernel_distance(x, y, subsets=400)
    expected = kernel_by_hand(x.numpy(), y.numpy())
    assert found.subset_size == 20
    assert found.mean == pytest.approx(expected, abs=4 * found.std / 20)


def test_kernel_distance_of_one_subset_equals_brute_force_to_rounding() -> None:
    """Of four images, a subset has two: its value is one of 36 that are known."""
    x = draw(4, 3, seed=0)
    y = draw(4, 3, seed=1)
    found = kernel_distance(x, y, subsets=1, seed=3)
    pairs = [(i, j) for i in range(4) for j in range(i + 1, 4)]
    candidates = [kernel_by_hand(x[list(a)].numpy(), y[list(b)].numpy()) for a in pairs for b in pairs]
    assert min(abs(found.mean - each) for each in candidates) < 1e-6 * abs(found.mean)


def test_kernel_distance_leaves_the_random_state_alone() -> None:
    x = draw(20, 3, seed=0)
    before = torch.get_rng_state()
    assert kernel_distance(x, x + 1, seed=1) == kernel_distance(x, x + 1, seed=1)
    assert kernel_distance(x, x + 1, seed=1) != kernel_distance(x, x + 1, seed=2)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("n", "m"), [(12, 12), (8, 12), (7, 5)])
def test_sliced_wasserstein_equals_brute_force(n: int, m: int) -> None:
    """Unequal sets: each repeated until both are equally large, which changes no distribution."""
    x, y = draw(n, 5, seed=0), draw(m, 5, seed=1, shift=0.5)
    directions = torch.randn(60, 5, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    common = Fraction(n, m)
    x_rows, y_rows = x.repeat_interleave(common.denominator, 0), y.repeat_interleave(common.numerator, 0)
    total = 0.0
    for u in directions / directions.norm(dim=1, keepdim=True):
        gaps = np.sort(x_rows.numpy() @ u.numpy()) - np.sort(y_rows.numpy() @ u.numpy())
        total += float((gaps**2).mean())
    assert sliced_wasserstein(x, y, projections=60, seed=4) == pytest.approx(15 * total / 60, rel=1e-12)


def test_sliced_wasserstein_of_a_shift_is_three_times_its_square() -> None:
    """``E (u . s)^2 = |s|^2 / d`` over directions u."""
    x = draw(100, 6, seed=0)
    shift = torch.tensor([1.0, -2.0, 0.5, 0.0, 0.0, 3.0], dtype=torch.float64)
    found = sliced_wasserstein(x, x + shift, projections=20_000)
    assert found == pytest.approx(3 * float(shift.square().sum()), rel=0.05)


def share_by_hand(points: np.ndarray, manifold: np.ndarray, k: int) -> float:
    inside = 0
    for p in points:
        for centre in manifold:
            radius = np.sort(np.linalg.norm(manifold - centre, axis=1))[k]
            if np.linalg.norm(p - centre) <= radius:
                inside += 1
                break
    return inside / len(points)


@pytest.mark.parametrize("d", [2, 300])  # two ways to compute distances
def test_precision_and_recall_equal_brute_force(d: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, d, generator=generator, dtype=torch.float64)
    y = torch.randn(30, d, generator=generator, dtype=torch.float64) * 1.3 + 0.2
    found = precision_recall(x, y, neighbours=3)
    assert found.precision == share_by_hand(x.numpy(), y.numpy(), 3)
    assert found.recall == share_by_hand(y.numpy(), x.numpy(), 3)
    assert 0 < found.precision <= 1


@pytest.mark.parametrize("d", [4, 2048])
def test_copies_of_an_image_lie_in_the_ball_of_each_other(d: int) -> None:
    """More copies than neighbours make a radius of 0; rounding put some of them outside."""
    generator = torch.Generator().manual_seed(0)
    images = 3 * torch.rand(5, d, generator=generator)
    samples, reference = images.repeat(10, 1), images.repeat(6, 1)[torch.randperm(30, generator=generator)]
    found = precision_recall(samples, reference)
    assert (found.precision, found.recall) == (1, 1)


def test_precision_and_recall_tell_what_is_wrong() -> None:
    real = draw(200, 2, seed=0)
    one_mode, far = real[:1] + 0.01 * draw(200, 2, seed=1), real + 1000
    assert precision_recall(one_mode, real).precision > 0.9 > 0.2 > precision_recall(one_mode, real).recall
    assert precision_recall(far, real).precision == 0


@pytest.mark.parametrize("distance", [frechet_distance, kernel_distance, sliced_wasserstein, precision_recall])
def test_unusable_features_are_refused(distance: object) -> None:
    good = draw(10, 3, seed=0)
    for bad, message in (
        (draw(10, 4, seed=0), "3 dimensions, the reference's 4"),
        (torch.full((10, 3), torch.nan), "finite"),
        (torch.zeros(10), r"\(N, d\)"),
        (torch.zeros(0, 3), "at least"),
    ):
        with pytest.raises(ValueError, match=message):
            distance(good, bad)
