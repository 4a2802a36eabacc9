"""invert(): the x_T from which a chain arrives at an image."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from fixpoint import Backward, ConvergenceError, ConvergenceWarning, Status, attach
from fixpoint_diffusion.chains import SamplingChain
from fixpoint_diffusion.inversion.parallel import ParallelInverse
from fixpoint_diffusion.inversion.problem import InverseProblem, check_images, refuse_clipped, rms
from fixpoint_diffusion.inversion.result import Inverse, InverseMethod


def invert(
    chain: SamplingChain,
    x_0: Tensor,
    *,
    method: InverseMethod = ParallelInverse(),  # noqa: B008 - immutable
    rtol: float = 1e-3,
    atol: float = 0.0,
    backward: Backward | None = None,
    on_failure: Literal["warn", "raise", "ignore"] = "warn",
    progress: bool = False,
    callback: Callable[[Any], object] | None = None,
) -> Inverse:
    """Find the x_T from which the ordinary sampler arrives at x_0.

    The chain says which sampler: its timesteps, its denoiser, conditioning and guidance, and, if it is stochastic, its
    noise. Whatever the method, the sampler is run from the x_T that was found, and ``error`` is what it misses by.

    Args:
        chain: a :class:`SamplingChain` of B samples; its x_T plays no part beside its shape.
        x_0: the images, ``(B, *shape)``, finite, in the dtype in which the denoiser is to be called. For float64, give
            x_0, the chain's x_T and the denoiser in float64.
        method: :class:`ParallelInverse`, :class:`StepwiseInverse`, :class:`ExplicitInverse` (plain DDIM inversion),
            :class:`OptimisedInverse` (gradient descent) or, for a stochastic chain whose noise is free,
            :class:`DrawnInverse`.
        rtol, atol: a sample is done when the RMS of ``reconstruction - x_0`` is at most ``atol + rtol * RMS(x_0)``.
        backward: a rule of ``fixpoint``, such as ``IFT()``: ``Inverse.x_T`` then has a gradient to x_0 and to whatever
            the denoiser depends on. It is right as far as the sample has converged. None: no gradient.
        on_failure: ``"warn"``, ``"raise"`` or ``"ignore"`` when samples do not converge.
        progress: show a bar.
        callback: called with an :class:`InverseRound` after every round of ``ParallelInverse``, with the evaluations of
            every step of ``StepwiseInverse``, with a :class:`~fixpoint_diffusion.inversion.Descent` after every epoch
            of ``OptimisedInverse``; returning something true stops the run.

    Raises:
        TypeError: a chain or a method of another kind.
        ValueError: x_0 of another shape or device than x_T, or not finite; a tolerance below 0; for the methods that
            solve steps exactly, and for all with ``backward``, a chain that clips its predicted images.
        fixpoint.ConvergenceError: with ``on_failure="raise"``.

    Example:
        >>> from fixpoint_diffusion import DDIMChain, NoiseSchedule
        >>> chain = DDIMChain(lambda x, t: 0.5 * x, torch.ones(1, 3), NoiseSchedule.linear(), steps=20)
        >>> x_0 = chain.sequential()[:, -1]
        >>> inverse = invert(chain, x_0, rtol=1e-5)
        >>> bool(inverse.converged), torch.allclose(inverse.x_T, chain.x_T, rtol=1e-3)
        (True, True)
    """
    if not isinstance(chain, SamplingChain):
        found = type(chain).__name__
        raise TypeError(f"chain must be a chain such as DDIMChain(denoiser, x_T, schedule), got a {found}")
    if not callable(getattr(method, "run", None)):
        raise TypeError(f"method must be a method of inversion such as ParallelInverse(), got {method!r}")
    check_images(chain, x_0)
    if on_failure not in ("warn", "raise", "ignore"):
        raise ValueError(f"on_failure must be 'warn', 'raise' or 'ignore', got {on_failure!r}")
    for name, value in (("rtol", rtol), ("atol", atol)):
        if not value >= 0:  # NaN fails every comparison
            raise ValueError(f"{name} must be at least 0, got {value}")
    if backward is not None:
        refuse_clipped(chain, otherwise="leave backward out")  # before a search that none would be attached to
    given, x_0 = x_0, x_0.detach()
    tolerance = atol + rtol * rms(x_0)
    with torch.no_grad():
        found = method.run(chain, x_0, tolerance=tolerance, progress=progress, callback=callback)
        played = _with_noise(chain, found.noise)
        trajectory = found.trajectory
        if trajectory is None:
            trajectory = played.sequential(x_T=found.x_T)
            chain.rounds, chain.evals = played.rounds, played.evals
    error = rms(trajectory[:, -1] - x_0)
    converged = error <= tolerance
    status = torch.where(converged, int(Status.CONVERGED), found.status.to(converged.device))
    # A method may have thought otherwise of what the sampler then missed.
    status = torch.where(~converged & (status == Status.CONVERGED), int(Status.STAGNATED), status)
    lost = ~torch.isfinite(error) & (status != Status.STOPPED)
    status = torch.where(lost, int(Status.NON_FINITE), status)
    x_T = found.x_T
    if backward is not None:
        x_T = _attached(played, given, x_T, trajectory, backward)
    inverse = Inverse(
        x_T=x_T,
        trajectory=trajectory,
        reconstruction=trajectory[:, -1],
        error=error,
        converged=converged,
        status=status,
        rounds=found.rounds,
        evals=found.evals,
        history=found.history,
        noise=found.noise,
    )
    _report(inverse, on_failure)
    return inverse


def _with_noise(chain: SamplingChain, noise: Tensor | None) -> SamplingChain:
    if noise is None:
        return chain
    other = copy.copy(chain)
    other.noise = noise
    return other


def _report(inverse: Inverse, on_failure: str) -> None:
    missed = ~inverse.converged
    if not bool(missed.any()) or on_failure == "ignore":
        return
    names = ", ".join(sorted({Status(int(number)).name for number in inverse.status[missed]}))
    worst = float(inverse.error.nan_to_num(nan=torch.inf).max())
    message = (
        f"{int(missed.sum())} of {len(missed)} samples were not inverted ({names}): RMS errors of x_0 up to "
        f"{worst:.1e}; take more steps, less guidance, or a larger rtol"
    )
    if on_failure == "raise":
        raise ConvergenceError(message, inverse)
    warnings.warn(message, ConvergenceWarning, stacklevel=3)


def _attached(chain: SamplingChain, x_0: Tensor, x_T: Tensor, trajectory: Tensor, backward: Backward) -> Tensor:
    """x_T with the gradient of the solution of all steps, by the fixed point that the sweep from the image end has."""
    problem = InverseProblem(chain, x_0.detach())
    samples = torch.arange(len(x_0), device=x_0.device)
    latents = problem.to_coordinates(torch.cat((x_T[:, None], trajectory[:, :-1]), dim=1))

    def swept(latents: Tensor, x_0: Tensor) -> Tensor:
        sources = problem.slopes * latents - problem.images(latents, samples)  # U - F
        return problem.from_sources(sources, problem.to_coordinates(x_0))

    solved = attach(swept, latents, (x_0,), backward, batch_dims=1)
    return problem.latent(solved[:, 0])
