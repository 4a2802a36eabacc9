"""A chain whose steps look back at earlier predictions: DPM-Solver++, UniPC, Heun's method."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from fixpoint_diffusion.chains.chain import SamplingChain, all_rows
from fixpoint_diffusion.processes import wide


class MultistepChain(SamplingChain):
    r"""A :class:`SamplingChain` of transitions with a ``history`` of p predictions.

    A step needs the x_0 that the denoiser predicted in the p steps before, so a state holds them beside the latent:
    ``(1 + p, *shape)``. Kept is by how much each differs from what the prior makes of the latent, because then a change
    of the latent leaves the rest of the state nearly as it is, and the prior's slopes say all that sweeps need.

    Args, attributes and errors are those of :class:`SamplingChain`, whose states ``z`` are ``(B, T, 1 + p, *shape)``
    here; :meth:`latents` takes the latents from them. ``chain(z)`` is one step from every state, exact after T rounds.

    Example:
        >>> import diffusers
        >>> from fixpoint_diffusion.chains import chain_from_scheduler
        >>> scheduler = diffusers.DPMSolverMultistepScheduler()
        >>> chain = chain_from_scheduler(lambda x, t: 0.5 * x, torch.ones(2, 3), scheduler, steps=10)
        >>> chain.z0.shape, chain.sequential().shape
        (torch.Size([2, 10, 2, 3]), torch.Size([2, 10, 3]))
    """

    def begin(self, x_T: Tensor) -> Tensor:
        """x_T ``(N, *shape)`` with nothing predicted before it, ``(N, 1 + p, *shape)``."""
        assert self.transitions.history is not None
        nothing = torch.zeros_like(x_T).unsqueeze(1).expand(-1, self.transitions.history.shape[1], *x_T.shape[1:])
        return torch.cat((x_T.unsqueeze(1), nothing), dim=1)

    @property
    def slopes(self) -> Tensor:
        """``(T, (1 + p) D)``: what the prior says that each step does to a small change of its state."""
        slopes, traces = self._modelled
        assert self.transitions.history is not None
        # The latent takes the k-th part of the rest by its weight; what is left of it there is what that moves.
        parts = (slopes[:, None], -self.transitions.history[..., None] * traces[1:])
        return torch.cat(parts, dim=1).expand(-1, -1, self.x_T[0].numel()).flatten(1)

    @property
    def basis(self) -> Tensor | tuple[Tensor, ...] | None:
        """That of the prior for each part of a state."""
        basis, parts = self.prior.basis, self.start.shape[1]
        if basis is None:
            return None
        return (
            torch.block_diag(*[basis] * parts)
            if isinstance(basis, Tensor)
            else (torch.eye(parts, dtype=torch.float64), *basis)
        )

    @property
    def guess(self) -> Tensor:
        """The states ``(B, T, 1 + p, *shape)`` that the prior expects, given x_T and the noise."""
        path = super().guess
        before = torch.cat((self.x_T.detach().unsqueeze(1).to(path), path[:, :-1]), dim=1)
        images, parts = self.prior.images(before, self.transitions).to(path), [path.unsqueeze(2)]
        for _ in range(self.start.shape[1] - 1):
            parts.append(images.unsqueeze(2))
            images = torch.cat((torch.zeros_like(images[:, :1]), images[:, :-1]), dim=1)
        states = torch.cat(parts, dim=2)
        step = torch.arange(self.steps, device=path.device).repeat(len(path))
        flat = states.flatten(0, 1)
        return torch.cat((flat[:, :1], flat[:, 1:] - self._expected(flat[:, 0], step + 1)), dim=1).reshape(states.shape)

    def latents(self, z: Tensor) -> Tensor:
        """The latents ``(..., *shape)`` of states ``(..., 1 + p, *shape)``."""
        return z.select(-self.x_T.ndim, 0)

    def __call__(self, z: Tensor) -> Tensor:
        """One step from every state: ``(B, T, 1 + p, *shape)`` to the same shape."""
        return self.one_step(z)

    def arrive(self, x: Tensor, out: Tensor, sample: Tensor, step: Tensor) -> Tensor:
        """The states ``(N, 1 + p, *shape)`` after chosen steps, from the denoiser's outputs ``(N, *shape)``."""
        noise = None if self.noise is None else wide(self.noise[sample, step])
        latent, rest = wide(x[:, 0]), wide(x[:, 1:])
        earlier = rest + self._expected(latent, step)
        after, image = self.transitions.step_back(latent, wide(out), step, earlier, noise, sample)
        earlier = torch.cat((image.unsqueeze(1), earlier[:, :-1]), dim=1)
        return torch.cat((after.unsqueeze(1), earlier - self._expected(after, step + 1)), dim=1).to(x.dtype)

    def accumulate(self, x: Tensor, out: Tensor) -> Tensor:
        """One step from every state ``x`` ``(B, T, 1 + p, *shape)``, from the outputs ``(B, T, *shape)``."""
        rows = all_rows(self._samples(), self.steps)
        return self.arrive(x.flatten(0, 1), out.flatten(0, 1), *rows).reshape(x.shape)

    @cached_property
    def _modelled(self) -> tuple[Tensor, Tensor]:
        return self.prior.slopes_and_traces(self.transitions)

    def _expected(self, latent: Tensor, step: Tensor) -> Tensor:
        """What the prior makes of latents ``(N, *shape)`` before the steps: earlier predictions ``(N, p, *shape)``."""
        traces = self._modelled[1].to(wide(latent))[step]
        along = self.prior.to_coordinates(latent.flatten(1)).unsqueeze(1) * traces
        found = self.prior.from_coordinates(along.flatten(0, 1))
        return found.reshape(*traces.shape[:2], *latent.shape[1:]).to(latent.dtype)
