"""What a training run keeps of how its data set is opened."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from fixpoint_diffusion.training.data.dataset import ImageDataset
from fixpoint_diffusion.training.data.labelled import split_held_out
from fixpoint_diffusion.training.data.opening import open_dataset


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """What to train on: the arguments of ``open_dataset`` that a run keeps.

    Of ``"digits"``, the part that ``split_held_out`` holds out is left out.

    Example:
        See :class:`fixpoint_diffusion.training.TrainingRun`, whose ``start`` takes them.
    """

    source: str = "digits"
    channels: str | None = None
    size: int | tuple[int, int] | None = None
    crop: str = "center"
    flip: bool = False
    latents: bool = False

    def open(self, *, seed: int = 0) -> ImageDataset:
        """The data set; errors as of ``open_dataset``."""
        options = {name: value for name, value in dataclasses.asdict(self).items() if name != "source"}
        size = options.pop("size")
        data = open_dataset(self.source, size=tuple(size) if isinstance(size, list) else size, seed=seed, **options)
        return split_held_out(data)[0] if self.source == "digits" else data
