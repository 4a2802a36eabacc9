"""Linear degradations of images with their pseudo-inverses: masks, block means, blur, grey, and any matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

# An orthogonal projection applied twice, or to the other side of a product, may differ from itself by so much.
_OFF = 1e-4


class Degradation(Protocol):
    """A linear map ``A`` of images and its pseudo-inverse; both differentiable, both of rows that do not mix.

    A class of your own needs these two methods. ``pinv(apply(x))`` must be the orthogonal projection of x onto what A
    sees, as it is for the Moore-Penrose inverse; :func:`check_degradation` says if it is not.

    Example:
        See :class:`fixpoint_diffusion.restoration.Mask`, which is one.
    """

    def apply(self, x: Tensor) -> Tensor:
        """``A x``: images ``(N, *shape)`` to measurements ``(N, *measured)``."""

    def pinv(self, y: Tensor) -> Tensor:
        """``A^+ y``: measurements ``(N, *measured)`` to images ``(N, *shape)``."""


def project(degradation: Degradation, x: Tensor) -> Tensor:
    """``A^+ A x``: the part of images ``(N, *shape)`` that the measurement determines.

    Example:
        >>> import torch
        >>> from fixpoint_diffusion.restoration import BlockMean, project
        >>> project(BlockMean(2), torch.arange(4.0).reshape(1, 1, 2, 2))
        tensor([[[[1.5000, 1.5000],
                  [1.5000, 1.5000]]]])
    """
    return degradation.pinv(degradation.apply(x))


@dataclass(frozen=True, eq=False)
class Mask:
    """Inpainting: the entries where the mask is true are known.

    Args:
        known: bool, broadcast to the shape of an image.

    Raises:
        TypeError: a mask that is no tensor of booleans.
        ValueError: on use, a mask that does not broadcast to the images.

    Example:
        >>> Mask(torch.tensor([True, False])).apply(torch.tensor([[3.0, 4.0]]))
        tensor([[3., 0.]])
    """

    known: Tensor

    def __post_init__(self) -> None:
        dtype = getattr(self.known, "dtype", type(self.known).__name__)
        if not isinstance(self.known, Tensor) or dtype != torch.bool:
            raise TypeError(f"a mask must be a tensor of torch.bool, True where a pixel is known, got {dtype}")

    def apply(self, x: Tensor) -> Tensor:
        # From the last dimension on, as torch broadcasts.
        sizes = zip(reversed(self.known.shape), reversed(x.shape), strict=False)
        if self.known.ndim > x.ndim or any(own not in (1, size) for own, size in sizes):
            raise ValueError(f"a mask of {tuple(self.known.shape)} does not fit images of {tuple(x.shape[1:])}")
        return torch.where(self.known.to(x.device), x, 0)

    def pinv(self, y: Tensor) -> Tensor:
        return self.apply(y)


@dataclass(frozen=True)
class BlockMean:
    """Super-resolution: each block of ``factor`` x ``factor`` pixels is known by its mean.

    Args:
        factor: side of a block; it must divide the height and the width.

    Raises:
        ValueError: a factor below 1; on use, one that does not divide the image.

    Example:
        >>> BlockMean(2).apply(torch.tensor([[[[1.0, 2.0], [3.0, 6.0]]]]))
        tensor([[[[3.]]]])
    """

    factor: int

    def __post_init__(self) -> None:
        if self.factor < 1:
            raise ValueError(f"factor must be at least 1, got {self.factor}")

    def apply(self, x: Tensor) -> Tensor:
        if x.ndim < 3 or x.shape[-1] % self.factor or x.shape[-2] % self.factor:
            raise ValueError(f"blocks of {self.factor} x {self.factor} do not divide images of {tuple(x.shape[1:])}")
        # As images of one channel: there is no pooling of more than two dimensions before height and width.
        pooled = functional.avg_pool2d(x.reshape(-1, 1, *x.shape[-2:]), self.factor)
        return pooled.reshape(*x.shape[:-2], *pooled.shape[-2:])

    def pinv(self, y: Tensor) -> Tensor:
        return y.repeat_interleave(self.factor, dim=-1).repeat_interleave(self.factor, dim=-2)


@dataclass(frozen=True, eq=False)
class Blur:
    """Deblurring: images are convolved with a kernel, over edges that wrap around.

    Args:
        kernel: ``(h, w)``, its centre at ``(h // 2, w // 2)``; no larger than the image.
        cutoff: frequencies that the kernel damps to less than this share of the largest count as lost.

    Raises:
        TypeError: a kernel that is no tensor.
        ValueError: a kernel that is not two-dimensional, a cutoff outside (0, 1]; on use, a kernel larger than the
            image.

    Example:
        >>> blur = Blur(torch.full((1, 3), 1 / 3))
        >>> blur.apply(torch.tensor([[[[0.0, 3.0, 0.0, 0.0]]]])).round(decimals=4)
        tensor([[[[1., 1., 1., 0.]]]])
    """

    kernel: Tensor
    cutoff: float = 1e-2

    def __post_init__(self) -> None:
        if not isinstance(self.kernel, Tensor):
            raise TypeError(f"kernel must be a tensor of shape (h, w), got {type(self.kernel).__name__}")
        if self.kernel.ndim != 2:
            raise ValueError(f"kernel must have shape (h, w), got {tuple(self.kernel.shape)}")
        if not 0 < self.cutoff <= 1:
            raise ValueError(f"cutoff must lie in (0, 1], got {self.cutoff}")

    def apply(self, x: Tensor) -> Tensor:
        return self._filter(x, self._spectrum(x))

    def pinv(self, y: Tensor) -> Tensor:
        spectrum = self._spectrum(y)
        size = spectrum.abs()
        seen = size >= self.cutoff * size.max()
        return self._filter(y, torch.where(seen, 1 / torch.where(seen, spectrum, 1), 0))

    def _spectrum(self, x: Tensor) -> Tensor:
        (height, width), (h, w) = x.shape[-2:], self.kernel.shape
        if h > height or w > width:
            raise ValueError(f"a kernel of {h} x {w} is larger than images of {tuple(x.shape[1:])}")
        padded = functional.pad(self.kernel.to(x.device, _transformed(x)), (0, width - w, 0, height - h))
        return torch.fft.rfft2(padded.roll((-(h // 2), -(w // 2)), dims=(0, 1)))

    @staticmethod
    def _filter(x: Tensor, spectrum: Tensor) -> Tensor:
        found = torch.fft.irfft2(torch.fft.rfft2(x.to(_transformed(x))) * spectrum, s=x.shape[-2:])
        return found.to(x.dtype)


def _transformed(x: Tensor) -> torch.dtype:
    """In which a Fourier transform of x is taken: there is none in half precision."""
    return torch.promote_types(x.dtype, torch.float32)


@dataclass(frozen=True)
class Grey:
    """Colourisation: of each pixel, a weighted sum of its channels is known.

    Args:
        weights: one a channel, not all 0. By default those of luma (ITU-R BT.601).

    Raises:
        ValueError: weights that are all 0; on use, another number of channels.

    Example:
        >>> Grey().apply(torch.ones(1, 3, 1, 1)).round(decimals=4)
        tensor([[[[1.]]]])
    """

    weights: tuple[float, ...] = (0.299, 0.587, 0.114)

    def __post_init__(self) -> None:
        if not any(self.weights):
            raise ValueError("weights must not all be 0")

    def apply(self, x: Tensor) -> Tensor:
        if x.shape[1] != len(self.weights):
            raise ValueError(f"{len(self.weights)} weights do not fit images of {tuple(x.shape[1:])}: one a channel")
        return (x * self._column(x)).sum(dim=1, keepdim=True)

    def pinv(self, y: Tensor) -> Tensor:
        column = self._column(y)
        return y * column / column.square().sum()

    def _column(self, like: Tensor) -> Tensor:
        return like.new_tensor(self.weights).reshape(1, -1, *[1] * (like.ndim - 2))


class LinearMap:
    """Any matrix of flattened images; its pseudo-inverse is computed here.

    Args:
        matrix: ``(m, D)``.
        shape: of an image, with D entries.
        cutoff: singular values below this share of the largest count as 0.

    Raises:
        ValueError: a matrix that does not fit the shape.

    Example:
        >>> mean = LinearMap(torch.full((1, 4), 0.25), (2, 2))
        >>> mean.apply(torch.ones(1, 2, 2)), mean.pinv(torch.ones(1, 1)).shape
        (tensor([[1.]]), torch.Size([1, 2, 2]))
    """

    def __init__(self, matrix: Tensor, shape: tuple[int, ...], *, cutoff: float = 1e-6) -> None:
        size = torch.Size(shape).numel()
        if matrix.ndim != 2 or matrix.shape[1] != size:
            raise ValueError(
                f"matrix must have shape (m, D) = (m, {size}) for images of {shape}, got {tuple(matrix.shape)}"
            )
        self.matrix, self.shape = matrix.double(), tuple(shape)
        self.inverse = torch.linalg.pinv(self.matrix, rtol=cutoff)

    def apply(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.matrix.mT.to(x)

    def pinv(self, y: Tensor) -> Tensor:
        return (y @ self.inverse.mT.to(y)).unflatten(1, self.shape)


def check_degradation(degradation: Degradation, like: Tensor) -> None:
    """Refuse a degradation whose ``A^+ A`` is no orthogonal projection of each image such as ``like`` ``(N, *shape)``.

    Raises:
        TypeError: if it lacks a method.
        ValueError: with what is wrong.

    Example:
        >>> class Half:
        ...     def apply(self, x):
        ...         return x
        ...     def pinv(self, y):
        ...         return y / 2
        >>> check_degradation(Half(), torch.zeros(1, 4))
        Traceback (most recent call last):
            ...
        ValueError: pinv(apply(x)) is no projection, applied twice it differs by 0.5: pass the Moore-Penrose inverse
    """
    for name in ("apply", "pinv"):
        if not callable(getattr(degradation, name, None)):
            found = type(degradation).__name__
            raise TypeError(f"a degradation needs the methods apply and pinv, and {found} has no {name}")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        shape = (2, 2, *like.shape[1:])
        drawn = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
        x, other = drawn.to(like.device)
        seen, other_seen = project(degradation, x), project(degradation, other)
        if seen.shape != x.shape:
            raise ValueError(f"pinv(apply(x)) must have the shape of x, {tuple(x.shape)}, got {tuple(seen.shape)}")
        beside_another = project(degradation, torch.stack([x[0], other[1]]))
        if not float((beside_another[0] - seen[0]).norm()) <= _OFF * float(x[0].norm()):
            raise ValueError("apply or pinv mixes the rows of a batch: an image has another result beside another one")
        off = float((project(degradation, seen) - seen).norm())
        if not off <= _OFF * max(float(x.norm()), float(seen.norm())):
            raise ValueError(
                f"pinv(apply(x)) is no projection, applied twice it differs by {off / float(seen.norm()):.2g}: "
                "pass the Moore-Penrose inverse"
            )
        skew = float((seen * other).sum() - (x * other_seen).sum()) / float(x.norm() * other.norm())
        if not abs(skew) <= _OFF:
            raise ValueError(
                f"pinv(apply(x)) is no orthogonal projection: <P x, y> and <x, P y> differ by {abs(skew):.2g} of "
                "|x| |y|; pass the Moore-Penrose inverse"
            )
