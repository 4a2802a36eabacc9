"""Shape of a diffusion transformer, as data that can be written beside its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from fixpoint_diffusion.models.transformer_config import SIZES, TransformerConfig


@dataclass(frozen=True, kw_only=True)
class DiTConfig(TransformerConfig):
    """Architecture of a :class:`~fixpoint_diffusion.models.DiT`.

    The fields of :class:`~fixpoint_diffusion.models.TransformerConfig`, and:

    Args:
        depth: Blocks.

    ``norm_eps`` and ``freq_shift`` are by default those of diffusers, so that trained models can be written for it.

    Raises:
        ValueError: If a value is out of its range; the message names the field, the value and the range.

    Source: Peebles and Xie, "Scalable Diffusion Models with Transformers", ICCV 2023, Tables 1 and 4.

    >>> DiTConfig.preset("XL/2").depth
    28
    """

    depth: int = 4
    norm_eps: float = 1e-5
    freq_shift: int = 1

    _LOWEST: ClassVar[Mapping[str, int]] = {**TransformerConfig._LOWEST, "depth": 1}

    @classmethod
    def preset(cls, name: str) -> DiTConfig:
        """The published models for 256x256 ImageNet in the Stable Diffusion latent space (4x32x32, 1000 classes).

        Args:
            name: Size and patch, such as ``"XL/2"``: S, B, L or XL, and a patch of 2, 4 or 8.

        Raises:
            ValueError: If the name is not of that form.
        """
        size, fields = cls._preset(name)
        return cls(**fields, depth=SIZES[size][2])
