"""The inverse of a chain as one problem: all latents before its steps unknown, the image given."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fixpoint_diffusion.chains import SamplingChain
from fixpoint_diffusion.chains.chain import all_rows
from fixpoint_diffusion.inversion.grids import StepGrid, lines, step_grids
from fixpoint_diffusion.inversion.result import Found
from fixpoint_diffusion.processes import Clip, wide

# The sweep divides by the slopes, and what a prior says of a step that hardly passes anything on is not that exact.
_SMALLEST_SLOPE = 0.05


class ClippedChainError(ValueError):
    """A chain that clips its predicted images, for a method that would have to undo that."""


def refuse_clipped(chain: SamplingChain, *, otherwise: str) -> None:
    """Raise :class:`ClippedChainError` for a chain that clips; ``otherwise``: what to do where it has to."""
    hook = chain.transitions.x0_hook
    if hook is not None and not (isinstance(hook, Clip) and math.isinf(hook.limit)):
        raise ClippedChainError(
            f"a chain whose predicted images pass through {hook!r} cannot be inverted: that takes many latents to "
            'one. Build it without: DDIMChain(..., clip_sample=float("inf")) or chain_from_scheduler(..., '
            f'x0_hook=Clip(float("inf"))). Or {otherwise}'
        )


class InverseProblem:
    """``Phi_k(X_k) = X_{k+1}`` for every step k, with ``X_T = x_0`` given and ``X_0 = x_T`` free.

    Latents are ``(B, T, D)`` in float64, in the coordinates of the chain's prior: ``X_k`` is the one before step k.
    With ``M_k`` the prior's slopes, the *sources* ``U_k = M_k X_k - X_{k+1}`` are another set of coordinates of the
    same trajectory: to get the latents from them is one sweep from the image end. In these coordinates a Newton step
    with the prior's slopes is ``U - F``, where ``F_k = Phi_k(X_k) - X_{k+1}`` is what the steps miss by. So a solver
    for ``U = U - F(U)`` is preconditioned by the sweep, and measures what matters: F.

    Args:
        chain: of B samples.
        x_0: ``(B, *shape)``; its dtype is what the denoiser is called in.

    Raises:
        ClippedChainError: a chain that clips its predicted images.
    """

    def __init__(self, chain: SamplingChain, x_0: Tensor) -> None:
        refuse_clipped(chain, otherwise="take a method that solves no step, such as OptimisedInverse()")
        self.chain = chain
        self.shape = x_0.shape[1:]
        self.dtype = x_0.dtype
        self.x_0 = self.to_coordinates(x_0)
        self.slopes = wide(chain.slopes.to(x_0.device)).clamp(min=_SMALLEST_SLOPE)

    @property
    def grids(self) -> list[StepGrid]:
        """From coarse to fine, at whose steps the denoiser may be asked before it is asked at all of them."""
        if self.chain.noise is not None:  # makes latents rough along the chain, and the denoiser's outputs with them
            return []
        return step_grids(self.chain.transitions.timesteps, self.x_0.device)

    @property
    def steps(self) -> int:
        """T."""
        return self.chain.steps

    def to_coordinates(self, x: Tensor) -> Tensor:
        """From ``(..., *shape)`` to ``(..., D)``."""
        leading, size = x.shape[: x.ndim - len(self.shape)], math.prod(self.shape)
        return self.chain.prior.to_coordinates(x.reshape(-1, size)).reshape(*leading, size)

    def from_coordinates(self, x: Tensor) -> Tensor:
        """The inverse of ``to_coordinates``, still wide."""
        return self.chain.prior.from_coordinates(x.flatten(0, -2)).reshape(*x.shape[:-1], *self.shape)

    def latent(self, x: Tensor) -> Tensor:
        """Coordinates ``(..., D)`` as latents ``(..., *shape)`` in the denoiser's dtype."""
        return self.from_coordinates(x).to(self.dtype)

    def guess(self, x: Tensor | None = None, steps: int | None = None) -> Tensor:
        """The latents ``(B, steps, D)`` that would lead to the images if the data were the prior's Gaussian.

        ``x`` ``(B, D)`` and ``steps`` are given where the latent after so many steps is known; else they are all steps.
        """
        transitions, device = self.chain.transitions, self.x_0.device
        prior = self.chain.prior
        mean = prior.to_coordinates(prior.mean.to(device).expand(1, self.x_0.shape[1]))
        before, after = wide(transitions.alphas.sqrt().to(device)), wide(transitions.alphas_prev.sqrt().to(device))
        sigma = wide(transitions.sigma.to(device))
        x, latents = self.x_0 if x is None else x, []
        for k in reversed(range(self.steps if steps is None else steps)):
            if self.chain.noise is not None:
                x = x - sigma[k] * self.to_coordinates(self.chain.noise[:, k])
            x = before[k] * mean + (x - after[k] * mean) / self.slopes[k]
            latents.append(x)
        return torch.stack(latents[::-1], dim=1)

    def images(self, latents: Tensor, samples: Tensor) -> Tensor:
        """What every step makes of its latent, ``(N, T, D)`` to the same shape, for N samples ``(N,)`` of the batch."""
        return self.step(latents.flatten(0, 1), *all_rows(samples, self.steps)).reshape(latents.shape)

    def look(self, *asked: Asked) -> list[Look]:
        """As ``images``, in one round too, but with more to see, and of several groups of samples."""
        groups = [each.rows() for each in asked]
        rows = [part for group in groups for part in group]
        x = torch.cat([latents.flatten(0, -2) for latents, _, _ in rows])
        sample, step = (torch.cat([part[i].flatten() for part in rows]) for i in (1, 2))
        out = wide(self.chain.denoise(self.from_coordinates(x).to(self.dtype), sample, step))
        parts = iter(out.split([part[1].numel() for part in rows]))
        found = [[next(parts).unflatten(0, part[1].shape) for part in group] for group in groups]
        return [self._seen(each, *outputs) for each, outputs in zip(asked, found, strict=True)]

    def _seen(self, asked: Asked, out: Tensor, *beside: Tensor) -> Look:
        """What a group's latents, and its probes beside them, have shown, given the denoiser's outputs."""
        latents, samples, grid = asked.latents, asked.samples, asked.grid
        filled, coarse = (out, None) if grid is None else grid.fill(out)
        images = self._arrive_all(latents, samples, filled, 0)
        doubts = None if coarse is None else images - self._arrive_all(latents, samples, coarse, 0)
        responses = []
        for each, seen in zip(asked.probes, beside, strict=True):
            change = seen - out[:, None, torch.isin(asked.steps, each.steps)]
            # The change of the output, at the steps that were not probed: on a line between those that were.
            change = torch.einsum("tn,bpn...->bpt...", lines(each.steps, each.first, self.steps), change)
            late = torch.arange(each.first, self.steps, device=latents.device)
            moved = (latents[:, None, each.first :] + each.at(late)).unbind(dim=1)
            arrived = [
                self._arrive_all(y, samples, filled[:, each.first :] + extra, each.first)
                for y, extra in zip(moved, change.unbind(dim=1), strict=True)
            ]
            responses.append(torch.stack(arrived, dim=2) - images[:, each.first :, None])
        return Look(images, doubts, responses)

    def step(self, x: Tensor, sample: Tensor, step: Tensor) -> Tensor:
        """Chosen steps of latents ``(N, D)``, in one round; only the denoiser computes in less than ``wide``."""
        x = self.from_coordinates(x)
        return self._arrive(x, sample, step, wide(self.chain.denoise(x.to(self.dtype), sample, step)))

    def _arrive(self, x: Tensor, sample: Tensor, step: Tensor, out: Tensor) -> Tensor:
        """Where chosen steps take latents ``(N, *shape)``, given the denoiser's outputs; as coordinates ``(N, D)``."""
        chain = self.chain
        noise = None if chain.noise is None else wide(chain.noise[sample, step])
        return self.to_coordinates(chain.transitions.step(x, out, step, noise, sample))

    def _arrive_all(self, latents: Tensor, samples: Tensor, out: Tensor, first: int) -> Tensor:
        """Where the steps from ``first`` on take their latents ``(N, n, D)``, given outputs ``(N, n, *shape)``."""
        sample, step = all_rows(samples, latents.shape[1])
        x = self.from_coordinates(latents).flatten(0, 1)
        return self._arrive(x, sample, first + step, out.flatten(0, 1)).reshape(latents.shape)

    def after(self, latents: Tensor, samples: Tensor) -> Tensor:
        """What every step should arrive at: the next latent, and after the last the image."""
        return torch.cat((latents[:, 1:], self.x_0[samples, None]), dim=1)

    def sources(self, latents: Tensor, samples: Tensor) -> Tensor:
        """``U`` of latents ``(N, T, D)``."""
        return self.slopes * latents - self.after(latents, samples)

    def from_sources(self, sources: Tensor, x_0: Tensor) -> Tensor:
        """The latents of sources ``(N, T, D)`` of images ``(N, D)``, by a sweep from the image end."""
        x, latents = x_0, []
        for k in reversed(range(self.steps)):
            x = (sources[:, k] + x) / self.slopes[k]
            latents.append(x)
        return torch.stack(latents[::-1], dim=1)


