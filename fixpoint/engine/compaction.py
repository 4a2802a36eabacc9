"""Rows that have ended cost f nothing: evaluation on a batch of the others."""

from __future__ import annotations

import logging

import numpy as np
import torch
from torch import Tensor

from fixpoint.engine.evaluation import RowMap
from fixpoint.engine.tolerance import Array

logger = logging.getLogger("fixpoint")

_REFUSALS = (RuntimeError, ValueError, IndexError, TypeError, AssertionError)


class Compaction:
    """f on the rows that have not ended, with those rows of its arguments that have the batch's length.

    Which arguments belong to the rows is a guess, and so is that f takes each row for itself. Nothing is concluded from
    a guess: before a solve ends, an evaluation of all rows confirms the states that were found, and where it does not,
    the solve goes on with all rows. That evaluation is the price, so the batch is cut once rows that have ended have
    cost as much: a solve that gains nothing loses at most one evaluation of all rows.
    """

    def __init__(self, f: RowMap) -> None:
        self._f = f  # on all rows
        self._index: Tensor | None = None  # the rows that are evaluated; None: all of them
        self._part = f  # f on these rows
        self._wasted = 0  # evaluations of single rows that had ended
        self._refused = False

    def refuse(self, why: object) -> None:
        """Evaluate all rows for the rest of the solve."""
        logger.debug("rows that have ended stay in the batch: %s", why)
        self._refused, self._index = True, None

    def __call__(self, z: Tensor, active: Array) -> tuple[Tensor, int, bool]:
        """``f(z)``, how many evaluations it took, and whether all rows were seen; rows left out come back as z."""
        self._cut(z, active)
        if self._index is None:
            return self._f(z), 1, True
        calls = self._part.calls
        try:
            images = self._part(z.index_select(0, self._index))
        except _REFUSALS as error:
            self.refuse(error)
            return self._f(z), 1 + self._part.calls - calls, True
        return z.index_copy(0, self._index, images), 1, False

    def _cut(self, z: Tensor, active: Array) -> None:
        """Leave out the rows that have ended, once they have cost a whole batch."""
        batch = len(active) if self._index is None else len(self._index)
        rows = np.flatnonzero(active)
        self._wasted += batch - len(rows)
        # By half at least: a compiled f that was not found out is compiled for few sizes.
        if self._refused or self._f.ambient.repeats or self._wasted < batch or 2 * len(rows) > batch:
            return
        self._index, self._wasted = torch.from_numpy(rows).to(z.device), 0
        self._part = self._f.take(self._index)
