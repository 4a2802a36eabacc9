"""The inverse by sweeps from the image end, all steps at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from tqdm.auto import tqdm

from fixpoint import Anderson, Solver, Status
from fixpoint_diffusion.chains import SamplingChain
from fixpoint_diffusion.inversion.forecast import Forecast
from fixpoint_diffusion.inversion.problem import InverseProblem, replay, rms
from fixpoint_diffusion.inversion.result import Found, InverseRound
from fixpoint_diffusion.inversion.stepwise import StepwiseInverse

_ACTIVE = -1
# A sample has stagnated when so many rounds brought no trajectory that is better by a tenth.
_PATIENCE = 15


@dataclass(frozen=True, kw_only=True)
class ParallelInverse:
    """Solve for all latents of the inverse trajectory at once.

    A round evaluates every step once, in one batch. A sweep from the image end then takes back what each step misses
    by, with the slopes that the chain's Gaussian prior gives it; ``solver`` accelerates these rounds over the whole
    trajectory of a sample. A sample is done when the predicted error of its x_0 is within the tolerance and a run of
    the ordinary sampler has confirmed it; where it has not, the prediction is corrected by that and the rounds go on.

    Args:
        solver: the update rule, whose vectors are what the steps of a sample miss by.
        max_rounds: most rounds of it.
        second_try: what is tried on samples that did not converge; the better of the two x_T is kept. None: nothing.

    Raises:
        ValueError: fewer than one round.

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

    solver: Solver = field(default_factory=lambda: Anderson(memory=5))
    max_rounds: int = 40
    second_try: StepwiseInverse | None = field(default_factory=StepwiseInverse)

    def __post_init__(self) -> None:
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
        search = _Search(InverseProblem(chain, x_0), tolerance, self.solver)
        with tqdm(total=self.max_rounds, desc="inverting", unit="round", disable=not progress) as bar:
            for _ in range(self.max_rounds):
                if not bool((search.status == _ACTIVE).any()):
                    break
                latest = search.round()
                bar.set_postfix(done=int((search.status != _ACTIVE).sum()), refresh=False)
                bar.update()
                if callback is not None and callback(latest):
                    search.end(Status.STOPPED)
        stopped = search.end(Status.MAX_EVALS)
        failed = (search.status != Status.CONVERGED).nonzero().flatten()
        again = failed[search.status[failed] != Status.STOPPED]
        if self.second_try is not None and len(again) and not stopped:
            search.consider(again, self.second_try.search(search.problem, again, tolerance))
        return search.found()


