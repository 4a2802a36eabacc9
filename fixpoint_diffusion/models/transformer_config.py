"""What the configurations of all transformers here share, as data that can be written beside their weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self, get_args

from fixpoint_cli.names import near_miss
from fixpoint_diffusion.processes.predictions import DENOISER_PREDICTIONS

PositionOrder = Literal["column-row", "row-column"]

# Width, heads and blocks of DiT's sizes.
SIZES = {"S": (384, 6, 12), "B": (768, 12, 12), "L": (1024, 16, 24), "XL": (1152, 16, 28)}


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """The fields that ``DiTConfig`` and ``FPDMConfig`` have in common.

    Args:
        sample_size: Height and width of the (square) image or latent, in pixels.
        patch_size: Side of one patch; it divides ``sample_size``.
        in_channels: Channels of the image or latent.
        width: Token width D, a multiple of 4 (two axes of sine and cosine positions) and of ``heads``.
        heads: Attention heads.
        mlp_ratio: Hidden width of a block's MLP, in units of D.
        num_classes: Number of classes, or None for an unconditional model. A null row is added for "no class".
        learn_sigma: Whether the head also predicts the variance (twice the output channels).
        prediction_type: What the head predicts: ``"epsilon"``, ``"v_prediction"``, ``"sample"`` or, of a DiT,
            ``"flow_prediction"``.
        positions: Which coordinate of a patch the first half of its position features encodes; ``"column-row"`` is
            DiT's order, ``"row-column"`` that of models from before this field.
        norm_eps: Added to the variance in the layer norm before a block's MLP.
        freq_shift: The 128 frequencies of the timestep are ``10000 ** (-i / (128 - freq_shift))``: 0 as in DiT's own
            code, 1 as in diffusers.

    Raises:
        ValueError: If a value is out of its range; the message names the field, the value and the range.

    Example:
        See :class:`fixpoint_diffusion.FPDMConfig`, which is one.
    """

    sample_size: int = 8
    patch_size: int = 2
    in_channels: int = 1
    width: int = 96
    heads: int = 4
    mlp_ratio: float = 4.0
    num_classes: int | None = None
    learn_sigma: bool = False
    prediction_type: str = "v_prediction"
    positions: PositionOrder = "column-row"
    norm_eps: float = 1e-6
    freq_shift: int = 0

    # The lowest value of each field that holds a whole number, and the choices of those that hold words.
    _LOWEST: ClassVar[Mapping[str, int]] = {
        "sample_size": 1,
        "patch_size": 1,
        "in_channels": 1,
        "width": 4,
        "heads": 1,
        "freq_shift": 0,
    }
    _CHOICES: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "prediction_type": DENOISER_PREDICTIONS,
        "positions": get_args(PositionOrder),
    }

    def __post_init__(self) -> None:
        own = type(self).__name__
        for name, low in self._LOWEST.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                raise ValueError(f"{own}.{name} must be an integer of at least {low}, got {value!r}")
        for name, choices in self._CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{own}.{name} must be one of {choices}, got {getattr(self, name)!r}")
        classes = self.num_classes
        if classes is not None and (not isinstance(classes, int) or isinstance(classes, bool) or classes < 1):
            raise ValueError(f"{own}.num_classes must be None or a positive integer, got {classes!r}")
        for name in ("mlp_ratio", "norm_eps"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
                raise ValueError(f"{own}.{name} must be positive and finite, got {value!r}")
        for field in dataclasses.fields(self):
            if field.type == "bool" and not isinstance(getattr(self, field.name), bool):
                raise ValueError(f"{own}.{field.name} must be true or false, got {getattr(self, field.name)!r}")
        if self.freq_shift > 1:
            raise ValueError(f"{own}.freq_shift must be 0 or 1, got {self.freq_shift}")
        if self.sample_size % self.patch_size:
            raise ValueError(f"patch_size {self.patch_size} does not divide sample_size {self.sample_size}")
        if self.width % 4 or self.width % self.heads:
            raise ValueError(f"width must be a multiple of 4 and of heads, got width {self.width}, heads {self.heads}")

    @property
    def tokens(self) -> int:
        """Number of patches of one image."""
        return (self.sample_size // self.patch_size) ** 2

    @property
    def out_channels(self) -> int:
        """Channels of the head: ``in_channels``, or twice that when the variance is learned."""
        return self.in_channels * (2 if self.learn_sigma else 1)

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """Shape of one image, ``(channels, height, width)``."""
        return (self.in_channels, self.sample_size, self.sample_size)

    @classmethod
    def _preset(cls, name: str) -> tuple[str, dict[str, Any]]:
        """The size in a name such as ``"XL/2"``, and the fields of that model for 4x32x32 latents of ImageNet."""
        size, _, patch = name.partition("/")
        if size not in SIZES or patch not in ("2", "4", "8"):
            raise ValueError(
                f"no {cls._model()} preset {name!r}; sizes are {', '.join(SIZES)}, patches 2, 4, 8, as in 'XL/2'"
            )
        width, heads, _ = SIZES[size]
        latents = {"sample_size": 32, "patch_size": int(patch), "in_channels": 4, "num_classes": 1000}
        return size, {**latents, "width": width, "heads": heads, "learn_sigma": True}

    @classmethod
    def _model(cls) -> str:
        return cls.__name__.removesuffix("Config")

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-able values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """A configuration from :meth:`to_dict`'s values; absent fields take their defaults.

        Raises:
            ValueError: If a key is not a field.

        >>> from fixpoint_diffusion.models import FPDMConfig
        >>> FPDMConfig.from_dict({"width": 64, "depth": 3})
        Traceback (most recent call last):
        ...
        ValueError: unknown FPDM configuration keys: depth.
        """
        unknown = sorted(set(values) - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            near = near_miss(unknown[0], [field.name for field in dataclasses.fields(cls)], cutoff=0.7)
            raise ValueError(f"unknown {cls._model()} configuration keys: {', '.join(unknown)}.{near}")
        return cls(**values)
