"""An FPDM's chain and the layers of all its steps as one fixed point."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypedDict, Unpack

import torch
from torch import Tensor

from fixpoint import CausalQuasiNewton, ProgressBar, Recurrence, Solution, solve
from fixpoint_diffusion.models.fpdm import FPDM, fpdm_layer_problem
from fixpoint_diffusion.processes import GaussianPrior, NoiseSchedule, Transitions
from fixpoint_diffusion.processes.schedules import positive
from fixpoint_diffusion.sampling.fpdm.step import StepFunction, transitions_of

OnFailure = Literal["warn", "raise", "ignore"]


class JointOptions(TypedDict, total=False):
    """Options of a joint solve, whatever its steps; :func:`sample_fpdm_jointly` says what they mean."""

    iterations: int
    seed: int
    y: Tensor | None
    guidance: float
    first_sample: int
    prior: GaussianPrior | None
    solver: CausalQuasiNewton
    rtol: float
    max_evals: int | None
    on_failure: OnFailure
    progress: bool


@dataclass(frozen=True, eq=False, kw_only=True)
class JointSamples:
    """What :func:`sample_fpdm_jointly` returns.

    Attributes:
        images: ``(B, C, H, W)``.
        trajectory: All latents ``(B, T, C, H, W)``; row k is the latent after step k.
        layers: The layer's states after its iterations in every step ``(B, T, L, D)``; with guidance
            ``(B, T, 2, L, D)``, those without class first.
        solution: The solve's own account; its ``value`` holds latents and layers, flat.
        rounds: Batched calls of the model.
        evals: Steps of single images in them.
        block_passes: Forward passes of blocks, for one image and row of the network, as in ``FPDMSamples``: the work.
        serial_block_passes: Those that have to wait for each other, which is what parallel sampling makes fewer.

    Example:
        See :func:`fixpoint_diffusion.sampling.sample_fpdm_jointly`, which returns one.
    """

    images: Tensor
    trajectory: Tensor
    layers: Tensor
    solution: Solution
    rounds: int
    evals: int
    block_passes: float
    serial_block_passes: int


@torch.no_grad()
def sample_fpdm_jointly(
    model: FPDM,
    x_T: Tensor,
    schedule: NoiseSchedule,
    *,
    steps: int = 50,
    eta: float = 0.0,
    variance_type: str = "fixed_small",
    spacing: str = "trailing",
    **options: Unpack[JointOptions],
) -> JointSamples:
    """What :func:`sample_fpdm` with reuse samples, all steps at once.

    The unknown of step k is the latent after it together with the state of its layer. One evaluation applies the layer
    ``iterations`` times to the state of the step before, as reuse does, and takes the chain's step. So the fixed point
    is the sequential run with that number of iterations, and no layer has to be solved inside an evaluation, as it has
    when a chain of an ``FPDMDenoiser`` is solved by :func:`~fixpoint_diffusion.sample`.

    A state has as many entries as image and tokens together, and the solver holds several states of every step.

    Args:
        model, x_T, schedule, steps, eta, variance_type, spacing, seed, y, guidance, first_sample: As for
            :func:`sample_fpdm`.
        iterations: Iterations of the layer in every step, 1 by default.
        prior: What is known of the images, for the first guess of the latents; None: a plain guess.
        solver: ``CausalQuasiNewton``, with its window or budget of rows.
        rtol: A state is done when its predicted error is at most this share of its norm, 1e-3 by default. Image and
            tokens count alike: the tokens are scaled to the norm of the noise.
        max_evals: Most rounds; by default as many as always do.
        on_failure: ``"warn"``, ``"raise"`` or ``"ignore"`` when samples do not converge.
        progress: Show a bar.

    Returns:
        The images, what the solver says of them, and their cost.

    Raises:
        ValueError: As :func:`sample_fpdm`, or if ``iterations`` is below 1.

    >>> from fixpoint_diffusion.models import FPDMConfig
    >>> from fixpoint_diffusion.sampling import sample_fpdm
    >>> model = FPDM(FPDMConfig(width=16, heads=2))
    >>> x_T, schedule = torch.randn(2, 1, 8, 8), NoiseSchedule.linear().zero_terminal_snr()
    >>> joint = sample_fpdm_jointly(model, x_T, schedule, steps=20, iterations=2)
    >>> torch.allclose(joint.images, sample_fpdm(model, x_T, schedule, steps=20, iterations=2).images, atol=1e-2)
    True
    >>> joint.rounds < 20
    True
    """
    transitions = transitions_of(model, schedule, steps=steps, eta=eta, variance_type=variance_type, spacing=spacing)
    return follow_jointly(model, x_T, transitions, **options)


@torch.no_grad()
def follow_jointly(
    model: FPDM,
    x_T: Tensor,
    transitions: Transitions,
    *,
    iterations: int = 1,
    seed: int = 0,
    y: Tensor | None = None,
    guidance: float = 1.0,
    first_sample: int = 0,
    prior: GaussianPrior | None = None,
    solver: CausalQuasiNewton = CausalQuasiNewton(),  # noqa: B008 - immutable
    rtol: float = 1e-3,
    max_evals: int | None = None,
    on_failure: OnFailure = "warn",
    progress: bool = False,
) -> JointSamples:
    """As :func:`sample_fpdm_jointly`, with steps that were made elsewhere.

    Raises:
        ValueError: As :func:`sample_fpdm_jointly`.
    """
    positive("iterations", iterations)
    steps = transitions.steps
    take_step = StepFunction(model=model, transitions=transitions, y=y, guidance=guidance)
    take_step.check_start(x_T)
    noise = take_step.noise(x_T, list(range(steps)), seed, first_sample)
    prior = prior or GaussianPrior.isotropic()
    batch, size, rounds, rows = len(x_T), x_T[0].numel(), 0, 0
    samples = torch.arange(batch, device=x_T.device)[:, None].expand(-1, steps)
    numbers = torch.arange(steps, device=x_T.device).expand(batch, -1)
    halves, tokens = take_step.halves, (model.config.tokens, model.config.width)

    def before_layer(latent: Tensor, k: Tensor, sample: Tensor) -> Tensor:
        """What the layer starts from without reuse, ``(N, halves L D)``."""
        images, t, labels = take_step.inputs(latent, k, sample)
        return _by_image(fpdm_layer_problem(model, images, t, y=labels).z0, halves).to(latent.dtype)

    latents = prior.path(x_T, transitions, None if noise is None else noise.to(x_T.dtype))
    inputs = torch.cat([x_T[:, None], latents[:, :-1]], dim=1)
    guess = before_layer(inputs.flatten(0, 1), numbers.flatten(), samples.flatten()).unflatten(0, (batch, steps))
    scale = (x_T.flatten(1).norm(dim=1) / guess[:, 0].norm(dim=1))[:, None]
    scale = torch.where((scale > 0) & torch.isfinite(scale), scale, 1)  # any will do, where one of them is 0

    def step(state: Tensor, k: Tensor, sample: Tensor, *drawn: Tensor) -> Tensor:
        nonlocal rounds, rows
        rounds, rows = rounds + 1, rows + len(state)
        latent = state[:, :size].unflatten(1, x_T.shape[1:])
        z0 = (state[:, size:] / scale[sample]).reshape(-1, halves, *tokens).transpose(0, 1).flatten(0, 1)
        after, solution = take_step(latent, z0, k, drawn[0] if drawn else None, sample, depth=iterations)
        layers = scale[sample] * _by_image(solution.value, halves)
        return torch.cat([after.flatten(1), layers.to(after.dtype)], dim=1)

    # The prior says how latents move. Of the tokens nothing is known, and iterating a contraction forgets them.
    slopes = GaussianPrior.isotropic().slopes(transitions).expand(-1, size)
    chain = Recurrence(
        step,
        torch.cat([x_T.flatten(1), scale * guess[:, 0]], dim=1),
        inputs=(numbers, samples) if noise is None else (numbers, samples, noise),
        slopes=torch.cat([slopes, slopes.new_zeros(steps, guess.shape[2])], dim=1),
    )
    start = torch.cat([latents.flatten(2), scale[:, :, None] * guess], dim=2)
    most = 3 * steps * max(1, batch) if max_evals is None else max_evals
    with ProgressBar("sampling") as bar:
        solution = solve(
            chain,
            start,
            solver=solver,
            backward=None,
            rtol=rtol,
            max_evals=most,
            on_failure=on_failure,
            callback=bar if progress else None,
        )
    trajectory = solution.value[:, :, :size].unflatten(2, x_T.shape[1:])
    layers = (solution.value[:, :, size:] / scale[:, :, None]).unflatten(2, (halves, *tokens))
    passes, n_pre = model.config.block_passes(iterations), model.config.n_pre
    return JointSamples(
        images=trajectory[:, -1],
        trajectory=trajectory,
        layers=layers[:, :, 0] if halves == 1 else layers,
        solution=solution,
        rounds=rounds,
        evals=rows,
        block_passes=rows * passes / batch + steps * n_pre,
        serial_block_passes=rounds * passes + n_pre,
    )


def _by_image(tokens: Tensor, halves: int) -> Tensor:
    """Tokens ``(halves N, L, D)``, half by half, as ``(N, halves L D)``."""
    return tokens.unflatten(0, (halves, -1)).transpose(0, 1).flatten(1)
