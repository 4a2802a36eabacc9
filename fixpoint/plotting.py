"""Pictures of a solve. matplotlib is imported when a function is called, never with the package."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from fixpoint.solution import Solution

if TYPE_CHECKING:
    from matplotlib.axes import Axes

EXTRA = 'pip install "fixpoint[bench]"'


def plot_residuals(
    solutions: Tensor | Solution | Mapping[str, Tensor | Solution], ax: Axes | None = None, *, band: bool = True
) -> Axes:
    """Residual against evaluations of f, on a log scale: the median row as a line, all rows as a band around it.

    Args:
        solutions: A trace ``(nfev, *batch)``, a solution solved with ``record=True``, or ``{label: either}``.
        ax: Where to draw; None makes a figure.
        band: Shade from the smallest to the largest row.

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
        if trace.ndim == 0 or trace.numel() == 0:
            raise ValueError(f"the trace {label!r} must have shape (nfev, *batch), found {tuple(trace.shape)}")
        rows = trace.detach().to("cpu").reshape(trace.shape[0], -1)
        evaluations = range(1, len(rows) + 1)
        (line,) = ax.plot(evaluations, rows.quantile(0.5, dim=1).tolist(), label=label or None)
        if band and rows.shape[1] > 1:
            low, high = rows.amin(dim=1).tolist(), rows.amax(dim=1).tolist()
            ax.fill_between(evaluations, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
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
