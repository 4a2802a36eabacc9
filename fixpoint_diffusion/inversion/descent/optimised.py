"""DEQ-DDIM's own inversion: descend on the distance between the image and the x_0 that x_T leads to."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from fixpoint import IFT, Backward, CausalQuasiNewton, ProgressBar, Solver, Status
from fixpoint_diffusion.chains import SamplingChain
from fixpoint_diffusion.inversion.descent.gradients import (
    Epoch,
    Gradient,
    LinearTerm,
    linear_factor,
    loss_and_gradient,
    part_of,
)
from fixpoint_diffusion.inversion.explicit import ddim_encoding
from fixpoint_diffusion.inversion.problem import check_images
from fixpoint_diffusion.inversion.result import ACTIVE, Found
from fixpoint_diffusion.processes import initial_noise
from fixpoint_diffusion.sampling import sample

Optimiser = Callable[[list[Tensor]], torch.optim.Optimizer]


@dataclass(frozen=True, eq=False, kw_only=True)
class Descent:
    """An optimisation so far, from which :class:`OptimisedInverse` can go on.

    Attributes:
        x_T: ``(B, *shape)``, where the next epoch starts.
        best_x_T: ``(B, *shape)``, the x_T of each sample with the least loss that was computed.
        best_loss: ``(B,)``, that loss: the squared distance between image and x_0, in the epoch that scored it.
        status: ``(B,)`` numbers of ``fixpoint.Status``; -1 where a sample has not ended.
        trajectory: ``(B, T, *shape)``, the latents of the last epoch, from which the next solve starts; None before the
            first, and for a sequential run.
        optimiser: the optimiser's state, ``Optimizer.state_dict()``.
        history: one entry an epoch.

    Example:
        See :class:`fixpoint_diffusion.inversion.OptimisedInverse`, whose ``descend`` returns one.
    """

    x_T: Tensor  # noqa: N815
    best_x_T: Tensor  # noqa: N815
    best_loss: Tensor
    status: Tensor
    trajectory: Tensor | None
    optimiser: dict[str, Any]
    history: tuple[Epoch, ...] = ()

    def state(self) -> dict[str, Any]:
        """Nothing but tensors, numbers, lists and dicts, for ``torch.save``."""
        return {**vars(self), "history": [dict(vars(epoch)) for epoch in self.history]}

    @classmethod
    def of(cls, state: dict[str, Any]) -> Descent:
        """From what :meth:`state` gave; ``torch.load(path, weights_only=True)`` reads it back."""
        return cls(**{**state, "history": tuple(Epoch(**epoch) for epoch in state["history"])})


@dataclass(frozen=True, kw_only=True, eq=False)
class OptimisedInverse:
    """Find x_T by gradient descent through the chain: DEQ-DDIM's Algorithms 1 to 4.

    An epoch runs the chain from the present x_T, computes the squared distance between its x_0 and the image, and lets
    the optimiser take one step along the gradient. Of each sample, the x_T of the epoch with the least loss is kept. A
    sample whose loss falls to ``stop`` is done and costs nothing more. Each solve starts from the last epoch's latents.

    ``invert(chain, x_0, method=OptimisedInverse(...))`` runs it; :meth:`descend` does too and returns all that is
    known. ``ParallelInverse`` needs far fewer rounds where it converges. This method asks nothing of the chain's steps:
    they may fold, and for :meth:`descend` they may clip.

    Args:
        gradient: ``"sequential"``: run the ordinary sampler and backpropagate through it (Algorithm 1). Otherwise the
            chain is solved in parallel, and a rule of ``fixpoint`` gives the gradient: ``IFT()``, the exact one
            (Eq. 15, Algorithm 2), by sweeps along the chain in reverse; ``Phantom(steps=k, damping=tau)``
            (Algorithm 3) or ``JFB()``, a true one-step gradient; :class:`LinearTerm`, what the released code takes.
            A stochastic chain makes each of them Algorithm 4.
        solver: of the chain.
        rtol: of each solve, as for :func:`fixpoint_diffusion.sample`.
        max_evals: most evaluations of each solve, as for :func:`fixpoint_diffusion.sample`.
        optimiser: called with a list of one tensor, makes the optimiser. One that treats entries alone (Adam, SGD)
            keeps the samples of a batch apart.
        epochs: most epochs of a run.
        stop: the loss at which a sample is done, a sum over its entries. None: what ``rtol`` of ``invert`` asks for.
        start: ``"noise"``: standard normal, of ``seed``, and every latent equal to it, as in the paper; ``"encoded"``:
            what plain DDIM inversion finds, latents too; or an x_T ``(B, *shape)``, such as ``ParallelInverse`` left.
        seed: of the noise to start from.
        resume: go on from here: what an earlier run on the same chain and images returned or showed its callback.

    Raises:
        TypeError, ValueError: an option of the wrong type or out of range.

    Source: Pokle, Geng, Kolter, "Deep Equilibrium Approaches to Diffusion Models" (NeurIPS 2022), Eq. 14 and 15.

    Example:
        >>> from fixpoint_diffusion import DDIMChain, NoiseSchedule
        >>> chain = DDIMChain(lambda x, t: 0.5 * x, torch.zeros(2, 3), NoiseSchedule.linear(), steps=10)
        >>> method = OptimisedInverse(optimiser=partial(torch.optim.Adam, lr=0.1), epochs=200, stop=1e-4)
        >>> found = method.descend(chain, torch.tensor([[0.1, 0.2, 0.3], [0.0, -0.1, 0.4]]))
        >>> bool((found.best_loss <= 1e-4).all())
        True
    """

    gradient: Gradient = field(default_factory=lambda: IFT(rtol=1e-3, on_failure="best"))
    solver: Solver = field(default_factory=CausalQuasiNewton)
    rtol: float = 1e-3
    max_evals: int | None = None
    optimiser: Optimiser = field(default_factory=lambda: partial(torch.optim.Adam, lr=0.01))
    epochs: int = 400
    stop: float | None = None
    start: Literal["noise", "encoded"] | Tensor = "noise"
    seed: int = 0
    resume: Descent | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.gradient, Backward | LinearTerm) and self.gradient != "sequential":
            raise TypeError(
                'gradient must be "sequential", LinearTerm() or a rule of fixpoint such as IFT() or Phantom(), got '
                f"{self.gradient!r}"
            )
        if isinstance(self.gradient, Backward) and self.gradient.runs_forward:
            raise TypeError(f"{self.gradient!r} runs the solve in a way of its own; take IFT(), Phantom() or JFB()")
        if self.epochs < 1:
            raise ValueError(f"epochs must be at least 1, got {self.epochs}")
        if self.stop is not None and not self.stop >= 0:
            raise ValueError(f"stop must be at least 0, got {self.stop}")
        if not isinstance(self.start, Tensor) and self.start not in ("noise", "encoded"):
            raise ValueError(f"start must be 'noise', 'encoded' or a tensor x_T, got {self.start!r}")

    def run(
        self,
        chain: SamplingChain,
        x_0: Tensor,
        *,
        tolerance: Tensor,
        progress: bool = False,
        callback: Callable[[Descent], object] | None = None,
    ) -> Found:
        """What ``invert`` calls, see :class:`InverseMethod`. The callback gets a :class:`Descent`, to go on from."""
        found = self.descend(chain, x_0, tolerance=tolerance, progress=progress, callback=callback)
        # What a run goes on from has been counted in its own.
        epochs = found.history[0 if self.resume is None else len(self.resume.history) :]
        return Found(
            x_T=found.best_x_T,
            status=found.status,
            rounds=sum(epoch.rounds for epoch in epochs),
            evals=sum(epoch.evals for epoch in epochs),
            history=found.history,
        )

    def descend(
        self,
        chain: SamplingChain,
        x_0: Tensor,
        *,
        tolerance: Tensor | float = 1e-3,
        progress: bool = False,
        callback: Callable[[Descent], object] | None = None,
    ) -> Descent:
        """Optimise x_T.

        Args:
            chain: of B samples and T steps; its x_T plays no part.
            x_0: the images, ``(B, *shape)``.
            tolerance: where ``stop`` is not given, the RMS error at which a sample is done; a number or ``(B,)``.
            progress: show a bar of epochs, with the worst and the median loss.
            callback: called with the :class:`Descent` so far after every epoch; returning something true stops the run,
                and its samples that have not ended get the status STOPPED.
        """
        grad = torch.is_grad_enabled()
        # What is made in inference mode has no gradient, whatever is asked; parts of it, made here, have one.
        with torch.inference_mode(False), torch.set_grad_enabled(grad):
            return self._descend(chain, x_0, tolerance, progress, callback)

    def _descend(
        self,
        chain: SamplingChain,
        x_0: Tensor,
        tolerance: Tensor | float,
        progress: bool,
        callback: Callable[[Descent], object] | None,
    ) -> Descent:
        if isinstance(self.gradient, LinearTerm):
            linear_factor(chain)  # refuses a chain that has none
        now = self._begin(chain, x_0)
        stop = torch.as_tensor(tolerance) ** 2 * x_0.shape[1:].numel() if self.stop is None else torch.tensor(self.stop)
        stop = stop.to(x_0.device, torch.float64).expand(len(x_0))
        x_T = now.x_T.clone()
        optimiser = self.optimiser([x_T])
        if now.optimiser:
            optimiser.load_state_dict(copy.deepcopy(now.optimiser))
        with ProgressBar.tqdm(total=self.epochs, desc="inverting", unit="epoch", disable=not progress) as bar:
            for _ in range(self.epochs):
                rows = (now.status == ACTIVE).nonzero().flatten()
                if not len(rows):
                    break
                now, gradient = self._score(chain, x_0, now, rows, stop)
                x_T.grad = torch.zeros_like(x_T).index_copy(0, rows, gradient)
                optimiser.step()
                # Momentum would move samples that have ended.
                ended = now.status != ACTIVE
                x_T[ended] = now.best_x_T[ended]
                now = replace(now, x_T=x_T.clone(), optimiser=copy.deepcopy(optimiser.state_dict()))
                bar.set_postfix(
                    loss=f"{float(now.history[-1].loss.median()):.2e}", done=int(ended.sum()), refresh=False
                )
                bar.update()
                if callback is not None and callback(now):
                    return _ended(now, Status.STOPPED)
        return _ended(now, Status.MAX_EVALS)

    def _begin(self, chain: SamplingChain, x_0: Tensor) -> Descent:
        """Where to start: an earlier run, or x_T and latents as asked for."""
        check_images(chain, x_0)
        if self.resume is not None:
            if self.resume.x_T.shape != x_0.shape:
                raise ValueError(
                    f"resume must be of images of the same shape, {tuple(x_0.shape)}: {tuple(self.resume.x_T.shape)}"
                )
            status = self.resume.status
            again = (status == Status.MAX_EVALS) | (status == Status.STOPPED)
            return replace(self.resume, status=torch.where(again, ACTIVE, status))
        trajectory = None
        if isinstance(self.start, Tensor):
            x_T = self.start.detach().to(x_0)
            if x_T.shape != x_0.shape:
                raise ValueError(f"start must have the shape of x_0, {tuple(x_0.shape)}, got {tuple(x_T.shape)}")
        elif self.start == "noise":
            x_T = initial_noise(self.seed, range(len(x_0)), x_0.shape[1:], dtype=x_0.dtype, device=x_0.device)
        else:
            x_T, trajectory = ddim_encoding(chain, x_0)
        losses = torch.full((len(x_0),), torch.inf, dtype=torch.float64, device=x_0.device)
        status = torch.full((len(x_0),), ACTIVE, dtype=torch.int64, device=x_0.device)
        return Descent(x_T=x_T, best_x_T=x_T, best_loss=losses, status=status, trajectory=trajectory, optimiser={})

    def _score(
        self, chain: SamplingChain, x_0: Tensor, now: Descent, rows: Tensor, stop: Tensor
    ) -> tuple[Descent, Tensor]:
        """One epoch of the samples ``rows``, short of the optimiser's step; and the gradient of their losses."""
        products: list[int] = []
        part = part_of(chain, now.x_T[rows], rows, products)
        found = loss_and_gradient(part, x_0[rows], self.gradient, partial(self._solve, now.trajectory, rows))
        chain.rounds, chain.evals = chain.rounds + part.rounds, chain.evals + part.evals
        chain.check_evals = part.check_evals
        loss = now.history[-1].loss.clone() if now.history else now.best_loss.clone()
        loss[rows] = found.loss.to(loss)
        better = torch.zeros_like(now.status, dtype=torch.bool)
        better[rows] = loss[rows] < now.best_loss[rows]
        best_x_T, status = now.best_x_T.clone(), now.status.clone()
        best_x_T[better] = now.x_T[better]
        status[rows[loss[rows] <= stop[rows]]] = int(Status.CONVERGED)
        status[rows[~torch.isfinite(loss[rows])]] = int(Status.NON_FINITE)
        trajectory = None
        if found.trajectory is not None:
            latents = chain.z0 if now.trajectory is None else now.trajectory
            trajectory = latents.index_copy(0, rows, found.trajectory.to(latents))
        epoch = Epoch(
            loss=loss, rounds=part.rounds, evals=part.evals, products=len(products), product_rows=sum(products)
        )
        return replace(
            now,
            best_x_T=best_x_T,
            best_loss=torch.where(better, loss, now.best_loss),
            status=status,
            trajectory=trajectory,
            history=(*now.history, epoch),
        ), found.gradient

    def _solve(self, trajectory: Tensor | None, rows: Tensor, chain: SamplingChain) -> Tensor:
        """The chain's latents, from those of the last epoch; NaN for samples of which the denoiser makes no numbers."""
        solver = self.solver
        if isinstance(solver, CausalQuasiNewton) and solver.window is None and solver.max_rows is None:
            # All steps at once: sample() might choose a narrow window, which has no use for the last epoch's latents.
            solver = replace(solver, window=chain.steps)
        init: str | Tensor | None = None if trajectory is None else trajectory[rows]
        result = sample(chain, solver=solver, rtol=self.rtol, max_evals=self.max_evals, init=init, on_failure="ignore")
        # A solve hands over the last finite latents, whose loss would mean nothing.
        result.trajectory[result.solution.status == Status.NON_FINITE] = torch.nan
        return result.trajectory


def _ended(now: Descent, status: Status) -> Descent:
    return replace(now, status=torch.where(now.status == ACTIVE, int(status), now.status))
