"""Rows that have ended cost f nothing: evaluation on a batch of the others."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fixpoint.engine.evaluation import RowMap
from fixpoint.engine.tolerance import Array, Tolerance

logger = logging.getLogger("fixpoint")

# The batch is cut anew when more than one in so many of its rows have ended: each cut copies rows of the arguments.
_SHARE = 16
_REFUSALS = (RuntimeError, ValueError, IndexError, TypeError, AssertionError)


@dataclass(frozen=True)
class _Witnesses:
    """Rows ``z`` ``(count, dim)`` whose images ``fz`` are known: other answers betray an f that couples rows."""

    rows: Tensor  # their numbers in the whole batch
    z: Tensor
    fz: Tensor

    def take(self, order: Tensor) -> _Witnesses:
        return _Witnesses(self.rows[order], self.z[order], self.fz[order])

    def confirm(self, images: Tensor) -> bool:
        """Whether ``images`` are the known ones, up to rounding. Never for NaN."""
        close = Tolerance(rtol=torch.finfo(images.dtype).eps ** 0.75, atol=0.0)
        return bool(close.satisfied(*close.measure(self.fz, images)).all())


class Compaction:
    """f on the rows that have not ended, with those rows of its arguments that are aligned with the batch.

    That f takes each row for itself is tried, not believed. With the first smaller batch go copies of two rows as they
    were at the last look, when their images became known: not both can stand where they stood, nor beside the same
    neighbours. If their images have changed, or f raises, or returns another shape, the evaluation is repeated with all
    rows, and all rows it is for the rest of the solve. Off the CPU a batch as large as before is tried first: there an
    f that looks up rows by number and reads past the end does not raise, it loses the device.
    """

    def __init__(self, f: RowMap) -> None:
        self._f = f  # on all rows
        self._index: Tensor | None = None  # the rows that are evaluated; None: all of them
        self._part = f  # f on these rows
        self._proven = False  # whether that has been seen to work
        self._witnesses: _Witnesses | None = None
        self._trials = 1 if f.layout.device.type == "cpu" else 2
        self._refused = False

    def select(self, active: Array, z: Tensor, fz: Tensor) -> None:
        """Take note that rows have ended: which have not, and their images ``fz`` of ``z``."""
        seen = len(active) if self._index is None else len(self._index)
        rows = np.flatnonzero(active)
        if self._refused or self._f.ambient.repeats or (seen - len(rows)) * _SHARE <= seen:
            return
        self._index, self._proven = torch.from_numpy(rows).to(z.device), False
        if self._witnesses is None:
            numbers = self._index[[-1, 0]]
            self._witnesses = _Witnesses(numbers, z[numbers], fz[numbers])

    def __call__(self, z: Tensor, *, spare: int) -> tuple[Tensor, int]:
        """``f(z)`` and how many evaluations it took, at most ``1 + spare``; rows that are left out come back as z."""
        if self._index is None or (spare < 1 and not self._proven):
            return self._f(z), 1
        rows = z.index_select(0, self._index)
        try:
            images = self._part(rows) if self._proven else self._attempt(rows, self._index)
        except _REFUSALS as error:
            if self._proven:
                raise
            logger.debug("rows that have ended stay in the batch, f does not take rows one by one: %s", error)
            self._refused, self._index = True, None
            return self._f(z), 1 + self._part.calls
        return z.index_copy(0, self._index, images), 1

    def _attempt(self, rows: Tensor, index: Tensor) -> Tensor:
        """f on a batch that it has not seen yet, together with the witnesses while f is on trial."""
        count, witnesses = len(index), self._witnesses if self._trials else None
        if witnesses is not None:
            copies = 2 if self._trials == 1 else max(2, self._f.layout.rows - count)
            witnesses = witnesses.take(torch.arange(copies, device=index.device) % 2)
            index, rows = torch.cat([index, witnesses.rows]), torch.cat([rows, witnesses.z])
        self._part = self._f.take(index)
        images = self._part(rows)
        if witnesses is None:
            self._proven = True
        elif witnesses.confirm(images[count:]):
            self._trials -= 1
        else:
            raise ValueError("in another batch, a row has another image")
        return images[:count]
