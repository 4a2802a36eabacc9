"""The loop that the window methods share: rounds of an update on a window that slides along each sample's chain."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fixpoint import Progress, Solution, Status
from fixpoint_diffusion.chains import SamplingChain
from fixpoint_diffusion.processes import wide
from fixpoint_diffusion.sampling import SamplingResult

Callback = Callable[[Progress], object]
Evaluate = Callable[[Tensor, Tensor, Tensor], Tensor]
Update = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


@torch.no_grad()
def slide(
    chain: SamplingChain,
    update: Update,
    *,
    evaluate: Evaluate | None = None,
    window: int | None,
    max_rounds: int | None,
    callback: Callback | None,
) -> SamplingResult:
    """Evaluate windows, update their states, and move them on past what is good, until all samples are done.

    A window starts at the first state whose input is not final. States that enter one start as the last state in it;
    at first all are x_T. A state that turns out infinite or NaN starts over as x_T; if its input was final, its sample
    ends.

    Args:
        chain: of B samples and T steps of D numbers.
        update: called as ``update(states, images, inside)`` with ``(B, T, D)`` states, what one step makes of the
            states before them, and which are inside the windows ``(B, T)``; returns new states, and which are good
            enough to stay as they are. Images outside are the states themselves. The first that is not good has good
            inputs, so it becomes final too.
        evaluate: ``chain.transition``, or what does more in the same round.
        window: most states of a sample in a round; None: T.
        max_rounds: at most so many; None: T, which always suffices.
        callback: called with a ``fixpoint.Progress`` after every round, with the states that it led to; returning
            something true ends the run.
    """
    limits = {"window": chain.steps if window is None else window}
    limits["max_rounds"] = chain.steps if max_rounds is None else max_rounds
    for name, limit in limits.items():
        if limit < 1:
            raise ValueError(f"{name} must be at least 1, got {limit}")
    evaluate = evaluate or chain.transition
    record = Record(chain, limits["max_rounds"], callback)
    states = wide(chain.z0).flatten(2)
    fresh = states.clone()
    step = torch.arange(chain.steps, device=states.device)
    done = torch.zeros_like(step[:1]).repeat(len(states))
    while not record.ended:
        end = done + limits["window"]
        inside = (step >= done[:, None]) & (step < end[:, None])
        rows = inside.nonzero(as_tuple=True)
        images = states.clone()
        inputs = chain.inputs(states.to(chain.x_T.dtype).reshape(chain.z0.shape))
        images[rows] = wide(evaluate(inputs[rows], *rows)).flatten(1)
        after, good = update(states, images, inside)
        finite, exact = after.isfinite().all(dim=2), step == done[:, None]
        after = torch.where((finite | exact)[..., None], after, fresh)
        after = torch.where(inside[..., None], after, states)
        change = (after - states).norm(dim=(1, 2))
        good |= step < done[:, None]
        done = torch.minimum(good.cumprod(dim=1).sum(dim=1) + 1, end).clamp(max=chain.steps)
        done = torch.where((exact & ~finite).any(dim=1), chain.steps, done)
        last = after.gather(1, (end.clamp(max=chain.steps) - 1)[:, None, None].expand_as(after[:, :1]))
        states = torch.where((step < end[:, None])[..., None], after, last)
        record.round(states, change, done == chain.steps)
    return record.result()


def carry(defects: Tensor, slopes: Tensor) -> Tensor:
    """``d_k = defects_k + slopes_k d_{k-1}`` with ``d_{-1} = 0``, ``(B, T, D)``, by doubling: log2(T) products."""
    reach = 1
    while reach < defects.shape[1]:
        defects = torch.cat((defects[:, :reach], defects[:, reach:] + slopes[:, reach:] * defects[:, :-reach]), dim=1)
        slopes = torch.cat((slopes[:, :reach], slopes[:, reach:] * slopes[:, :-reach]), dim=1)
        reach *= 2
    return defects


class Record:
    """What a run has come to after each of its rounds, and its result."""

    def __init__(self, chain: SamplingChain, max_rounds: int, callback: Callback | None) -> None:
        self._chain, self._max_rounds, self._callback = chain, max_rounds, callback
        self._before = chain.rounds, chain.evals
        self._ended_at = torch.zeros(len(chain.x_T), dtype=torch.int64, device=chain.x_T.device)
        self._change = torch.full_like(self._ended_at, torch.inf, dtype=torch.float64)
        self._states, self._rounds = chain.z0, 0
        self.ended = False

    def round(self, states: Tensor, change: Tensor, done: Tensor) -> None:
        """Take in ``(B, T, D)`` states, the norm of their change, and which samples are done, both ``(B,)``."""
        self._rounds += 1
        self._states = states.reshape(self._chain.z0.shape).to(self._chain.x_T.dtype)
        running = self._ended_at == 0
        self._change = torch.where(running, change.to(self._change), self._change)
        self._ended_at = torch.where(running & done, self._rounds, self._ended_at)
        active = int((self._ended_at == 0).sum())
        progress = Progress(self._rounds, self._max_rounds, self._change, active, self._states)
        stopped = self._callback is not None and self._callback(progress)
        self.ended = bool(stopped) or active == 0 or self._rounds == self._max_rounds

    def result(self) -> SamplingResult:
        """The last states. Their ``residual`` is how far the last round moved them."""
        states, done = self._states, self._ended_at > 0
        finite = states.flatten(1).isfinite().all(dim=1)
        status = torch.where(done & finite, int(Status.CONVERGED), int(Status.MAX_EVALS))
        solution = Solution(
            value=states,
            converged=done & finite,
            status=torch.where(finite, status, int(Status.NON_FINITE)),
            residual=self._change,
            relative_residual=self._change / states.flatten(1).double().norm(dim=1),
            evals=torch.where(done, self._ended_at, self._rounds),
            nfev=self._rounds,
        )
        rounds, evals = self._before
        return SamplingResult(states[:, -1], states, solution, self._chain.rounds - rounds, self._chain.evals - evals)
