"""Features gathered in one pass, intervals and extrapolation, the report and its command."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from fixpoint_diffusion.cli import app, main
from fixpoint_diffusion.evaluation import (
    DigitFeatures,
    FeatureStatistics,
    Images,
    ModuleFeatures,
    collect_features,
    digit_frechet_distance,
    evaluate,
    frechet_distance,
    precision_recall,
)
from fixpoint_diffusion.evaluation.uncertainty import estimate_by_blocks, estimate_of_share, estimate_of_subsets
from fixpoint_diffusion.training.data import load_digits, split_held_out


def pixels(d: int = 4) -> ModuleFeatures:
    return ModuleFeatures(lambda images: images.flatten(1), name="pixels", num_features=d)


def noise(n: int, *, seed: int, d: int = 4, scale: float = 0.1) -> torch.Tensor:
    """Images of d pixels, whose features are Gaussian; within [-1, 1], so nothing is clipped."""
    return scale * torch.randn(n, 1, 1, d, generator=torch.Generator().manual_seed(seed))


class TestCollecting:
    def test_statistics_are_those_of_all_images(self) -> None:
        images = noise(2345, seed=0)
        found = collect_features(Images(images), pixels(), batch_size=32)
        rows = images.flatten(1).double().numpy()
        assert found.num_images == 2345
        np.testing.assert_allclose(found.statistics().mean, rows.mean(0), atol=1e-9)
        np.testing.assert_allclose(found.statistics().cov, np.cov(rows.T), rtol=1e-6, atol=1e-9)
        assert torch.equal(found.kept.sort(0).values, images.flatten(1).sort(0).values)

    @pytest.mark.parametrize("n", [10, 999, 1000, 2345])
    def test_blocks_are_nearly_equal(self, n: int) -> None:
        sizes = [block.count for block in collect_features(Images(noise(n, seed=0)), pixels(), batch_size=7).blocks]
        assert sum(sizes) == n
        assert max(sizes) - min(sizes) <= 1 + n // 1000

    def test_blocks_are_random_parts_of_sorted_images(self) -> None:
        """Images in the order of a folder of classes: each block sees all classes."""
        images = torch.linspace(-1, 1, 1000).reshape(-1, 1, 1, 1)
        blocks = collect_features(Images(images), pixels(1), batch_size=10).blocks
        assert all(abs(float(block.mean)) < 0.25 for block in blocks)

    def test_kept_features_are_in_random_order(self) -> None:
        images = torch.linspace(-1, 1, 3000).reshape(-1, 1, 1, 1)
        kept = collect_features(Images(images), pixels(1), batch_size=10, max_kept=600).kept
        assert len(kept) == len(kept.unique()) == 600
        assert abs(float(kept[:300].mean() - kept[300:].mean())) < 0.2  # in random order

    def test_every_image_is_kept_equally_often(self) -> None:
        """Five of twenty in each of 200 draws: 50 times each, with a deviation of 6."""
        images = torch.linspace(-1, 1, 20).reshape(-1, 1, 1, 1)
        times = torch.zeros(20)
        for seed in range(200):
            kept = collect_features(Images(images), pixels(1), batch_size=4, max_kept=5, seed=seed).kept
            times[torch.bucketize(kept[:, 0], images.flatten() - 1e-3) - 1] += 1
        assert times.sum() == 1000
        assert 25 < times.min() <= times.max() < 75

    def test_no_more_than_a_batch_is_held(self) -> None:
        """Every batch is freed before the one after the next is read; what is kept is bounded."""
        alive: list[int] = []

        class Counting(Images):
            def parts(self, batch_size: int):
                import weakref

                seen: list[weakref.ref] = []
                for _ in range(50):
                    batch = torch.rand(batch_size, 1, 1, 4) - 0.5
                    seen.append(weakref.ref(batch))
                    alive.append(sum(ref() is not None for ref in seen))
                    yield batch_size, lambda given=batch: given
                    del batch

        found = collect_features(Counting("x"), ModuleFeatures(lambda x: x.flatten(1) + 0, name="x", num_features=4))
        assert found.num_images == 50 * 64
        assert max(alive) <= 2

    def test_evaluation_mode_and_no_gradients(self) -> None:
        layer = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Dropout(0.5))
        found = collect_features(Images(noise(20, seed=0)), ModuleFeatures(layer, name="x", num_features=4))
        assert (found.kept != 0).all()
        assert not found.kept.requires_grad

    def test_bad_sets_and_features_are_refused(self) -> None:
        with pytest.raises(ValueError, match="holds 1 images; expected at least two"):
            collect_features(Images(noise(1, seed=0), (-1, 1)), pixels())
        with pytest.raises(ValueError, match=r"gave features \(3, 4\); expected \(3, 5\)"):
            collect_features(Images(noise(3, seed=0)), pixels(5))
        broken = ModuleFeatures(lambda images: images.flatten(1).log(), name="log", num_features=4)
        with pytest.raises(ValueError, match="log gave infinities or NaNs"):
            collect_features(Images(noise(3, seed=0)), broken)


class TestUncertainty:
    def test_jackknife_of_a_mean_is_its_standard_error(self) -> None:
        """With Student's t of 9 degrees of freedom, 2.262."""
        blocks = torch.randn(10, generator=torch.Generator().manual_seed(0), dtype=torch.float64).tolist()
        found = estimate_by_blocks(lambda chosen: float(np.mean([blocks[b] for b in chosen])), [50] * 10)
        half_width = 2.2621571627 * np.std(blocks, ddof=1) / 10**0.5
        assert found.interval == pytest.approx((np.mean(blocks) - half_width, np.mean(blocks) + half_width), rel=1e-9)

    def test_extrapolation_is_exact_for_a_bias_of_one_over_n(self) -> None:
        sizes = [31, 30, 30, 30, 30, 30, 30, 30, 30, 30]

        def biased(chosen: Sequence[int]) -> float:
            return 2.0 + 40 / sum(sizes[b] for b in chosen)

        assert estimate_by_blocks(biased, sizes).at_infinite_n == pytest.approx(2.0, abs=1e-9)

    def test_frechet_interval_holds_the_true_distance_of_the_population(self) -> None:
        """Twenty sets of samples against the exact Gaussian: the extrapolation is far nearer than the value."""
        d, n = 8, 400
        exact = FeatureStatistics(mean=torch.full((d,), 0.05).double(), cov=0.01 * torch.eye(d).double())
        truth = d * 0.05**2
        figures = [
            evaluate(noise(n, seed=seed, d=d), exact, pixels(d), seed=seed).figures["frechet"] for seed in range(20)
        ]
        raw, limit = (np.mean([getattr(f, name) for f in figures]) for name in ("value", "at_infinite_n"))
        assert raw > truth
        assert abs(limit - truth) < 0.3 * abs(raw - truth)
        bias = raw - truth
        held = sum(f.interval[0] - bias <= truth <= f.interval[1] - bias for f in figures)
        assert held >= 16

    def test_share_has_wilsons_interval(self) -> None:
        """The textbook's 8 of 10."""
        assert estimate_of_share(0.8, 10).interval == pytest.approx((0.4902, 0.9433), abs=1e-4)
        for count in range(1, 100):
            assert estimate_of_share(0.0, count).interval[0] == 0
            assert estimate_of_share(1.0, count).interval[1] == 1

    def test_spread_over_subsets_becomes_that_of_the_whole(self) -> None:
        """Means of subsets without replacement: the interval is that of the mean of all."""
        rows = torch.randn(200, generator=torch.Generator().manual_seed(0), dtype=torch.float64).numpy()
        rng = np.random.default_rng(0)
        means = [rng.choice(rows, 50, replace=False).mean() for _ in range(4000)]
        found = estimate_of_subsets(float(np.mean(means)), float(np.std(means)), subset_size=50, count=200)
        half_width = (found.interval[1] - found.interval[0]) / 2
        assert half_width == pytest.approx(1.96 * rows.std(ddof=1) / 200**0.5, rel=0.05)


