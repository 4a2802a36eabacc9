"""Restoration in parallel: solve a restoration chain for all of its latents at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from fixpoint import IFT, Backward, CausalQuasiNewton, Progress, Solver, solve
from fixpoint_diffusion.restoration.chain import RestorationChain, SplitChain
from fixpoint_diffusion.sampling import SamplingResult


def restore(
    chain: RestorationChain,
    *,
    solver: Solver = CausalQuasiNewton(),  # noqa: B008 - immutable
    backward: Backward | None = IFT(rtol=1e-4),  # noqa: B008
    rtol: float = 1e-3,
    max_evals: int | None = None,
    on_failure: Literal["warn", "raise", "ignore"] = "warn",
    record: bool = False,
    callback: Callable[[Progress], object] | None = None,
) -> SamplingResult:
    """Restore by solving for all latents of the chain in parallel. The sequential method is ``chain.sequential()``.

    Where x_T, the measurement or the denoiser's parameters require gradients, images and trajectory have them.

    Args:
        chain: of B samples and T steps.
        solver: a solver of ``fixpoint``; sweeps along the chain by default.
        backward: how gradients go through the solution; None: they do not.
        rtol: a latent is done when its predicted error is at most this share of its norm.
        max_evals: most rounds; by default T + 1, after which plain iteration would be exact.
        on_failure: ``"warn"``, ``"raise"`` or ``"ignore"`` when samples do not converge.
        record: keep the predicted error after every round in ``solution.trace``.
        callback: called with a ``fixpoint.Progress`` after every round; returning something true stops the run.

    Returns:
        As :func:`fixpoint_diffusion.sample`. In ``solution.value`` each latent is split into what the measurement
        determines and the rest, ``(B, T, 2, *shape)`` in float64 (float32 on devices without it).

    Raises:
        TypeError: for another chain than a :class:`RestorationChain`.
        fixpoint.ConvergenceError: with ``on_failure="raise"``.

    Example: see :class:`RestorationChain`.
    """
    if not isinstance(chain, RestorationChain):
        raise TypeError(f"restore takes a RestorationChain, got {type(chain).__name__}: sample solves other chains")
    rounds, evals = chain.rounds, chain.evals
    problem = SplitChain(chain)
    solution = solve(
        problem,
        problem.z0,
        solver=solver,
        backward=backward,
        rtol=rtol,
        max_evals=chain.steps + 1 if max_evals is None else max_evals,
        batch_dims=1,
        on_failure=on_failure,
        record=record,
        callback=callback,
    )
    trajectory = solution.value.sum(dim=2).to(chain.x_T.dtype)
    return SamplingResult(
        images=trajectory[:, -1],
        trajectory=trajectory,
        solution=solution,
        rounds=chain.rounds - rounds,
        evals=chain.evals - evals,
    )
