"""The inverse by sweeps from the image end, all steps at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from fixpoint import Anderson, ProgressBar, Solver, Status
from fixpoint_diffusion.chains import SamplingChain
from fixpoint_diffusion.inversion.problem import InverseProblem
from fixpoint_diffusion.inversion.result import Found, InverseRound
from fixpoint_diffusion.inversion.search import Search
from fixpoint_diffusion.inversion.stepwise import StepwiseInverse


@dataclass(frozen=True, kw_only=True)
class ParallelInverse:
    """Solve for all latents of the inverse trajectory at once.

    A round evaluates every step once, in one batch. A sweep from the image end then takes back what each step misses
    by, with a model of the step's Jacobian: the slopes that the chain's Gaussian prior gives it, and what the latest
    rounds have shown. The same batch holds probes: steps evaluated a little beside their latents. Those nearest the
    image are probed in random directions, and all of them in the one in which the sampler is predicted to drift off.
    They make rounds dearer and fewer; a sample that they do not bring on any more goes on without. A sample is done
    when the predicted error of its x_0 is within the tolerance and a run of the ordinary sampler has confirmed it;
    where it has not, the prediction is corrected by that and the rounds go on.

    Args:
        probes: random directions in which each of the last steps is probed in a round. These steps are an eighth of
            the chain, and at least ten; of a chain of 130 steps or more, few of them. 0: nothing is probed, the
            Jacobians are the prior's slopes alone, and ``solver`` accelerates the rounds.
        solver: the update rule without probes, whose vectors are what the steps of a sample miss by.
        max_rounds: most rounds.
        second_try: what is tried on samples that did not converge; the better of the two x_T is kept. None: nothing.

    Raises:
        ValueError: fewer than one round, or than no probes.

    Source: this project's. Anderson acceleration for the inverse of a single step is AIDI's (Pan et al., ICCV 2023).

    Example:
        >>> import torch
        >>> from fixpoint_diffusion import DDIMChain, NoiseSchedule
        >>> from fixpoint_diffusion.inversion import invert
        >>> chain = DDIMChain(lambda x, t: 0.5 * x, torch.zeros(2, 3), NoiseSchedule.linear(), steps=20)
        >>> inverse = invert(chain, torch.tensor([[0.1, 0.2, 0.3], [0.0, -0.1, 0.4]]), method=ParallelInverse())
        >>> inverse.converged.tolist(), inverse.rounds < 10
        ([True, True], True)
    """

    probes: int = 8
    solver: Solver = field(default_factory=lambda: Anderson(memory=5))
    max_rounds: int = 50
    second_try: StepwiseInverse | None = field(default_factory=StepwiseInverse)

    def __post_init__(self) -> None:
        if self.probes < 0:
            raise ValueError(f"probes must be at least 0, got {self.probes}")
        if self.max_rounds < 1:
            raise ValueError(f"max_rounds must be at least 1, got {self.max_rounds}")

    def run(
        self,
        chain: SamplingChain,
        x_0: Tensor,
        *,
        tolerance: Tensor,
        progress: bool = False,
        callback: Callable[[InverseRound], object] | None = None,
    ) -> Found:
        """See :class:`InverseMethod`; the history holds an :class:`InverseRound` for each round."""
        search, stopped = Search(InverseProblem(chain, x_0), tolerance, self.solver, self.probes), False
        with ProgressBar.tqdm(total=self.max_rounds, desc="inverting", unit="round", disable=not progress) as bar:
            while not stopped and len(search.history) < self.max_rounds and search.work_left():
                latest = search.round()
                bar.set_postfix(done=int((search.status == Status.CONVERGED).sum()), refresh=False)
                bar.update()
                stopped = callback is not None and bool(callback(latest))
        search.end(Status.STOPPED if stopped else Status.MAX_EVALS)
        failed = search.measure_failed()
        if self.second_try is not None and len(failed) and not stopped:
            self.second_try.search(search.problem, failed, tolerance, search.consider)
        return search.best.found(search.status, search.history)
