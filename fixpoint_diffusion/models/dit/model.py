"""The diffusion transformer: the explicit network that a fixed point diffusion model is compared with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from fixpoint_diffusion.models.dit.config import DiTConfig
from fixpoint_diffusion.models.transformer import PatchTransformer, condition_of


class DiT(PatchTransformer):
    """A diffusion transformer (DiT), of the blocks that :class:`~fixpoint_diffusion.models.FPDM` is made of.

    Every block and the head are conditioned on the sum of the embeddings of timestep and class. The label after the
    last class means "no class"; dropping labels at random is the trainer's work (its ``class_dropout``).

    Args:
        config: The architecture.

    Source: Peebles and Xie, "Scalable Diffusion Models with Transformers", ICCV 2023, Sec. 3.2.

    >>> import torch
    >>> model = DiT(DiTConfig(width=16, heads=2, num_classes=10)).eval()
    >>> model(torch.randn(3, 1, 8, 8), torch.tensor([10, 500, 999]), torch.tensor([7, 0, 10])).shape
    torch.Size([3, 1, 8, 8])
    """

    config: DiTConfig

    def __init__(self, config: DiTConfig) -> None:
        super().__init__(config, label=config.num_classes is not None)
        self.blocks = self._blocks(config.depth, conditional=True)
        self.head = self._head(conditional=True)
        self._initialise()

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """Predict from noisy images.

        Args:
            x: Noisy images ``(N, C, H, W)``.
            t: Timesteps ``(N,)``, or one for all; 0 is the least noisy.
            y: Classes ``(N,)``, int64; ``num_classes`` is the null class, which None means for every image.

        Returns:
            The prediction ``(N, C, H, W)``, or ``(N, 2C, H, W)`` with ``learn_sigma``.

        Raises:
            ValueError: If a shape, or ``y`` for an unconditional model, does not fit the configuration.
        """
        tokens, time, label = self._embed(x, t, y)
        condition = condition_of(time, label)
        return self.head(self._through(self.blocks, tokens, condition), condition)

    @classmethod
    def from_diffusers(cls, source: Any, *, prediction_type: str = "epsilon") -> DiT:
        """A copy of a ``DiTTransformer2DModel`` of diffusers, with the same outputs.

        Args:
            source: The module, or a folder with its ``config.json`` and safetensors; of a pipeline folder its
                ``transformer`` is taken. Nothing is downloaded.
            prediction_type: What it was trained to predict, which diffusers keeps with the scheduler.

        Raises:
            FileNotFoundError: If there is no such folder.
            ValueError: If the module has parts that a ``DiT`` has not; the message names them.

        >>> module = DiT(DiTConfig(width=16, heads=2, num_classes=10)).to_diffusers()
        >>> type(module).__name__, DiT.from_diffusers(module).config.prediction_type
        ('DiTTransformer2DModel', 'epsilon')
        """
        from fixpoint_diffusion.models.dit.conversion import dit_from_diffusers, read_module

        module = read_module(source) if isinstance(source, str | Path) else source
        return dit_from_diffusers(module, prediction_type=prediction_type)

    def to_diffusers(self) -> Any:
        """A copy as a ``DiTTransformer2DModel`` of diffusers, with the same outputs.

        That of an unconditional model has one class, whose label is of no effect.

        Raises:
            ValueError: If diffusers' class cannot express this architecture; the message says why.
            ImportError: If diffusers is not installed.
        """
        from fixpoint_diffusion.models.dit.conversion import dit_to_diffusers

        return dit_to_diffusers(self)
