"""What an inversion returns, and what a method of inversion is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from fixpoint_diffusion.chains import SamplingChain

ACTIVE = -1  # in the place of a ``fixpoint.Status``: a sample that has not ended


@dataclass(frozen=True, eq=False, kw_only=True)
class InverseRound:
    """One round of a search for x_T.

    Attributes:
        predicted_error: ``(B,)`` float64, the RMS error of x_0 that is expected of each sample's present x_T; NaN where
            a sample was not worked on.
        residual: ``(B,)`` float64, the RMS of ``Phi_k(x_k) - x_{k+1}`` over a sample's trajectory, NaN as above.
        rows: denoiser rows of the round.
        x_T: ``(B, *shape)``, what the round has evaluated.

    Example:
        See :class:`fixpoint_diffusion.ParallelInverse`, whose history has one a round.
    """

    predicted_error: Tensor
    residual: Tensor
    rows: int
    x_T: Tensor  # noqa: N815 - the field's name for it


@dataclass(frozen=True, eq=False, kw_only=True)
class Found:
    """What a method has found.

    Attributes:
        x_T: ``(B, *shape)``.
        status: ``(B,)`` numbers of ``fixpoint.Status``. Whether a sample has converged is measured afterwards.
        rounds, evals: batched denoiser calls and denoiser rows of the search, without those that measured the error.
        trajectory: ``(B, T, *shape)`` of the ordinary sampler from x_T, if it was run; None: it has yet to be.
        history: one entry a round, step or epoch.
        noise: ``(B, T, *shape)``, from a method that finds the steps' noise too.

    Example:
        See :func:`fixpoint_diffusion.invert`, which measures what was found.
    """

    x_T: Tensor  # noqa: N815
    status: Tensor
    rounds: int
    evals: int
    trajectory: Tensor | None = None
    history: Sequence[Any] = ()
    noise: Tensor | None = None


class InverseMethod(Protocol):
    """A way to invert a chain, for :func:`invert`.

    Example:
        See :class:`fixpoint_diffusion.ExplicitInverse`, which is one.
    """

    def run(
        self,
        chain: SamplingChain,
        x_0: Tensor,
        *,
        tolerance: Tensor,
        progress: bool,
        callback: Callable[[Any], object] | None,
    ) -> Found:
        """Search for x_T.

        Args:
            chain: of B samples and T steps; its x_T plays no part.
            x_0: ``(B, *shape)``, finite.
            tolerance: ``(B,)`` float64, the RMS error of x_0 at which a sample is done.
            progress: show a bar.
            callback: called after each round, step or epoch with what there is to tell; something true stops the run.
        """


@dataclass(frozen=True, eq=False, kw_only=True)
class Inverse:
    """What :func:`invert` returns.

    Attributes:
        x_T: ``(B, *shape)``, the best that was found; with a graph if ``invert`` was given ``backward``.
        trajectory: ``(B, T, *shape)``, the ordinary sampler's latents from that x_T; row k is the latent after step k.
        reconstruction: ``(B, *shape)``, its last row.
        error: ``(B,)`` float64, RMS of ``reconstruction - x_0``: measured, whatever the method.
        converged: ``(B,)`` bool, whether the error is at most ``atol + rtol * RMS(x_0)``.
        status: ``(B,)`` numbers of ``fixpoint.Status``, why each sample ended.
        rounds: batched denoiser calls of the search. Each reconstruction takes T more.
        evals: denoiser rows of the search.
        history: figures by round, step or epoch: of ``ParallelInverse`` an :class:`InverseRound` each.
        noise: ``(B, T, *shape)``, of the steps, where the method has found it too (``DrawnInverse``); else None.

    Example:
        See :func:`fixpoint_diffusion.invert`, which returns one.
    """

    x_T: Tensor  # noqa: N815
    trajectory: Tensor
    reconstruction: Tensor
    error: Tensor
    converged: Tensor
    status: Tensor
    rounds: int
    evals: int
    history: Sequence[Any]
    noise: Tensor | None = None

    def __repr__(self) -> str:
        worst = float(self.error.nan_to_num(nan=torch.inf, posinf=torch.inf).max()) if len(self.error) else 0.0
        done = f"{int(self.converged.sum())} of {len(self.converged)} samples inverted"
        return f"Inverse({done}, worst error {worst:.1e}, rounds={self.rounds}, evals={self.evals})"
