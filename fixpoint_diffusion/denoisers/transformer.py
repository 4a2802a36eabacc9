"""The transformers of this package, DiT and FPDM, as denoisers and as model families."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fixpoint_diffusion.denoisers.diffusers_models import spatial_sizes
from fixpoint_diffusion.denoisers.modules import compute_dtype, execution_device, spread
from fixpoint_diffusion.denoisers.protocol import CLASS_LABELS, ConditioningInput
from fixpoint_diffusion.denoisers.registry import Family, LoadOptions
from fixpoint_diffusion.denoisers.schedules import ZERO_SNR_SCHEDULE
from fixpoint_diffusion.models.transformer import PatchTransformer
from fixpoint_diffusion.models.transformer_config import TransformerConfig
from fixpoint_diffusion.processes import GaussianPrior


class TransformerDenoiser:
    """A DiT as a denoiser: ``denoiser(x, t)`` returns the network's raw output for ``x`` ``(N, C, H, W)``.

    Args:
        model: The model.
        schedule_config: Configuration of the noise schedule it was trained with, as a diffusers scheduler's.
        prior: What is known of the images, from which chains predict how latents move; None: a plain guess.
        learned_variance: Whether the output keeps what the model says of the variance, ``(N, 2 C, H, W)``; for a
            model with ``learn_sigma``. False: it is dropped.

    Raises:
        ValueError: A learned variance of a model that has none.

    >>> from fixpoint_diffusion.models import DiT, DiTConfig
    >>> denoiser = TransformerDenoiser(DiT(DiTConfig(width=16, heads=2, num_classes=10)).eval())
    >>> denoiser(torch.randn(2, 1, 8, 8), torch.tensor([3, 999]), class_labels=torch.tensor([7, 10])).shape
    torch.Size([2, 1, 8, 8])
    """

    def __init__(
        self,
        model: PatchTransformer,
        *,
        schedule_config: Mapping[str, Any] | None = None,
        prior: GaussianPrior | None = None,
        learned_variance: bool = False,
    ) -> None:
        if learned_variance and not model.config.learn_sigma:
            raise ValueError(f"this {type(model).__name__} learned no variance (learn_sigma is False)")
        self.model: Any = model
        self.schedule_config = None if schedule_config is None else dict(schedule_config)
        self.prior = prior
        self.learned_variance = learned_variance
        self.prediction_type: str = model.config.prediction_type
        self.sample_shape: tuple[int, ...] = model.config.sample_shape
        self.conditioning: Mapping[str, ConditioningInput] = class_inputs(model.config)

    @property
    def device(self) -> torch.device:
        """Where the network computes."""
        return execution_device(self.model)

    def __call__(self, x: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """Raw output ``(N, C, H, W)``, in x's dtype, for ``x`` ``(N, C, H, W)`` at timesteps ``t`` ``(N,)``.

        ``class_labels`` ``(N,)`` are those of a conditional model; None: no class.
        """
        output = self.model(x.to(compute_dtype(self.model, x.dtype)), t, class_labels, **self._options())
        channels = x.shape[1] * (2 if self.learned_variance else 1)
        return output[:, :channels].to(x.dtype)

    def _options(self) -> dict[str, Any]:
        """Further arguments of the network."""
        return {}

    def __repr__(self) -> str:
        name, shape = type(self.model).__name__, self.sample_shape
        return f"{type(self).__name__}({name}, prediction_type={self.prediction_type!r}, sample_shape={shape})"


def class_inputs(config: TransformerConfig) -> dict[str, ConditioningInput]:
    """What a transformer of that shape takes beside x and t: class labels, if it was made for classes."""
    classes = config.num_classes
    return {} if classes is None else {CLASS_LABELS: ConditioningInput(num_classes=classes, null_label=classes)}


def transformer_family(
    name: str,
    model_class: Callable[[Any], PatchTransformer],
    config_class: type[TransformerConfig],
    *,
    denoiser_class: type[TransformerDenoiser],
    load: Callable[..., PatchTransformer],
    save: Callable[..., object],
    training: Mapping[str, Any],
) -> Family:
    """The family of DiT or FPDM; ``load`` and ``save`` are the functions of ``fixpoint_diffusion.models``."""
    class_name = config_class.__name__.removesuffix("Config")

    def build(sample_shape: tuple[int, ...], num_classes: int | None, settings: Mapping[str, Any]) -> nn.Module:
        channels, height, width = spatial_sizes(class_name, sample_shape, 2)
        if height != width:
            raise ValueError(f"{class_name} takes square images, got {height} x {width}")
        sizes = {"sample_size": height, "in_channels": channels}
        # A setting may ask for classes where the data has none.
        classes = {} if num_classes is None else {"num_classes": num_classes}
        return model_class(config_class.from_dict({**settings, **sizes, **classes}))

    def load_placed(folder: Path, config: Mapping[str, Any], options: LoadOptions) -> nn.Module:
        # There are no pickled weights, whatever the options allow.
        if options.device_map is None:
            return load(folder, dtype=options.dtype, device=options.device)
        return spread(load(folder, dtype=options.dtype), options.device_map, whole=("DiTBlock", "FixedPointLayer"))

    def write(model: nn.Module, folder: Path, dtype: torch.dtype | None) -> None:
        save(model, folder, dtype=dtype)

    def denoiser(model: Any, /, *, prediction_type: str | None = None, **about: Any) -> TransformerDenoiser:
        if prediction_type not in (None, model.config.prediction_type):
            raise ValueError(
                f"this {class_name} predicts {model.config.prediction_type!r}, but its schedule is for "
                f"{prediction_type!r}"
            )
        return denoiser_class(model, **about)

    return Family(
        name=name,
        class_name=class_name,
        build=build,
        denoiser=denoiser,
        load=load_placed,
        save=write,
        sample_shape=lambda config: config_class.from_dict(config).sample_shape,
        conditioning=lambda config: class_inputs(config_class.from_dict(config)),
        schedule_config=ZERO_SNR_SCHEDULE,
        training={"prediction_type": "v_prediction", **training},
    )