class TestReport:
    def test_it_says_all_that_the_figures_depend_on(self, tmp_path: Path) -> None:
        train, held_out = split_held_out(load_digits())
        extractor = DigitFeatures()
        report = evaluate(held_out.images, train.images, extractor, seed=3)
        report.save(tmp_path / "new" / "report.json")
        found = json.loads((tmp_path / "new" / "report.json").read_text())
        assert found["samples"] == "tensor (359, 1, 8, 8)"
        assert (found["num_samples"], found["num_reference"], found["seed"]) == (359, 1438, 3)
        assert (found["extractor"], found["weights_hash"]) == (extractor.name, extractor.weights_hash)
        assert (found["preparation"], found["reference_features"]) == (extractor.preparation, extractor.label)
        assert set(found["figures"]) == {"frechet", "kernel", "precision", "recall", "mind"}
        for figure in found["figures"].values():
            low, high = figure["interval"]
            assert low <= figure["value"] <= high
        frechet = report.figures["frechet"]
        assert frechet.value == pytest.approx(digit_frechet_distance(held_out.images, train.images), rel=1e-9)
        assert frechet.at_infinite_n < frechet.value
        shares = precision_recall(extractor(held_out.images), extractor(train.images))
        assert report.figures["precision"].value == shares.precision
        assert report.figures["recall"].value == shares.recall

    def test_figures_tell_noise_from_digits(self) -> None:
        train, held_out = split_held_out(load_digits())
        generator = torch.Generator().manual_seed(0)
        random = torch.rand(held_out.images.shape, generator=generator) * 2 - 1
        reference = collect_features(Images(train.images), DigitFeatures())
        good, bad = (evaluate(x, reference, DigitFeatures()).figures for x in (held_out.images, random))
        for name in ("frechet", "kernel", "mind"):
            assert bad[name].interval[0] > good[name].interval[1]
        assert good["precision"].interval[0] > bad["precision"].interval[1]

    def test_the_same_call_gives_the_same_report_and_another_seed_another_draw(self) -> None:
        x, y = noise(300, seed=0), noise(300, seed=1)
        assert evaluate(x, y, pixels()) == evaluate(x, y, pixels())
        one, other = (evaluate(x, y, pixels(), max_kept=100, seed=seed) for seed in (0, 1))
        assert one.images_one_by_one == (100, 100)
        assert one.figures["frechet"].value == pytest.approx(other.figures["frechet"].value, rel=1e-9)
        assert one.figures["mind"].value != other.figures["mind"].value

    def test_statistics_give_the_frechet_distance_that_images_give(self, tmp_path: Path) -> None:
        x, y = noise(300, seed=0), noise(200, seed=1)
        collect_features(Images(y), pixels()).statistics().save(tmp_path / "y.npz")
        report = evaluate(x, tmp_path / "y.npz", pixels())
        assert set(report.figures) == {"frechet"}
        assert report.figures["frechet"].value == pytest.approx(
            frechet_distance(x.flatten(1), y.flatten(1)), rel=1e-6, abs=1e-12
        )
        assert (report.num_reference, report.images_one_by_one) == (200, None)
        assert report.figures["frechet"].interval is not None
        both = evaluate(tmp_path / "y.npz", tmp_path / "y.npz", pixels()).figures["frechet"]
        assert (both.value >= 0, both.interval) == (True, None)

    def test_statistics_of_another_extractor_are_refused(self, tmp_path: Path) -> None:
        x = noise(50, seed=0)
        collect_features(Images(x), pixels()).statistics().save(tmp_path / "x.npz")
        smaller = ModuleFeatures(lambda images: images.flatten(1), name="pixels", num_features=4, input_range=(0, 1))
        with pytest.raises(ValueError, match=r"x\.npz holds features of: pixels; .*-1\.\.1.*expected: .*0\.\.1"):
            evaluate(x, tmp_path / "x.npz", smaller)
        with pytest.raises(ValueError, match="holds statistics of 4 features; pixels has 5"):
            evaluate(x, tmp_path / "x.npz", pixels(5))

    def test_foreign_statistics_are_taken_and_noted(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "x.npz", mu=np.zeros(4), sigma=np.eye(4))
        report = evaluate(noise(3, seed=0), tmp_path / "x.npz", pixels())
        assert report.reference_features == "not recorded"
        assert report.num_reference is None
        assert any("does not say which extractor" in note for note in report.notes)
        assert any("covariance is singular" in note for note in report.notes)
        json.loads(report.to_json())

    def test_wrong_requests_are_refused_before_any_work(self, tmp_path: Path) -> None:
        def never(images: torch.Tensor) -> torch.Tensor:
            raise AssertionError

        extractor = ModuleFeatures(never, name="never", num_features=4)
        np.savez(tmp_path / "x.npz", mu=np.zeros(4), sigma=np.eye(4))
        x = noise(5, seed=0)
        with pytest.raises(ValueError, match=r"metrics are frechet, .*; got fid"):
            evaluate(x, x, extractor, metrics=["fid"])
        with pytest.raises(ValueError, match="got none"):
            evaluate(x, x, extractor, metrics=[])
        with pytest.raises(ValueError, match="which give frechet alone; kernel, mind needs the images"):
            evaluate(x, tmp_path / "x.npz", extractor, metrics=["kernel", "frechet", "mind"])

    def test_few_images_have_values_but_no_interval(self) -> None:
        figures = evaluate(noise(20, seed=0), noise(20, seed=1), pixels()).figures
        assert figures["frechet"].interval is None
        assert figures["mind"].interval is None
        assert figures["frechet"].value > 0


