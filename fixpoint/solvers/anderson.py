"""Anderson acceleration in its scale-free difference form."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fixpoint.solvers.base import Solver, gram_dtype, require_count, small_dtype, write_slot


@dataclass(frozen=True)
class AndersonState:
    """Differences ``(rows, memory, dim)``, the first ``held`` in use; the Gram matrix of ``dg``; the last g, f(z)."""

    dg: Tensor
    df: Tensor
    gram: Tensor
    g: Tensor | None = None
    fz: Tensor | None = None
    held: int = 0


@dataclass(frozen=True, kw_only=True)
class Anderson(Solver):
    """Anderson acceleration (type II) with restarts: the best combination of the differences since the last one.

    With ``g = f(z) - z`` and differences of successive iterates as columns of ``dG`` and ``dF``, one step is
    ``gamma = argmin |g - dG gamma|``, ``z_next = f(z) - dF gamma - (1 - damping) (g - dG gamma)``.
    When ``memory`` differences are held, the next step starts a new set: a sliding window of the same length takes far
    more evaluations on slowly contracting problems. Columns are normalised and the ridge is relative to them,
    so scaling a problem changes nothing; the small system is solved in float64. A row whose system cannot be solved
    takes a plain step.

    Args:
        memory: Number of differences between restarts; two states per row are held for each.
        damping: Mixing in (0, 1]; 1 trusts the accelerated step wholly.
        ridge: Tikhonov weight relative to the normalised columns; None takes ten times the rounding of the state's
            dtype.

    Raises:
        ValueError: If an option is out of range.

    Source: D. G. Anderson, J. ACM 12 (1965); the difference form of Walker and Ni, SIAM J. Numer. Anal. 49 (2011).

    Example:
        >>> import torch, fixpoint
        >>> sol = fixpoint.solve(torch.cos, torch.tensor(1.0), solver=fixpoint.Anderson(memory=3), rtol=1e-6)
        >>> bool(sol.converged), sol.nfev < 10
        (True, True)
    """

    memory: int = 5
    damping: float = 1.0
    ridge: float | None = None

    def __post_init__(self) -> None:
        require_count("memory", self.memory)
        if not 0 < self.damping <= 1:
            raise ValueError(f"damping must lie in (0, 1], found {self.damping}")
        if self.ridge is not None and not self.ridge >= 0:
            raise ValueError(f"ridge must be at least 0, found {self.ridge}")

    def init(self, z: Tensor) -> AndersonState:
        rows, dim = z.shape
        history = z.new_zeros(rows, self.memory, dim)
        gram = torch.zeros(rows, 0, 0, dtype=small_dtype(z), device=z.device)
        return AndersonState(dg=history, df=history.clone(), gram=gram)

    def step(self, z: Tensor, fz: Tensor, state: AndersonState) -> tuple[Tensor, AndersonState]:
        g = fz - z
        if state.g is None or state.fz is None:
            return z + self.damping * g, replace(state, g=g, fz=fz)
        held = state.held % self.memory + 1
        newest = g - state.g
        dg = write_slot(state.dg, held - 1, newest)
        df = write_slot(state.df, held - 1, fz - state.fz)
        columns, images = dg[:, :held], df[:, :held]
        # One read of the history gives both the new row of the Gram matrix and the right-hand side.
        wide = gram_dtype(z)
        products = torch.matmul(columns.to(wide), torch.stack([newest, g], dim=2).to(wide)).to(small_dtype(z))
        gram = torch.cat(
            [torch.cat([state.gram[:, : held - 1, : held - 1], products[:, :-1, :1]], 2), products[:, None, :, 0]], 1
        )
        gamma = self._solve(gram, products[..., 1], g.dtype).to(g.dtype)
        z_next = fz - torch.matmul(gamma[:, None], images).squeeze(1)
        if self.damping < 1:
            z_next = z_next - (1 - self.damping) * (g - torch.matmul(gamma[:, None], columns).squeeze(1))
        return z_next, AndersonState(dg=dg, df=df, gram=gram, g=g, fz=fz, held=held)

    def _solve(self, gram: Tensor, target: Tensor, dtype: torch.dtype) -> Tensor:
        """Least-squares coefficients ``(rows, held)``; empty columns get zero, unsolvable rows get zero throughout."""
        ridge = 10 * torch.finfo(dtype).eps if self.ridge is None else self.ridge
        square = gram.diagonal(dim1=1, dim2=2)
        used = square > 0
        scale = torch.where(used, square, 1).rsqrt()
        # An empty column (the row did not move) becomes one of the identity: the system stays regular, its share zero.
        system = gram * scale[:, :, None] * scale[:, None, :] + torch.diag_embed(torch.where(used, ridge, 1.0))
        gamma, _ = torch.linalg.solve_ex(system, (target * scale)[..., None])
        gamma = gamma.squeeze(-1) * scale
        return torch.where(torch.isfinite(gamma).all(dim=1, keepdim=True), gamma, 0)
