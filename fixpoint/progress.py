"""A progress bar as a callback. tqdm is imported when a bar is first shown, never with the package."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from types import TracebackType
from typing import Any

import numpy as np

from fixpoint.plotting import EXTRA
from fixpoint.solution import Progress

# Least time between two lines of a bar in a file.
LOG_SECONDS = 30.0


class ProgressBar:
    """A tqdm bar to pass as ``callback``: evaluations so far, rows that have not ended, the worst row's residual,
    or its predicted error where the solver judges by that.

    The bar closes itself when the solve has run its course, and the next solve opens another. A ``with`` block closes
    it also where a solve is interrupted.

    Args:
        description: What stands before the bar.

    Raises:
        ModuleNotFoundError: At the first evaluation, if tqdm is missing.

    Example:
        >>> import torch, fixpoint
        >>> with fixpoint.ProgressBar("cosine") as bar:
        ...     sol = fixpoint.solve(torch.cos, torch.ones(3), callback=bar)
    """

    def __init__(self, description: str = "solve") -> None:
        self._description = description
        self._bar: Any = None

    def __call__(self, progress: Progress) -> None:
        if self._bar is None:
            self._bar = self.tqdm(total=progress.max_evals, desc=self._description, unit="eval")
        predicted = progress.predicted_error
        name, per_row = ("residual", progress.residual) if predicted is None else ("predicted_error", predicted)
        figures = np.asarray(per_row.tolist())
        worst = f"{figures.max():.1e}" if figures.size else "-"
        self._bar.set_postfix(rows=progress.active, refresh=False, **{name: worst})
        self._bar.update(progress.nfev - self._bar.n)
        if progress.active == 0 or progress.nfev == progress.max_evals:
            self.close()

    @staticmethod
    def tqdm(iterable: Iterable[Any] | None = None, **options: Any) -> Any:
        """A tqdm bar for work of any kind, which does not fill a log.

        In a terminal or a notebook it is tqdm's own. Elsewhere, as in the log of a batch job, where every change would
        become a line, one comes every 30 seconds at most.

        Args:
            iterable: What to go through; see tqdm.
            **options: tqdm's own.

        Raises:
            ModuleNotFoundError: If tqdm is missing.

        Example:
            >>> import fixpoint
            >>> [k * k for k in fixpoint.ProgressBar.tqdm(range(3), disable=True)]
            [0, 1, 4]
        """
        kind = _tqdm()
        notebook = any(base.__module__ == "tqdm.notebook" for base in kind.__mro__)
        if not notebook and not getattr(options.get("file") or sys.stderr, "isatty", bool)():
            options = {"mininterval": LOG_SECONDS, "maxinterval": LOG_SECONDS, **options}
        return kind(iterable, **options)

    def close(self) -> None:
        """Leave the bar as it stands; a later solve opens another."""
        if self._bar is not None:
            self._bar.close()
        self._bar = None

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _tqdm() -> Any:
    try:
        from tqdm.auto import tqdm
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"a progress bar needs tqdm: {EXTRA}") from error
    return tqdm
