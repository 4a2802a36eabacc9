"""What is learnt of the Jacobians of a chain's steps while it is inverted, and the sweep that uses it."""

from __future__ import annotations

import torch
from torch import Tensor

from fixpoint_diffusion.inversion.problem import InverseProblem, Probes

# Near the image a step's Jacobian is far from what the prior says: a share of them, there, is probed.
_LATE_SHARE, _LATE_LEAST = 8, 10
_NUDGE = 0.01  # RMS of a probe's change of a latent
_MEMORY = 3  # rounds that are remembered
_FADE = 0.1  # weight of a round, beside that of the round after it
_RIDGE = 1e-3  # keeps nearly dependent changes apart
_SHRINKAGE = 0.02  # weight of the prior's slope beside what was seen of a pixel
_DAMPING = 0.07  # singular values of a step that are smaller are hardly divided by


class BlockSecants:
    """Newton's method for all steps at once, with Jacobians that are learnt from the rounds and from probes.

    A *probe* evaluates a late step a little beside its latent, in a random direction. The directions of a round are
    orthogonal, and the same for all samples and steps. So a round shows a block of what the Jacobians do, and not only
    what they do to the last move. Early steps learn from their moves alone.

    Args:
        problem: whose steps they are.
        probes: of each late step and round; at most as many as a latent has entries are made.
    """

    def __init__(self, problem: InverseProblem, probes: int) -> None:
        self._problem = problem
        self._first = max(problem.steps - max(problem.steps // _LATE_SHARE, _LATE_LEAST), 0)
        slopes, (samples, size) = problem.slopes, problem.x_0.shape
        self._count = min(probes, size)
        self._early = StepModels(slopes[: self._first].expand(-1, size), samples, 1)
        # Pixels differ most there, and a model must have its diagonal in one basis: that of pixels.
        mean = slopes[self._first :].mean(dim=1, keepdim=True).expand(-1, size)
        self._late = StepModels(mean, samples, self._count + 1, fitted=True)
        self._generator = torch.Generator().manual_seed(0)
        # Latents and images of the latest round; not finite where there is none.
        self._last = slopes.new_full((2, samples, len(slopes), size), torch.nan)

    def probes(self) -> Probes:
        """New ones, for the next round."""
        size = self._problem.x_0.shape[1]
        signs = torch.randint(0, 2, (size, self._count), generator=self._generator) * 2.0 - 1
        pixels = torch.linalg.qr(signs.double())[0].mT * (_NUDGE * size**0.5)
        self._changes = self._problem.chain.prior.to_coordinates(pixels.to(self._problem.x_0.device))
        return Probes(self._first, self._changes)

    def observe(self, latents: Tensor, images: Tensor, samples: Tensor, responses: Tensor) -> None:
        """Learn from a round.

        Args:
            latents: ``(B, T, D)``.
            images: what the steps made of them.
            samples: ``(N,)``, that were looked at.
            responses: what the latest probes of these samples did, as of :class:`Look`.
        """
        first, latents, images = self._first, latents[samples], images[samples]
        move, change = latents - self._last[0][samples], images - self._last[1][samples]
        moved = torch.cat((self._changes.expand_as(responses), move[:, first:, None]), dim=2)
        seen = torch.cat((responses, change[:, first:, None]), dim=2)
        self._early.learn(samples, move[:, :first, None], change[:, :first, None])
        self._late.learn(samples, self._pixels(moved), self._pixels(seen))
        self._last[0][samples], self._last[1][samples] = latents, images
        self._inverses = self._early.inverse(), self._late.inverse()

    def forget_move(self) -> None:
        """The next round's images are not to be compared with those of the last one."""
        self._last = torch.full_like(self._last, torch.nan)

    def error(self, misses: Tensor) -> Tensor:
        """As of :class:`Forecast`, with what is learnt here: RMS ``(n, B)`` of n sorts of misses ``(n, B, T, D)``."""
        early, late = self._inverses
        errors = []
        for each in misses:
            x = torch.zeros_like(each[:, 0])
            for k in range(each.shape[1]):
                if k >= self._first:
                    grown = self._problem.chain.prior.to_coordinates(late.forward(k - self._first, self._pixels(x)))
                else:
                    grown = early.forward(k, x)
                x = grown + each[:, k]
            errors.append(x.square().mean(dim=1).sqrt())
        return torch.stack(errors)

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
        secants: a round has so many of each step.
        fitted: whether the secants are to change the diagonals first.
    """

    def __init__(self, slopes: Tensor, samples: int, secants: int, *, fitted: bool = False) -> None:
        self._slopes, self._fitted = slopes, fitted
        self._moved = slopes.new_zeros(samples, len(slopes), _MEMORY * secants, slopes.shape[1])
        self._seen = torch.zeros_like(self._moved)
        age = torch.arange(_MEMORY, device=slopes.device).repeat_interleave(secants)
        self._weights = _FADE ** age.to(slopes)

    def learn(self, samples: Tensor, moved: Tensor, seen: Tensor) -> None:
        """Remember, of some samples ``(N,)``, changes ``(N, n, secants, D)`` and what the steps made of them.

        Changes of nothing, and what is not finite, count for nothing.
        """
        size = moved.norm(dim=3, keepdim=True)
        sound = (size > 0) & (torch.isfinite(moved) & torch.isfinite(seen)).all(dim=3, keepdim=True)
        for memory, new in ((self._moved, moved), (self._seen, seen)):
            kept = memory[samples, :, : -new.shape[2]]
            memory[samples] = torch.cat((torch.where(sound, new / size, 0), kept), dim=2)

    def inverse(self) -> Inverse:
        """The damped inverses of the models as they are now."""
        moved, seen, weights = self._moved, self._seen, self._weights
        slopes = self._slopes[None]
        if self._fitted:
            along = weights[:, None] * moved
            excess = (along * (seen - slopes[:, :, None] * moved)).sum(dim=2)
            slopes = slopes + excess / ((along * moved).sum(dim=2) + _SHRINKAGE)
        gram = moved @ moved.mT + torch.diag(_RIDGE / weights)
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
