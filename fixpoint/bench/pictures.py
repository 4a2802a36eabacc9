"""Blocks drawn as PNG files: curves and grids of small images."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fixpoint.bench.results import Images, Lines
from fixpoint.plotting import EXTRA

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's palette, which colour-blind readers can tell apart; dashes tell the rest.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
_DASHES = ("-", "--", "-.", ":")
_DPI = 110
_CELL = 56  # pixels that an image's longer side should at least take
_GAP = 4


def draw_lines(block: Lines, path: Path) -> None:
    """Draw curves into the PNG ``path``. Legend entries are in the order of the series."""
    figure = _figure(7.6, 4.4)
    axes = figure.subplots()
    for index, (label, (x, y)) in enumerate(block.series.items()):
        values = [math.nan if value is None else value for value in y]
        style = _DASHES[index // len(_COLOURS) % len(_DASHES)]
        # A lone point is invisible as a line.
        marker = "o" if len(x) <= 12 else None
        axes.plot(x, values, style, color=_COLOURS[index % len(_COLOURS)], label=label, marker=marker, markersize=4)
    if block.log_y:
        axes.set_yscale("log")
    axes.set(title=block.title, xlabel=block.x_label, ylabel=block.y_label)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if len(block.series) > 4:  # more would cover curves
        axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    elif block.series:
        axes.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=_DPI)


def draw_images(block: Images, path: Path) -> None:
    """Draw a labelled grid into the PNG ``path``, each image enlarged by whole pixels without smoothing."""
    images = block.array()
    mosaic, zoom = _mosaic(images)
    rows, columns, height, width = images.shape[:4]
    figure = _figure(mosaic.shape[1] / _DPI + 2, mosaic.shape[0] / _DPI + 1)
    figure.set_layout_engine("none")
    # In inches the picture has exactly its pixels, so that nothing is resampled; labels stand around it.
    axes = figure.add_axes(
        (0, 0, mosaic.shape[1] / _DPI / figure.get_figwidth(), mosaic.shape[0] / _DPI / figure.get_figheight())
    )
    axes.imshow(mosaic.numpy(), cmap="gray", vmin=0, vmax=255, interpolation="nearest", aspect="auto")
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
    figure.savefig(path, dpi=_DPI, bbox_inches="tight", pad_inches=0.1)


def _mosaic(images: Tensor) -> tuple[Tensor, int]:
    """``(H, W[, 3])`` uint8 with white gaps from ``(rows, columns, height, width[, 3])``, and the zoom factor."""
    rows, columns, height, width = images.shape[:4]
    zoom = max(1, math.ceil(_CELL / max(height, width)))
    large = images.repeat_interleave(zoom, dim=2).repeat_interleave(zoom, dim=3)
    tall, broad = height * zoom + _GAP, width * zoom + _GAP
    canvas = torch.full((rows * tall + _GAP, columns * broad + _GAP, *images.shape[4:]), 255, dtype=torch.uint8)
    for i in range(rows):
        for j in range(columns):
            canvas[_GAP + i * tall : (i + 1) * tall, _GAP + j * broad : (j + 1) * broad] = large[i, j]
    return canvas, zoom


def _figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"drawing needs matplotlib: {EXTRA}") from error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)  # no display, and no global state of pyplot
    return figure
