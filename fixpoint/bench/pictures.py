"""Blocks drawn as PNG files that are read on light and on dark pages: curves, bars and grids of small images."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fixpoint.bench.results import Bars, Images, Lines, shown
from fixpoint.plotting import COLOURS, EXTRA, INK, STYLE, draw_curves

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_DPI = 110
_WIDTH = 4.8  # inches of a chart
_SHARP = 200  # of drawings, which may be shown on a fine screen
_CELL = 56  # pixels that an image's longer side should at least take
_GAP = 4


def draw_lines(block: Lines, path: Path) -> None:
    """Draw curves into the PNG ``path``; the legend, in the order of the series, stands below them."""

    def draw() -> Figure:
        entries = len(block.series) + len(block.marks)
        figure = _figure(_WIDTH, 3.1 + 0.19 * math.ceil(entries / 2))
        axes = figure.subplots()
        draw_curves(axes, block)
        axes.set_title(_lines(block.title), fontsize=10)
        if entries:
            handles, labels = axes.get_legend_handles_labels()
            names = [_lines(label, 30) for label in labels]
            figure.legend(handles, names, loc="outside lower center", ncols=2, fontsize=8)
        return figure

    _save(draw, path)


def draw_bars(block: Bars, path: Path) -> None:
    """Draw horizontal bars into the PNG ``path``, each with its length as a number."""

    def draw() -> Figure:
        lines = sum(max(1.0, len(label) / 32) for label in block.values)  # a long label takes several
        figure = _figure(_WIDTH, 1.2 + 0.42 * lines)
        axes = figure.subplots()
        colours = iter(COLOURS * len(block.values))
        fills = [INK if label == block.reference else next(colours) for label in block.values]
        lengths = [math.nan if value is None else value for value in block.values.values()]
        bars = axes.barh(range(len(lengths)), lengths, height=0.65, color=fills)
        axes.bar_label(bars, [f" {shown(value)}" for value in block.values.values()], fontsize=8)
        axes.set_yticks(range(len(lengths)), [_lines(label, 24) for label in block.values], fontsize=9)
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.grid(visible=False, axis="y")
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel(block.x_label)
        axes.set_title(_lines(block.title), fontsize=10)
        return figure

    _save(draw, path)


def draw_images(block: Images, path: Path) -> None:
    """Draw a labelled grid into the PNG ``path``, each image enlarged by whole pixels without smoothing."""
    images = block.array()
    mosaic, zoom = _mosaic(images)
    rows, columns, height, width = images.shape[:4]

    def draw() -> Figure:
        figure = _figure(mosaic.shape[1] / _DPI + 2, mosaic.shape[0] / _DPI + 1)
        figure.set_layout_engine("none")
        # In inches the picture has exactly its pixels, so that nothing is resampled; labels stand around it.
        axes = figure.add_axes(
            (0, 0, mosaic.shape[1] / _DPI / figure.get_figwidth(), mosaic.shape[0] / _DPI / figure.get_figheight())
        )
        axes.imshow(mosaic.numpy(), interpolation="nearest", aspect="auto")
        axes.xaxis.tick_top()
        pitch = (height * zoom + _GAP, width * zoom + _GAP)
        crowded = max((len(label) for label in block.column_labels), default=0) * 7 > pitch[1]
        axes.set_xticks(
            [_GAP + pitch[1] * i + width * zoom / 2 for i in range(columns)] if block.column_labels else [],
            block.column_labels,
            rotation=45 if crowded else 0,
            rotation_mode="anchor",
            ha="left" if crowded else "center",
            fontsize=9,
        )
        axes.set_yticks(
            [_GAP + pitch[0] * i + height * zoom / 2 for i in range(rows)] if block.row_labels else [],
            block.row_labels,
            fontsize=9,
        )
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.grid(visible=False)
        return figure

    _save(draw, path, dpi=_DPI, bbox_inches="tight", pad_inches=0.1)


def _mosaic(images: Tensor) -> tuple[Tensor, int]:
    """``(H, W, 4)`` uint8 with clear gaps from ``(rows, columns, height, width[, 3])``, and the zoom factor."""
    rows, columns, height, width = images.shape[:4]
    zoom = max(1, math.ceil(_CELL / max(height, width)))
    coloured = images if images.ndim == 5 else images[..., None].expand(*images.shape, 3)
    large = coloured.repeat_interleave(zoom, dim=2).repeat_interleave(zoom, dim=3)
    tall, broad = height * zoom + _GAP, width * zoom + _GAP
    canvas = torch.zeros(rows * tall + _GAP, columns * broad + _GAP, 4, dtype=torch.uint8)
    for i in range(rows):
        for j in range(columns):
            cell = canvas[_GAP + i * tall : (i + 1) * tall, _GAP + j * broad : (j + 1) * broad]
            cell[..., :3], cell[..., 3] = large[i, j], 255
    return canvas, zoom


def _lines(text: str, width: int = 54) -> str:
    """A title, or another text, in lines that a chart is wide enough for."""
    return "\n".join(textwrap.wrap(text, width))


def _save(draw: Callable[[], Figure], path: Path, **options: Any) -> None:
    """Save what ``draw`` makes, drawn in the style of all pictures whatever the user's own style is."""
    try:
        import matplotlib.style
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"drawing needs matplotlib: {EXTRA}") from error
    with matplotlib.style.context(["default", STYLE]):
        draw().savefig(path, **{"dpi": _SHARP, **options})


def _figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)  # no display, and no global state of pyplot
    return figure
