"""Shape of a fixed point diffusion model, as data that can be written beside its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from fixpoint_diffusion.models.transformer_config import TransformerConfig

Gelu = Literal["exact", "tanh"]
Backpropagation = Literal["sjfb", "multi-jfb", "jfb", "phantom", "ift", "shine"]
UnconditionalAdaLN = Literal["vector", "linear"]


@dataclass(frozen=True, kw_only=True)
class FPDMConfig(TransformerConfig):
    """Architecture and training bounds of an :class:`~fixpoint_diffusion.models.FPDM`.

    The fields of :class:`~fixpoint_diffusion.models.TransformerConfig`, and:

    Args:
        n_pre: Explicit blocks before the fixed point layer.
        n_post: Explicit blocks after it.
        implicit_blocks: Blocks of the fixed point map; one of its applications passes all of them.
        timestep_everywhere: Whether the timestep conditions the explicit blocks and the head too.
        injection_gelu: The GELU between the two projections of the fixed point map: exact, or approximated by tanh as
            in the released code.
        gate_cap: Make the fixed point map ``z + g (f(z) - z)``, with a g between 0 and this number that is learned for
            each feature: the same fixed points, reached in smaller steps. None: f itself, as in the paper.
        unconditional_adaln: What modulates explicit blocks and the head where neither class nor timestep does: plain
            vectors, or the linear maps of a conditional model, applied to one learned vector (the parameters that the
            paper counts).
        backward: How training gets the gradient of the layer. ``"sjfb"`` is S-JFB: n ~ U{0..N} iterations that record
            nothing, then m ~ U{1..M} recorded ones. ``"multi-jfb"`` always makes N and M of them, ``"jfb"`` N and one.
            The others attach to the state after N updates: ``"phantom"`` by M steps of damping 0.5, ``"ift"`` by the
            adjoint equation, ``"shine"`` by the inverse that Broyden's method has built.
        max_no_grad: N.
        max_grad: M.
        attach_start: If no iteration comes before the recorded ones, whether the gradient also flows into the state
            that the layer starts from, as in the paper's Algorithm 1; the released code cuts it.
        start_noise: Standard deviation of noise that is added to that state in training, so that the layer learns to
            come to the same solution from different starts.

    Raises:
        ValueError: If a value is out of its range; the message names the field, the value and the range.

    Source: Bai and Melas-Kyriazi, "Fixed Point Diffusion Models", CVPR 2024, Sec. 3.2 and 3.4.

    >>> FPDMConfig(width=96, heads=4).tokens
    16
    """

    n_pre: int = 1
    n_post: int = 1
    implicit_blocks: int = 1
    timestep_everywhere: bool = False
    injection_gelu: Gelu = "exact"
    gate_cap: float | None = None
    unconditional_adaln: UnconditionalAdaLN = "vector"
    backward: Backpropagation = "sjfb"
    max_no_grad: int = 12
    max_grad: int = 4
    attach_start: bool = True
    start_noise: float = 0.0

    # The fields that say how the layer is trained, not what it is.
    TRAINING: ClassVar[tuple[str, ...]] = ("backward", "max_no_grad", "max_grad", "attach_start", "start_noise")
    _LOWEST: ClassVar[Mapping[str, int]] = {
        **TransformerConfig._LOWEST,
        "n_pre": 0,
        "n_post": 0,
        "implicit_blocks": 1,
        "max_no_grad": 0,
        "max_grad": 1,
    }
    _CHOICES: ClassVar[Mapping[str, tuple[str, ...]]] = {
        **TransformerConfig._CHOICES,
        "injection_gelu": get_args(Gelu),
        "unconditional_adaln": get_args(UnconditionalAdaLN),
        "backward": get_args(Backpropagation),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prediction_type == "flow_prediction":
            raise ValueError("an FPDM is not trained along a flow: its samplers take DDIM's and DDPM's steps")
        noise = self.start_noise
        if not isinstance(noise, int | float) or isinstance(noise, bool) or not 0 <= noise < float("inf"):
            raise ValueError(f"FPDMConfig.start_noise must be finite and not negative, got {noise!r}")
        cap = self.gate_cap
        if cap is not None and (not isinstance(cap, int | float) or isinstance(cap, bool) or not 0 < cap <= 1):
            raise ValueError(f"FPDMConfig.gate_cap must be None or in (0, 1], got {cap!r}")
        if self.backward in ("phantom", "ift", "shine") and self.max_no_grad == 0:
            raise ValueError(
                f"FPDMConfig.backward {self.backward!r} needs a state to attach to: max_no_grad of at least 1, got 0"
            )

    @property
    def has_label(self) -> bool:
        """Whether there is a vector for the class, or in its place a learned one for all images."""
        return self.num_classes is not None or (self.unconditional_adaln == "linear" and not self.timestep_everywhere)

    def block_passes(self, iterations: int) -> int:
        """Forward passes of blocks in one call with so many iterations: the paper's measure of cost (footnote 4).

        >>> FPDMConfig().block_passes(26), FPDMConfig(implicit_blocks=4).block_passes(8)
        (28, 34)
        """
        return self.n_pre + iterations * self.implicit_blocks + self.n_post

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
        return cls(**cls._preset(name)[1], max_no_grad=12, max_grad=12)
