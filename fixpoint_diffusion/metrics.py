"""How digit-like generated digits are, judged by a small classifier trained on the real ones."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fixpoint_diffusion.training.data import load_digits, split_held_out


@dataclass(frozen=True, kw_only=True)
class DigitQuality:
    """What the classifier says of a set of images.

    Attributes:
        confidence: mean probability of the most probable digit.
        relative_confidence: ``confidence`` over the same figure for real digits that the classifier never saw.
        class_shares: share of images given to each digit 0..9, ``(10,)``.
    """

    confidence: float
    relative_confidence: float
    class_shares: tuple[float, ...]


def digit_probabilities(images: Tensor) -> Tensor:
    """The probability of each digit 0..9 for each image.

    The classifier is scikit-learn's multilayer perceptron, one hidden layer of 64, trained on the same part of the real
    digits as the embedded models. It is trained once per process, in under a second, always the same.

    Args:
        images: ``(N, 1, 8, 8)`` in [-1, 1]; what a sampler overshoots is clipped.

    Returns:
        ``(N, 10)`` float64, on the CPU.

    Raises:
        ValueError: if the images have another shape, or are not finite.

    >>> digit_probabilities(load_digits().images[:4]).argmax(1)
    tensor([0, 1, 2, 3])
    """
    _check(images)
    return torch.from_numpy(_classifier().predict_proba(_features(images)).astype(np.float64))


def digit_confidence(images: Tensor) -> float:
    """Mean over images of the most probable digit's probability; see ``digit_probabilities``."""
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


def frechet_distance(images: Tensor, reference: Tensor) -> float:
    """Frechet distance of two sets of digits in the classifier's 64 hidden features: of the Gaussians fitted to them.

    It falls with the number of images and must be compared at the same number only.

    Args:
        images, reference: ``(N, 1, 8, 8)`` and ``(M, 1, 8, 8)`` in [-1, 1], at least two each; what a sampler
            overshoots is clipped.

    Returns:
        ``||m - m'||^2 + tr(C + C' - 2 (C C')^(1/2))``.

    Raises:
        ValueError: if the images have another shape, are not finite, or are fewer than two.

    Source: Heusel et al., "GANs Trained by a Two Time-Scale Update Rule..." (NeurIPS 2017), Eq. 6, with the features of
        this classifier instead of Inception's.

    >>> train, held_out = split_held_out(load_digits())
    >>> noise = torch.rand(500, 1, 8, 8) * 2 - 1
    >>> frechet_distance(held_out.images, train.images) < 0.1 * frechet_distance(noise, train.images)
    True
    """
    (mean, cov), (other_mean, other_cov) = (_moments(_hidden(each)) for each in (images, reference))
    # tr (C C')^(1/2) is the sum of the roots of the eigenvalues of the symmetric R C' R with R R = C.
    values, vectors = np.linalg.eigh(cov)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    overlap = np.sqrt(np.linalg.eigvalsh(root @ other_cov @ root).clip(min=0)).sum()
    return float(((mean - other_mean) ** 2).sum() + np.trace(cov) + np.trace(other_cov) - 2 * overlap)


def _moments(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if len(features) < 2:
        raise ValueError(f"a distance needs at least two images of each set, got {len(features)}")
    return features.mean(axis=0), np.cov(features, rowvar=False)


def _hidden(images: Tensor) -> np.ndarray:
    _check(images)
    model = _classifier()
    hidden = _features(images).astype(np.float64) @ model.coefs_[0] + model.intercepts_[0]
    return np.asarray(hidden).clip(min=0)


def _check(images: Tensor) -> None:
    if images.ndim != 4 or tuple(images.shape[1:]) != (1, 8, 8) or len(images) == 0:
        raise ValueError(f"images must be (N, 1, 8, 8) with N at least 1, got {tuple(images.shape)}")
    if not bool(images.isfinite().all()):
        raise ValueError("images must be finite, got infinities or NaNs")


def _features(images: Tensor) -> np.ndarray:
    return images.detach().to("cpu", torch.float32).clamp(-1, 1).flatten(1).numpy()


@cache
def _classifier() -> Any:
    from sklearn.neural_network import MLPClassifier

    train, _ = split_held_out(load_digits())
    assert train.labels is not None
    # A perceptron, because its confidence falls off the digits: images of noise get half of it (an SVM's get 0.8).
    model = MLPClassifier((64,), alpha=0.1, learning_rate_init=3e-3, max_iter=500, random_state=0)
    return model.fit(_features(train.images), train.labels.numpy())
