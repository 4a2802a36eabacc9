"""The command ``fixpoint-diffusion evaluate``."""

from __future__ import annotations

from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fixpoint_diffusion.commands.shared import check_device, path_option
from fixpoint_diffusion.files import check_replaceable, check_writable, read_json
from fixpoint_diffusion.ranks import Ranks

if TYPE_CHECKING:
    from fixpoint_diffusion.evaluation.extractors import FeatureExtractor
    from fixpoint_diffusion.evaluation.report import EvaluationReport


class FeatureName(StrEnum):
    digits = "digits"
    inception = "inception"
    inception_clean = "inception-clean"
    dinov2 = "dinov2"


class MetricName(StrEnum):
    frechet = "frechet"
    kernel = "kernel"
    precision = "precision"
    recall = "recall"
    mind = "mind"


class RangeName(StrEnum):
    symmetric = "-1..1"
    unit = "0..1"
    bytes = "0..255"


def evaluate(
    samples: Annotated[
        Path,
        typer.Argument(parser=path_option, help="Folder of pictures, .npy or .npz file, folder of those, or digits."),
    ],
    reference: Annotated[
        Path | None,
        typer.Argument(parser=path_option, help="The same kinds, or a statistics file (mu, sigma in .npz)."),
    ] = None,
    features: Annotated[FeatureName, typer.Option(help="What images are compared in.")] = FeatureName.digits,
    weights: Annotated[
        Path | None, typer.Option(parser=path_option, help="inception: weights file. dinov2: model folder.")
    ] = None,
    metric: Annotated[list[MetricName] | None, typer.Option(help="May be repeated (default: all possible).")] = None,
    value_range: Annotated[
        RangeName | None, typer.Option(help="Range of the values in arrays of samples (default: checked to be -1..1).")
    ] = None,
    reference_range: Annotated[RangeName | None, typer.Option(help="The same for the reference.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at once.")] = 64,
    seed: Annotated[int, typer.Option(min=0, max=2**64 - 1, help="Seed of all random choices.")] = 0,
    device: Annotated[str, typer.Option(help="Where to compute features: cpu, cuda, ...")] = "cpu",
    out: Annotated[
        Path | None, typer.Option(parser=path_option, help="Write the report to this JSON file.", metavar="FILE")
    ] = None,
    save_statistics: Annotated[
        Path | None,
        typer.Option(
            parser=path_option,
            help="Write mean and covariance of the samples' features to this .npz file.",
            metavar="FILE",
        ),
    ] = None,
) -> None:
    """Judge a set of images against a reference.

    Example: fixpoint-diffusion evaluate runs/sample/images.npy digits --out runs/sample/report.json

    Figures come with 95% intervals. They can be compared with others only if extractor, hash, preparation and the
    number of images are the same. Without a reference, --save-statistics makes a statistics file for later.
    """
    if reference is None and (save_statistics is None or out is not None or metric):
        raise ValueError("evaluate needs a REFERENCE, unless it only writes --save-statistics")
    if save_statistics is not None and save_statistics.suffix != ".npz":
        raise ValueError(f"a statistics file is a .npz file, got {save_statistics}")
    if out is not None:
        check_replaceable(out, _is_report)
        check_writable(out)
    import sys

    from fixpoint_diffusion.evaluation.features import CollectedFeatures, collect_features
    from fixpoint_diffusion.evaluation.images import Images
    from fixpoint_diffusion.evaluation.report import evaluate as judge
    from fixpoint_diffusion.evaluation.statistics import is_statistics_file

    if save_statistics is not None:
        if save_statistics.resolve() in [path.resolve() for path in (samples, reference) if path is not None]:
            raise FileExistsError(f"--save-statistics {save_statistics} would replace what is compared")
        check_replaceable(save_statistics, is_statistics_file)
        check_writable(save_statistics)

    def opened(path: Path, declared: RangeName | None) -> Path | Images:
        if not is_statistics_file(path):
            return Images(path, _bounds(declared))
        if declared is not None:
            raise ValueError(f"{path} holds statistics, which have no range of values: drop {declared.value}")
        return path

    with Ranks.of_torchrun() as ranks:
        own, main = ranks.device(device), ranks.rank == 0
        ranks.together(partial(check_device, own))
        extractor = ranks.together(partial(_extractor, features, weights))
        how: dict[str, Any] = {"batch_size": batch_size, "seed": seed, "device": own, "ranks": ranks}
        how["progress"] = main and sys.stderr.isatty()
        one: Path | Images | CollectedFeatures = opened(samples, value_range)
        if save_statistics is not None:
            if not isinstance(one, Images):
                raise ValueError(f"{samples} is a statistics file already; --save-statistics needs images")
            one = ranks.together(partial(collect_features, one, extractor, **how))
            if main:
                one.statistics().save(save_statistics)
                typer.echo(f"statistics of {one.num_images} images written to {save_statistics}")
            if reference is None:
                return
        assert reference is not None
        report = ranks.together(
            partial(
                judge,
                one,
                opened(reference, reference_range),
                extractor,
                metrics=[each.value for each in metric] if metric else None,
                **how,
            )
        )
    if not main:
        return
    typer.echo(describe(report))
    if out is not None:
        report.save(out)
        typer.echo(f"written to {out}")


def describe(report: EvaluationReport) -> str:
    """A report as lines of text."""
    rows = {
        "samples": f"{report.samples} ({_count(report.num_samples)})",
        "reference": f"{report.reference} ({_count(report.num_reference)})",
        "extractor": f"{report.extractor}, {report.num_features} features",
        "weights": f"sha256 {report.weights_hash or 'unknown'}",
        "preparation": report.preparation,
    }
    if report.images_one_by_one:
        rows["one by one"] = "{:,} samples and {:,} of the reference in the metrics but frechet".format(
            *report.images_one_by_one
        )
    rows["seed"] = str(report.seed)
    for name, figure in report.figures.items():
        text = f"{figure.value:.6g}"
        if figure.interval:
            text += f"  95% interval {figure.interval[0]:.6g} to {figure.interval[1]:.6g}"
        if figure.at_infinite_n is not None:
            text += f"  at infinite N {figure.at_infinite_n:.6g}"
        rows[name] = text
    lines = [f"{name:12}{text}" for name, text in rows.items()]
    return "\n".join([*lines, *(f"note: {note}" for note in report.notes)])


def _is_report(path: Path) -> bool:
    """Whether a file is a report of this command."""
    try:
        return {"figures", "extractor", "preparation"} <= read_json(path).keys()
    except (ValueError, OSError):
        return False


def _count(number: int | None) -> str:
    return "number of images not recorded" if number is None else f"{number:,} images"


def _bounds(declared: RangeName | None) -> tuple[float, float] | None:
    if declared is None:
        return None
    low, high = declared.value.split("..")
    return int(low), int(high)


def _extractor(name: FeatureName, weights: Path | None) -> FeatureExtractor:
    from fixpoint_diffusion.evaluation.digits import DigitFeatures
    from fixpoint_diffusion.evaluation.extractors import DINOv2Features, InceptionFeatures

    if name is FeatureName.digits:
        if weights is not None:
            raise ValueError("--features digits has its own weights; drop --weights")
        return DigitFeatures()
    if weights is None:
        raise ValueError(f"--features {name.value} needs --weights, the local file or folder of its weights")
    if name is FeatureName.dinov2:
        return DINOv2Features(weights)
    return InceptionFeatures(weights, resize="clean" if name is FeatureName.inception_clean else "bilinear")
