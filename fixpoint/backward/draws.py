"""Random numbers that are the same when an activation checkpoint runs its function again."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch

from fixpoint.engine.private import CHECKPOINTS, in_backward, saved_tensors_hooks


class Draws:
    """Whole numbers from a generator, or from torch's global CPU state if that is None.

    ``torch.utils.checkpoint(..., use_reentrant=False)`` runs its function again in backward. It puts the global random
    state back for that, but knows of no other generator. So each number drawn under a checkpoint is noted with that
    checkpoint, for as long as that lives, and its recomputation gets the same numbers in the same order.
    """

    def __init__(self, generator: torch.Generator | None) -> None:
        self.__setstate__((generator,))

    def __getstate__(self) -> tuple[torch.Generator | None]:
        # A copy goes on at the same place of its own stream. No checkpoint knows of it yet.
        return (self._generator,)

    def __setstate__(self, state: tuple[torch.Generator | None]) -> None:
        (self._generator,) = state
        self._noted: WeakKeyDictionary[Any, list[int]] = WeakKeyDictionary()
        self._replays: WeakKeyDictionary[Any, Iterator[int]] = WeakKeyDictionary()

    def integer(self, least: int, most: int) -> int:
        """A number from ``least`` to ``most``, both included.

        Raises:
            RuntimeError: For a generator of its own, in a backward pass where no checkpoint is found that noted a
                number. Only the global random state could give the same one again.
        """
        recomputation, checkpoint, running = _checkpoints()
        number = None
        if self._generator is None:  # also where it is replaced below: what is drawn next must not change
            number = self._draw(least, most)
        if recomputation is not None:
            replay = self._replays.setdefault(recomputation, iter(self._noted.get(checkpoint, ())))
            number = next(replay, number)
        elif self._generator is not None and not in_backward():
            number = self._draw(least, most)
        if number is None:
            raise RuntimeError(
                "random depths were drawn in a backward pass, from a generator whose numbers in the forward pass are "
                "not known there: the gradient would be that of other depths. Recompute by torch.utils.checkpoint with "
                "use_reentrant=False (and PyTorch 2.8 or newer), or pass neither seed nor generator, so that they come "
                "from PyTorch's global random state, which checkpoints put back."
            )
        for checkpoint in running:
            self._noted.setdefault(checkpoint, []).append(number)
        return number

    def _draw(self, least: int, most: int) -> int:
        device = "cpu" if self._generator is None else self._generator.device  # whatever the default device is
        return int(torch.randint(least, most + 1, (), generator=self._generator, device=device))


def _checkpoints() -> tuple[Any, Any, list[Any]]:
    """The recomputation that is going on, if any, the checkpoint that it is for, and the checkpoints started in it.

    Each is found by the hook that it has set for tensors saved by autograd; PyTorch has no public way to ask.
    """
    running: list[Any] = []
    for pack, _ in saved_tensors_hooks():
        pack = inspect.unwrap(pack)
        names = inspect.getclosurevars(pack).nonlocals
        target = names.get("target_frame_ref")
        if target is not None:
            return pack, target(), running
        if isinstance(names.get("frame"), CHECKPOINTS):
            running.append(names["frame"])
    return None, None, running
