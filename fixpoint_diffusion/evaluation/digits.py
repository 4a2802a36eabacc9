"""How digit-like generated digits are, judged by a small classifier trained on the real ones."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path

import torch
from torch import Tensor

from fixpoint_diffusion.evaluation.distances import frechet_distance
from fixpoint_diffusion.evaluation.extractors import FeatureExtractor, state_hash
from fixpoint_diffusion.evaluation.images import check_range, to_symmetric
from fixpoint_diffusion.extras import needed_for
from fixpoint_diffusion.training.data import load_digits, split_held_out


@dataclass(frozen=True, kw_only=True)
class DigitQuality:
    """What the classifier says of a set of images.

    Attributes:
        confidence: mean probability of the most probable digit.
        relative_confidence: ``confidence`` over the same figure for real digits that the classifier never saw.
        class_shares: share of images given to each digit 0..9, ``(10,)``.

    Example:
        See :func:`fixpoint_diffusion.evaluation.digit_quality`, which returns one.
    """

    confidence: float
    relative_confidence: float
    class_shares: tuple[float, ...]


def digit_probabilities(images: Tensor) -> Tensor:
    """The probability of each digit 0..9 for each image.

    The classifier is a perceptron with one hidden layer of 64, trained by scikit-learn on the same part of the real
    digits as the embedded models (``train_digit_classifier``). Its weights come with the package.

    Args:
        images: ``(N, 1, 8, 8)`` in [-1, 1]; what a sampler overshoots is clipped.

    Returns:
        ``(N, 10)`` float64, on the CPU.

    Raises:
        ValueError: if the images have another shape or range, or are not finite.

    >>> digit_probabilities(load_digits().images[:4]).argmax(1)
    tensor([0, 1, 2, 3])
    """
    weights = _weights()
    return (_hidden(_checked(images)) @ weights["output.weight"] + weights["output.bias"]).softmax(dim=1)


def digit_confidence(images: Tensor) -> float:
    """Mean over images of the most probable digit's probability; see ``digit_probabilities``.

    Example:
        >>> from fixpoint_diffusion.evaluation import digit_confidence
        >>> from fixpoint_diffusion.training.data import load_digits
        >>> 0.9 < digit_confidence(load_digits().images) <= 1
        True
    """
    return float(digit_probabilities(images).amax(1).mean())


def digit_quality(images: Tensor) -> DigitQuality:
    """The confidence of the classifier in ``images`` ``(N, 1, 8, 8)``, compared with held-out real digits.

    >>> _, held_out = split_held_out(load_digits())
    >>> digit_quality(held_out.images).relative_confidence
    1.0
    """
    probabilities = digit_probabilities(images)
    _, held_out = split_held_out(load_digits())
    confidence = float(probabilities.amax(1).mean())
    shares = torch.bincount(probabilities.argmax(1), minlength=10) / len(images)
    return DigitQuality(
        confidence=confidence,
        relative_confidence=confidence / digit_confidence(held_out.images),
        class_shares=tuple(shares.tolist()),
    )


class DigitFeatures(FeatureExtractor):
    """The 64 hidden features of the classifier of 8x8 digits that comes with the package.

    Images are ``(N, 1, 8, 8)`` and taken as they are.

    >>> DigitFeatures()(load_digits().images[:3]).shape
    torch.Size([3, 64])
    """

    def __init__(self) -> None:
        weights = _weights()
        super().__init__(
            name="digits-classifier",
            num_features=weights["hidden.bias"].numel(),
            weights_hash=state_hash(weights),
            preparation="no resizing; values -1..1",
        )

    def forward(self, images: Tensor) -> Tensor:
        return _hidden(images)


def digit_frechet_distance(images: Tensor, reference: Tensor) -> float:
    """Frechet distance of two sets of digits in the classifier's 64 hidden features.

    It falls with the number of images and must be compared at the same number only.

    Args:
        images, reference: ``(N, 1, 8, 8)`` and ``(M, 1, 8, 8)`` in [-1, 1], at least two each; what a sampler
            overshoots is clipped.

    Returns:
        The distance, at least 0; see ``frechet_distance``.

    Raises:
        ValueError: if the images have another shape or range, are not finite, or are fewer than two.

    >>> train, held_out = split_held_out(load_digits())
    >>> noise = torch.rand(500, 1, 8, 8) * 2 - 1
    >>> digit_frechet_distance(held_out.images, train.images) < 0.1 * digit_frechet_distance(noise, train.images)
    True
    """
    return frechet_distance(*(_hidden(_checked(each)) for each in (images, reference)))


def train_digit_classifier() -> dict[str, Tensor]:
    """Train the classifier anew: the tensors of the weights file that comes with the package.

    It takes a second. The result depends on the machine in the last digits, which is why the weights are kept.

    Example:
        See :func:`fixpoint_diffusion.evaluation.digit_probabilities`, which uses these weights.
    """
    from sklearn.neural_network import MLPClassifier

    train, _ = split_held_out(load_digits())
    assert train.labels is not None
    # A perceptron, because its confidence falls off the digits: images of noise get half of it (an SVM's get 0.8).
    model = MLPClassifier((64,), alpha=0.1, learning_rate_init=3e-3, max_iter=500, random_state=0)
    model.fit(train.images.flatten(1).numpy(), train.labels.numpy())
    weights: dict[str, Tensor] = {}
    for name, weight, bias in zip(("hidden", "output"), model.coefs_, model.intercepts_, strict=True):
        weights |= {f"{name}.weight": torch.from_numpy(weight), f"{name}.bias": torch.from_numpy(bias)}
    return weights


def _hidden(images: Tensor) -> Tensor:
    """The hidden layer's features ``(N, 64)`` of images in [-1, 1], float64 on the CPU."""
    _check_shape(images)
    weights = _weights()
    pixels = images.detach().to("cpu", torch.float64).flatten(1)
    return (pixels @ weights["hidden.weight"] + weights["hidden.bias"]).relu()


def _check_shape(images: Tensor) -> None:
    if images.ndim != 4 or tuple(images.shape[1:]) != (1, 8, 8) or len(images) == 0:
        raise ValueError(
            f"the classifier of digits takes images (N, 1, 8, 8) with N at least 1, got {tuple(images.shape)}; "
            "for other images choose other features: --features inception or dinov2, with --weights"
        )


def _checked(images: Tensor) -> Tensor:
    _check_shape(images)
    check_range(images, None, name="the tensor of digits")
    return to_symmetric(images, (-1, 1), name="the tensor of digits")


@cache
def _weights() -> dict[str, Tensor]:
    with needed_for("the classifier of digits"):
        from safetensors.torch import load_file

    path = Path(str(files("fixpoint_diffusion"))) / "assets" / "digits-classifier" / "model.safetensors"
    return {name: tensor.double() for name, tensor in load_file(path).items()}
