"""Broyden's method with limited memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fixpoint.solvers.base import Solver, gram_dtype, require_count, write_slot


@dataclass(frozen=True)
class BroydenState:
    """The inverse Jacobian ``-I + sum_j u_j v_j^T`` of ``g = f(z) - z``, and the last point and residual."""

    u: Tensor
    v: Tensor
    z: Tensor | None = None
    g: Tensor | None = None
    held: int = 0


@dataclass(frozen=True, kw_only=True)
class Broyden(Solver):
    """Broyden's good method on ``g(z) = f(z) - z``: a rank-one secant update of the inverse Jacobian each step.

    It starts from minus the identity, so the first step is Picard's. When ``memory`` updates are held it starts over:
    overwriting the oldest instead leaves updates that were built on one no longer there, and stalls. An update whose
    denominator vanishes beside its terms is left out for that row.

    Args:
        memory: Number of rank-one updates between restarts; two states per row are held for each.

    Raises:
        ValueError: If ``memory`` is below 1.

    Source: C. G. Broyden, Math. Comp. 19 (1965); restarts as in Kelley, Iterative Methods (1995), 7.3.

    Example:
        >>> import torch, fixpoint
        >>> sol = fixpoint.solve(torch.cos, torch.tensor(1.0), solver=fixpoint.Broyden(), rtol=1e-6)
        >>> bool(sol.converged), sol.nfev < 10
        (True, True)
    """

    memory: int = 10

    def __post_init__(self) -> None:
        require_count("memory", self.memory)

    def init(self, z: Tensor) -> BroydenState:
        rows, dim = z.shape
        history = torch.zeros(rows, self.memory, dim, dtype=gram_dtype(z), device=z.device)
        return BroydenState(u=history, v=history.clone())

    def step(self, z: Tensor, fz: Tensor, state: BroydenState) -> tuple[Tensor, BroydenState]:
        zw = z.to(gram_dtype(z))
        g = fz.to(zw.dtype) - zw
        u, v, held = state.u, state.v, state.held
        if state.z is not None and state.g is not None:
            if held == self.memory:
                u, v, held = torch.zeros_like(u), torch.zeros_like(v), 0
            dz, dg = zw - state.z, g - state.g
            image = _apply(u, v, dg)  # inverse Jacobian times dg
            covector = _apply(v, u, dz)  # its transpose times dz
            denominator = (dz * image).sum(dim=1, keepdim=True)
            size = torch.linalg.vector_norm(dz, dim=1, keepdim=True) * torch.linalg.vector_norm(
                image, dim=1, keepdim=True
            )
            sound = denominator.abs() > torch.finfo(zw.dtype).eps ** 0.5 * size
            u = write_slot(u, held, torch.where(sound, (dz - image) / torch.where(sound, denominator, 1), 0))
            v = write_slot(v, held, torch.where(sound, covector, 0))
            held += 1
        move = -_apply(u, v, g)
        move = torch.where(torch.isfinite(move).all(dim=1, keepdim=True), move, g)
        return (zw + move).to(z.dtype), BroydenState(u=u, v=v, z=zw, g=g, held=held)

    def transposed_inverse(self, state: BroydenState, x: Tensor) -> Tensor:
        """``(I - J)^-T x`` for each row ``x`` ``(rows, dim)``, by the inverse that ``state`` has come to."""
        return -_apply(state.v, state.u, x.to(state.u.dtype)).to(x.dtype)


def _apply(u: Tensor, v: Tensor, x: Tensor) -> Tensor:
    """``(-I + sum_j u_j v_j^T) x`` for each row: u, v ``(rows, memory, dim)``, x ``(rows, dim)``."""
    return torch.matmul(torch.matmul(v, x[..., None]).transpose(1, 2), u).squeeze(1) - x
