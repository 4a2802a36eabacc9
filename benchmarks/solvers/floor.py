"""A floor under the counts: what GMRES takes on an affine map.

Every solver of the suite evaluates an affine ``f`` at points of ``z0`` plus the Krylov space of its residuals. GMRES
finds the smallest residual there is in that space, so no solver reaches the tolerance sooner.

Source: Saad & Schultz, SIAM J. Sci. Stat. Comput. 7 (1986).
"""

from __future__ import annotations

import numpy as np
import torch

from benchmarks.solvers.cases import Case
from benchmarks.solvers.counting import solves


def floor(case: Case) -> int | None:
    """Fewest evaluations that solve the affine ``case``, the one at its solution included; None beyond its limit.

    Raises:
        ValueError: If the case is not affine, or not in float64, where the space loses its meaning to rounding.
    """
    if not case.affine or case.z0.dtype != torch.float64:
        raise ValueError(f"expected an affine case in float64, found {case.name}")
    constant = case.f(torch.zeros_like(case.z0))
    start = case.f(case.z0) - case.z0
    size = float(torch.linalg.vector_norm(start))
    basis = (start / size).clone()
    projected = np.zeros((case.max_evals, case.max_evals - 1))
    for step in range(case.max_evals - 1):
        image = basis[-1:] - (case.f(basis[-1:]) - constant)
        for _ in range(2):  # once more, for the rounding of the first
            overlap = image @ basis.T
            image = image - overlap @ basis
            projected[: step + 1, step] += overlap[0].numpy()
        length = float(torch.linalg.vector_norm(image))
        projected[step + 1, step] = length
        target = np.zeros(step + 2)
        target[0] = size
        weights = np.linalg.lstsq(projected[: step + 2, : step + 1], target, rcond=None)[0]
        z = case.z0 + torch.from_numpy(weights)[None] @ basis
        if solves(z, case.f(z), case.rtol):
            return step + 2
        basis = torch.cat([basis, image / length])
    return None
