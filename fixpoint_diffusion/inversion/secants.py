"""What is learnt of the Jacobians of a chain's steps while it is inverted, and the sweep that uses it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fixpoint_diffusion.inversion.problem import InverseProblem, Probes

# Near the image a step's Jacobian is far from what the prior says: a share of them, there, is probed.
_LATE_SHARE, _LATE_LEAST = 8, 10
_NUDGE = 0.01  # RMS of a probe's change of a latent
_FAR = 1e3  # longer ways count as this one, for weights must not become zero: they are divided by
_RIDGE = 1e-3  # keeps nearly dependent changes apart
_SHRINKAGE = 0.02  # weight of the prior's slope beside what was seen of a pixel
_DAMPING = 0.03


class Memory(NamedTuple):
    """What earlier rounds count for.

    Attributes:
        rounds: that are remembered.
        fade: weight of a round, beside that of the round after it.
        near: a round has half of that weight when the latents have gone so far since, RMS.
    """

    rounds: int
    fade: float
    near: float = math.inf


# Late steps are shown much in each round, and their Jacobians are others elsewhere. Early ones are nearly linear.
_LATE, _EARLY = Memory(5, 0.5, near=0.03), Memory(3, 0.1)


class BlockSecants:
    """Newton's method for all steps at once, with Jacobians that are learnt from the rounds and from probes.

    A *probe* evaluates a late step a little beside its latent, in a random direction. The directions of a round are
    orthogonal, and the same for all steps. So a round shows a block of what the Jacobians do, and not only what they do
    to the last move. What the directions are depends on how many rounds a sample has had, and not on other samples.
    One more probe, of all steps, looks along the drift: how far off the sampler is predicted to be before each step.
    What a model has not been shown, it takes for smaller than it is; so of the direction that decides how far off x_0
    will be, something must be shown.

    Args:
        problem: whose steps they are.
        probes: random ones, of each late step and round; at most as many as a latent has entries are made.
    """

    def __init__(self, problem: InverseProblem, probes: int) -> None:
        self._problem = problem
        self._first = max(problem.steps - max(problem.steps // _LATE_SHARE, _LATE_LEAST), 0)
        slopes, (samples, size) = problem.slopes, problem.x_0.shape
        # Jacobians change less from step to step than outputs do: half of the coarsest grid is enough for them.
        self._probed = problem.grids[0].half if problem.grids else torch.arange(len(slopes), device=slopes.device)
        self._count = min(probes, size)
        self._early = StepModels(slopes[: self._first].expand(-1, size), samples, 2, _EARLY)
        # Pixels differ most there, and a model must have its diagonal in one basis: that of pixels.
        mean = slopes[self._first :].mean(dim=1, keepdim=True).expand(-1, size)
        self._late = StepModels(mean, samples, self._count + 2, _LATE, fitted=True)
        self._drift = slopes.new_zeros(samples, len(slopes), size)
        # Rounds of each sample so far, and the state that the generator has before each of them.
        self._rounds = torch.zeros(samples, dtype=torch.int64, device="cpu")
        self._generator_states = [torch.Generator().manual_seed(0).get_state()]
        # Latents and images of the latest round; not finite where there is none, or none to compare with.
        self._last = slopes.new_full((2, samples, len(slopes), size), torch.nan)

    def probes(self, samples: Tensor) -> list[Probes]:
        """New ones, for the next round with these samples ``(N,)``: random ones, and the one along the drift."""
        size = self._problem.x_0.shape[1]
        numbers, place = self._rounds[samples.cpu()].unique(return_inverse=True)
        changes = torch.stack([self._directions(number) for number in numbers.tolist()])[place.to(samples.device)]
        self._rounds[samples.cpu()] += 1
        along = self._drift[samples, None]
        length = along.norm(dim=3, keepdim=True)
        along = torch.where((length > 0) & torch.isfinite(length), along / length * (_NUDGE * size**0.5), 0)
        late = self._probed[self._probed >= self._first]
        self._changes = changes[:, :, None], along
        random = Probes(self._first, late, changes[:, :, None])
        # No drift is known before the first round, and before the first step there never is one.
        return [random, Probes(0, self._probed[1:], along)] if bool(along.any()) else [random]

    def _directions(self, number: int) -> Tensor:
        """The random ones ``(P, D)`` of a round of this number, whatever rounds other samples have had."""
        size, generator = self._problem.x_0.shape[1], torch.Generator()
        generator.set_state(self._generator_states[number])
        signs = torch.randint(0, 2, (size, self._count), generator=generator, device="cpu") * 2.0 - 1
        if number + 1 == len(self._generator_states):
            self._generator_states.append(generator.get_state())
        pixels = torch.linalg.qr(signs.double())[0].mT * (_NUDGE * size**0.5)
        return self._problem.chain.prior.to_coordinates(pixels.to(self._problem.x_0.device))

    def observe(self, latents: Tensor, images: Tensor, samples: Tensor, responses: Sequence[Tensor]) -> None:
        """Learn from a round.

        Args:
            latents: ``(B, T, D)``.
            images: what the steps made of them.
            samples: ``(N,)``, that were looked at.
            responses: what the latest probes of these samples did, as of :class:`Look`.
        """
        first, latents, images = self._first, latents[samples], images[samples]
        random, along = self._changes
        moves = torch.stack((along[:, 0], latents - self._last[0][samples]), dim=2)
        drifted = responses[1][:, :, 0] if len(responses) > 1 else torch.zeros_like(images)
        changes = torch.stack((drifted, images - self._last[1][samples]), dim=2)
        moved = torch.cat((random.transpose(1, 2).expand_as(responses[0]), moves[:, first:]), dim=2)
        seen = torch.cat((responses[0], changes[:, first:]), dim=2)
        self._early.learn(samples, moves[:, :first], changes[:, :first])
        self._late.learn(samples, self._pixels(moved), self._pixels(seen))
        self._last[0][samples], self._last[1][samples] = latents, images
        self._inverses = self._early.inverse(), self._late.inverse()

    def forget_move(self, samples: Tensor) -> None:
        """The next images of these samples ``(N,)`` are not to be compared with their last ones."""
        self._last[1, samples] = torch.nan

    def error(self, misses: Tensor) -> Tensor:
        """As of :class:`Forecast`, with what is learnt here: RMS ``(n, B)`` of n sorts of misses ``(n, B, T, D)``.

        The next round's probes will look along the drift that the first sort leads to.
        """
        drifts = [self._drifts(each) for each in misses]
        self._drift = torch.stack(drifts[0][:-1], dim=1)
        return torch.stack([each[-1] for each in drifts]).square().mean(dim=2).sqrt()

    def _drifts(self, misses: Tensor) -> list[Tensor]:
        """How far off the sampler is before each step, and in the end: T + 1 times ``(B, D)``."""
        (early, late), e = self._inverses, [torch.zeros_like(misses[:, 0])]
        for k in range(misses.shape[1]):
            if k >= self._first:
                grown = self._problem.chain.prior.to_coordinates(late.forward(k - self._first, self._pixels(e[-1])))
            else:
                grown = early.forward(k, e[-1])
            e.append(grown + misses[:, k])
        return e

    def correction(self, misses: Tensor) -> Tensor:
        """Changes of the latents that take back what the steps miss by, both ``(B, T, D)``: a sweep from the image."""
        early, late = self._inverses
        x, found = torch.zeros_like(misses[:, 0]), []
        for k in reversed(range(misses.shape[1])):
            missing = x - misses[:, k]
            if k >= self._first:
                x = self._problem.chain.prior.to_coordinates(late(k - self._first, self._pixels(missing)))
            else:
                x = early(k, missing)
            found.append(x)
        return torch.stack(found[::-1], dim=1)

    def _pixels(self, x: Tensor) -> Tensor:
        return self._problem.chain.prior.from_coordinates(x.flatten(0, -2)).reshape(x.shape)


class StepModels:
    """Models of the Jacobians of n steps: a diagonal, and what secants say beyond it, which is of low rank.

    Args:
        slopes: the diagonals ``(n, D)`` to begin with.
        samples: B.
        secants: a round has so many of each step; the last of them is how far the latent has moved.
        memory: of earlier rounds.
        fitted: whether the secants are to change the diagonals first.
    """

    def __init__(self, slopes: Tensor, samples: int, secants: int, memory: Memory, *, fitted: bool = False) -> None:
        self._slopes, self._secants, self._memory, self._fitted = slopes, secants, memory, fitted
        self._moved = slopes.new_zeros(samples, len(slopes), memory.rounds * secants, slopes.shape[1])
        self._seen = torch.zeros_like(self._moved)
        # How far the latents have gone since each round, RMS.
        self._way = slopes.new_zeros(samples, len(slopes), memory.rounds)
        self._aged = memory.fade ** torch.arange(memory.rounds, device=slopes.device).to(slopes)

    def learn(self, samples: Tensor, moved: Tensor, seen: Tensor) -> None:
        """Remember, of some samples ``(N,)``, changes ``(N, n, secants, D)`` and what the steps made of them.

        Changes of nothing, and what is not finite, count for nothing.
        """
        size = moved.norm(dim=3, keepdim=True)
        step = (size[:, :, -1] / moved.shape[3] ** 0.5).nan_to_num(nan=0, posinf=_FAR)
        way = torch.cat((torch.zeros_like(step), self._way[samples, :, :-1] + step), dim=2)
        self._way[samples] = way.clamp(max=_FAR)
        sound = (size > 0) & (torch.isfinite(moved) & torch.isfinite(seen)).all(dim=3, keepdim=True)
        for memory, new in ((self._moved, moved), (self._seen, seen)):
            kept = memory[samples, :, : -new.shape[2]]
            memory[samples] = torch.cat((torch.where(sound, new / size, 0), kept), dim=2)

    def inverse(self) -> Inverse:
        """The damped inverses of the models as they are now."""
        moved, seen = self._moved, self._seen
        weights = self._aged / (1 + (self._way / self._memory.near) ** 2)
        weights = weights.repeat_interleave(self._secants, dim=2)
        slopes = self._slopes[None]
        if self._fitted:
            along = weights[..., None] * moved
            excess = (along * (seen - slopes[:, :, None] * moved)).sum(dim=2)
            slopes = slopes + excess / ((along * moved).sum(dim=2) + _SHRINKAGE)
        gram = moved @ moved.mT + torch.diag_embed(_RIDGE / weights)
        return Inverse(slopes, torch.linalg.solve(gram, moved), seen - slopes[:, :, None] * moved)


class Inverse:
    """Damped inverses of ``diag(slopes) + outputs^T inputs``, by the identity of Woodbury.

    Tikhonov's ``(J^T J + damping^2)^-1 J^T``, once more applied to what it leaves: so directions that a step passes on
    are inverted almost exactly, and those that it takes away are not.

    Args:
        slopes: ``(1 or B, n, D)``.
        inputs: ``(B, n, q, D)``.
        outputs: the same shape.
    """

    def __init__(self, slopes: Tensor, inputs: Tensor, outputs: Tensor) -> None:
        self._slopes, self._inputs, self._outputs = slopes, inputs, outputs
        self._sizes = slopes.square() + _DAMPING**2
        unit = torch.eye(inputs.shape[2], dtype=slopes.dtype, device=slopes.device).expand(*inputs.shape[:2], -1, -1)
        upper = torch.cat((-outputs @ outputs.mT, unit), dim=3)
        core = torch.cat((upper, torch.cat((unit, torch.zeros_like(unit)), dim=3)), dim=2)
        factors = torch.cat((outputs * slopes[:, :, None], inputs), dim=2)
        self._factors = factors / self._sizes[:, :, None]
        self._solved = torch.linalg.solve(core + self._factors @ factors.mT, self._factors)

    def __call__(self, k: int, x: Tensor) -> Tensor:
        """Undo step k on ``(B, D)``."""
        found = self._damped(k, x)
        return found + self._damped(k, x - self.forward(k, found))

    def forward(self, k: int, x: Tensor) -> Tensor:
        return self._slopes[:, k] * x + _through(self._inputs[:, k], self._outputs[:, k], x)

    def _damped(self, k: int, x: Tensor) -> Tensor:
        turned = self._slopes[:, k] * x + _through(self._outputs[:, k], self._inputs[:, k], x)
        return turned / self._sizes[:, k] - _through(self._solved[:, k], self._factors[:, k], turned)


def _through(inputs: Tensor, outputs: Tensor, x: Tensor) -> Tensor:
    """``outputs^T inputs x``, of ``(B, q, D)``, ``(B, q, D)`` and ``(B, D)``."""
    return ((inputs @ x[:, :, None]).mT @ outputs)[:, 0]
