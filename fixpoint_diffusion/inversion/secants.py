"""What is learnt of the Jacobians of a chain's steps while it is inverted, and the sweep that uses it."""

from __future__ import annotations

import torch
from torch import Tensor

from fixpoint_diffusion.inversion.problem import InverseProblem

# Near the image a step's Jacobian is far from what the prior says: the last eighth of the steps is probed, at least ten.
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
        self.late = max(problem.steps - max(problem.steps // _LATE_SHARE, _LATE_LEAST), 0)
        slopes, size = problem.slopes, problem.x_0.shape[1]
        self._early = StepModels(slopes[: self.late].expand(-1, size))
        # Pixels differ most there, and a model must have its diagonal in one basis: that of pixels.
        self._late = StepModels(slopes[self.late :].mean(dim=1, keepdim=True).expand(-1, size), fitted=True)
        self._probes = min(probes, size)
        self._generator = torch.Generator().manual_seed(0)
        self._last: tuple[Tensor, Tensor] | None = None

    def directions(self) -> Tensor:
        """New changes of a latent ``(probes, D)``, orthogonal to each other; coordinates of the problem."""
        size = self._problem.x_0.shape[1]
        signs = torch.randint(0, 2, (size, self._probes), generator=self._generator) * 2.0 - 1
        pixels = torch.linalg.qr(signs.double())[0].mT * (_NUDGE * size**0.5)
        return self._problem.chain.prior.to_coordinates(pixels.to(self._problem.x_0.device))

    def observe(self, latents: Tensor, images: Tensor, directions: Tensor, responses: Tensor) -> None:
        """Learn from a round.

        Args:
            latents: ``(B, T, D)``.
            images: what the steps made of them, as they are.
            directions: ``(probes, D)``.
            responses: by how much the late steps' images change ``(B, late steps, probes, D)``.
        """
        late = self.late
        moved = directions.expand_as(responses)
        if self._last is not None:
            move, change = latents - self._last[0], images - self._last[1]
            self._early.learn(move[:, :late, None], change[:, :late, None])
            moved = torch.cat((moved, move[:, late:, None]), dim=2)
            responses = torch.cat((responses, change[:, late:, None]), dim=2)
        self._late.learn(self._pixels(moved), self._pixels(responses))
        # Copies: the search writes the next round into the same memory.
        self._last = latents.clone(), images.clone()

    def forget_move(self) -> None:
        """The next round's images are not to be compared with those of the last one."""
        self._last = None

    def correction(self, misses: Tensor) -> Tensor:
        """Changes of the latents that take back what the steps miss by, both ``(B, T, D)``: a sweep from the image."""
        early, late = self._early.inverse(), self._late.inverse()
        x, found = torch.zeros_like(misses[:, 0]), []
        for k in reversed(range(misses.shape[1])):
            missing = x - misses[:, k]
            if k >= self.late:
                x = self._problem.chain.prior.to_coordinates(late(k - self.late, self._pixels(missing)))
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
        fitted: whether the secants are to change the diagonals first.
    """

    def __init__(self, slopes: Tensor, *, fitted: bool = False) -> None:
        self._slopes, self._fitted = slopes, fitted
        self._blocks: list[tuple[Tensor, Tensor]] = []

    def learn(self, moved: Tensor, seen: Tensor) -> None:
        """Remember changes ``(B, n, q, D)`` and what the steps made of them; those that are not finite count for nothing."""
        size = moved.norm(dim=3, keepdim=True)
        sound = (size > 0) & (torch.isfinite(moved) & torch.isfinite(seen)).all(dim=3, keepdim=True)
        block = torch.where(sound, moved / size, 0), torch.where(sound, seen / size, 0)
        self._blocks = [block, *self._blocks][:_MEMORY]

    def inverse(self) -> Inverse:
        """The damped inverses of the models as they are now."""
        if not self._blocks:
            return Inverse(self._slopes[None], None)
        moved, seen = (torch.cat(each, dim=2) for each in zip(*self._blocks, strict=True))
        weights = torch.cat(
            [moved.new_full((block[0].shape[2],), _FADE**age) for age, block in enumerate(self._blocks)]
        )
        slopes = self._slopes[None]
        if self._fitted:
            along = weights[:, None] * moved
            excess = (along * (seen - slopes[:, :, None] * moved)).sum(dim=2)
            slopes = slopes + excess / ((along * moved).sum(dim=2) + _SHRINKAGE)
        gram = moved @ moved.mT + torch.diag(_RIDGE / weights)
        return Inverse(slopes, (torch.linalg.solve(gram, moved), seen - slopes[:, :, None] * moved))


class Inverse:
    """Damped inverses of ``diag(slopes) + outputs^T inputs``, by the identity of Woodbury.

    Tikhonov's ``(J^T J + damping^2)^-1 J^T``, once more applied to what it leaves: so directions that a step passes on
    are inverted almost exactly, and those that it takes away are not.

    Args:
        slopes: ``(1 or B, n, D)``.
        secants: inputs and outputs ``(B, n, q, D)``.
    """

    def __init__(self, slopes: Tensor, secants: tuple[Tensor, Tensor] | None) -> None:
        self._slopes, self._secants = slopes, secants
        self._sizes = slopes.square() + _DAMPING**2
        if secants is not None:
            inputs, outputs = secants
            unit = torch.eye(inputs.shape[2], dtype=slopes.dtype, device=slopes.device).expand(*inputs.shape[:2], -1, -1)
            core = torch.cat(
                (torch.cat((-outputs @ outputs.mT, unit), 3), torch.cat((unit, torch.zeros_like(unit)), 3)), 2
            )
            factors = torch.cat((outputs * slopes[:, :, None], inputs), dim=2)
            self._factors = factors / self._sizes[:, :, None]
            self._solved = torch.linalg.solve(core + self._factors @ factors.mT, self._factors)

    def __call__(self, k: int, x: Tensor) -> Tensor:
        """Undo step k on ``(B, D)``."""
        found = self._damped(k, x)
        return found + self._damped(k, x - self._forward(k, found))

    def _forward(self, k: int, x: Tensor) -> Tensor:
        out = self._slopes[:, k] * x
        if self._secants is not None:
            inputs, outputs = (each[:, k] for each in self._secants)
            out = out + _rows(_coefficients(inputs, x), outputs)
        return out

    def _damped(self, k: int, x: Tensor) -> Tensor:
        turned = self._slopes[:, k] * x
        if self._secants is None:
            return turned / self._sizes[:, k]
        inputs, outputs = (each[:, k] for each in self._secants)
        turned = turned + _rows(_coefficients(outputs, x), inputs)
        return turned / self._sizes[:, k] - _rows(_coefficients(self._solved[:, k], turned), self._factors[:, k])


def _coefficients(vectors: Tensor, x: Tensor) -> Tensor:
    return (vectors @ x[:, :, None])[:, :, 0]


def _rows(coefficients: Tensor, vectors: Tensor) -> Tensor:
    return (coefficients[:, None] @ vectors)[:, 0]
