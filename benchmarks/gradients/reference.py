"""The gradient of a setting to full float64, from dense Jacobians and linear algebra alone."""

from __future__ import annotations

import torch
from torch import Tensor

import fixpoint
from benchmarks.gradients.cells import Cell, Setting

_SOLVER = fixpoint.Anderson(memory=20)
_CHUNK = 64  # rows of the Jacobian found at once


@torch.no_grad()
def dense_jacobian(cell: Cell, z: Tensor, x: Tensor) -> Tensor:
    """``(rows, dim, dim)``: of each row's image by its own state, the only one that it depends on."""
    _, pullback = torch.func.vjp(lambda z: cell(z, x), z)
    basis = torch.eye(z[0].numel(), dtype=z.dtype)

    def row(entry: Tensor) -> Tensor:
        return pullback(entry.view(z.shape[1:]).expand_as(z))[0].flatten(1)

    return torch.func.vmap(row, chunk_size=_CHUNK)(basis).transpose(0, 1)


def fixed_point(cell: Cell, x: Tensor, rtol: float) -> Tensor:
    """The fixed point that iteration from zero runs into."""
    options = {"solver": _SOLVER, "max_evals": 3000, "backward": None, "on_failure": "ignore"}
    return fixpoint.solve(cell, torch.zeros_like(x), (x,), rtol=rtol, **options).value.detach()


def exact_gradient(setting: Setting) -> Tensor:
    """``d(z* . target)`` by x and by every parameter, as one vector; ``setting`` in float64."""
    cell, x = setting.cell, setting.x.detach().requires_grad_()
    z = fixed_point(cell, setting.x, rtol=1e-10)
    with torch.no_grad():  # one step of Newton's method doubles the digits
        residual = (cell(z, setting.x) - z).flatten(1)
        z = z + torch.linalg.solve(_complement(dense_jacobian(cell, z, setting.x)), residual).view_as(z)
    transposed = _complement(dense_jacobian(cell, z, setting.x)).transpose(1, 2)
    adjoint = torch.linalg.solve(transposed, setting.target.flatten(1)).view_as(z)
    return flat(torch.autograd.grad(cell(z, x), [x, *cell.parameters()], adjoint))


def slope(setting: Setting, direction: list[Tensor], step: float = 1e-5) -> float:
    """Central difference of the loss along ``direction`` for ``[x, *parameters]``; each side is solved by itself."""

    def loss(along: float) -> Tensor:
        x, *parameters = (
            value.detach() + along * part
            for value, part in zip([setting.x, *setting.cell.parameters()], direction, strict=True)
        )
        moved = setting.cast(torch.float64)
        for parameter, value in zip(moved.cell.parameters(), parameters, strict=True):
            parameter.data = value
        return (fixed_point(moved.cell, x, rtol=1e-13) * setting.target).sum()

    return float((loss(step) - loss(-step)) / (2 * step))


def flat(gradients: tuple[Tensor, ...]) -> Tensor:
    """All of them in one float64 vector."""
    return torch.cat([gradient.double().flatten() for gradient in gradients])


def _complement(jacobian: Tensor) -> Tensor:
    return torch.eye(jacobian.shape[-1], dtype=jacobian.dtype) - jacobian
