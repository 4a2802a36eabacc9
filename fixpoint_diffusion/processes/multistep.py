r"""How steps of multistep solvers use earlier predictions: weights of the differences of predicted images.

All take ``signal`` and ``noise``, ``(T + 1,)`` float64: what latents ``signal x_0 + noise eps`` hold before each step
and after the last. They return ``(T, p)``: what :class:`Transitions` calls ``history``. With
``lambda = log(signal / noise)``, ``h`` is the step's change of lambda, and ``r`` how far back an earlier prediction
lies, in units of h.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def heun_weights(sigmas: Tensor) -> Tensor:
    """Of Heun's method on latents ``x_0 + sigma eps``, ``(T, 1)``: every second step corrects the one before.

    The first of two steps is Euler's. The second starts where that arrived, at the same sigma, and half of Euler's step
    is made anew with the slope there.

    Args:
        sigmas: ``(T + 1,)``, as :class:`diffusers.HeunDiscreteScheduler` has them, all but the ends twice.

    Source: Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models" (2022), Algorithm 1.
    """
    weights = torch.zeros(len(sigmas) - 1, 1, dtype=torch.float64, device="cpu")
    weights[1::2, 0] = (1 - sigmas[:-2:2] / sigmas[1:-1:2]) / 2
    return weights


def dpm_solver_weights(config: Mapping[str, Any], signal: Tensor, noise: Tensor, first: int = 0) -> Tensor | None:
    """Of DPM-Solver++, ``(T, order - 1)``; None for order 1.

    Args:
        config: of a :class:`diffusers.DPMSolverMultistepScheduler`.
        first: the step that a loop begins with, which nothing was predicted before.

    Source: Lu et al., "DPM-Solver++" (2022), Algorithm 2 and its variants with noise.
    """
    order, steps = config["solver_order"], len(signal) - 1
    if order == 1:
        return None
    short = steps < 15 and config["lower_order_final"]
    first_at_end = config["euler_at_final"] or short or config["final_sigmas_type"] == "zero"
    weights, lambdas = torch.zeros(steps, order - 1, dtype=torch.float64, device="cpu"), signal.log() - noise.log()
    noisy = config["algorithm_type"].startswith("sde")
    for k in range(first + 1, steps):
        left = steps - k  # steps that are left, this one counted
        if left == 1 and first_at_end:
            continue
        h = lambdas[k + 1] - lambdas[k]
        z = 2 * h if noisy else h
        r_1 = (lambdas[k] - lambdas[k - 1]) / h
        second = order == 2 or k == first + 1 or (left == 2 and short)
        # What weighs the slope of x_0 in lambda, times h; the midpoint rule has its limit for small h.
        halved = second and config["solver_type"] == "midpoint"
        slope = signal[k + 1] * (-torch.expm1(-z) / 2 if halved else torch.expm1(-z) / z + 1)
        weights[k, 0] = -slope / r_1
        if not second:  # the parabola through three predictions, by its divided differences
            r_2 = (lambdas[k - 1] - lambdas[k - 2]) / h
            # With noise, 0.5 would be right; diffusers has the other sign, and its steps are what is wanted.
            curvature = signal[k + 1] * ((torch.expm1(-z) + z) / z**2 - (-0.5 if noisy else 0.5))
            share = (slope * r_1 - curvature) / (r_1 + r_2)
            weights[k, 0] -= share * (1 / r_1 + 1 / r_2)
            weights[k, 1] = share / r_2
    return weights


def unipc_weights(config: Mapping[str, Any], signal: Tensor, noise: Tensor, first: int = 0) -> Tensor:
    """Of UniPC, ``(T, order)``: a step corrects the latent that it starts from, and predicts the next.

    Args:
        config: of a :class:`diffusers.UniPCMultistepScheduler`.
        first: as for :func:`dpm_solver_weights`.

    Source: Zhao et al., "UniPC: A Unified Predictor-Corrector Framework for Fast Sampling of Diffusion Models" (2023).
    """
    steps, order = len(signal) - 1, config["solver_order"]
    weights, lambdas = torch.zeros(steps, order, dtype=torch.float64, device="cpu"), signal.log() - noise.log()
    final = config["lower_order_final"]
    orders = {k: min(order, k - first + 1, steps - k if final else order) for k in range(first, steps)}
    for k in range(first, steps):
        predicted, _, scale = _unipc_rule(config["solver_type"], lambdas, k, orders[k])
        for j, weight in enumerate(predicted):
            weights[k, j] -= signal[k + 1] * scale * weight
        if k == first or k - 1 in config["disable_corrector"]:
            continue
        # What the corrector adds to the latent that the predictor of the step before had made of the same predictions.
        predicted, corrected, scale = _unipc_rule(config["solver_type"], lambdas, k - 1, orders[k - 1])
        move = -signal[k] * scale * noise[k + 1] / noise[k]
        for j, (old, new) in enumerate(zip(predicted, corrected, strict=False), start=1):
            weights[k, j] += move * (new - old)
            weights[k, 0] -= move * (new - old)
        weights[k, 0] -= move * corrected[-1]
    return weights


def _solution(system: Tensor, wanted: Tensor) -> Tensor:
    """As ``torch.linalg.solve``, but NaN for a singular system: whoever knows the settings checks what they make."""
    solution, info = torch.linalg.solve_ex(system, wanted)
    return torch.where(info == 0, solution, torch.nan)


def _unipc_rule(solver_type: str, lambdas: Tensor, k: int, order: int) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Predictor and corrector of the step from k, by what they make of differences from the prediction at k.

    Returns:
        Weights of the differences of the ``order - 1`` predictions before k, for the predictor and for the corrector;
        the corrector's last weighs the difference of the prediction at k + 1. Last, what multiplies them all.
    """
    h = lambdas[k + 1] - lambdas[k]
    back = [(lambdas[k - j] - lambdas[k]) / h for j in range(1, order)]
    rates = torch.stack([*back, torch.ones_like(h)])
    scale = -h if solver_type == "bh1" else torch.expm1(-h)
    rows, moments, term, factorial = [], [], torch.expm1(-h) / -h - 1, 1
    for i in range(1, order + 1):
        rows.append(rates ** (i - 1))
        moments.append(term * factorial / scale)
        factorial *= i + 1
        term = term / -h - 1 / factorial
    system, wanted = torch.stack(rows), torch.stack(moments)
    half = torch.full_like(rates[:1], 0.5)
    predictor = half if order == 2 else _solution(system[:-1, :-1], wanted[:-1])
    corrector = half if order == 1 else _solution(system, wanted)
    return (
        [weight / r for weight, r in zip(predictor, back, strict=False)],
        [*(weight / r for weight, r in zip(corrector, back, strict=False)), corrector[-1]],
        scale,
    )
