"""Recipes with a name: the network and the training of a publication, and ours."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fixpoint_diffusion.models import DiTConfig, FPDMConfig
from fixpoint_diffusion.training.data import ImageDataset
from fixpoint_diffusion.training.data.crops import Crop


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Settings that belong together; those that the caller names win.

    Attributes:
        kind: the model family that it is for.
        settings: of the architecture, as in ``TrainingRun.start``.
        training: of the training, as in ``TrainingRun.start``.
        published: shape, classes and number of the images that it was published for; None: any.
        unknown: what the source does not say, and what is taken for it.
    """

    kind: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    published: tuple[tuple[int, ...], int, int] | None = None
    unknown: str = ""

    def planned_data(self) -> ImageDataset:
        """A data set of the published shape and size, to plan with: it holds no images."""
        assert self.published is not None
        shape, classes, count = self.published
        rows: Any = range(count)
        return ImageDataset(rows, sample_shape=shape, crop=Crop(), num_classes=classes, is_latent=True)


def preset_named(name: str, kind: str) -> Preset:
    """The preset of that name.

    Raises:
        ValueError: if there is none, or it is for another model family.

    >>> preset_named("released", "fpdm").training["weighting"]
    'fpdm'
    """
    if name not in PRESETS:
        raise ValueError(f"no preset {name!r}; there are {', '.join(PRESETS)}")
    by_kind = {preset.kind: preset for preset in PRESETS[name]}
    if kind not in by_kind:
        raise ValueError(f"preset {name!r} is for {' and '.join(by_kind)}, got {kind}")
    return by_kind[kind]


def _sizes(published: FPDMConfig | DiTConfig) -> dict[str, Any]:
    """What does not depend on the data."""
    fields = dataclasses.asdict(published)
    return {name: fields[name] for name in fields if name not in ("sample_size", "in_channels", "num_classes")}


_FPDM_XL = _sizes(FPDMConfig.preset("XL/2"))
_TRAINING: dict[str, Any] = {
    "steps": 400_000,
    "batch_size": 512,
    "learning_rate": 1e-4,
    "final_learning_rate": 1e-4,
    "warmup_steps": 0,
    "weight_decay": 0.0,
    "max_grad_norm": None,
    "ema_decay": 0.9999,
    "class_dropout": 0.1,
}
_IMAGENET = ((4, 32, 32), 1000, 1_281_167)
_STEPS = "the number of steps (the paper gives days; its DiT made 400,000 in that time)"
_AS_DIT = (
    "optimiser, weight decay, average and clipping (as in DiT: AdamW, 0, 0.9999, none); the weight of the loss (plain)"
)

# By name, one for each family that it is for.
PRESETS: Mapping[str, tuple[Preset, ...]] = {
    # Sections 4.1 and 5.5 of the paper; what these leave open is as in DiT, whose recipe it follows.
    "paper": (
        Preset(
            kind="fpdm",
            settings=_FPDM_XL,
            training=_TRAINING,
            published=_IMAGENET,
            unknown=f"{_STEPS}; {_AS_DIT}",
        ),
        # Its baseline, with the same hyperparameters.
        Preset(
            kind="dit",
            settings=_sizes(DiTConfig.preset("XL/2")),
            training=_TRAINING,
            published=_IMAGENET,
            unknown=_AS_DIT,
        ),
    ),
    "released": (
        Preset(
            kind="fpdm",
            settings={**_FPDM_XL, "injection_gelu": "tanh", "attach_start": False},
            training={**_TRAINING, "weighting": "fpdm"},
            published=_IMAGENET,
            unknown=f"{_STEPS}; clipping (none); N and M of the published models (12, as in the paper)",
        ),
    ),
    "ours": (Preset(kind="fpdm"),),
}
