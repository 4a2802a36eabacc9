"""A chain whose steps look back at earlier predictions: DPM-Solver++, UniPC, Heun's method."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from fixpoint_diffusion.chains.chain import SamplingChain, all_rows, in_parts
from fixpoint_diffusion.processes import wide
from fixpoint_diffusion.processes.modes import Modes


class MultistepChain(SamplingChain):
    r"""A :class:`SamplingChain` of transitions with a ``history`` of p predictions.

    A step needs the x_0 that the denoiser predicted in the p steps before, so a state holds them beside the latent:
    ``(1 + p, *shape)``. They are written as :class:`Modes` says, because then a step acts on each part of a state
    nearly by itself, and the prior's slopes say all that sweeps need.

    Args, attributes and errors are those of :class:`SamplingChain`, whose states ``z`` are ``(B, T, 1 + p, *shape)``
    here; :meth:`trajectory` takes the latents from them. ``chain(z)`` is one step from every state, exact after T
    rounds.

    Example:
        >>> from diffusers import DPMSolverMultistepScheduler
        >>> from fixpoint_diffusion.chains import chain_from_scheduler
        >>> scheduler = DPMSolverMultistepScheduler()
        >>> chain = chain_from_scheduler(lambda x, t: 0.5 * x, torch.ones(2, 3), scheduler, steps=10)
        >>> chain.z0.shape, chain.trajectory(chain.z0).shape
        (torch.Size([2, 10, 2, 3]), torch.Size([2, 10, 3]))
    """

    def begin(self, x_T: Tensor) -> Tensor:
        """x_T ``(N, *shape)`` with nothing predicted before it, ``(N, 1 + p, *shape)``."""
        earlier = wide(x_T).new_zeros(len(x_T), self._modes.traces.shape[1], *x_T.shape[1:])
        first = torch.zeros(len(x_T), dtype=torch.int64, device=x_T.device)
        return self._modes.encode(wide(x_T), earlier, first).to(x_T.dtype)

    @property
    def slopes(self) -> Tensor:
        """``(T, (1 + p) D)``: what the prior says that each step does to a small change of its state."""
        return self._modes.slopes.expand(-1, -1, self.x_T.shape[1:].numel()).flatten(1)

    @property
    def basis(self) -> Tensor | tuple[Tensor, ...] | None:
        """That of the prior for each part of a state."""
        basis, parts = self.prior.basis, self._modes.slopes.shape[1]
        if basis is None:
            return None
        if isinstance(basis, Tensor):
            return torch.block_diag(*[basis] * parts)
        return torch.eye(parts, dtype=torch.float64, device="cpu"), *basis

    @property
    def guess(self) -> Tensor:
        """The states ``(B, T, 1 + p, *shape)`` that the prior expects, given x_T and the noise."""
        path = wide(super().guess)
        before = torch.cat((wide(self.x_T.detach()).unsqueeze(1), path[:, :-1]), dim=1)
        images, earlier = self.prior.images(before, self.transitions), list[Tensor]()
        for _ in range(self._modes.traces.shape[1]):
            earlier.append(images)
            images = torch.cat((torch.zeros_like(images[:, :1]), images[:, :-1]), dim=1)
        _, step = all_rows(self._samples(), self.steps)
        states = self._modes.encode(path.flatten(0, 1), torch.stack(earlier, dim=2).flatten(0, 1), step + 1)
        return states.unflatten(0, path.shape[:2]).to(self.x_T.dtype)

    def latents(self, states: Tensor, step: Tensor) -> Tensor:
        """The latents ``(N, *shape)`` in states ``(N, 1 + p, *shape)`` before the steps ``step``, ``(N,)``."""
        return in_parts(lambda x, step: self._modes.latents(wide(x), step).to(x.dtype), states, step)

    def __call__(self, z: Tensor) -> Tensor:
        """One step from every state: ``(B, T, 1 + p, *shape)`` to the same shape."""
        return self.one_step(z)

    def arrive(self, x: Tensor, out: Tensor, sample: Tensor, step: Tensor) -> Tensor:
        """The states ``(N, 1 + p, *shape)`` after chosen steps, from the denoiser's outputs ``(N, *shape)``."""
        noise = None if self.noise is None else wide(self.noise[sample, step])
        latent = self._modes.latents(wide(x), step)
        earlier = self._modes.earlier(wide(x), latent, step)
        after, image = self.transitions.step_back(latent, wide(out), step, earlier, noise, sample)
        earlier = torch.cat((image.unsqueeze(1), earlier[:, :-1]), dim=1)
        return self._modes.encode(after, earlier, step + 1).to(x.dtype)

    def accumulate(self, x: Tensor, out: Tensor) -> Tensor:
        """One step from every state ``x`` ``(B, T, 1 + p, *shape)``, from the outputs ``(B, T, *shape)``."""
        rows = all_rows(self._samples(), self.steps)
        return in_parts(self.arrive, x.flatten(0, 1), out.flatten(0, 1), *rows).reshape(x.shape)

    @cached_property
    def _modes(self) -> Modes:
        return Modes.of(self.prior, self.transitions)
