"""What is known of the images before any denoiser is asked: a Gaussian, whose exact denoiser is linear."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fixpoint_diffusion.extras import needed_for
from fixpoint_diffusion.processes.step_values import wide
from fixpoint_diffusion.processes.transitions import Transitions

PRIOR_FILE = "prior.safetensors"
_LARGEST_BASIS = 1024  # up to so many entries, the principal axes are estimated: 8 MiB
_LONGEST = 4096  # a longer dimension is not transformed: its matrix would take more than 128 MiB
_BATCH = 256
_PART = 2**12  # entries of latents that a path is made for at a time: more of them save little


@dataclass(frozen=True, eq=False)
class GaussianPrior:
    """Gaussian data with a mean and variances along orthogonal directions, for which the denoiser is linear.

    Its slopes are what :class:`fixpoint.CausalQuasiNewton` starts from on a sampling chain, and its path is where
    :func:`fixpoint_diffusion.sample` starts. No result depends on it, only the number of rounds.

    Attributes:
        mean: ``(D,)`` float64, of flattened images; or ``(1,)``, for all entries alike.
        variances: ``(D,)`` float64, along the columns of ``basis``; or ``(1,)``.
        basis: ``(D, D)`` float64, orthogonal; or a tuple of orthogonal matrices, one for each dimension of an image,
            that stand for their Kronecker product; None: the entries themselves.

    Raises:
        ValueError: values that are not finite, variances below 0, a basis that is not orthogonal, sizes that do not
            fit together.

    Example:
        >>> from fixpoint_diffusion.training.data import load_digits
        >>> prior = GaussianPrior.of(load_digits().images)
        >>> prior.variances.shape, prior.basis.shape
        (torch.Size([64]), torch.Size([64, 64]))
    """

    mean: Tensor
    variances: Tensor
    basis: Tensor | tuple[Tensor, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("mean", "variances"):
            values = getattr(self, name)
            if values.ndim != 1 or not values.numel() or not bool(torch.isfinite(values).all()):
                raise ValueError(f"a prior's {name} must be finite numbers of shape (D,), got {tuple(values.shape)}")
            object.__setattr__(self, name, values.to(torch.float64))
        if bool((self.variances < 0).any()):
            raise ValueError(f"a prior's variances must be at least 0, got {float(self.variances.min()):g}")
        for factor in self._factors:
            one = torch.eye(len(factor), dtype=torch.float64, device="cpu")
            square = factor.ndim == 2 and factor.shape[0] == factor.shape[1]
            if not square or not torch.allclose(factor.double().mT @ factor.double(), one.to(factor.device), atol=1e-4):
                raise ValueError(f"a prior's basis must be orthogonal; that of shape {tuple(factor.shape)} is not")
        sizes = {len(self.mean), len(self.variances), math.prod(map(len, self._factors))} - {1}
        if len(sizes) > 1:
            raise ValueError(f"mean, variances and basis of a prior must have one size, got {sorted(sizes)}")

    @property
    def _factors(self) -> tuple[Tensor, ...]:
        if self.basis is None:
            return ()
        return (self.basis,) if isinstance(self.basis, Tensor) else self.basis

    @classmethod
    def isotropic(cls, variance: float = 0.3) -> GaussianPrior:
        """Mean 0 and one variance for all entries: right for images in [-1, 1] and for latents to within a factor."""
        nothing = torch.zeros(1, dtype=torch.float64, device="cpu")
        return cls(nothing, nothing + variance)

    @classmethod
    def of(cls, images: Tensor | Iterable[Tensor], *, shrinkage: float = 0.5) -> GaussianPrior:
        """From images, along their principal axes; for more than 1024 entries, in a cosine transform.

        Neighbouring pixels are alike, so waves of different lengths are nearly uncorrelated: along the dimensions after
        the first, the directions are those of the discrete cosine transform; along the first (channels), the principal
        axes of the channels. Such a prior takes about as much memory as two images. Of vectors, and of images with a
        dimension longer than 4096, the directions are the entries.

        Args:
            images: ``(N, *shape)``, a sample of the data, or batches ``(n, *shape)`` of it, which are read once.
            shrinkage: share of the mean variance in each variance, from 0 to 1. What is left of the variance once a
                sample is known in part is more even than that of the data.

        Raises:
            ValueError: fewer than two images, images of several shapes or with NaN, or a shrinkage outside [0, 1].
        """
        if not 0 <= shrinkage <= 1:
            raise ValueError(f"shrinkage must lie in [0, 1], got {shrinkage}")
        batches = images.split(_BATCH) if isinstance(images, Tensor) else images
        moments: _Moments | None = None
        for batch in batches:
            if len(batch):
                moments = moments or _Moments(batch)
                moments.add(batch)
        if moments is None or moments.count < 2:
            raise ValueError(f"a prior needs at least two images, got {moments.count if moments else 0}")
        variances, basis = moments.axes()
        variances = (1 - shrinkage) * variances.clamp(min=0) + shrinkage * variances.mean()
        return cls(moments.mean(), variances, basis)

    def save(self, folder: str | Path) -> None:
        """Write ``prior.safetensors`` into a model's folder, where ``load_denoiser`` finds it."""
        with needed_for("saving a prior"):
            from safetensors.torch import save_file

        tensors = {"mean": self.mean, "variances": self.variances}
        if isinstance(self.basis, Tensor):
            tensors["basis"] = self.basis.contiguous()
        else:
            tensors |= {f"basis.{number}": factor.contiguous() for number, factor in enumerate(self._factors)}
        save_file(tensors, Path(folder) / PRIOR_FILE)

    @classmethod
    def load(cls, folder: str | Path) -> GaussianPrior | None:
        """Read ``prior.safetensors`` from a model's folder; None if there is none.

        Raises:
            ValueError: a file that is damaged or holds something else.
        """
        path = Path(folder) / PRIOR_FILE
        if not path.is_file():
            return None
        with needed_for("reading a prior"):
            from safetensors import SafetensorError
            from safetensors.torch import load_file

        try:
            tensors = load_file(path)
            factors = tuple(tensors[f"basis.{n}"] for n in range(len(tensors)) if f"basis.{n}" in tensors)
            prior = cls(tensors["mean"], tensors["variances"], tensors.get("basis", factors or None))
        except SafetensorError as error:
            raise ValueError(f"{path} is not a safetensors file: {error}") from error
        except KeyError as error:
            raise ValueError(f"{path} is not the file of a prior: it has no {error}") from error
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        if len(tensors) != 2 + len(prior._factors):
            raise ValueError(f"{path} is not the file of a prior: it holds {', '.join(sorted(tensors))}")
        return prior

    def slopes(self, transitions: Transitions) -> Tensor:
        """``(T, 1 or D)`` float64: what each step does to a small change of its latent, along the basis.

        Of steps that look back, without what they see there; see :class:`Modes`.
        """
        levels = (transitions.alphas, transitions.alphas_prev, transitions.direction)
        return _slopes(self.variances, *(level[:, None] for level in levels))

    def to_coordinates(self, flat: Tensor) -> Tensor:
        """Flattened images ``(N, D)`` in the coordinates in which the slopes count, ``(N, D)``, ``wide``."""
        return _times_each(wide(flat), [wide(factor.to(flat.device)) for factor in self._factors])

    def from_coordinates(self, flat: Tensor) -> Tensor:
        """The inverse of :meth:`to_coordinates`."""
        return _times_each(wide(flat), [wide(factor.to(flat.device)).mT for factor in self._factors])

    def denoise(self, x: Tensor, transitions: Transitions, k: int) -> Tensor:
        """The output of this Gaussian's exact denoiser, of the transitions' prediction type, at step k.

        Args:
            x: latents ``(B, *shape)`` in float64.
            transitions: T steps.
            k: which step.
        """
        image = self.images(x.unsqueeze(1), transitions, slice(k, k + 1)).squeeze(1)
        return transitions.output(x, image, k)

    def images(self, x: Tensor, transitions: Transitions, k: slice | Tensor = slice(None)) -> Tensor:
        """The x_0 that this Gaussian's exact denoiser predicts from latents ``(B, n, *shape)`` at the n steps k."""
        a, flat = transitions.alphas.to(x.device)[k][:, None], wide(x.reshape(*x.shape[:2], x.shape[2:].numel()))
        mean = self.mean.to(flat)
        along = self.to_coordinates((flat - a.sqrt() * mean).flatten(0, 1)).reshape(flat.shape)
        along = along * gain(self.variances.to(flat), a)
        return (mean + self.from_coordinates(along.flatten(0, 1)).reshape(flat.shape)).reshape(x.shape)

    def path(self, x_T: Tensor, transitions: Transitions, noise: Tensor | None = None) -> Tensor:
        """The chain's latents if the data were this Gaussian, with the chain's own noise.

        Beside what is returned, this takes the memory of a few latents.

        Args:
            x_T: ``(B, *shape)``.
            transitions: T steps.
            noise: ``(B, T, *shape)``, or None.

        Returns:
            ``(B, T, *shape)`` in the dtype of x_T.

        Raises:
            ValueError: a prior of another size than the images.
        """
        size = math.prod(x_T.shape[1:])
        for found in (len(self.mean), len(self.variances)):
            if found not in (1, size):
                raise ValueError(f"the prior is one of {found} entries, the images have {size}: {tuple(x_T.shape[1:])}")
        factors = [wide(factor.to(x_T.device)) for factor in self._factors]
        x = _times_each(wide(x_T.reshape(len(x_T), size)), factors)
        mean = _times_each(self.mean.to(x).expand(1, size), factors)
        variances, alphas, arrive, direction, sigma = (
            values.to(x)
            for values in (
                self.variances,
                transitions.alphas,
                transitions.alphas_prev,
                transitions.direction,
                transitions.sigma,
            )
        )
        path = x_T.new_empty(len(x_T), transitions.steps, size)
        looks_back = transitions.history is not None
        history = alphas.new_zeros(transitions.steps, 0) if transitions.history is None else transitions.history.to(x)
        earlier = [torch.zeros_like(x)] * history.shape[1]  # what predictions before this step differ from the mean by
        # What does not depend on x is made for many steps at once.
        count = max(1, _PART // max(x.numel(), 1))
        for first in range(0, transitions.steps, count):
            k = slice(first, first + count)
            levels = (alphas[k, None], arrive[k, None], direction[k, None])
            slopes, gains, means = _slopes(variances, *levels), gain(variances, levels[0]), levels[0].sqrt() * mean
            # A Gaussian's flow keeps to its mean, sqrt(a) times it: displacements from there follow the slopes.
            added = (levels[1].sqrt() * mean - slopes * means)[None]
            if noise is not None:
                drawn = wide(noise[:, k]).reshape(*noise[:, k].shape[:2], size)
                added = added + sigma[k, None] * _times_each(drawn.flatten(0, 1), factors).reshape(drawn.shape)
            latents = []
            for number, (slope, more) in enumerate(zip(slopes, added.unbind(1), strict=True)):
                after = torch.addcmul(more, slope, x)
                if looks_back:
                    image = gains[number] * (x - means[number])
                    weights = history[first + number]
                    after = after + sum(weight * (old - image) for weight, old in zip(weights, earlier, strict=True))
                    earlier = [image, *earlier[:-1]]
                x = after
                latents.append(x)
            part = torch.stack(latents, dim=1)
            path[:, k] = _times_each(part.flatten(0, 1), [factor.mT for factor in factors]).reshape(part.shape)
        return path.reshape(len(x_T), transitions.steps, *x_T.shape[1:])


def gain(variances: Tensor, a: Tensor) -> Tensor:
    """By how much the expected image follows a latent at signal level ``a``."""
    return a.sqrt() * variances / (a * variances + 1 - a)


def _slopes(variances: Tensor, a: Tensor, a_prev: Tensor, direction: Tensor) -> Tensor:
    """What a step from signal level ``a`` to ``a_prev`` does to a small change of its latent."""
    image = gain(variances, a)
    noise = torch.where(a < 1, (1 - a.sqrt() * image) / (1 - a).clamp(min=1e-12).sqrt(), 0)
    return a_prev.sqrt() * image + direction * noise


def _times_each(flat: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """``(B, D)`` times the Kronecker product of square factors; as it is without any."""
    if not factors:
        return flat
    out = flat.reshape(len(flat), *map(len, factors))
    for number, factor in enumerate(factors, start=1):
        out = torch.tensordot(out, factor, dims=([number], [0])).movedim(-1, number)
    return out.reshape(flat.shape)


def _cosines(n: int) -> Tensor:
    """``(n, n)`` float64: the columns are the orthonormal waves of the discrete cosine transform (DCT-II)."""
    wave = torch.arange(n, dtype=torch.float64, device="cpu")
    place = wave[:, None]
    waves = (math.pi / n * (place + 0.5) * wave).cos() * (2 / n) ** 0.5
    waves[:, 0] /= 2**0.5
    return waves


class _Moments:
    """Mean and covariances of images that come in batches, in float64 on the CPU.

    Of small images, the covariance of all entries. Of larger ones, that of the channels for each wave of a cosine
    transform of the other dimensions; or the variance of each entry, where that would be too large.
    """

    def __init__(self, first: Tensor) -> None:
        shape, self.count = first.shape[1:], 0
        self.given = shape
        small = shape.numel() <= _LARGEST_BASIS
        # Neither small nor to be transformed: its entries alone, for its axes are too many.
        self.alone = not small and (len(shape) == 1 or max(shape) > _LONGEST)
        self.shape = (shape.numel(),) if small or self.alone else shape
        channels, rest = self.shape[0], math.prod(self.shape[1:])
        self.shift = first.flatten(1).to("cpu", torch.float64).mean(dim=0)  # numbers near 0 lose no digits
        self.sum = torch.zeros_like(self.shift)
        if self.alone:
            self.products = torch.zeros(1, channels, dtype=torch.float64, device="cpu")
        else:
            self.waves = [torch.eye(channels, dtype=torch.float64, device="cpu"), *map(_cosines, self.shape[1:])]
            self.products = torch.zeros(rest, channels, channels, dtype=torch.float64, device="cpu")

    def add(self, batch: Tensor) -> None:
        if batch.shape[1:] != self.given:
            raise ValueError(f"a prior's images must have one shape, got {tuple(self.given)}, {tuple(batch.shape[1:])}")
        if not bool(torch.isfinite(batch).all()):
            raise ValueError("a prior's images must be finite, got NaN or infinity")
        flat = batch.flatten(1).to("cpu", torch.float64) - self.shift
        self.count += len(flat)
        self.sum += flat.sum(dim=0)
        self.products += self._products(flat)

    def _products(self, flat: Tensor) -> Tensor:
        if self.alone:
            return flat.square().sum(dim=0, keepdim=True)
        rows = _times_each(flat, self.waves).reshape(len(flat), self.shape[0], -1)
        return torch.einsum("ncp,ndp->pcd", rows, rows)

    def mean(self) -> Tensor:
        return self.shift + self.sum / self.count

    def axes(self) -> tuple[Tensor, Tensor | tuple[Tensor, ...] | None]:
        """Variances ``(D,)`` and the basis along which they are."""
        offset = self.sum[None] / self.count
        covariance = (self.products - self.count * self._products(offset)) / (self.count - 1)
        if self.alone:
            return covariance[0], None
        channels, axes = (x.contiguous() for x in torch.linalg.eigh(covariance.mean(dim=0)))
        if len(self.shape) == 1:
            return channels, axes
        variances = torch.einsum("cj,pcd,dj->jp", axes, covariance, axes)
        return variances.flatten(), (axes, *self.waves[1:])
