"""Mean and covariance in one pass, and the files in which tools exchange them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from fixpoint_diffusion.evaluation import FeatureStatistics
from fixpoint_diffusion.evaluation.statistics import RunningMoments, is_statistics_file


def features(n: int = 50, d: int = 4) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("sizes", [(50,), (1, 49), (20, 0, 30)])
def test_running_moments_are_those_of_the_whole(sizes: tuple[int, ...]) -> None:
    rows = features() + 1000  # a mean that would spoil a difference of squares
    moments = RunningMoments()
    for part in rows.split(sizes):
        moments.update(part)
    found = moments.statistics()
    np.testing.assert_allclose(found.mean, rows.numpy().mean(axis=0), rtol=1e-13)
    np.testing.assert_allclose(found.cov, np.cov(rows.numpy().T), rtol=1e-9, atol=1e-12)
    assert found.num_images == 50


def test_float32_features_lose_nothing_in_the_sums() -> None:
    rows = (features(2000, 2) + 3000).float()
    moments = RunningMoments()
    for part in rows.split(7):
        moments.update(part)
    np.testing.assert_allclose(moments.statistics().cov, np.cov(rows.double().numpy().T), rtol=1e-9, atol=1e-12)


def test_union_is_the_moments_of_all() -> None:
    rows = features()
    parts = [RunningMoments() for _ in range(3)]
    for part, some in zip(parts, rows.split((10, 39, 1)), strict=True):
        part.update(some)
    whole = RunningMoments.union(parts).statistics()
    np.testing.assert_allclose(whole.cov, np.cov(rows.numpy().T), rtol=1e-12)


def test_a_file_comes_back_as_it_was(tmp_path: Path) -> None:
    statistics = FeatureStatistics.from_features(features(), label="some extractor")
    statistics.save(tmp_path / "new" / "x.npz")
    found = FeatureStatistics.load(tmp_path / "new" / "x.npz")
    assert torch.equal(found.mean, statistics.mean)
    assert torch.equal(found.cov, statistics.cov)
    assert (found.num_images, found.features) == (50, "some extractor")
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["x.npz"]


def test_other_tools_read_it(tmp_path: Path) -> None:
    statistics = FeatureStatistics.from_features(features())
    statistics.save(tmp_path / "x.npz")
    with np.load(tmp_path / "x.npz") as file:
        np.testing.assert_array_equal(file["mu"], statistics.mean)
        np.testing.assert_array_equal(file["sigma"], statistics.cov)


@pytest.mark.parametrize("keys", [("mu", "sigma"), ("mean", "cov")])
def test_files_of_other_tools_are_read(tmp_path: Path, keys: tuple[str, str]) -> None:
    rows = features().numpy()
    arrays = {keys[0]: rows.mean(axis=0), keys[1]: np.cov(rows.T), "mu_s": np.zeros(3)}
    np.savez(tmp_path / "x.npz", **arrays)
    assert is_statistics_file(tmp_path / "x.npz")
    found = FeatureStatistics.load(tmp_path / "x.npz")
    np.testing.assert_array_equal(found.cov, arrays[keys[1]])
    assert (found.num_images, found.features) == (None, None)


def test_other_files_are_no_statistics(tmp_path: Path) -> None:
    np.savez(tmp_path / "images.npz", images=np.zeros((2, 1, 4, 4)))
    (tmp_path / "broken.npz").write_bytes(b"no zip")
    assert not any(is_statistics_file(tmp_path / name) for name in ("images.npz", "broken.npz", "absent.npz"))
    assert not is_statistics_file(tmp_path)


def npz(**arrays: object) -> Callable[[Path], object]:
    return lambda path: np.savez(path, **arrays)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (npz(mu=np.zeros(2)), "holds mu; expected mu and sigma"),
        (npz(mu=np.zeros(2), sigma=np.eye(3)), r"got \(2,\) and \(3, 3\)"),
        (npz(mu=np.zeros((1, 2)), sigma=np.eye(2)), r"got \(1, 2\) and \(2, 2\)"),
        (npz(mu=np.zeros(0), sigma=np.zeros((0, 0))), r"got \(0,\)"),
        (npz(mu=np.zeros(2), sigma=np.full((2, 2), np.nan)), "finite"),
        (npz(mu=np.zeros(2), sigma=np.array([[1.0, 2.0], [0.0, 1.0]])), "symmetric"),
        (npz(mu=np.zeros(2), sigma=-np.eye(2)), "diagonal of at least 0"),
        (npz(mu=np.array(["a", "b"]), sigma=np.eye(2)), "not a statistics file"),
        (npz(mu=np.zeros(2, dtype=object), sigma=np.eye(2)), "not a statistics file"),
        (lambda path: path.write_bytes(b"no zip"), "not a statistics file"),
    ],
)
def test_other_contents_are_refused(tmp_path: Path, write: Callable[[Path], object], message: str) -> None:
    write(tmp_path / "x.npz")
    with pytest.raises(ValueError, match=message) as caught:
        FeatureStatistics.load(tmp_path / "x.npz")
    assert str(tmp_path) in str(caught.value)


def test_bad_features_are_refused() -> None:
    with pytest.raises(ValueError, match="at least two images, got 1"):
        FeatureStatistics.from_features(features(1))
    with pytest.raises(ValueError, match="finite"):
        FeatureStatistics.from_features(torch.full((3, 2), torch.inf))
    with pytest.raises(ValueError, match=r"must be \(N, d\)"):
        FeatureStatistics.from_features(torch.zeros(3))
    moments = RunningMoments()
    moments.update(features())
    with pytest.raises(ValueError, match="dimension 5 among those of dimension 4"):
        moments.update(features(d=5))


def test_only_npz_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is a \.npz file"):
        FeatureStatistics.from_features(features()).save(tmp_path / "x.npy")


def test_complex_statistics_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "s.npz", mu=np.zeros(2, complex), sigma=np.eye(2))
    with pytest.raises(ValueError, match="mu holds complex128; expected real numbers"):
        FeatureStatistics.load(tmp_path / "s.npz")


def test_file_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "s.npz").mkdir()
    with pytest.raises(OSError, match=r"cannot write to .*s\.npz: Is a directory"):
        FeatureStatistics(mean=torch.zeros(2), cov=torch.eye(2)).save(tmp_path / "s.npz")
    assert [path.name for path in tmp_path.iterdir()] == ["s.npz"]


def test_a_name_may_be_as_long_as_names_can_be(tmp_path: Path) -> None:
    """The longer name of the unfinished file was none, and what hours had made was not written."""
    path = tmp_path / f"{'a' * 251}.npz"
    FeatureStatistics.from_features(torch.randn(4, 2)).save(path)
    assert [found.name for found in tmp_path.iterdir()] == [path.name]
