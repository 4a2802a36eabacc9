"""What a denoiser is, and what it may say about itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fixpoint_diffusion.processes import GaussianPrior

CLASS_LABELS = "class_labels"


@dataclass(frozen=True)
class ConditioningInput:
    """One input that a denoiser takes beside x and t.

    Attributes:
        shape: shape of one row; ``()`` for a number a row, such as a class label. -1 stands for any length.
        dtype: dtype of the rows.
        num_classes: for class labels, how many classes there are: labels run from 0 to ``num_classes - 1``.
        null_label: the label that stands for "no class", which guidance needs; None: the model has none.

    Example:
        See :func:`fixpoint_diffusion.denoisers.describe`, which returns them by name.
    """

    shape: tuple[int, ...] = ()
    dtype: torch.dtype = torch.int64
    num_classes: int | None = None
    null_label: int | None = None


class Denoiser(Protocol):
    """A network that samplers can use, and what its output means.

    Called as ``denoiser(x, t, **conditioning)`` with latents ``(N, *shape)``, timesteps ``(N,)`` and the rows of the
    conditioning, each ``(N, ...)``. Returns ``(N, *shape)`` in the dtype and on the device of x. With
    ``learned_variance`` it returns ``(N, 2 C, ...)``: the prediction, then what the network says of the variance, as
    in Nichol and Dhariwal, "Improved Denoising Diffusion Probabilistic Models" (2021).

    A plain function is a legal denoiser too: :func:`describe` fills in what it does not say.

    Attributes:
        prediction_type: what the output means, in diffusers' words; one of
            ``fixpoint_diffusion.processes.predictions.DENOISER_PREDICTIONS``.
        sample_shape: shape of one sample, ``(C, *spatial)``; None where that is not known.
        schedule_config: the configuration of the schedule it was trained on, as a diffusers scheduler writes it; or
            None.
        prior: what is known of the samples before the denoiser is asked; or None.
        learned_variance: whether the output has twice the channels.
        conditioning: the inputs that it takes, by name. Class labels are called ``class_labels``.

    Example:
        See :func:`fixpoint_diffusion.denoisers.describe`, which reads one.
    """

    @property
    def prediction_type(self) -> str: ...

    @property
    def sample_shape(self) -> tuple[int, ...] | None: ...

    @property
    def schedule_config(self) -> Mapping[str, Any] | None: ...

    @property
    def prior(self) -> GaussianPrior | None: ...

    @property
    def learned_variance(self) -> bool: ...

    @property
    def conditioning(self) -> Mapping[str, ConditioningInput]: ...

    # So a type checker accepts whatever inputs a denoiser names.
    def __call__(self, *args: Any, **kwargs: Any) -> Tensor: ...


class NetworkDenoiser(Denoiser, Protocol):
    """A denoiser around one network, such as ``load_denoiser`` returns.

    Attributes:
        model: the network.
        device: where it computes, which is where x should be; offloaded weights may be elsewhere.

    Example:
        See :func:`fixpoint_diffusion.load_denoiser`, which returns one.
    """

    model: Any

    @property
    def device(self) -> torch.device: ...


@dataclass(frozen=True, kw_only=True)
class Description:
    """What is known of a denoiser: see :class:`Denoiser` for the attributes.

    Attributes:
        prediction_type: None where the denoiser does not say; a chain then takes the schedule's.
        per_sample: inputs that the denoiser itself holds with one row for each sample, such as a guidance scale for
            each. A chain passes to every call the rows of the samples that the call is about.

    Example:
        See :func:`fixpoint_diffusion.denoisers.describe`, which returns one.
    """

    prediction_type: str | None = None
    sample_shape: tuple[int, ...] | None = None
    schedule_config: Mapping[str, Any] | None = None
    prior: GaussianPrior | None = None
    learned_variance: bool = False
    conditioning: Mapping[str, ConditioningInput] = field(default_factory=dict)
    per_sample: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def class_labels(self) -> ConditioningInput | None:
        """The input for class labels; None where the denoiser takes none."""
        return self.conditioning.get(CLASS_LABELS)


def describe(denoiser: Callable[..., Tensor]) -> Description:
    """What a denoiser says about itself, with the defaults of a plain function for all else.

    Args:
        denoiser: anything that is called as :class:`Denoiser`.

    Example:
        >>> describe(lambda x, t: x).learned_variance
        False
        >>> from fixpoint_diffusion.denoisers import embedded
        >>> about = describe(embedded("ddpm-digits"))
        >>> about.prediction_type, about.sample_shape
        ('epsilon', (1, 8, 8))
    """
    plain = Description()
    given = {name: getattr(denoiser, name, None) for name in vars(plain)}
    return Description(**{name: value for name, value in given.items() if value is not None})


def from_outside(denoiser: object) -> Iterator[object]:
    """A denoiser, the one that it is around (its attribute ``denoiser``), and so on."""
    while denoiser is not None:
        yield denoiser
        denoiser = getattr(denoiser, "denoiser", None)


def networks_of(denoiser: object) -> Iterator[nn.Module]:
    """The modules among these, or in their attribute ``model``, from outside."""
    for each in from_outside(denoiser):
        network = each if isinstance(each, nn.Module) else getattr(each, "model", None)
        if isinstance(network, nn.Module):
            yield network
