"""The inverse by sweeps from the image end, all steps at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fixpoint import Anderson, ProgressBar, Solver, Status
from fixpoint_diffusion.chains import SamplingChain
from fixpoint_diffusion.inversion.forecast import Forecast
from fixpoint_diffusion.inversion.grids import StepGrid
from fixpoint_diffusion.inversion.problem import BestSoFar, InverseProblem
from fixpoint_diffusion.inversion.result import ACTIVE, Found, InverseRound
from fixpoint_diffusion.inversion.secants import BlockSecants
from fixpoint_diffusion.inversion.stepwise import StepwiseInverse

# A sample has stagnated when so many rounds brought no trajectory that is better by a tenth.
_PATIENCE, _PROGRESS = 25, 0.9
# Where there is another way to go on (without probes, or on a finer grid): when so many brought none so much better.
_PROBED_PATIENCE, _PROBED_PROGRESS = 4, 0.7
# Cubic splines on twice as many steps are up to 16 times as accurate; so much better is each grid taken to be.
_GAIN = 4.0
_MOST_GAIN = 16.0


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
        search = _Search(InverseProblem(chain, x_0), tolerance, self.solver, self.probes)
        with ProgressBar.tqdm(total=self.max_rounds, desc="inverting", unit="round", disable=not progress) as bar:
            for grid in search.grids():
                search.begin(grid)
                while len(search.history) < self.max_rounds and search.work_left():
                    latest = search.round()
                    bar.set_postfix(done=int((search.status == Status.CONVERGED).sum()), refresh=False)
                    bar.update()
                    if callback is not None and callback(latest):
                        search.end(Status.STOPPED)
        stopped = bool((search.status == Status.STOPPED).any())
        search.end(Status.MAX_EVALS)
        failed = search.measure_failed()
        if self.second_try is not None and len(failed) and not stopped:
            search.consider(failed, self.second_try.search(search.problem, failed, tolerance)[0])
        return search.best.found(search.status, search.history)


class _Mixed(NamedTuple):
    """Samples ``(n,)`` that the solver moves, by a state that began when they began."""

    samples: Tensor
    state: Any


class _Search:
    """The rounds of a ``ParallelInverse``, on one grid after another and, in the end, on all steps (no grid).

    A sample that has done what it can on a grid rests until the others have, so that one run of the ordinary sampler
    measures them all. What the others do changes nothing for it. On all steps, a sample that probes bring no further
    goes on at once with the solver, while others are still probed.
    """

    def __init__(self, problem: InverseProblem, tolerance: Tensor, solver: Solver, probes: int) -> None:
        self.problem, self.tolerance, self.solver = problem, tolerance, solver
        samples, device = len(problem.x_0), problem.x_0.device
        self._latents = problem.guess()
        self._forecast = Forecast(problem.slopes)
        self._secants = BlockSecants(problem, probes) if probes else None
        self.status = torch.full((samples,), ACTIVE, device=device)
        self.history: list[InverseRound] = []
        self.best = BestSoFar(problem)
        # Those of the least predicted error. Their x_T is measured when that is small or the search ends.
        self._nearest = self._latents.clone()
        self._least = torch.full((samples,), torch.inf, dtype=torch.float64, device=device)
        self._doubt = torch.zeros_like(self._least)

    def grids(self) -> list[StepGrid | None]:
        """From coarse to fine; None: all steps."""
        return [*self.problem.grids, None]

    def begin(self, grid: StepGrid | None) -> None:
        """Go on with another grid, from the latents that the one before has led to."""
        self._grid, self._finest = grid, grid is None
        self._images, self._misses = self._latents.clone(), torch.zeros_like(self._latents)
        if self._secants is not None:
            self._secants.forget_move()
        # Where the next grid will not do either, a sample rests until there is one that may.
        skipped = (self._doubt > _MOST_GAIN * self.tolerance) & (not self._finest)
        self._doubt = torch.where(skipped, self._doubt / _MOST_GAIN, 0)
        self._working = (self.status == ACTIVE) & ~skipped
        self._improved = torch.full_like(self.status, len(self.history))
        # By how much the ordinary sampler was seen to end farther off than predicted.
        self._factor = torch.ones_like(self._least)
        self._mixed: list[_Mixed] = []
        self._alone = torch.zeros_like(self._working)
        if self._secants is None:
            self._begin_to_mix(self._working)

    def _begin_to_mix(self, chosen: Tensor) -> None:
        """From now on the solver moves the chosen ``(B,)`` samples."""
        rows = chosen.nonzero().flatten()
        if len(rows):
            sources = self.problem.sources(self._latents[rows], rows)
            self._mixed.append(_Mixed(rows, self.solver.init(sources.flatten(1))))
        self._alone |= chosen

    def work_left(self) -> bool:
        """Whether this grid has more to do; if all samples rest, those that seem to be done are measured first."""
        if not bool(self._working.any()):
            done = (self.status == ACTIVE) & (self._least * self._factor <= self.tolerance)
            self._confirm(done.nonzero().flatten())
            # A finer grid is of no use to those that this one is not at fault for.
            self._working = (self.status == ACTIVE) & (done & (2 * self._doubt <= self.tolerance) | self._finest)
            self._improved[self._working] = len(self.history)
        return bool(self._working.any())

    def round(self) -> InverseRound:
        """Evaluate the samples that are worked on, and move them."""
        problem, secants = self.problem, self._secants
        probed = (self._working & ~self._alone).nonzero().flatten()
        active = torch.cat((probed, (self._working & self._alone).nonzero().flatten()))
        before = problem.chain.evals
        latents = self._latents[active]
        probes = () if secants is None or not len(probed) else secants.probes(probed)
        seen = problem.look(latents, active, self._grid, probes, len(probed))
        self._images[active] = seen.images
        doubts = None
        if seen.doubts is not None:
            doubts = torch.zeros_like(self._misses)
            doubts[active] = seen.doubts
        self._misses.zero_()
        self._misses[active] = self._images[active] - problem.after(latents, active)
        self._forecast.observe(self._latents, self._images)
        if secants is not None and len(probed):
            secants.observe(self._latents, self._images, probed, seen.responses)
        if doubts is None:
            missed, doubt = self._predict(self._misses[None])[0], self._doubt
        else:
            missed, doubt = self._predict(torch.stack((self._misses, doubts)))
            doubt = doubt / _GAIN
            self._doubt = torch.where(self._working, doubt, self._doubt)
        nan = torch.full_like(missed, torch.nan)
        latest = InverseRound(
            predicted_error=torch.where(self._working, missed + doubt, nan),
            residual=torch.where(self._working, self._misses.flatten(1).square().mean(dim=1).sqrt(), nan),
            rows=problem.chain.evals - before,
            x_T=problem.latent(self._latents[:, 0].clone()),
        )
        self.history.append(latest)
        stuck = self._judge(missed, doubt)
        moving = self._working & ~self._alone & ~stuck
        if secants is not None and bool(moving.any()):
            self._latents += torch.where(moving[:, None, None], secants.correction(self._misses), 0)
        self._mix()
        if bool(stuck.any()):
            self._latents[stuck] = self._nearest[stuck]
            self._begin_to_mix(stuck)
        return latest

    def _predict(self, misses: Tensor) -> Tensor:
        """The errors ``(n, B)`` that follow from n sorts of misses ``(n, B, T, D)``; by two models, the larger."""
        predicted = self._forecast.error(misses)
        return predicted if self._secants is None else torch.maximum(predicted, self._secants.error(misses))

    def _mix(self) -> None:
        """Let the solver move its samples; those that rest stay where they are."""
        for place, (rows, state) in enumerate(self._mixed):
            sources = self.problem.sources(self._latents[rows], rows)
            moved, state = self.solver.step(sources.flatten(1), (sources - self._misses[rows]).flatten(1), state)
            self._mixed[place] = _Mixed(rows, state)
            latents = self.problem.from_sources(moved.reshape(sources.shape), self.problem.x_0[rows])
            self._latents[rows] = torch.where(self._working[rows, None, None], latents, self._latents[rows])

    def _judge(self, missed: Tensor, doubt: Tensor) -> Tensor:
        """Keep the best, let samples rest that this grid has done its best for, and end those that are lost.

        Returns:
            The samples ``(B,)`` that probes bring no further, or have led astray, on all steps.
        """
        predicted, working = missed + doubt, self._working
        sane = torch.isfinite(predicted) & torch.isfinite(self._misses).flatten(1).all(dim=1)
        # What the first round predicts rests on the prior alone: no later one is measured against it.
        least = torch.full_like(self._least, torch.inf) if len(self.history) <= 2 else self._least
        better = working & sane & (predicted < least)
        last = self._alone & self._finest
        progress = predicted < torch.where(last, _PROGRESS, _PROBED_PROGRESS) * least
        self._improved[working & sane & progress] = len(self.history)
        self._nearest[better] = self._latents[better]
        self._least[better] = predicted[better]
        stuck = len(self.history) - self._improved >= torch.where(last, _PATIENCE, _PROBED_PATIENCE)
        done = better & (predicted * self._factor <= self.tolerance)
        lost = working & ~(sane & ~stuck | done)
        self._working = working & ~lost & ~done
        self.status[lost & last & ~sane] = int(Status.NON_FINITE)
        self.status[lost & last & sane] = int(Status.STAGNATED)
        if not self._finest:
            self._working &= ~(missed < doubt)
        self._misses[~sane] = 0
        self._images[~sane] = 0
        astray = lost & ~last & ~sane
        self._latents[astray] = self._nearest[astray]
        again = lost & ~last & self._finest
        self._working |= again
        self._improved[again] = len(self.history)
        return again

    def _confirm(self, samples: Tensor) -> None:
        """Measure the candidates of these samples."""
        if not len(samples):
            return
        error = self.consider(samples, self._nearest[samples, 0])
        self._factor[samples] = (error / self._least[samples]).clamp(min=1).nan_to_num(nan=2, posinf=1e6)

    def consider(self, samples: Tensor, x_T: Tensor) -> Tensor:
        """Measure the x_T ``(N, D)`` of some samples; those that meet the tolerance are done. Their errors ``(N,)``."""
        error = self.best.consider(samples, x_T)
        self.status[samples[error <= self.tolerance[samples]]] = int(Status.CONVERGED)
        return error

    def end(self, status: Status) -> None:
        """End all samples that have not ended."""
        self.status[self.status == ACTIVE] = int(status)
        self._working = torch.zeros_like(self._working)

    def measure_failed(self) -> Tensor:
        """Measure the candidates of the samples that have not converged; those that then still have not ``(N,)``."""
        rows = (self.status != Status.CONVERGED).nonzero().flatten()
        if len(rows):
            self.consider(rows, self._nearest[rows, 0])
        return rows[self.status[rows] != Status.CONVERGED]
