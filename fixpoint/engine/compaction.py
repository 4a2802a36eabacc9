"""Rows that have ended cost f nothing: evaluation on a batch of the others."""

from __future__ import annotations

import logging

import numpy as np
import torch
from torch import Tensor

from fixpoint.engine.evaluation import RowMap
from fixpoint.engine.norms import Array
from fixpoint.engine.tolerance import same_images

logger = logging.getLogger("fixpoint")


class Compaction:
    """f on the rows that have not ended, with those rows of its arguments that have the batch's length.

    Which arguments belong to the rows is a guess, and so is that f takes each row for itself. The first evaluation of a
    smaller batch tries the guess: every row goes along a second time, as it was when its image was last known, and must
    have that image. Nothing is concluded from it: before a solve ends, an evaluation of all rows confirms the states
    that were found, and where it does not, the solve goes on with all rows. That is the price, so the batch is cut once
    rows that have ended have cost as much: a solve that gains nothing loses at most one evaluation of all rows.
    """

    def __init__(self, f: RowMap) -> None:
        self._f = f  # on all rows
        self._index: Tensor | None = None  # the rows that are evaluated; None: all of them
        self._part = f  # f on these rows
        self._tried = False  # whether the guess has held for these rows
        self._known: tuple[Tensor, Tensor] | None = None  # the last state of all rows, and its image
        self._wasted = 0  # evaluations of single rows that had ended
        self._refused = False

    def refuse(self, why: object) -> None:
        """Evaluate all rows for the rest of the solve."""
        logger.debug("rows that have ended stay in the batch: %s", why)
        self._refused, self._index, self._known = True, None, None

    def __call__(self, z: Tensor, active: Array) -> tuple[Tensor, int, bool]:
        """``f(z)``, how many evaluations it took, and whether all rows were seen; rows left out come back as z."""
        self._cut(z, active)
        if self._index is None:
            fz = self._f(z)
            self._known = None if self._refused else (z, fz)
            return fz, 1, True
        calls = self._f.ambient.calls
        try:
            images = self._part(z.index_select(0, self._index)) if self._tried else self._try(z, self._index)
        except Exception as error:  # whatever f says to a batch of another size; all rows will tell if it is more
            spent = self._f.ambient.calls - calls
            self.refuse(error)
            return self._f(z), 1 + spent, True
        return z.index_copy(0, self._index, images), 1, False

    def _try(self, z: Tensor, index: Tensor) -> Tensor:
        """The images of a smaller batch, which it has seen twice."""
        assert self._known is not None
        before, known = (x.index_select(0, index) for x in self._known)
        twice = self._f.take(torch.cat([index, index]))
        images = twice(torch.cat([z.index_select(0, index), before]))
        now, again = images.split(len(index))
        if not bool(same_images(again, known, self._f.ambient.rounding).all()):
            raise ValueError("in another batch, a row has another image")
        self._tried, self._part = True, self._f.take(index)
        self._known = (z, z.index_copy(0, index, now))
        return now

    def _cut(self, z: Tensor, active: Array) -> None:
        """Leave out the rows that have ended, once they have cost a whole batch."""
        batch = len(active) if self._index is None else len(self._index)
        rows = np.flatnonzero(active)
        self._wasted += batch - len(rows)
        # By half at least: a compiled f that was not found out is compiled for few sizes.
        due = self._wasted >= batch and 2 * len(rows) <= batch
        if self._refused or self._known is None or self._f.ambient.repeats or not due:
            return
        self._index, self._wasted, self._tried = torch.from_numpy(rows).to(z.device), 0, False
