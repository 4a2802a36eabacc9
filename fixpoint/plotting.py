"""Pictures of solves, and the style of pictures that we draw; matplotlib is imported when a function is called."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fixpoint.engine.layout import as_tensor
from fixpoint.solution import Solution

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from fixpoint.bench.results import Lines

EXTRA = 'pip install "fixpoint-torch[bench]"'

INK = "#7d8590"  # is read on white as well as on black
COLOURS = ("#2f81d7", "#e0752d", "#2da44e", "#c94f8c", "#8a6fe0", "#b0892b", "#1b9e9e", "#d1495b", "#8fa31e")
# Settings of matplotlib: no background, and one ink for all that is not a curve.
STYLE: dict[str, Any] = {
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "savefig.transparent": True,
    "axes.facecolor": "none",
    "axes.prop_cycle": f"cycler('color', {list(COLOURS)})",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.3,
    "grid.color": INK,
    "legend.frameon": False,
    "image.cmap": "gray",
    **dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "axes.titlecolor", "xtick.color", "ytick.color"), INK
    ),
}
_DASHES = ("-", "--", "-.", ":")


def plot_residuals(
    solutions: Tensor | Solution | Mapping[str, Tensor | Solution], ax: Axes | None = None, *, band: bool = True
) -> Axes:
    """Residual against evaluations of f, on a log scale: the median row as a line, bands around it for the others.

    The darker band holds the middle half of the rows, the lighter one all. A row that has ended stays at its final
    residual; values that are not finite are left out, as is an exact zero, which a log scale cannot show.

    Args:
        solutions: A trace ``(nfev, *batch)``, a solution solved with ``record=True``, or ``{label: either}``.
        ax: Where to draw; None makes a figure.
        band: Whether to draw the bands.

    Returns:
        Axes: the one drawn on.

    Raises:
        ValueError: If a solution has no trace, or a trace holds no evaluation.
        ModuleNotFoundError: If matplotlib is missing.

    Example:
        >>> import torch, fixpoint
        >>> sol = fixpoint.solve(torch.cos, torch.ones(3), record=True)
        >>> plot_residuals({"Anderson": sol}).get_yscale()
        'log'
    """
    if ax is None:
        ax = new_axes()
    labelled = solutions if isinstance(solutions, Mapping) else {"": solutions}
    for label, item in labelled.items():
        trace = item.trace if isinstance(item, Solution) else item
        if trace is None:
            raise ValueError(f"the solution{f' {label!r}' if label else ''} has no trace: solve with record=True")
        if trace.ndim == 0 or 0 in trace.shape:
            raise ValueError(f"the trace {label!r} must have shape (nfev, *batch), found {tuple(trace.shape)}")
        rows = as_tensor(trace).detach().to("cpu", torch.float64).reshape(trace.shape[0], -1)
        shown = torch.where(rows.isfinite() & (rows > 0), rows, torch.nan)
        evaluations = range(1, len(rows) + 1)
        levels = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0], dtype=torch.float64, device="cpu")
        low, lower, median, upper, high = shown.nanquantile(levels, dim=1).tolist()
        (line,) = ax.plot(evaluations, median, label=label or None)
        if band and rows.shape[1] > 1:
            for bottom, top, alpha in ((low, high, 0.15), (lower, upper, 0.25)):
                ax.fill_between(evaluations, bottom, top, color=line.get_color(), alpha=alpha, linewidth=0)
    ax.set_yscale("log")
    ax.set_xlabel("evaluations of f")
    ax.set_ylabel("residual ||f(z) - z||")
    if any(labelled):
        ax.legend()
    return ax


def draw_curves(axes: Axes, lines: Lines) -> None:
    """Draw the curves, marks and names of axes of a ``bench.Lines``; no title and no legend."""
    for index, (label, (x, y)) in enumerate(lines.series.items()):
        values = [math.nan if value is None else value for value in y]
        style = _DASHES[index // len(COLOURS) % len(_DASHES)]
        # A lone point is invisible as a line.
        marker = "o" if len(x) <= 30 else None
        axes.plot(x, values, style, color=COLOURS[index % len(COLOURS)], label=label, marker=marker, markersize=3)
    for index, (label, place) in enumerate(lines.marks.items()):
        axes.axvline(place, color=INK, linestyle=_DASHES[(index + 1) % len(_DASHES)], label=label)
    if lines.log_x:
        from matplotlib.ticker import LogLocator, NullLocator

        axes.set_xscale("log")
        low, high = axes.get_xlim()
        if high < 1e4 * low:  # powers of ten alone would be too few
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.xaxis.set_major_formatter(lambda x, _: f"{x / 1000:g}k" if x >= 1e4 else f"{x:g}")
    if lines.log_y:
        axes.set_yscale("log")
    axes.set(xlabel=lines.x_label, ylabel=lines.y_label)


def new_axes() -> Axes:
    """Axes of a figure of their own."""
    try:
        import matplotlib.pyplot as plt
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"plotting needs matplotlib: {EXTRA}") from error
    return plt.subplots(layout="constrained")[1]
