"""Models of the diffusers library as denoisers."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fixpoint_diffusion.denoisers.modules import compute_dtype, execution_device, uncompiled
from fixpoint_diffusion.denoisers.protocol import ConditioningInput
from fixpoint_diffusion.denoisers.registry import family_of
from fixpoint_diffusion.processes import GaussianPrior
from fixpoint_diffusion.processes.predictions import DENOISER_PREDICTIONS


class DiffusersDenoiser:
    """A diffusers model (``UNet2DModel``, ``DiTTransformer2DModel``, ...) called as ``denoiser(x, t)``.

    The output is the model's own, in its own prediction type; channels beyond the image's (a learned variance) are cut
    unless ``learned_variance`` asks for them. Floating-point inputs of another dtype than the model computes in are
    cast to it, and the output back. Weights may be quantised, cast layer by layer or offloaded by accelerate.

    Args:
        model: any module called as ``model(x, t, **inputs)`` that returns a tensor, a tuple that begins with it, or an
            object with ``.sample``.
        prediction_type: what the output means, in diffusers' words: ``"epsilon"``, ``"v_prediction"`` or ``"sample"``.
        schedule_config: the configuration of the noise schedule it was trained on, as a diffusers scheduler writes it.
        inputs: further inputs by name (``class_labels``, ``encoder_hidden_states``), each with one row ``(1, ...)``
            that is repeated for every row of x; what is no tensor is passed on as it is.
        prior: what is known of the images, from which chains predict how latents move; None: a plain guess.
        sample_shape: shape of one sample ``(C, *spatial)``; None: what the model's config says.
        learned_variance: whether the output keeps the second half of the channels, ``(N, 2 C, *spatial)``.

    Attributes:
        sample_shape: shape of one sample; None where nothing says it.
        conditioning: the inputs beside x and t that the model takes, by name; empty where its family is not known.

    Raises:
        ValueError: for an unknown prediction type, an input without a leading dimension of 1, a learned variance of a
            model that has as many output channels as input channels, or a model that is told the timestep elsewhere
            than after x, as the transformers of Stable Diffusion 3 and FLUX are.

    >>> class Half(nn.Module):
    ...     def forward(self, x, t):
    ...         return x / 2
    >>> DiffusersDenoiser(Half())(torch.ones(2, 1, 1, 1), torch.tensor([3, 4])).flatten()
    tensor([0.5000, 0.5000])
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        prediction_type: str = "epsilon",
        schedule_config: Mapping[str, Any] | None = None,
        inputs: Mapping[str, Any] | None = None,
        prior: GaussianPrior | None = None,
        sample_shape: tuple[int, ...] | None = None,
        learned_variance: bool = False,
    ) -> None:
        if prediction_type not in DENOISER_PREDICTIONS:
            raise ValueError(f"prediction_type must be one of {DENOISER_PREDICTIONS}, got {prediction_type!r}")
        self._check_call(model)
        self.model = model
        self.prediction_type: str = prediction_type
        self.schedule_config = None if schedule_config is None else dict(schedule_config)
        self.inputs = dict(inputs or {})
        self.prior = prior
        self.learned_variance = learned_variance
        for name, value in self.inputs.items():
            if isinstance(value, Tensor) and value.shape[:1] != (1,):
                raise ValueError(f"input {name!r} must have one row (1, ...), got shape {tuple(value.shape)}")
        family, config = family_of(model), getattr(model, "config", None)
        self.sample_shape = sample_shape
        self.conditioning: Mapping[str, ConditioningInput] = {}
        if not isinstance(config, Mapping):  # not a model of diffusers
            config = {}
        elif sample_shape is None:
            self.sample_shape = family.sample_shape(config) if family else image_shape(config)
        if family and config:
            self.conditioning = family.conditioning(config)
        given, returned = config.get("in_channels"), config.get("out_channels")
        if learned_variance and given is not None and returned != 2 * given:
            raise ValueError(
                f"a model that learned the variance has twice as many output as input channels; this one has "
                f"{given} and {returned}"
            )

    @staticmethod
    def _check_call(model: nn.Module) -> None:
        """Refuse a model that would take t for something else; what it means by a timestep is not known either."""
        if "forward" in vars(uncompiled(model)):  # adapted by the caller
            return
        kind = type(uncompiled(model))
        names = [*inspect.signature(getattr(kind, "forward", kind.__call__)).parameters]
        if "timestep" in names[3:]:
            raise ValueError(
                f"{kind.__name__} is not called as model(x, t, **inputs): what comes after {names[1]} is {names[2]}, "
                "not the timestep. Wrap it in a module that is called so, or sample with a pipeline "
                "(fixpoint_diffusion.pipelines)"
            )

    @property
    def _class_name(self) -> str:
        return type(uncompiled(self.model)).__name__

    @property
    def device(self) -> torch.device:
        """Where the model computes; its weights may be elsewhere."""
        return execution_device(self.model)

    def __call__(self, x: Tensor, t: Tensor, **inputs: Tensor) -> Tensor:
        """Predict for samples ``(N, C, *spatial)`` at timesteps ``(N,)``; returns that shape in x's dtype.

        Further inputs have one row for each row of x; a chain passes its conditioning so. Without class labels, a
        model that knows "no class" is told that.
        """
        dtype = compute_dtype(self.model, x.dtype)
        given: dict[str, Any] = {
            name: value.expand(len(x), *value.shape[1:]) if isinstance(value, Tensor) else value
            for name, value in self.inputs.items()
        }
        given |= inputs
        self._complete(given, x)
        given = {name: _cast(value, dtype) for name, value in given.items()}
        output = self._ask(x.to(dtype), t, given)
        if not isinstance(output, Tensor):
            output = output[0] if isinstance(output, tuple) else output.sample
        channels = x.shape[1] * (2 if self.learned_variance else 1)
        return output[:, :channels].to(x.device, x.dtype)

    def _ask(self, x: Tensor, t: Tensor, inputs: dict[str, Any]) -> Any:
        """The model's own output."""
        return self.model(x, t, **inputs)

    def _complete(self, given: dict[str, Any], x: Tensor) -> None:
        """Add what the model wants and was not told, or say what is missing."""
        for name, wanted in self.conditioning.items():
            if name in given:
                continue
            if wanted.null_label is None:
                raise ValueError(
                    f"{self._class_name} needs {name}, one row for each of {len(x)}: give it in inputs or as "
                    f"conditioning"
                )
            given[name] = torch.full((len(x),), wanted.null_label, dtype=wanted.dtype, device=x.device)
        if self._class_name == "UNet2DConditionModel":
            given.setdefault("encoder_hidden_states", None)  # has no default, but a network without prompts uses none

    def __repr__(self) -> str:
        about = f"prediction_type={self.prediction_type!r}, sample_shape={self.sample_shape}"
        return f"DiffusersDenoiser({self._class_name}, {about})"


def image_shape(config: Mapping[str, Any]) -> tuple[int, ...] | None:
    """``(C, H, W)`` as most configs of diffusers say it; None where ``in_channels`` or ``sample_size`` is missing."""
    channels, size = config.get("in_channels"), config.get("sample_size")
    if channels is None or size is None:
        return None
    return (channels, size, size) if isinstance(size, int) else (channels, *size)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