class _Search:
    """The rounds of a ``ParallelInverse``."""

    def __init__(self, problem: InverseProblem, tolerance: Tensor, solver: Solver) -> None:
        self.problem, self.tolerance, self.solver = problem, tolerance, solver
        samples, device = len(problem.image), problem.image.device
        self._everyone = torch.arange(samples, device=device)
        self._latents = problem.guess()
        self._sources = problem.sources(self._latents, self._everyone)
        self._misses = torch.zeros_like(self._sources)
        self._images = self._latents.clone()
        self._state = solver.init(self._sources.flatten(1))
        self._forecast = Forecast(problem.slopes, samples)
        self.status = torch.full((samples,), _ACTIVE, device=device)
        self.history: list[InverseRound] = []
        self._best = self._latents[:, 0].clone()
        self._least = torch.full((samples,), torch.inf, dtype=torch.float64, device=device)
        self._improved = torch.zeros(samples, dtype=torch.int64, device=device)
        # By how much the ordinary sampler was seen to end farther off than predicted.
        self._factor = torch.ones(samples, dtype=torch.float64, device=device)
        self._error = torch.full_like(self._least, torch.nan)  # as measured
        self._trajectory = problem.latent(self._latents).clone()
        self._start = problem.chain.rounds, problem.chain.evals
        self._replays = [0, 0]

    def round(self) -> InverseRound:
        """Evaluate the samples that are worked on, and move them."""
        problem, active = self.problem, (self.status == _ACTIVE).nonzero().flatten()
        before = problem.chain.evals
        self._images[active] = problem.images(self._latents[active], active)
        self._misses.zero_()
        self._misses[active] = self._images[active] - problem.after(self._latents[active], active)
        predicted = self._forecast.error(self._latents, self._images, self._misses)
        nan = torch.full_like(predicted, torch.nan)
        working = self.status == _ACTIVE
        latest = InverseRound(
            predicted_error=torch.where(working, predicted, nan),
            residual=torch.where(working, self._misses.flatten(1).square().mean(dim=1).sqrt(), nan),
            rows=problem.chain.evals - before,
            x_T=problem.latent(self._latents[:, 0].clone()),
        )
        self.history.append(latest)
        self._judge(predicted, active)
        # Samples that have ended stay where they are.
        sources = self._sources.flatten(1)
        moved, self._state = self.solver.step(sources, sources - self._misses.flatten(1), self._state)
        working = self.status == _ACTIVE
        self._sources = torch.where(working[:, None, None], moved.reshape(self._sources.shape), self._sources)
        rows = working.nonzero().flatten()
        self._latents[rows] = problem.latents(self._sources[rows], rows)
        return latest

    def _judge(self, predicted: Tensor, active: Tensor) -> None:
        """Keep the best, confirm samples that seem to be done, and end those that are lost."""
        sane = torch.isfinite(predicted) & torch.isfinite(self._misses).flatten(1).all(dim=1)
        working = self.status == _ACTIVE
        # What the first round predicts rests on the prior alone: no later one is measured against it.
        least = torch.full_like(self._least, torch.inf) if len(self.history) <= 2 else self._least
        better = working & sane & (predicted < least)
        self._improved[working & sane & (predicted < 0.9 * least)] = len(self.history)
        self._best[better] = self._latents[better, 0]
        self._least[better] = predicted[better]
        self._confirm((better & (predicted * self._factor <= self.tolerance)).nonzero().flatten())
        working = self.status == _ACTIVE
        self.status[working & ~sane] = int(Status.NON_FINITE)
        self._misses[~sane] = 0
        self._images[~sane] = 0
        late = len(self.history) - self._improved >= _PATIENCE
        self.status[working & sane & late] = int(Status.STAGNATED)

    def _confirm(self, samples: Tensor) -> None:
        """Run the ordinary sampler from the best x_T of these samples."""
        if not len(samples):
            return
        error = self.consider(samples, self._best[samples])
        self._factor[samples] = (error / self._least[samples]).clamp(min=1).nan_to_num(nan=2, posinf=1e6)

    def consider(self, samples: Tensor, latents: Tensor) -> Tensor:
        """Measure the x_T ``(N, D)`` of some samples, and keep those that are better than what was measured before.

        Returns:
            Their errors ``(N,)``.
        """
        chain = self.problem.chain
        before = chain.rounds, chain.evals
        trajectory = replay(chain, self.problem.latent(latents), samples)
        self._replays[0] += chain.rounds - before[0]
        self._replays[1] += chain.evals - before[1]
        image = self.problem.from_coordinates(self.problem.image[samples])
        error = rms(trajectory[:, -1] - image.to(trajectory))
        better = torch.isnan(self._error[samples]) | (error < self._error[samples])
        rows = samples[better]
        self._best[rows], self._error[rows], self._trajectory[rows] = latents[better], error[better], trajectory[better]
        self.status[samples[error <= self.tolerance[samples]]] = int(Status.CONVERGED)
        return error

    def end(self, status: Status) -> bool:
        """End all samples, and measure those that have not converged; whether a callback had ended them."""
        stopped = bool((self.status == Status.STOPPED).any())
        self.status[self.status == _ACTIVE] = int(status)
        if status != Status.STOPPED:
            self.consider_best()
        return stopped

    def consider_best(self) -> None:
        """Measure the best x_T of the samples that have not converged."""
        rows = (self.status != Status.CONVERGED).nonzero().flatten()
        if len(rows):
            self.consider(rows, self._best[rows])

    def found(self) -> Found:
        """The best that was found."""
        chain = self.problem.chain
        return Found(
            x_T=self.problem.latent(self._best),
            status=self.status,
            rounds=chain.rounds - self._start[0] - self._replays[0],
            evals=chain.evals - self._start[1] - self._replays[1],
            trajectory=self._trajectory,
            history=self.history,
        )
