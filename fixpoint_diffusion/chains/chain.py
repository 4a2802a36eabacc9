"""A whole sampling trajectory as one fixed point (DEQ-DDIM, Sec. 4), for any steps that ``Transitions`` describes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from numbers import Integral

import torch
from torch import Tensor

from fixpoint import ProgressBar
from fixpoint_diffusion.chains.known_outputs import KnownOutputs, known_neighbours, neighbours
from fixpoint_diffusion.denoisers.checks import call_checked, check_conditioning, check_fixed_function, check_process
from fixpoint_diffusion.denoisers.protocol import describe
from fixpoint_diffusion.processes import GaussianPrior, Transitions, wide

_PART = 2**20  # entries of latents that are worked on in float64 at a time: 8 MiB, and more of them take hardly longer


class SamplingChain:
    """All latents of a sampler as the unknown of one fixed point problem ``z = chain(z)``.

    A state ``z`` has shape ``(B, T, *shape)``: row k is the latent after step k, the last row is x_0. Rows of
    ``chain(z)`` depend on earlier rows alone, so plain iteration is exact after T evaluations; a good solver needs far
    fewer, and all of an evaluation's T denoiser rows go through the network in one batch.

    A chain is a problem for ``fixpoint.solve(chain)``; :func:`fixpoint_diffusion.sample` adds what sampling wants.
    Gradients flow through ``chain(z)`` to z, to x_T and to the denoiser's parameters. :class:`DDIMChain` and
    :class:`StochasticDDIMChain` make the transitions from a noise schedule.

    Args:
        denoiser: called as ``denoiser(x, t, **conditioning)`` with latents ``(N, *shape)``, timesteps ``(N,)`` int64
            and the rows of the conditioning; returns ``(N, *shape)`` in the dtype and on the device of x. Must treat
            rows independently.
        x_T: initial noise, ``(B, *shape)``, floating point. Its dtype and device are the chain's; sums over the chain
            are in float64 all the same (float32 on devices without it).
        transitions: the coefficients of every step.
        noise: standard normal noise of every step, ``(B, T, *shape)`` in the dtype and on the device of x_T; None where
            the transitions add none.
        conditioning: what the denoiser is told beside x and t, by name: tensors ``(B, ...)``, one row a sample.
        max_rows: most rows in one denoiser call, to bound memory; by default all at once. A split call is one round.

    Attributes:
        rounds: batched denoiser calls so far.
        evals: denoiser rows so far.
        check_evals: rows, beside those, of the one call that sees whether the denoiser is a fixed function.

    Raises:
        ValueError: inconsistent options or shapes; a model of a flow with other steps, or the other way round; at its
            first call, a denoiser that returns another shape, dtype or device than it was given, changes x in place,
            draws at random (dropout in training mode), or lets rows of a batch see each other (batch normalisation in
            training mode). One call of three rows more tells the last two.

    Source: Pokle, Geng, Kolter, "Deep Equilibrium Approaches to Diffusion Models" (NeurIPS 2022), Eq. 7 to 13.

    Example:
        >>> from fixpoint_diffusion import NoiseSchedule
        >>> schedule = NoiseSchedule.linear()
        >>> transitions = Transitions.of(schedule, schedule.timesteps(5))
        >>> def denoiser(x, t, label):
        ...     return x * label.reshape(-1, 1)
        >>> labels = torch.tensor([0.1, 0.9])
        >>> chain = SamplingChain(denoiser, torch.ones(2, 3), transitions, conditioning={"label": labels})
        >>> chain(chain.z0).shape, chain.evals
        (torch.Size([2, 5, 3]), 10)
    """

    batch_dims = 1

    def __init__(
        self,
        denoiser: Callable[..., Tensor],
        x_T: Tensor,
        transitions: Transitions,
        *,
        noise: Tensor | None = None,
        conditioning: Mapping[str, Tensor] | None = None,
        max_rows: int | None = None,
    ) -> None:
        check_start(x_T)
        if max_rows is not None and (not isinstance(max_rows, Integral) or max_rows < 1):
            raise ValueError(f"max_rows must be a whole number of at least 1, got {max_rows!r}")
        about = describe(denoiser)
        check_process(about, along_flow=transitions.along_flow)
        self.denoiser = denoiser
        self.x_T = x_T
        self.transitions = transitions
        self.noise = None if noise is None else self._check_noise(noise)
        given = {} if conditioning is None else conditioning
        self.conditioning = check_conditioning(given, about, len(x_T), x_T.device)
        self.max_rows: int | None = max_rows
        self.check_evals = 0
        self._timesteps_here = transitions.timesteps, transitions.timesteps
        self.reset_counters()

    @property
    def prior(self) -> GaussianPrior:
        """What is assumed of the images before the denoiser is asked: its attribute ``prior``, or a plain one."""
        return describe(self.denoiser).prior or GaussianPrior.isotropic()

    @property
    def start(self) -> Tensor:
        """The state from which the first step starts: x_T."""
        return self.begin(self.x_T)

    def begin(self, x_T: Tensor) -> Tensor:
        """The state in which a chain from x_T ``(N, *shape)`` starts: x_T itself, where no step looks back."""
        return x_T

    @property
    def slopes(self) -> Tensor:
        """``(T, 1 or D)``: what the prior says that each step does to a small change of its latent."""
        return self.prior.slopes(self.transitions)

    @property
    def basis(self) -> Tensor | tuple[Tensor, ...] | None:
        """In whose coordinates the slopes count: ``(D, D)``, or a matrix for each dimension; None: the entries."""
        return self.prior.basis

    @property
    def noise_scale(self) -> Tensor:
        """``(T,)``: the root mean square norm of the noise that each step adds to a latent; the least, if learned."""
        return self.transitions.sigma * math.prod(self.x_T.shape[1:]) ** 0.5

    @property
    def guess(self) -> Tensor:
        """The latents ``(B, T, *shape)`` that the prior expects, given x_T and the noise."""
        return self.prior.path(self.x_T.detach(), self.transitions, self.noise)

    def latents(self, states: Tensor, step: Tensor) -> Tensor:
        """The latents ``(N, *shape)`` in states ``(N, ...)`` before the steps ``step`` ``(N,)``; T: after the last.

        They are the states themselves, where no step looks back.
        """
        return states

    def trajectory(self, z: Tensor) -> Tensor:
        """All latents, ``(B, T, *shape)``, in a solution ``(B, T, ...)``."""
        _, step = all_rows(torch.arange(len(z), device=z.device), self.steps)
        return self.latents(z.flatten(0, 1), step + 1).unflatten(0, z.shape[:2])

    @property
    def timesteps(self) -> Tensor:
        """What the denoiser is told at each step: ``(T,)`` on the CPU, descending; int64 for DDIM and DDPM."""
        return self.transitions.timesteps

    @property
    def steps(self) -> int:
        """T, the number of steps."""
        return len(self.transitions.timesteps)

    @property
    def z0(self) -> Tensor:
        """Where to start: every latent = x_T, ``(B, T, *shape)``; detached, for no solution depends on its start."""
        return self.start.detach().unsqueeze(1).expand(-1, self.steps, *self.start.shape[1:]).clone()

    def __call__(self, z: Tensor) -> Tensor:
        """All latents from all latents, in the cumulative form of Eq. 10: ``(B, T, *shape)`` to the same shape.

        Evaluates the denoiser on B T rows. One evaluation carries a change of any row to all rows after it.
        """
        x = self.inputs(z)
        return self.accumulate(x, self.denoise_all(x))

    def one_step(self, z: Tensor) -> Tensor:
        """Each latent from the one before it alone, the first from x_T: ``(B, T, *shape)`` to the same shape.

        The same fixed point as that of ``chain(z)``, in the form that sweeps over a chain need.
        """
        x = self.inputs(z)
        return self.transition(x.flatten(0, 1), *all_rows(self._samples(), self.steps)).reshape(x.shape)

    def transition(self, x: Tensor, sample: Tensor, step: Tensor) -> Tensor:
        """Chosen steps of chosen samples, in one round of N denoiser rows.

        A subclass that changes what a step does overrides :meth:`arrive` or :meth:`denoise`, of which
        :meth:`sparse_transition` is made too. One that overrides this method alone is evaluated whole in every round.

        Args:
            x: the latents before the steps, ``(N, *shape)``.
            sample: the sample of each row, ``(N,)`` int64, from 0 to B - 1.
            step: the step of each row, ``(N,)`` int64, from 0 to T - 1.

        Returns:
            The latents after the steps, ``(N, *shape)`` in the dtype of x.
        """
        sample, step = sample.to(x.device), step.to(x.device)
        return in_parts(self.arrive, x, self.denoise(self.latents(x, step), sample, step), sample, step)

    def sparse_transition(self, x: Tensor, sample: Tensor, step: Tensor, evaluated: Tensor) -> tuple[Tensor, Tensor]:
        """As :meth:`transition`, but the denoiser is asked about a part; see :class:`fixpoint.SparseChain`."""
        sample, step = sample.to(x.device), step.to(x.device)
        latents = self.latents(x, step)
        # Before the denoiser is asked: the prior is copied to the device, for which the host would wait.
        expected = in_parts(self._expected, latents, step)
        samples, steps, asked = (each[evaluated] for each in (sample, step, latents))
        out = self.denoise(asked, samples, steps)
        expected_of_asked = expected[evaluated]
        known = KnownOutputs(self.transitions, asked, expected_of_asked, out, steps)
        outputs = in_parts(known.between, latents, expected, step, *neighbours(evaluated, len(step)))
        del latents, expected
        outputs[evaluated] = out
        states = in_parts(self.arrive, x, outputs, sample, step)
        del outputs
        before, after = known_neighbours(samples, steps)
        guesses = in_parts(known.between, asked, expected_of_asked, steps, before, after)
        guesses = in_parts(self.arrive, x[evaluated], guesses, samples, steps)
        distance = torch.linalg.vector_norm((guesses - states[evaluated]).reshape(len(evaluated), -1), dim=1)
        return states, distance.new_zeros(len(step)).index_copy(0, evaluated, torch.where(before < after, distance, 0))

    def _expected(self, latents: Tensor, step: Tensor) -> Tensor:
        """The images that the prior expects of latents ``(N, *shape)`` before the steps ``(N,)``, in their dtype."""
        return self.prior.images(wide(latents)[None], self.transitions, step)[0].to(latents.dtype)

    def arrive(self, x: Tensor, out: Tensor, sample: Tensor, step: Tensor) -> Tensor:
        """What :meth:`transition` returns, from the denoiser's outputs ``out``."""
        noise = None if self.noise is None else wide(self.noise[sample, step])
        return self.transitions.step(wide(x), wide(out), step, noise, sample).to(x.dtype)

    def sequential(
        self,
        *,
        x_T: Tensor | None = None,
        samples: Tensor | None = None,
        trajectory: bool = True,
        progress: bool = False,
    ) -> Tensor:
        """The ordinary sampler, one step after another, with the same noise.

        Args:
            x_T: where to start, ``(N, *shape)``; None: at the chain's x_T.
            samples: whose noise and conditioning are used, ``(N,)`` int64; None: those of all samples.
            trajectory: whether to keep all latents. Without, no more than one is held beside what the denoiser takes.
            progress: show a bar.

        Returns:
            All latents, ``(N, T, *shape)``: what every parallel solution must equal. Without ``trajectory`` the last of
            them, x_0, ``(N, *shape)``.
        """
        state, latents = self.begin(self.x_T if x_T is None else x_T), []
        samples = self._samples() if samples is None else samples
        for k in ProgressBar.tqdm(range(self.steps), desc="sequential", disable=not progress):
            state = self.transition(state, samples, torch.full_like(samples, k))
            if trajectory or k == self.steps - 1:
                latents.append(self.latents(state, torch.full_like(samples, k + 1)))
        return torch.stack(latents, dim=1) if trajectory else latents[-1]

    def inputs(self, z: Tensor) -> Tensor:
        """The latent that each step starts from: x_T, then all rows of z but the last; ``(B, T, *shape)``."""
        expected = (len(self.x_T), self.steps, *self.start.shape[1:])
        if tuple(z.shape) != expected:
            raise ValueError(f"the chain's state has shape (B, T, *shape) = {expected}, got {tuple(z.shape)}")
        return torch.cat([self.start.unsqueeze(1).to(z.dtype), z[:, :-1]], dim=1)

    def denoise(self, x: Tensor, sample: Tensor, step: Tensor) -> Tensor:
        """The denoiser's outputs for latents ``(N, *shape)`` before chosen steps, checked, counted as one round.

        Arguments as for :meth:`transition`.
        """
        if not len(x):  # networks are not made for that
            return torch.cat([x, x], dim=1) if self.transitions.learned_variance else x
        size = self.max_rows or len(x)
        rows = zip(x.split(size), sample.to(x.device).split(size), step.to(x.device).split(size), strict=True)
        parts = [self._call(*part) for part in rows]
        self.rounds += 1
        self.evals += len(x)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def denoise_all(self, x: Tensor) -> Tensor:
        """The denoiser's outputs for the inputs of all steps, ``(B, T, *shape)``, in one round."""
        sample, step = all_rows(self._samples(), self.steps)
        out = self.denoise(self.latents(x.flatten(0, 1), step), sample, step)
        return out.unflatten(0, x.shape[:2])

    def accumulate(self, x: Tensor, out: Tensor) -> Tensor:
        """The right-hand side of Eq. 10 from each step's input and denoiser output, both ``(B, T, *shape)``."""
        return self.transitions.cumulative(x, out, self.noise)

    def reset_counters(self) -> None:
        """Start counting rounds and evaluations from zero."""
        self.rounds = 0
        self.evals = 0

    def _samples(self) -> Tensor:
        """The numbers of all samples, ``(B,)``."""
        return torch.arange(len(self.x_T), device=self.x_T.device)

    def _call(self, x: Tensor, sample: Tensor, step: Tensor) -> Tensor:
        t, x = self._timesteps_on(x.device)[step], self.transitions.as_input(x, step)
        rows = {name: rows[sample] for name, rows in self.conditioning.items()}
        # What the network learned of the variance stands behind the prediction.
        wanted = self.transitions.learned_variance
        returned = wanted or describe(self.denoiser).learned_variance
        channels = x.shape[1] * (2 if returned else 1) if x.ndim > 1 else 1
        out = call_checked(self.denoiser, x, t, rows, channels=channels)
        if self.check_evals == 0 and not torch.compiler.is_compiling():
            self.check_evals = min(3, self.max_rows or 3)
            out = out.clone()  # the denoiser may use the memory of its output again
            times = self._timesteps_on(x.device)
            check_fixed_function(
                self.denoiser, x.detach(), t, rows, out.detach(), rows=self.check_evals, timesteps=times
            )
        return out if wanted or x.ndim == 1 else out[:, : x.shape[1]]

    def _timesteps_on(self, device: torch.device) -> Tensor:
        """The timesteps where the latents are; copied there once."""
        kept, here = self._timesteps_here
        if kept is not self.timesteps or here.device != device:
            here = self.timesteps.to(device)
            self._timesteps_here = self.timesteps, here
        return here

    def _check_noise(self, noise: Tensor) -> Tensor:
        expected = torch.Size([len(self.x_T), self.steps, *self.x_T.shape[1:]])
        for name, wanted in (("shape", expected), ("dtype", self.x_T.dtype), ("device", self.x_T.device)):
            found = getattr(noise, name, None)
            if found != wanted:
                raise ValueError(
                    f"noise must have shape (B, T, *shape), dtype and device of x_T: {name} is {found}, "
                    f"expected {wanted}"
                )
        return noise


def in_parts(function: Callable[..., Tensor], x: Tensor, *more: Tensor) -> Tensor:
    """``function(x, *more)``, which treats each row by itself, of a few rows of these tensors ``(N, ...)`` at a time.

    What is made in float64 on the way to its result would be several times all that a solver holds.
    """
    size = max(1, _PART // max(x[:1].numel(), 1))
    if len(x) <= size:
        return function(x, *more)
    return torch.cat([function(*part) for part in zip(*(each.split(size) for each in (x, *more)), strict=True)])


def check_start(x_T: Tensor) -> None:
    """Raise a ``ValueError`` for what no chain can start from."""
    if not isinstance(x_T, Tensor) or not x_T.is_floating_point() or x_T.ndim < 1:
        found = f"{x_T.dtype} {tuple(x_T.shape)}" if isinstance(x_T, Tensor) else f"a {type(x_T).__name__}"
        raise ValueError(f"x_T must be a floating-point tensor of shape (B, *shape), got {found}")


def all_rows(samples: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Sample and step of every row of a state, sample by sample: ``(N * T,)`` each, for samples ``(N,)``."""
    return samples.repeat_interleave(steps), torch.arange(steps, device=samples.device).repeat(len(samples))
