from __future__ import annotations

import numpy as np
import pytest
import torch

from fixpoint_diffusion import DDIMChain, NoiseSchedule, initial_noise
from fixpoint_diffusion.denoisers import embedded
from fixpoint_diffusion.evaluation import (
    DigitFeatures,
    digit_confidence,
    digit_frechet_distance,
    digit_probabilities,
    digit_quality,
    train_digit_classifier,
)
from fixpoint_diffusion.training.data import load_digits, split_held_out


def test_classifier_is_accurate_and_calibrated_on_digits_it_never_saw() -> None:
    _, held_out = split_held_out(load_digits())
    probabilities = digit_probabilities(held_out.images)
    accuracy = float((probabilities.argmax(1) == held_out.labels).double().mean())
    assert accuracy > 0.95
    assert float(probabilities.amax(1).mean()) == pytest.approx(accuracy, abs=0.03)


def test_probabilities_sum_to_one_and_do_not_depend_on_the_batch() -> None:
    images = load_digits().images[:7]
    probabilities = digit_probabilities(images)
    assert probabilities.shape == (7, 10)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(7, dtype=torch.float64))
    one_by_one = torch.cat([digit_probabilities(image[None]) for image in images])
    torch.testing.assert_close(probabilities, one_by_one, rtol=1e-5, atol=1e-6)


def test_confidence_tells_digits_from_noise() -> None:
    _, held_out = split_held_out(load_digits())
    noise = torch.randn(300, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    shuffled = held_out.images.flatten(1)[:, torch.randperm(64, generator=torch.Generator().manual_seed(0))]
    real = digit_confidence(held_out.images)
    assert digit_confidence(noise) < 0.8 * real
    assert digit_confidence(shuffled.view_as(held_out.images)) < 0.8 * real


def test_quality_of_one_repeated_digit_shows_in_the_class_shares() -> None:
    digits = load_digits()
    threes = digits.images[digits.labels == 3][:1].expand(5, -1, -1, -1)
    quality = digit_quality(threes)
    assert quality.class_shares == (0, 0, 0, 1, 0, 0, 0, 0, 0, 0)
    assert quality.confidence == pytest.approx(digit_confidence(threes))


def test_overshooting_values_are_clipped() -> None:
    images = load_digits().images[:5]
    loud = torch.where(images == 1, 1.5, images)
    torch.testing.assert_close(digit_probabilities(loud), digit_probabilities(images))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(2, 8, 8), r"\(N, 1, 8, 8\)"),
        (torch.zeros(0, 1, 8, 8), "at least 1"),
        (torch.full((1, 1, 8, 8), torch.nan), "finite"),
        (torch.zeros(1, 1, 8, 8, dtype=torch.uint8), "holds torch.uint8 values"),
        (torch.linspace(0, 1, 64).reshape(1, 1, 8, 8), "none negative"),
        (torch.linspace(-3, 260, 64).reshape(1, 1, 8, 8), r"expected \[-1, 1\]"),
    ],
)
def test_unusable_images_are_refused(images: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        digit_quality(images)


@pytest.mark.parametrize("seed", [0, 1])
def test_samples_of_the_embedded_unet_look_like_digits(seed: int) -> None:
    """The acceptance figure of the shipped model is 0.90 with 256 images; it has 0.98 to 1.00."""
    denoiser = embedded("ddpm-digits")
    x_T = initial_noise(seed, range(128), (1, 8, 8))
    chain = DDIMChain(denoiser, x_T, NoiseSchedule.from_diffusers(denoiser.schedule_config), steps=50)
    with torch.no_grad():
        quality = digit_quality(chain.sequential()[:, -1])
    assert quality.relative_confidence >= 0.90
    assert min(quality.class_shares) > 0


def test_bundled_weights_are_those_of_the_documented_training() -> None:
    trained = train_digit_classifier()
    images = load_digits().images
    hidden = (images.flatten(1) @ trained["hidden.weight"] + trained["hidden.bias"]).relu()
    probabilities = (hidden @ trained["output.weight"] + trained["output.bias"]).softmax(1)
    torch.testing.assert_close(digit_probabilities(images).float(), probabilities, rtol=0, atol=0.05)
    assert DigitFeatures().weights_hash == "304e60ddd41b1f90264c5f47ce5d9d269394fa3cf9617db29a9513f30c5dca83"


def test_frechet_distance_is_that_of_the_fitted_gaussians() -> None:
    train, held_out = split_held_out(load_digits())
    noisy = (held_out.images + 0.5 * torch.randn(held_out.images.shape, generator=torch.manual_seed(0))).clamp(-1, 1)

    def moments(images: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        hidden = DigitFeatures()(images).numpy()
        return hidden.mean(axis=0), np.cov(hidden.T)

    (m, C), (n, D) = moments(noisy), moments(train.images)
    overlap = np.sqrt(np.linalg.eigvals(C @ D).real.clip(min=0)).sum()
    expected = ((m - n) ** 2).sum() + np.trace(C + D) - 2 * overlap
    assert digit_frechet_distance(noisy, train.images) == pytest.approx(expected, rel=1e-4)
    assert 0 <= digit_frechet_distance(train.images, train.images) < 1e-9
    assert expected > 2 * digit_frechet_distance(held_out.images, train.images)


def test_frechet_distance_needs_two_images() -> None:
    images = load_digits().images
    with pytest.raises(ValueError, match="at least two"):
        digit_frechet_distance(images[:1], images)
