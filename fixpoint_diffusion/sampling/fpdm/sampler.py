"""Sampling from an FPDM with a chosen number of iterations per step, and reuse of solutions between steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypedDict, Unpack

import torch
from torch import Tensor

from fixpoint import Anderson, ProgressBar, Solution, Solver
from fixpoint_diffusion.models.allocation import iterations_per_step
from fixpoint_diffusion.models.fpdm import FPDM
from fixpoint_diffusion.processes import NoiseSchedule, Transitions
from fixpoint_diffusion.sampling.fpdm.iterations import LastIterate, ToTolerance
from fixpoint_diffusion.sampling.fpdm.step import StepFunction, transitions_of

Reuse = bool | Literal["extrapolate"]


class FPDMOptions(TypedDict, total=False):
    """Options of a sampling run of an FPDM, whatever its steps; :func:`sample_fpdm` says what they mean.

    Example:
        See :func:`fixpoint_diffusion.sample_fpdm`, which takes the same options.
    """

    iterations: int | Sequence[int] | Tensor | ToTolerance
    reuse: Reuse
    solver: Solver | None
    seed: int
    y: Tensor | None
    guidance: float
    first_sample: int
    record: bool


@dataclass(frozen=True)
class FPDMStep:
    """One step of sampling from an FPDM.

    Attributes:
        timestep: What the network is told.
        latent: The noisy images that the step starts from, ``(N, C, H, W)``.
        z0: Where the fixed point layer started, ``(N, L, D)``; None: at the pre blocks' output.
        solution: What the layer returned; its ``trace`` is None unless recorded.
        after: The less noisy images that the step leads to, ``(N, C, H, W)``.

    Example:
        See :func:`fixpoint_diffusion.sampling.fpdm_steps`, which yields them.
    """

    timestep: int
    latent: Tensor
    z0: Tensor | None
    solution: Solution
    after: Tensor


@dataclass(frozen=True, kw_only=True)
class FPDMSamples:
    """Images sampled from an FPDM and what they cost.

    Attributes:
        images: ``(N, C, H, W)``.
        timesteps: Sampling timesteps ``(S,)``, the noisiest first.
        iterations: Iterations of the fixed point layer at each step and for each row of the network ``(S, N)``; with
            guidance ``(S, 2 N)``, those without class first.
        block_passes: Forward passes of transformer blocks for one row of the network, ``n_pre + k + n_post`` summed
            over the steps, mean over the rows: the paper's measure. Beside its block, an iteration costs the two
            projections of the injection.
        residuals: For each step ``(k, N)`` norms ``||f(z) - z||`` at every evaluation, a row that is done with its last
            one; None unless recorded.

    Example:
        See :func:`fixpoint_diffusion.sample_fpdm`, which returns one.
    """

    images: Tensor
    timesteps: Tensor
    iterations: Tensor
    block_passes: float
    residuals: tuple[Tensor, ...] | None = None

    @property
    def deltas(self) -> Tensor | None:
        """``(S, N)``: the residual of each step's last evaluation, None unless recorded.

        With plain Picard iteration it is the norm of the difference of the last two iterates, the ``delta_t`` of
        Fig. 6.
        """
        return None if self.residuals is None else torch.stack([trace[-1] for trace in self.residuals])


def sample_fpdm(
    model: FPDM,
    x_T: Tensor,
    schedule: NoiseSchedule,
    *,
    steps: int = 50,
    eta: float = 0.0,
    variance_type: str = "fixed_small",
    spacing: str = "trailing",
    progress: bool = False,
    **options: Unpack[FPDMOptions],
) -> FPDMSamples:
    """Sample by DDIM or DDPM, with so many iterations of the fixed point layer in every step.

    Args:
        model: The model.
        x_T: Initial noise ``(N, C, H, W)``.
        schedule: The noise schedule that the model was trained on.
        steps: Sampling steps S.
        eta: Share of DDPM's noise: 0 is deterministic DDIM, 1 is DDPM.
        variance_type: Of DDPM's noise, as in :class:`~fixpoint_diffusion.processes.Transitions`; ``"learned_range"`` or
            ``"learned"`` for a model with ``learn_sigma``.
        spacing: Which timesteps are visited. ``"trailing"`` starts at the last one and makes steps of one length, down
            to the image; ``"linspace"`` includes both ends, as in the paper, and needs more steps for the same images.
        progress: Show a bar.
        iterations: Iterations of the layer: one number for all steps, or one for each, the noisiest step first, see
            :func:`allocate`; or a :class:`ToTolerance`, which ends each step by itself.
        reuse: Start each step's layer from the previous step's solution (Sec. 3.3). ``"extrapolate"``: from the
            last solution plus a share of what changed since the one before, ``1 - 2^-k`` after ``k`` iterations. False:
            from the pre blocks' output.
        solver: Solver of the layer. None: plain iteration for a count; ``Anderson()`` for a :class:`ToTolerance`,
            because plain iteration does not converge for every image. The paper has plain iteration for both.
        seed: Of the noise, which is a function of (seed, image, step).
        y: Classes ``(N,)`` of a conditional model.
        guidance: Classifier-free guidance: 1 is none. Else the layer is solved for 2 N rows, those without class first,
            and so are the solutions that are handed on.
        first_sample: Number of the first image among all that share the seed.
        record: Keep the residual of every iteration.

    Returns:
        The images, the iterations, their cost in block passes and, if recorded, the residuals.

    Raises:
        ValueError: If the iterations do not fit the steps, a shape, a dtype, a class, ``eta``, ``variance_type`` or
            ``spacing`` is out of range, guidance is not finite or asked for without classes, or a learned variance of a
            model that has none.

    Source: Bai and Melas-Kyriazi, CVPR 2024, Sec. 3.3; footnote 4 for the cost.

    >>> from fixpoint_diffusion.models import FPDM, FPDMConfig
    >>> model = FPDM(FPDMConfig(width=16, heads=2))
    >>> schedule = NoiseSchedule.linear().zero_terminal_snr()
    >>> samples = sample_fpdm(model, torch.randn(2, 1, 8, 8), schedule, steps=10, iterations=3)
    >>> samples.images.shape, samples.block_passes
    (torch.Size([2, 1, 8, 8]), 50.0)
    """
    run = fpdm_steps(
        model, x_T, schedule, steps=steps, eta=eta, variance_type=variance_type, spacing=spacing, **options
    )
    images, timesteps, counts, residuals = x_T, [], [], []
    for step in ProgressBar.tqdm(run, total=steps, desc="sampling", unit="step", disable=not progress):
        images = step.after
        timesteps.append(step.timestep)
        counts.append(step.solution.evals)
        if step.solution.trace is not None:
            residuals.append(step.solution.trace)
    iterations, config = torch.stack(counts), model.config
    return FPDMSamples(
        images=images,
        timesteps=torch.tensor(timesteps, device="cpu"),
        iterations=iterations,
        block_passes=steps * config.block_passes(0)
        + config.implicit_blocks * float(iterations.double().mean(dim=1).sum()),
        residuals=tuple(residuals) or None,
    )


@torch.no_grad()
def fpdm_steps(
    model: FPDM,
    x_T: Tensor,
    schedule: NoiseSchedule,
    *,
    steps: int = 50,
    eta: float = 0.0,
    variance_type: str = "fixed_small",
    spacing: str = "trailing",
    **options: Unpack[FPDMOptions],
) -> Iterator[FPDMStep]:
    """The steps of :func:`sample_fpdm` one by one, for whoever wants to look at latents and layer solutions.

    Arguments and errors are those of :func:`sample_fpdm`.

    >>> from fixpoint_diffusion.models import FPDM, FPDMConfig
    >>> model = FPDM(FPDMConfig(width=16, heads=2))
    >>> schedule = NoiseSchedule.linear().zero_terminal_snr()
    >>> [step.timestep for step in fpdm_steps(model, torch.randn(2, 1, 8, 8), schedule, steps=4)]
    [999, 749, 499, 249]
    """
    transitions = transitions_of(model, schedule, steps=steps, eta=eta, variance_type=variance_type, spacing=spacing)
    yield from follow_transitions(model, x_T, transitions, **options)


@torch.no_grad()
def follow_transitions(
    model: FPDM,
    x_T: Tensor,
    transitions: Transitions,
    *,
    iterations: int | Sequence[int] | Tensor | ToTolerance = 4,
    reuse: Reuse = True,
    solver: Solver | None = None,
    seed: int = 0,
    y: Tensor | None = None,
    guidance: float = 1.0,
    first_sample: int = 0,
    record: bool = False,
) -> Iterator[FPDMStep]:
    """As :func:`fpdm_steps`, with steps that were made elsewhere, such as by :meth:`SamplerConfig.transitions`.

    Raises:
        ValueError: As :func:`sample_fpdm`.

    Example:
        See :func:`fixpoint_diffusion.sample_fpdm`, which takes its steps from a schedule.
    """
    if reuse not in (True, False, "extrapolate"):
        raise ValueError(f"reuse must be True, False or 'extrapolate', got {reuse!r}")
    take_step = StepFunction(model=model, transitions=transitions, y=y, guidance=guidance)
    take_step.check_start(x_T)
    latent, z0, before = x_T, None, None
    for k, how in enumerate(_solves(iterations, solver, transitions.steps)):
        noise = take_step.noise(x_T, [k], seed, first_sample)
        after, solution = take_step(latent, z0, k, None if noise is None else noise[:, 0], record=record, **how)
        yield FPDMStep(int(transitions.timesteps[k]), latent, z0, solution, after)
        latent = after
        z0 = solution.value if reuse else None
        if reuse == "extrapolate":
            z0 = solution.value if before is None else _extrapolated(solution, before)
            before = solution.value


def _extrapolated(solution: Solution, before: Tensor) -> Tensor:
    """The next solution, on the line through the last two.

    The errors of both come along, up to three times as large if the whole change is added: at one iteration a step
    that spoils the images. So the fewer iterations a solution has had, the less of its change is added.
    """
    share = 1 - torch.exp2(-solution.evals.to(before.dtype))
    return solution.value + share[:, None, None] * (solution.value - before)


def _solves(
    iterations: int | Sequence[int] | Tensor | ToTolerance, solver: Solver | None, steps: int
) -> list[dict[str, Any]]:
    """How the model is to solve its layer in each step: its options."""
    if isinstance(iterations, ToTolerance):
        return [{"solver": LastIterate(solver=solver or Anderson(), until=iterations)}] * steps
    return [{"solver": solver, "depth": count} for count in iterations_per_step(iterations, steps)]
