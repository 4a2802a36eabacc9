"""Means, spreads and curves over records: what tables, plots and trends are made of."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fixpoint import bench
from fixpoint_diffusion.experiments.records import Record


def grouped(records: Iterable[Record], *keys: str) -> dict[tuple[Any, ...], list[Record]]:
    """Records by these entries of their configurations, or of the settings in them, in the order in which they come."""
    found: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        config = {**record.config.get("settings", {}), **record.config}
        found.setdefault(tuple(config.get(key) for key in keys), []).append(record)
    return found


def values(records: Iterable[Record], measure: str) -> list[float]:
    """One measure of each record; infinity where it was not finite. A list of figures counts one by one."""
    found: list[float] = []
    for record in records:
        value = record.measures[measure]
        for each in value if isinstance(value, list) else [value]:
            found.append(math.inf if each is None else float(each))
    return found


def mean(records: Iterable[Record], measure: str) -> float:
    """The mean of :func:`values`."""
    return statistics.fmean(values(records, measure))


def mean_spread(numbers: Sequence[float]) -> str:
    """Mean and standard deviation.

    >>> mean_spread([1.0, 2.0, 3.0])
    '2 ± 1'
    """
    if not numbers:
        return "–"
    spread = statistics.stdev(numbers) if len(numbers) > 1 and all(map(math.isfinite, numbers)) else 0.0
    return f"{statistics.fmean(numbers):.3g}" + (f" ± {spread:.2g}" if len(numbers) > 1 else "")


def lower(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether the first are lower, by more than chance: at least three each, and twice the standard error apart.

    >>> lower([1.0, 1.1, 0.9], [2.0, 2.1, 1.9]), lower([1.0, 2.0, 3.0], [1.1, 2.1, 3.1]), lower([1.0], [2.0])
    (True, False, False)
    """
    if min(len(one), len(other)) < 3 or not all(map(math.isfinite, one)):
        return False
    if not all(map(math.isfinite, other)):
        return True
    error = math.sqrt(statistics.variance(one) / len(one) + statistics.variance(other) / len(other))
    return statistics.fmean(other) - statistics.fmean(one) > 2 * error


def curve(records: Sequence[Record], measure: str) -> tuple[list[float], list[float | None]]:
    """1, 2, ... and the mean of the records' curves; a run that ended earlier keeps its last value."""
    curves = [record.measures[measure] for record in records]
    length = max(map(len, curves))
    padded = [[*each, *[each[-1]] * (length - len(each))] for each in curves]
    means = [None if None in column else statistics.fmean(column) for column in zip(*padded, strict=True)]
    return [float(k + 1) for k in range(length)], means


def curves_by(
    records: Sequence[Record], measure: str, keys: Sequence[str], words: Mapping[str, str] | None = None
) -> dict[str, tuple[list[float], list[float | None]]]:
    """:func:`curve` for each group by these keys, labelled by what they are; ``words`` say more of some values."""
    words = words or {}
    return {
        ", ".join(
            words.get(value, value) if isinstance(value, str) else f"{key}={value:g}"
            for key, value in zip(keys, group, strict=True)
        ): curve(members, measure)
        for group, members in grouped(records, *keys).items()
    }


def first_seed(records: Sequence[Record]) -> list[Record]:
    """Those of the seed that comes first: what pictures are made of."""
    return [record for record in records if record.config["seed"] == records[0].config["seed"]]


def of_which(grid: dict[str, Any], name: str) -> dict[str, Any]:
    """A grid of pictures, kept in measures, whose rows say of what they are.

    >>> of_which({"row_labels": ["image", "reconstruction"]}, "digits")
    {'row_labels': ['digits: image', 'digits: reconstruction']}
    """
    return {**grid, "row_labels": [f"{name}: {label}" for label in grid["row_labels"]]}


def stacked(title: str, grids: Sequence[dict[str, Any]], caption: str = "") -> bench.Images:
    """Grids of pictures of one width, kept in measures, one below the other."""
    import torch

    arrays = [bench.Images(**grid) for grid in grids]
    rows = [label for grid in arrays for label in grid.row_labels]
    whole = torch.cat([grid.array() for grid in arrays]).float()
    return bench.Images.of(
        title,
        whole.movedim(-1, 2) if whole.ndim == 5 else whole,
        row_labels=rows,
        column_labels=arrays[0].column_labels,
        low=0.0,
        high=255.0,
        caption=caption,
    )
