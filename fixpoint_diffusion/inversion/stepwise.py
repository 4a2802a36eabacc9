"""The inverse of one step after another, from the image to the noise."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fixpoint import Anderson, ProgressBar, Solution, Solver, Status, solve
from fixpoint_diffusion.chains import SamplingChain
from fixpoint_diffusion.inversion.problem import BestSoFar, InverseProblem
from fixpoint_diffusion.inversion.result import Found

_PASSES = 3  # most times that the steps of a sample are undone


@dataclass(frozen=True, kw_only=True)
class StepwiseInverse:
    """Undo the steps of the chain one after another, each as a fixed point ``x = x + (x_next - Phi_k(x)) / M_k``.

    ``M_k`` is the slope that the chain's prior gives the step. It takes T small solves in sequence. Where every step
    was undone as closely as seemed enough, and x_0 is too far off all the same, they are solved more closely: at most
    three times in all. Of a step that cannot be undone, the best x goes on.

    Args:
        solver: of each step.
        max_evals: most evaluations of a step.

    Raises:
        ValueError: fewer than one evaluation.

    Source: Pan et al., "Effective Real Image Editing with Accelerated Iterative Diffusion Inversion" (ICCV 2023), with
    the prior's slope in place of ``sqrt(a' / a)``.

    Example:
        >>> from fixpoint_diffusion import DDIMChain, NoiseSchedule
        >>> from fixpoint_diffusion.inversion import invert
        >>> chain = DDIMChain(lambda x, t: 0.5 * x, torch.zeros(1, 2), NoiseSchedule.linear(), steps=5)
        >>> invert(chain, torch.tensor([[0.1, 0.2]]), method=StepwiseInverse()).converged
        tensor([True])
    """

    solver: Solver = field(default_factory=lambda: Anderson(memory=3))
    max_evals: int = 30

    def __post_init__(self) -> None:
        if self.max_evals < 1:
            raise ValueError(f"max_evals must be at least 1, got {self.max_evals}")

    def run(
        self,
        chain: SamplingChain,
        x_0: Tensor,
        *,
        tolerance: Tensor,
        progress: bool = False,
        callback: Callable[[int], object] | None = None,
    ) -> Found:
        """See :class:`InverseMethod`; the history, and what a callback gets, is the evaluations of each step.

        Where a callback stops it, the steps that are left are undone as the prior has it.
        """
        problem = InverseProblem(chain, x_0)
        best, everyone = BestSoFar(problem), torch.arange(len(x_0), device=x_0.device)
        history, stopped = self.search(
            problem, everyone, tolerance, best.consider, progress=progress, callback=callback
        )
        ended = Status.STOPPED if stopped else Status.MAX_EVALS
        return best.found(torch.full((len(x_0),), int(ended), device=x_0.device), history)

    def search(
        self,
        problem: InverseProblem,
        samples: Tensor,
        tolerance: Tensor,
        consider: Callable[[Tensor, Tensor], Tensor],
        *,
        progress: bool = False,
        callback: Callable[[int], object] | None = None,
    ) -> tuple[list[int], bool]:
        """Undo the steps of some samples ``(N,)``, and again, each step closer, where the sampler is still too far off.

        Args:
            problem: of B samples.
            samples: which of them.
            tolerance: ``(B,)`` float64, largest error of x_0.
            consider: gets samples and the x_T ``(n, D)`` that were found, coordinates; returns their errors ``(n,)``.
            progress, callback: as of ``run``.

        Returns:
            The evaluations of each step, and whether a callback stopped the search.
        """
        asked, history, stopped = tolerance.clone(), list[int](), False
        for _ in range(_PASSES):
            x, evals, met, stopped = self._undo_all(problem, samples, asked, progress=progress, callback=callback)
            history += evals
            error = consider(samples, x)
            # Errors of many steps may add up to more than was taken.
            again = met & (error > tolerance[samples]) & torch.isfinite(error)
            if stopped or not bool(again.any()):
                break
            samples = samples[again]
            asked[samples] *= tolerance[samples] / (2 * error[again])
        return history, stopped

    def _undo_all(
        self,
        problem: InverseProblem,
        samples: Tensor,
        tolerance: Tensor,
        *,
        progress: bool = False,
        callback: Callable[[int], object] | None = None,
    ) -> tuple[Tensor, list[int], Tensor, bool]:
        """Undo the steps of some samples ``(N,)``.

        Returns:
            x_T as coordinates ``(N, D)``, the evaluations of each step, whether all steps of a sample ``(N,)`` were
            undone as closely as asked, and whether the callback stopped it, be it at the last step.
        """
        x, history, stopped = problem.x_0[samples], list[int](), False
        met = torch.ones(len(samples), dtype=torch.bool, device=x.device)
        # Errors of T steps, taken to be independent, add up to half of the tolerance.
        allowed = tolerance[samples] * math.sqrt(x.shape[1] / problem.steps) / 2
        steps = range(problem.steps)[::-1]
        for k in ProgressBar.tqdm(steps, desc="inverting", unit="step", disable=not progress):
            undone = self.undo(problem, samples, k, x, allowed)
            x, met = undone.value, met & undone.converged
            history.append(undone.nfev)
            stopped = callback is not None and bool(callback(undone.nfev))
            if stopped:
                x = problem.guess(x, k)[:, 0] if k else x
                break
        return x, history, met, stopped

    def undo(self, problem: InverseProblem, samples: Tensor, k: int, after: Tensor, allowed: Tensor) -> Solution:
        """Solve for the latents ``(N, D)`` before step k that lead to ``after``.

        ``allowed`` ``(N,)`` is the norm of what they may miss ``after`` by, divided by the slopes.
        """
        slopes = problem.slopes[k]

        def closer(x: Tensor, target: Tensor, sample: Tensor) -> Tensor:
            return x + (target - problem.step(x, sample, torch.full_like(sample, k))) / slopes

        return solve(
            closer,
            after,
            (after, samples),
            solver=self.solver,
            backward=None,
            rtol=0.0,
            atol=allowed,
            max_evals=self.max_evals,
            batch_dims=1,
            on_failure="ignore",
            compact=True,
        )
