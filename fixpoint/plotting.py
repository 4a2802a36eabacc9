"""Pictures of a solve. matplotlib is imported when a function is called, never with the package."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fixpoint.solution import Solution

if TYPE_CHECKING:
    from matplotlib.axes import Axes

EXTRA = 'pip install "fixpoint-torch[bench]"'


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
        ax = _new_axes()
    labelled = solutions if isinstance(solutions, Mapping) else {"": solutions}
    for label, item in labelled.items():
        trace = item.trace if isinstance(item, Solution) else item
        if trace is None:
            raise ValueError(f"the solution {label!r} has no trace: solve with record=True")
        if trace.ndim == 0 or 0 in trace.shape:
            raise ValueError(f"the trace {label!r} must have shape (nfev, *batch), found {tuple(trace.shape)}")
        rows = torch.as_tensor(trace).detach().to("cpu", torch.float64).reshape(trace.shape[0], -1)
        shown = torch.where(rows.isfinite() & (rows > 0), rows, torch.nan)
        evaluations = range(1, len(rows) + 1)
        levels = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0], dtype=torch.float64)
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


def _new_axes() -> Axes:
    try:
        import matplotlib.pyplot as plt
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"plotting needs matplotlib: {EXTRA}") from error
    return plt.subplots(layout="constrained")[1]
