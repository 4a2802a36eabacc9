"""What is measured of an FPDM, or a DiT, of digits with classes, for all benchmarks of its training and its use.

Samples are drawn by DDIM without guidance, image i with class i modulo 10, from the noise of one seed. Their quality is
the Frechet distance to real digits that no model has seen, in the features of the package's classifier, and the
classifier's mean confidence over its confidence in these digits. It depends on the number of images: compare figures of
equal numbers only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fixpoint_diffusion.evaluation import digit_frechet_distance, digit_probabilities, digit_quality
from fixpoint_diffusion.experiments.fpdm import classes_of
from fixpoint_diffusion.models import FPDM, DiT, FPDMLayerProblem, fpdm_layer_problem
from fixpoint_diffusion.processes import NoiseSchedule, Transitions, initial_noise, wide
from fixpoint_diffusion.sampling import fpdm_steps, sample_fpdm
from fixpoint_diffusion.training.data import load_digits, split_held_out

MULTIPLES = (1, 2, 3, 4)
SETTLED = 1e-4


def quality(images: Tensor, classes: Tensor) -> dict[str, float]:
    """``frechet``, ``confidence`` (relative) and ``agreement``: the share of images that are read as their class."""
    held_out = split_held_out(load_digits())[1].images
    read = digit_probabilities(images).argmax(dim=1)
    return {
        "frechet": digit_frechet_distance(images, held_out),
        "confidence": digit_quality(images).relative_confidence,
        "agreement": float((read == classes).double().mean()),
    }


def sample_quality(
    model: FPDM, schedule: NoiseSchedule, *, images: int, steps: int, seed: int, **options: Any
) -> dict[str, float]:
    """Quality of samples and what they cost; ``options`` are those of ``sample_fpdm``."""
    classes = classes_of(images)
    x_T = initial_noise(seed, range(images), model.config.sample_shape)
    samples = sample_fpdm(model, x_T, schedule, steps=steps, y=classes, **options)
    return {**quality(samples.images, classes), "block_passes": samples.block_passes}


@torch.no_grad()
def dit_quality(model: DiT, schedule: NoiseSchedule, *, images: int, steps: int, seed: int) -> dict[str, float]:
    """The same of a DiT: as many steps, from the same noise."""
    classes = classes_of(images)
    transitions = Transitions.of(schedule, schedule.timesteps(steps, "trailing"), prediction_type="v_prediction")
    x = initial_noise(seed, range(images), model.config.sample_shape)
    for k, t in enumerate(transitions.timesteps):
        x = transitions.step(wide(x), wide(model(x, t, classes)), k).to(x.dtype)
    return {**quality(x, classes), "block_passes": float(steps * model.config.depth)}


def beyond_training(
    model: FPDM, schedule: NoiseSchedule, *, depth: int, images: int, steps: int, seed: int
) -> dict[str, dict[str, float]]:
    """Quality with 1, 2, 3 and 4 times ``depth`` iterations a step, each step's layer started anew.

    At a fixed point nothing changes any more, so quality stays; a loop that is none gets worse.
    """
    return {
        str(times): sample_quality(
            model, schedule, images=images, steps=steps, seed=seed, iterations=times * depth, reuse=False
        )
        for times in MULTIPLES
    }


@torch.no_grad()
def layer_figures(
    model: FPDM, schedule: NoiseSchedule, *, depth: int, images: int, steps: int, seed: int
) -> dict[str, float]:
    """How well the layer is solved, at the latents of a sampling run.

    ``residual``: ``|f(z) - z| / |f(z)|`` after ``depth`` plain iterations, the median of images and steps.
    ``worst_residual``: of these the 99 % quantile.
    ``cosine``: between the states reached in four times as many iterations from the pre blocks' output and from normal
    noise of the same size, mean over images and steps; 1 where every start leads to one solution.
    ``lowest_cosine``: of these the 1 % quantile.
    ``unsettled``: the share of images and steps whose residual is above 1e-4 after four times ``depth`` iterations.
    """
    classes = classes_of(images)
    x_T = initial_noise(seed, range(images), model.config.sample_shape)
    generator = torch.Generator().manual_seed(seed)
    residuals, cosines, still_moving = [], [], []
    for step in fpdm_steps(model, x_T, schedule, steps=steps, iterations=depth, y=classes):
        problem = fpdm_layer_problem(model, step.latent, torch.tensor(step.timestep), y=classes)
        z = _iterated(problem, problem.z0, depth)
        image = problem(z)
        residuals.append(_norm(image - z) / _norm(image))
        noise = torch.randn(z.shape, generator=generator)
        other = _iterated(problem, noise * (_norm(problem.z0) / _norm(noise))[:, None, None], 4 * depth)
        far = _iterated(problem, z, 3 * depth)
        cosines.append(torch.cosine_similarity(far.flatten(1), other.flatten(1)))
        image = problem(far)
        still_moving.append(~(_norm(image - far) <= SETTLED * _norm(image)))  # NaN is not settled
    residual, cosine = torch.cat(residuals).double(), torch.cat(cosines).double()
    return {
        "residual": float(residual.median()),
        "worst_residual": float(residual.quantile(0.99)),
        "cosine": float(cosine.mean()),
        "lowest_cosine": float(cosine.quantile(0.01)),
        "unsettled": float(torch.cat(still_moving).double().mean()),
    }


def _iterated(problem: FPDMLayerProblem, z: Tensor, times: int) -> Tensor:
    for _ in range(times):
        z = problem(z)
    return z


def _norm(z: Tensor) -> Tensor:
    return z.flatten(1).norm(dim=1)