@dataclass(frozen=True, eq=False)
class Probes:
    """Small changes of the latents before steps, to see what these steps make of them.

    Attributes:
        first: the steps from this one on are asked about.
        steps: ``(n,)``, rising, those of them that are probed; of a grid that is given too, all must be steps.
        changes: ``(N, P, 1 or T - first, D)``, coordinates, of samples and steps.
    """

    first: int
    steps: Tensor
    changes: Tensor

    def at(self, steps: Tensor) -> Tensor:
        """The changes before chosen steps, ``(N, P, 1 or n, D)``."""
        return self.changes if self.changes.shape[2] == 1 else self.changes[:, :, steps - self.first]

    def split(self, sizes: Sequence[int]) -> list[Probes]:
        """Those of the first samples, of the next ones, and so on: groups of these sizes."""
        return [Probes(self.first, self.steps, part) for part in self.changes.split(list(sizes))]


@dataclass(frozen=True, eq=False)
class Asked:
    """Samples that a round is to evaluate, and where.

    Attributes:
        samples: ``(N,)``, of the batch.
        latents: ``(N, T, D)``.
        grid: the denoiser is asked at its steps alone; None: at all steps.
        probes: what steps are to be probed with.
    """

    samples: Tensor
    latents: Tensor
    grid: StepGrid | None = None
    probes: Sequence[Probes] = ()

    @property
    def steps(self) -> Tensor:
        """At which the denoiser is asked."""
        latents, grid = self.latents, self.grid
        return torch.arange(latents.shape[1], device=latents.device) if grid is None else grid.steps

    def rows(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Latents ``(..., D)``, and the sample and the step ``(...)`` of each: the trajectory's, then each probe's."""
        latents, probes = self.latents, self.probes
        x = [latents[:, self.steps], *(latents[:, None, each.steps] + each.at(each.steps) for each in probes)]
        steps = [self.steps, *(each.steps for each in probes)]
        # Samples come first in all of them.
        samples = [self.samples.reshape(-1, *(1 for _ in y.shape[2:])) for y in x]
        return [
            (y, sample.expand(y.shape[:-1]), step.expand(y.shape[:-1]))
            for y, sample, step in zip(x, samples, steps, strict=True)
        ]


class Look(NamedTuple):
    """What a round shows.

    Attributes:
        images: what every step makes of its latent ``(N, T, D)``.
        doubts: by how much the images by the next coarser grid would differ; None without a grid.
        responses: by how much each of the probes changes the images, ``(N, T - first, P, D)``.
    """

    images: Tensor
    doubts: Tensor | None
    responses: list[Tensor]


class BestSoFar:
    """Of each sample the best x_T that was tried: the one from which the ordinary sampler comes nearest to the image.

    Attributes:
        x_T: ``(B, D)``, coordinates.
        error: ``(B,)`` float64, RMS of what the sampler makes of it, minus the image; NaN where none was tried yet.
        trajectory: ``(B, T, *shape)``, of the sampler from there.
    """

    def __init__(self, problem: InverseProblem) -> None:
        chain = self._chain = problem.chain
        self._problem = problem
        self.x_T = torch.zeros_like(problem.x_0)
        self.error = problem.x_0.new_full((len(problem.x_0),), torch.nan)
        self.trajectory = chain.x_T.new_zeros(len(problem.x_0), chain.steps, *problem.shape, dtype=problem.dtype)
        # Running the sampler is no part of the search.
        self._rounds, self._evals = chain.rounds, chain.evals

    def consider(self, samples: Tensor, x_T: Tensor) -> Tensor:
        """Run the sampler from the x_T ``(N, D)`` of some samples ``(N,)``; their errors ``(N,)``."""
        chain, problem = self._chain, self._problem
        before = chain.rounds, chain.evals
        trajectory = chain.sequential(x_T=problem.latent(x_T), samples=samples)
        self._rounds += chain.rounds - before[0]
        self._evals += chain.evals - before[1]
        error = rms(trajectory[:, -1] - problem.latent(problem.x_0[samples]))
        better = torch.isnan(self.error[samples]) | (error < self.error[samples])
        rows = samples[better]
        self.x_T[rows], self.error[rows], self.trajectory[rows] = x_T[better], error[better], trajectory[better]
        return error

    def found(self, status: Tensor, history: Sequence[Any]) -> Found:
        """The result of a search that has considered every sample."""
        return Found(
            x_T=self._problem.latent(self.x_T),
            status=status,
            rounds=self._chain.rounds - self._rounds,
            evals=self._chain.evals - self._evals,
            trajectory=self.trajectory,
            history=history,
        )


def check_images(chain: SamplingChain, x_0: Tensor) -> None:
    """Refuse images that are not finite, or do not fit the chain's x_T; and a chain whose steps look back."""
    if chain.transitions.history is not None:
        raise ValueError(
            "a chain whose steps look back at earlier predictions cannot be inverted: take DDIM's or Euler's"
        )
    if not isinstance(x_0, Tensor) or x_0.shape != chain.x_T.shape or not x_0.is_floating_point():
        found = f"{x_0.dtype} {tuple(x_0.shape)}" if isinstance(x_0, Tensor) else type(x_0).__name__
        raise ValueError(f"x_0 must be a float tensor of the shape of x_T, {tuple(chain.x_T.shape)}, got {found}")
    if x_0.device != chain.x_T.device:
        raise ValueError(f"x_0 must be on the device of x_T, {chain.x_T.device}, got {x_0.device}")
    check_finite("x_0", x_0)


def check_finite(name: str, x: Tensor, *, item: str = "sample") -> None:
    """Refuse samples ``(B, ...)`` that are not finite; ``item`` is what one of them is called."""
    bad = (~torch.isfinite(_flat(x))).any(dim=1).nonzero().flatten().tolist()
    if bad:
        more = " and others" if len(bad) > 1 else ""
        raise ValueError(f"{name} must be finite; it is not in {item} {bad[0]}{more}")


def rms(x: Tensor) -> Tensor:
    """``(B,)`` float64 of ``(B, ...)``."""
    return wide(_flat(x)).square().mean(dim=1).sqrt()


def _flat(x: Tensor) -> Tensor:
    """``(B, *shape)`` as ``(B, D)``; samples may be numbers."""
    return x.reshape(len(x), x.shape[1:].numel())
