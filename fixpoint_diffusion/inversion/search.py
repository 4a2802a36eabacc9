"""The rounds of a parallel inversion: what each sample is asked next, and when it is done."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fixpoint import Solver, Status
from fixpoint_diffusion.inversion.forecast import Forecast
from fixpoint_diffusion.inversion.problem import Asked, BestSoFar, InverseProblem, Look, Probes
from fixpoint_diffusion.inversion.result import ACTIVE, InverseRound
from fixpoint_diffusion.inversion.secants import BlockSecants

# A sample has stagnated when so many rounds brought no trajectory that is better by a tenth.
_PATIENCE, _PROGRESS = 25, 0.9
# Where there is another way to go on (without probes, or on a finer grid): when so many brought none so much better.
_PROBED_PATIENCE, _PROBED_PROGRESS = 4, 0.7
# Cubic splines on twice as many steps are up to 16 times as accurate; so much better is each grid taken to be.
_GAIN = 4.0
_MOST_GAIN = 16.0
# Predictions are to first order, and of models that were not shown every direction: they are rather too small.
_CAUTION = 1.25


class Search:
    """The rounds of a ``ParallelInverse``.

    Each sample is asked at the steps of one grid after another, from coarse to fine, and in the end at all steps (no
    grid). A round evaluates all samples in one batch, whatever their grids. On all steps, a sample that probes bring
    no further goes on with the solver. One that seems to be done rests until no other is at work, so that one run of
    the ordinary sampler measures them all. What the others do changes nothing for a sample, as long as rounds are left.

    Args:
        problem: of B samples.
        tolerance: ``(B,)`` float64, largest error of x_0.
        solver: what moves samples that are not probed.
        probes: random ones of each late step; 0: no sample is probed.
    """

    def __init__(self, problem: InverseProblem, tolerance: Tensor, solver: Solver, probes: int) -> None:
        self.problem, self.tolerance, self.solver = problem, tolerance, solver
        samples, device = len(problem.x_0), problem.x_0.device
        self._latents = problem.guess()
        self._images, self._misses = self._latents.clone(), torch.zeros_like(self._latents)
        self._forecast = Forecast(problem.slopes)
        self._secants = BlockSecants(problem, probes) if probes else None
        self.status = torch.full((samples,), ACTIVE, device=device)
        self.history: list[InverseRound] = []
        self.best = BestSoFar(problem)
        # Those of the least predicted error. Their x_T is measured when that is small or the search ends.
        self._nearest = self._latents.clone()
        self._least = torch.full((samples,), torch.inf, dtype=torch.float64, device=device)
        # The part of the predicted error that is due to interpolation on a sample's grid.
        self._doubt = torch.zeros_like(self._least)
        # By how much the ordinary sampler was seen to end farther off than predicted.
        self._factor = torch.ones_like(self._least)
        # Of each sample, the place of its grid in the list, where None stands for all steps.
        self._grids = [*problem.grids, None]
        self._grid = torch.zeros_like(self.status)
        self._working = self.status == ACTIVE
        # Rounds in which each sample was at work, and how many of them there were at its last progress.
        self._rounds, self._improved = torch.zeros_like(self.status), torch.zeros_like(self.status)
        # Which samples the solver moves, each by a state of its own: the others are probed.
        self._mixed = torch.zeros_like(self._working)
        self._states: dict[int, Any] = {}
        if self._secants is None:
            self._begin_to_mix(self._working)

    @property
    def _finest(self) -> Tensor:
        """Which samples ``(B,)`` are asked at all steps."""
        return self._grid == len(self._grids) - 1

    def work_left(self) -> bool:
        """Whether there is more to do; if all samples rest, they are measured first."""
        if not bool(self._working.any()):
            before = self.best.error.clone()
            self._confirm((self.status == ACTIVE).nonzero().flatten())
            failed = self.status == ACTIVE
            # A finer grid does not help where interpolation on this one is accurate. By its own estimate it may be so,
            # and yet better latents have brought the sampler no nearer to the image: then it is not.
            accurate = (2 * self._doubt <= self.tolerance) & ~(self.best.error > _PROGRESS * before)
            again = failed & (self._finest | accurate)
            self._resume(again)
            self._move()
            self._refine(failed & ~again)
        return bool(self._working.any())

    def round(self) -> InverseRound:
        """Evaluate the samples that are worked on, and move them."""
        problem, before = self.problem, self.problem.chain.evals
        asked = self._asked()
        seen = problem.look(*asked)
        doubts = None if all(each.doubts is None for each in seen) else torch.zeros_like(self._misses)
        for group, shown in zip(asked, seen, strict=True):
            self._images[group.samples] = shown.images
            self._misses[group.samples] = shown.images - problem.after(group.latents, group.samples)
            if doubts is not None and shown.doubts is not None:
                doubts[group.samples] = shown.doubts
        self._learn(asked, seen)
        if doubts is None:
            missed, doubt = self._predict(self._misses[None])[0], torch.zeros_like(self._doubt)
        else:
            missed, doubt = self._predict(torch.stack((self._misses, doubts)))
        missed = _CAUTION * missed
        doubt = self._doubt = torch.where(self._working, doubt / _GAIN, self._doubt)
        nan = torch.full_like(missed, torch.nan)
        latest = InverseRound(
            predicted_error=torch.where(self._working, missed + doubt, nan),
            residual=torch.where(self._working, self._misses.flatten(1).square().mean(dim=1).sqrt(), nan),
            rows=problem.chain.evals - before,
            x_T=problem.latent(self._latents[:, 0].clone()),
        )
        self.history.append(latest)
        self._judge(missed, doubt)
        return latest

    def _asked(self) -> list[Asked]:
        """The samples at work, those of one grid together, the probed ones first."""
        kinds = self._grid + len(self._grids) * self._mixed
        groups = [(self._working & (kinds == kind)).nonzero().flatten() for kind in kinds[self._working].unique()]
        probed = [rows for rows in groups if not self._mixed[rows[0]]]
        shares: list[Sequence[Probes]] = [()] * len(groups)
        if self._secants is not None and probed:
            probes = self._secants.probes(torch.cat(probed))
            shares[: len(probed)] = zip(*(each.split([len(rows) for rows in probed]) for each in probes), strict=True)
        return [
            Asked(rows, self._latents[rows], self._grids[int(self._grid[rows[0]])], share)
            for rows, share in zip(groups, shares, strict=True)
        ]

    def _learn(self, asked: Sequence[Asked], seen: Sequence[Look]) -> None:
        """Show the two models what a round has shown."""
        working = torch.cat([group.samples for group in asked])
        self._forecast.observe(self._latents, self._images, working)
        probed = [(group.samples, shown.responses) for group, shown in zip(asked, seen, strict=True) if group.probes]
        if self._secants is not None and probed:
            responses = [torch.cat(parts) for parts in zip(*(each for _, each in probed), strict=True)]
            self._secants.observe(self._latents, self._images, torch.cat([each for each, _ in probed]), responses)

    def _predict(self, misses: Tensor) -> Tensor:
        """The errors ``(n, B)`` that n sorts of misses ``(n, B, T, D)`` lead to; if probed, the worse of two models."""
        predicted = self._forecast.error(misses)
        if self._secants is None:
            return predicted
        # What probes have shown of a sample that is not probed any more was elsewhere, and led nowhere.
        return torch.where(self._mixed, predicted, torch.maximum(predicted, self._secants.error(misses)))

    def _judge(self, missed: Tensor, doubt: Tensor) -> None:
        """Keep the best, and decide how each sample goes on: it moves, rests, goes on otherwise or has ended."""
        predicted, working, finest, mixed = missed + doubt, self._working, self._finest, self._mixed
        sane = torch.isfinite(predicted) & torch.isfinite(self._misses).flatten(1).all(dim=1)
        # What the first round predicts rests on the prior alone: no later one is measured against it.
        self._rounds += working
        least = torch.where(self._rounds <= 2, torch.inf, self._least)
        better = working & sane & (predicted < least)
        last = mixed & finest
        progress = predicted < torch.where(last, _PROGRESS, _PROBED_PROGRESS) * least
        self._improved = torch.where(working & sane & progress, self._rounds, self._improved)
        self._nearest[better] = self._latents[better]
        self._least[better] = predicted[better]
        stuck = self._rounds - self._improved >= torch.where(last, _PATIENCE, _PROBED_PATIENCE)
        done = better & (predicted * self._factor <= self.tolerance)
        lost = working & ~(sane & ~stuck | done)
        rough = working & ~lost & ~done & ~finest & (missed < doubt)
        self.status[lost & last & ~sane] = int(Status.NON_FINITE)
        self.status[lost & last & sane] = int(Status.STAGNATED)
        self._misses[~sane] = 0
        self._images[~sane] = 0
        self._working = working & ~lost & ~done
        self._move()
        self._latents[lost] = self._nearest[lost]
        self._refine(rough | lost & ~finest)
        self._begin_to_mix(lost & finest & ~mixed)

    def _move(self) -> None:
        """Move the samples at work; those that rest stay where they are."""
        probed = self._working & ~self._mixed
        if self._secants is not None and bool(probed.any()):
            self._latents += torch.where(probed[:, None, None], self._secants.correction(self._misses), 0)
        rows = (self._working & self._mixed).nonzero().flatten()
        if not len(rows):
            return
        sources = self.problem.sources(self._latents[rows], rows)
        images = sources - self._misses[rows]
        moved = torch.empty_like(sources)
        # One after another: they began in different rounds, and have rested in different ones.
        for place, row in enumerate(rows.tolist()):
            z, fz = (each[place].flatten()[None] for each in (sources, images))
            z, self._states[row] = self.solver.step(z, fz, self._states[row])
            moved[place] = z.reshape(moved[place].shape)
        self._latents[rows] = self.problem.from_sources(moved, self.problem.x_0[rows])

    def _begin_to_mix(self, chosen: Tensor) -> None:
        """From now on the solver moves the chosen ``(B,)`` samples."""
        rows = chosen.nonzero().flatten()
        if len(rows):
            sources = self.problem.sources(self._latents[rows], rows).flatten(1)
            self._states |= {row: self.solver.init(z[None]) for row, z in zip(rows.tolist(), sources, strict=True)}
        self._mixed |= chosen
        self._resume(chosen)

    def _refine(self, chosen: Tensor) -> None:
        """Ask the chosen ``(B,)`` samples on a finer grid from now on, from the latents that theirs has led to."""
        self._grid += chosen
        # Where that one will not do either, it is passed over.
        while bool((passed := chosen & ~self._finest & (self._doubt > _MOST_GAIN * self.tolerance)).any()):
            self._grid += passed
            self._doubt = torch.where(passed, self._doubt / _MOST_GAIN, self._doubt)
        rows = chosen.nonzero().flatten()
        # The finer grid's predictions are measured against what was seen, not against what this one promised.
        self._least[rows] *= self._factor[rows]
        self._factor[rows] = 1
        self._forecast.forget_move(rows)
        if self._secants is None:
            self._begin_to_mix(chosen)
        else:
            self._secants.forget_move(rows)
        self._resume(chosen)

    def _resume(self, chosen: Tensor) -> None:
        """The chosen ``(B,)`` samples are at work from now on."""
        self._working = self._working | chosen
        self._improved = torch.where(chosen, self._rounds, self._improved)

    def _confirm(self, samples: Tensor) -> None:
        """Measure the candidates of these samples."""
        if not len(samples):
            return
        error = self.consider(samples, self._nearest[samples, 0])
        ratio = (error / self._least[samples]).clamp(min=1).nan_to_num(nan=2, posinf=1e6)
        # What the prior alone promised says nothing of what later rounds will.
        self._factor[samples] = torch.where(self._rounds[samples] > 1, ratio, 1)

    def consider(self, samples: Tensor, x_T: Tensor) -> Tensor:
        """Measure the x_T ``(N, D)`` of some samples; those that meet the tolerance are done. Their errors ``(N,)``."""
        error = self.best.consider(samples, x_T)
        self.status[samples[error <= self.tolerance[samples]]] = int(Status.CONVERGED)
        return error

    def end(self, status: Status) -> None:
        """End all samples that have not ended."""
        self.status[self.status == ACTIVE] = int(status)

    def measure_failed(self) -> Tensor:
        """Measure the candidates of the samples that have not converged; those that then still have not ``(N,)``."""
        rows = (self.status != Status.CONVERGED).nonzero().flatten()
        if len(rows):
            self.consider(rows, self._nearest[rows, 0])
        return rows[self.status[rows] != Status.CONVERGED]
