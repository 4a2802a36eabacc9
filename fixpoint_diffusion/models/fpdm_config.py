"""Shape of a fixed point diffusion model, as data that can be written beside its weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fixpoint_diffusion.processes.schedules import PREDICTION_TYPES

_SIZES = {"S": (384, 6), "B": (768, 12), "L": (1024, 16), "XL": (1152, 16)}


@dataclass(frozen=True, kw_only=True)
class FPDMConfig:
    """Architecture and training bounds of an :class:`~fixpoint_diffusion.models.FPDM`.

    Args:
        sample_size: Height and width of the (square) image or latent, in pixels.
        patch_size: Side of one patch; it divides ``sample_size``.
        in_channels: Channels of the image or latent.
        width: Token width D, a multiple of 4 (two axes of sine and cosine positions) and of ``heads``.
        heads: Attention heads.
        n_pre: Explicit blocks before the fixed point layer.
        n_post: Explicit blocks after it.
        mlp_ratio: Hidden width of a block's MLP, in units of D.
        num_classes: Number of classes, or None for an unconditional model. A null row is added for "no class".
        learn_sigma: Whether the head also predicts the variance (twice the output channels).
        prediction_type: What the head predicts: ``"epsilon"``, ``"v_prediction"`` or ``"sample"``.
        max_no_grad: N of S-JFB: training runs n ~ U{0..N} iterations without gradient.
        max_grad: M of S-JFB: then m ~ U{1..M} iterations with gradient.

    Raises:
        ValueError: If a value is out of its range; the message names the field, the value and the range.

    Source: Bai and Melas-Kyriazi, "Fixed Point Diffusion Models", CVPR 2024, Sec. 3.2 and 3.4.

    >>> FPDMConfig(width=96, heads=4).tokens
    16
    """

    sample_size: int = 8
    patch_size: int = 2
    in_channels: int = 1
    width: int = 96
    heads: int = 4
    n_pre: int = 1
    n_post: int = 1
    mlp_ratio: float = 4.0
    num_classes: int | None = None
    learn_sigma: bool = False
    prediction_type: str = "v_prediction"
    max_no_grad: int = 12
    max_grad: int = 4

    def __post_init__(self) -> None:
        lowest = {"sample_size": 1, "patch_size": 1, "in_channels": 1, "width": 4, "heads": 1, "max_grad": 1}
        lowest |= {"n_pre": 0, "n_post": 0, "max_no_grad": 0}
        for name, low in lowest.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < low:
                raise ValueError(f"FPDMConfig.{name} must be an integer of at least {low}, got {value!r}")
        classes = self.num_classes
        if classes is not None and (not isinstance(classes, int) or isinstance(classes, bool) or classes < 1):
            raise ValueError(f"FPDMConfig.num_classes must be None or a positive integer, got {classes!r}")
        if not isinstance(self.learn_sigma, bool):
            raise ValueError(f"FPDMConfig.learn_sigma must be true or false, got {self.learn_sigma!r}")
        if self.sample_size % self.patch_size:
            raise ValueError(f"patch_size {self.patch_size} does not divide sample_size {self.sample_size}")
        if self.width % 4 or self.width % self.heads:
            raise ValueError(f"width must be a multiple of 4 and of heads, got width {self.width}, heads {self.heads}")
        ratio = self.mlp_ratio
        if not isinstance(ratio, int | float) or isinstance(ratio, bool) or not 0 < ratio < float("inf"):
            raise ValueError(f"FPDMConfig.mlp_ratio must be positive and finite, got {ratio!r}")
        if self.prediction_type not in PREDICTION_TYPES:
            raise ValueError(f"prediction_type must be one of {PREDICTION_TYPES}, got {self.prediction_type!r}")

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
    def preset(cls, name: str) -> FPDMConfig:
        """The paper's models for 256x256 ImageNet in the Stable Diffusion latent space (4x32x32, 1000 classes).

        Args:
            name: Size and patch, such as ``"XL/2"``: S, B, L or XL, and a patch of 2, 4 or 8.

        Raises:
            ValueError: If the name is not of that form.

        >>> FPDMConfig.preset("XL/2").width
        1152
        """
        size, _, patch = name.partition("/")
        if size not in _SIZES or patch not in ("2", "4", "8"):
            raise ValueError(f"no FPDM preset {name!r}; sizes are {', '.join(_SIZES)}, patches 2, 4, 8, as in 'XL/2'")
        width, heads = _SIZES[size]
        return cls(
            sample_size=32,
            patch_size=int(patch),
            in_channels=4,
            width=width,
            heads=heads,
            num_classes=1000,
            learn_sigma=True,
            max_no_grad=12,
            max_grad=12,
        )

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-able values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> FPDMConfig:
        """A configuration from :meth:`to_dict`'s values; absent fields take their defaults.

        Raises:
            ValueError: If a key is not a field.

        >>> FPDMConfig.from_dict({"width": 64, "depth": 3})
        Traceback (most recent call last):
        ...
        ValueError: unknown FPDM configuration keys: depth
        """
        unknown = sorted(set(values) - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            raise ValueError(f"unknown FPDM configuration keys: {', '.join(unknown)}")
        return cls(**values)
