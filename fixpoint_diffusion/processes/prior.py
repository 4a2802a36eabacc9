"""What is known of the images before any denoiser is asked: a Gaussian, whose exact denoiser is linear."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fixpoint import CausalQuasiNewton, Recurrence, solve
from fixpoint_diffusion.processes.transitions import Transitions, wide

PRIOR_FILE = "prior.safetensors"
_LARGEST_BASIS = 4096


@dataclass(frozen=True, eq=False)
class GaussianPrior:
    """Gaussian data with a mean and variances along orthogonal directions, for which the denoiser is linear.

    Its slopes are what :class:`fixpoint.CausalQuasiNewton` starts from on a sampling chain, and its path is where
    :func:`fixpoint_diffusion.sample` starts. No result depends on it, only the number of rounds.

    Attributes:
        mean: ``(D,)`` float64, of flattened images; or ``(1,)``, for all entries alike.
        variances: ``(D,)`` float64, along the columns of ``basis``; or ``(1,)``.
        basis: ``(D, D)`` float64, orthogonal; None: the entries themselves.

    Example:
        >>> from fixpoint_diffusion.training.data import load_digits
        >>> prior = GaussianPrior.of(load_digits().images)
        >>> prior.variances.shape, prior.basis.shape
        (torch.Size([64]), torch.Size([64, 64]))
    """

    mean: Tensor
    variances: Tensor
    basis: Tensor | None = None

    @classmethod
    def isotropic(cls, variance: float = 0.3) -> GaussianPrior:
        """Mean 0 and one variance for all entries: right for images in [-1, 1] and for latents to within a factor."""
        return cls(torch.zeros(1, dtype=torch.float64), torch.tensor([variance], dtype=torch.float64))

    @classmethod
    def of(cls, images: Tensor, *, shrinkage: float = 0.5) -> GaussianPrior:
        """From images ``(N, *shape)``: along their principal axes, or for more than 4096 entries along these.

        Args:
            images: a sample of the data, a few times D of them.
            shrinkage: share of the mean variance in each variance, from 0 to 1. What is left of the variance once a
                sample is known in part is more even than that of the data.

        Raises:
            ValueError: fewer than two images, or a shrinkage outside [0, 1].
        """
        if len(images) < 2:
            raise ValueError(f"a prior needs at least two images, got {len(images)}")
        if not 0 <= shrinkage <= 1:
            raise ValueError(f"shrinkage must lie in [0, 1], got {shrinkage}")
        flat = images.flatten(1).to("cpu", torch.float64)
        if flat.shape[1] > _LARGEST_BASIS:
            variances, basis = flat.var(dim=0), None
        else:
            variances, basis = torch.linalg.eigh(torch.cov(flat.T))
        variances = (1 - shrinkage) * variances.clamp(min=0) + shrinkage * variances.mean()
        return cls(flat.mean(dim=0), variances, basis)

    def save(self, folder: str | Path) -> None:
        """Write ``prior.safetensors`` into a model's folder, where ``load_denoiser`` finds it."""
        tensors = {"mean": self.mean, "variances": self.variances}
        if self.basis is not None:
            tensors["basis"] = self.basis.contiguous()
        save_file(tensors, Path(folder) / PRIOR_FILE)

    @classmethod
    def load(cls, folder: str | Path) -> GaussianPrior | None:
        """Read ``prior.safetensors`` from a model's folder; None if there is none.

        Raises:
            ValueError: a damaged file, or tensors that are no such prior.
        """
        path = Path(folder) / PRIOR_FILE
        if not path.is_file():
            return None
        try:
            tensors = load_file(path)
        except (SafetensorError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not a readable safetensors file: {error}") from error
        problem = _problem(tensors)
        if problem:
            raise ValueError(f"{path} is not a prior: {problem}")
        return cls(**{name: tensor.double() for name, tensor in tensors.items()})

    def gains(self, transitions: Transitions) -> Tensor:
        """``(T, 1 or D)``: by how much the expected image follows a change of the latent, along the basis."""
        a = transitions.alphas[:, None]
        return a.sqrt() * self.variances / (a * self.variances + 1 - a)

    def slopes(self, transitions: Transitions) -> Tensor:
        """``(T, 1 or D)`` float64: what each step does to a small change of its latent, along the basis."""
        a, gains = transitions.alphas[:, None], self.gains(transitions)
        noise = torch.where(a < 1, (1 - a.sqrt() * gains) / (1 - a).clamp(min=1e-12).sqrt(), 0)
        return transitions.alphas_prev.sqrt()[:, None] * gains + transitions.direction[:, None] * noise

    def denoise(self, x: Tensor, transitions: Transitions, k: int) -> Tensor:
        """The output of this Gaussian's exact denoiser, of the transitions' prediction type, at step k.

        Args:
            x: latents ``(B, *shape)`` in float64.
            transitions: T steps.
            k: which step.
        """
        a = transitions.alphas[k].to(x.device)
        offset = x.flatten(1) - a.sqrt() * self.mean.to(x)
        x_0 = self.gains(transitions)[k].to(x) * self._coordinates(offset)
        x_0 = self.mean.to(x) + (x_0 if self.basis is None else x_0 @ self.basis.to(x_0).mT)
        x_0 = x_0.reshape(x.shape)
        if transitions.prediction_type == "sample":
            return x_0
        eps = (x - a.sqrt() * x_0) / (1 - a).sqrt()
        return eps if transitions.prediction_type == "epsilon" else a.sqrt() * eps - (1 - a).sqrt() * x_0

    def path(self, x_T: Tensor, transitions: Transitions, noise: Tensor | None = None) -> Tensor:
        """The chain's latents if the data were this Gaussian, with the chain's own noise.

        Args:
            x_T: ``(B, *shape)``.
            transitions: T steps.
            noise: ``(B, T, *shape)``, or None.

        Returns:
            ``(B, T, *shape)`` in the dtype of x_T.
        """
        coordinates = self._coordinates(x_T.flatten(1))
        mean = self._coordinates(self.mean.to(x_T.device).expand(1, coordinates.shape[1]))
        slopes, a = self.slopes(transitions).to(coordinates), transitions.alphas[:, None]
        # A Gaussian's flow keeps to its mean, sqrt(a) times it: displacements from there follow the slopes.
        added = coordinates.new_zeros(len(x_T), transitions.steps, coordinates.shape[1])
        if noise is not None:
            added = self._coordinates(noise.flatten(2)) * transitions.sigma.to(coordinates)[:, None]
        arrive = transitions.alphas_prev.sqrt().to(coordinates)[:, None] * mean
        leave = a.sqrt().to(coordinates) * mean
        added = added + arrive - slopes * leave
        spread = slopes.expand_as(added)
        chain = Recurrence(lambda x, s, u: s * x + u, coordinates, inputs=(spread, added), slopes=slopes.squeeze(1))
        path = solve(chain, solver=CausalQuasiNewton(), rtol=1e-6, backward=None).value
        path = path if self.basis is None else path @ self.basis.to(path).mT
        return path.reshape(len(x_T), transitions.steps, *x_T.shape[1:]).to(x_T.dtype)

    def _coordinates(self, flat: Tensor) -> Tensor:
        flat = wide(flat)
        return flat if self.basis is None else flat @ self.basis.to(flat)


def _problem(tensors: Mapping[str, Tensor]) -> str | None:
    """What is wrong with a prior's tensors; None where nothing is."""
    if not {"mean", "variances"} <= tensors.keys() <= {"mean", "variances", "basis"}:
        return f"it holds {', '.join(sorted(tensors)) or 'nothing'}; expected mean, variances and perhaps basis"
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):
            return f"{name} must hold finite numbers, and is {str(tensor.dtype).removeprefix('torch.')}"
    mean, variances, basis = tensors["mean"], tensors["variances"], tensors.get("basis")
    sizes = {len(part) for part in (mean, variances) if part.ndim == 1}
    if mean.ndim != 1 or variances.ndim != 1 or 0 in sizes or len(sizes - {1}) > 1:
        return f"mean has shape {tuple(mean.shape)} and variances {tuple(variances.shape)}; expected (D,) or (1,)"
    if bool((variances < 0).any()):
        return "a variance is negative"
    if basis is None:
        return None
    if basis.shape != (max(sizes), max(sizes)):
        return f"basis has shape {tuple(basis.shape)}, expected {(max(sizes), max(sizes))}"
    # A few random vectors, for the whole product takes seconds at thousands of entries.
    vectors = torch.randn(len(basis), 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    off = basis.double().mT @ (basis.double() @ vectors) - vectors
    return None if float(off.abs().max()) < 1e-3 else "basis is not orthogonal"