class TestCommand:
    @pytest.fixture
    def samples(self, tmp_path: Path) -> Path:
        np.save(tmp_path / "samples.npy", split_held_out(load_digits())[1].images.numpy())
        return tmp_path / "samples.npy"

    def test_report_is_printed_and_written(self, samples: Path, tmp_path: Path) -> None:
        out = tmp_path / "report.json"
        result = CliRunner().invoke(app, ["evaluate", str(samples), "digits", "--out", str(out)])
        assert result.exit_code == 0, result.output
        report = json.loads(out.read_text())
        assert (report["num_samples"], report["num_reference"], report["samples"]) == (359, 1797, str(samples))
        for text in ("359 images", "1,797 images", "sha256", "95% interval", "at infinite N", str(out)):
            assert text in result.output

    def test_statistics_replace_the_reference(self, samples: Path, tmp_path: Path) -> None:
        statistics, out = tmp_path / "digits.npz", tmp_path / "report.json"
        saved = CliRunner().invoke(app, ["evaluate", "digits", "--save-statistics", str(statistics)])
        assert saved.exit_code == 0, saved.output
        arguments = ["evaluate", str(samples), str(statistics), "--metric", "frechet", "--out", str(out)]
        assert CliRunner().invoke(app, arguments).exit_code == 0
        expected = digit_frechet_distance(split_held_out(load_digits())[1].images, load_digits().images)
        assert json.loads(out.read_text())["figures"]["frechet"]["value"] == pytest.approx(expected, rel=1e-6)

    def test_both_at_once_read_the_samples_once(self, samples: Path, tmp_path: Path) -> None:
        arguments = ["evaluate", str(samples), "digits", "--metric", "kernel", "--save-statistics"]
        result = CliRunner().invoke(app, [*arguments, str(tmp_path / "x.npz")])
        assert result.exit_code == 0, result.output
        assert (tmp_path / "x.npz").is_file()
        assert "kernel" in result.output

    def test_a_range_where_none_can_be_stated_is_refused(self, samples: Path, tmp_path: Path) -> None:
        statistics = tmp_path / "x.npz"
        assert CliRunner().invoke(app, ["evaluate", "digits", "--save-statistics", str(statistics)]).exit_code == 0
        Image.new("L", (8, 8), 99).save(tmp_path / "0.png")
        (tmp_path / "pictures").mkdir()
        (tmp_path / "0.png").rename(tmp_path / "pictures" / "0.png")
        for reference in ("digits", statistics, tmp_path / "pictures"):
            command = ["evaluate", str(samples), str(reference), "--metric", "frechet", "--reference-range", "0..255"]
            error = CliRunner().invoke(app, command).exception
            assert isinstance(error, ValueError)
            assert "range of values" in str(error)

    def test_only_files_of_its_own_are_replaced(self, samples: Path, tmp_path: Path) -> None:
        report, statistics = tmp_path / "report.json", tmp_path / "x.npz"
        arguments = ["evaluate", str(samples), "digits", "--metric", "frechet"]
        for _ in range(2):
            written = [*arguments, "--out", str(report), "--save-statistics", str(statistics)]
            assert CliRunner().invoke(app, written).exit_code == 0
        record, images = tmp_path / "sample.json", tmp_path / "images.npz"
        record.write_text('{"model": "ddpm-digits"}')
        np.savez(images, images=np.zeros((3, 1, 8, 8)))
        before = {path: path.read_bytes() for path in (record, samples, images, statistics)}
        refused = [("--out", record), ("--out", samples), ("--save-statistics", images)]
        for option, path in refused:
            result = CliRunner().invoke(app, [*arguments, option, str(path)])
            told = f"{tmp_path} holds {path.name}, which this command has not written: choose another name"
            assert told in str(result.exception)
        # Nor is the reference that is read.
        result = CliRunner().invoke(
            app, ["evaluate", str(samples), str(statistics), "--save-statistics", str(statistics)]
        )
        assert f"--save-statistics {statistics} would replace what is compared" in str(result.exception)
        assert {path: path.read_bytes() for path in before} == before

    def test_ranges_are_declared(self, tmp_path: Path) -> None:
        images = load_digits().images[:100]
        np.save(tmp_path / "x.npy", ((images + 1) / 2).numpy())
        arguments = ["evaluate", str(tmp_path / "x.npy"), "digits", "--metric", "frechet", "--value-range", "0..1"]
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output
        assert f"{digit_frechet_distance(images, load_digits().images):.5g}"[:4] in result.output

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["{unit}", "digits"], "none negative"),
            (["{colour}", "{colour}"], "(5, 3, 16, 16); for other images choose other features: --features inception"),
            (["{diverged}", "digits"], "they may have diverged"),
            (["{samples}"], "needs a REFERENCE"),
            (["absent", "digits"], "no images at absent"),
            (["{samples}", "digits", "--features", "inception"], "needs --weights"),
            (["{samples}", "digits", "--features", "inception", "--weights", "absent"], "no weights file absent"),
            (["{samples}", "digits", "--weights", "x"], "drop --weights"),
            (["{samples}", "--save-statistics", "x.txt"], "is a .npz file"),
            (["{samples}", "digits", "--device", "nowhere"], "no device 'nowhere'"),
            (["{samples}", "digits", "--device", "meta"], "no device 'meta'"),
            (["{samples}", "digits", "--seed", str(2**64)], "--seed"),
            (["{samples}", "digits", "--out", "."], ". is a folder"),
            (["{samples}", "digits", "--out", ""], "no file or folder can have the name"),
            (["", "digits"], "no file or folder can have the name"),
        ],
    )
    def test_errors_are_one_line(
        self,
        samples: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
        arguments: list[str],
        message: str,
    ) -> None:
        numbers = np.random.default_rng(0).random((5, 3, 16, 16))
        arrays = {
            "unit": numbers[:, :1, :8, :8],
            "colour": numbers * 2 - 1,
            "diverged": numbers[:, :1, :8, :8] * 80 - 40,
        }
        for name, array in arrays.items():
            np.save(tmp_path / f"{name}.npy", array)
        monkeypatch.chdir(tmp_path)
        before = sorted(tmp_path.iterdir())
        given = [a.format(samples=samples, **{name: tmp_path / f"{name}.npy" for name in arrays}) for a in arguments]
        monkeypatch.setattr(sys, "argv", ["fixpoint-diffusion", "evaluate", *given])
        with pytest.raises(SystemExit) as stop:
            main()
        assert stop.value.code != 0
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
        assert sorted(tmp_path.iterdir()) == before
