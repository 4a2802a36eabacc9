"""What helps to train a fixed point: penalties on its Jacobian, its spectral radius, losses on states on the way."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fixpoint.engine.evaluation import RowMap
from fixpoint.engine.layout import Layout, map_leaves
from fixpoint.engine.norms import row_norm
from fixpoint.options import check_args
from fixpoint.solution import Solution
from fixpoint.solvers.base import require_count

# PyTorch keeps its choice of kernels for the whole process: two threads that overlapped would restore each other's.
_CHOOSING = threading.RLock()


@contextlib.contextmanager
def _plain_attention() -> Iterator[None]:
    """Attention by kernels that have a second derivative."""
    with _CHOOSING, sdpa_kernel(SDPBackend.MATH):
        yield


def jacobian_penalty(
    f: Callable[..., Any],
    z: Any,
    args: Sequence[Any] = (),
    *,
    probes: int = 1,
    generator: torch.Generator | None = None,
    batch_dims: int | None = None,
) -> Tensor:
    """An unbiased estimate of ``|J|_F^2 / dim`` for each row, where J is the Jacobian of f at z.

    Added to a training loss, it keeps the fixed point quick to solve and its gradient easy. It is Hutchinson's
    estimate: the mean over probes of ``|J^T e|^2 / dim``, with ``e`` standard normal. Gradients flow to all that f
    depends on, and into z if that requires grad; pass ``z.detach()`` to hold the point, as the source does.

    Args:
        f, z, args, batch_dims: As in ``fixpoint.solve``; z is the point, usually a solution.
        probes: Random vectors averaged, a vector-Jacobian product each.
        generator: Source of the random vectors, on z's device; None takes the global one.

    Returns:
        Tensor: One number per row, in the batch shape.

    Raises:
        TypeError, ValueError: If an option or a state cannot work.

    Source: S. Bai, V. Koltun, J. Z. Kolter, Stabilizing Equilibrium Models by Jacobian Regularization, ICML 2021.

    Example:
        >>> import torch, fixpoint
        >>> w = torch.nn.Parameter(torch.eye(3))
        >>> penalty = fixpoint.jacobian_penalty(lambda z: 0.5 * z @ w, torch.ones(2, 3), probes=4)
        >>> penalty.shape
        torch.Size([2])
        >>> penalty.mean().backward()
        >>> w.grad is not None
        True
    """
    require_count("probes", probes)
    # The penalty's gradient is a second derivative, which the fast kernels for attention do not have. What is only
    # measured keeps them. The choice is the process's, so it also covers what a checkpoint computes again.
    trained = torch.is_grad_enabled() and not torch.compiler.is_compiling()
    with _plain_attention() if trained else contextlib.nullcontext():
        layout, at, fz = _recorded(f, z, args, batch_dims)
        total = at.new_zeros(layout.rows, dtype=torch.promote_types(at.dtype, torch.float32))
        for _ in range(probes):
            probe = torch.randn(at.shape, dtype=at.dtype, device=at.device, generator=generator)
            product = _pull(fz, at, probe, create_graph=torch.is_grad_enabled())
            total = total + product.to(total.dtype).square().sum(dim=1)
    return (total / (probes * max(at.shape[1], 1))).reshape(layout.batch_shape)


def spectral_radius(
    f: Callable[..., Any],
    z: Any,
    args: Sequence[Any] = (),
    *,
    steps: int = 100,
    generator: torch.Generator | None = None,
    batch_dims: int | None = None,
) -> Tensor:
    """The spectral radius of the Jacobian of f at z, for each row, by the power method.

    Below 1, plain iteration converges near z and the Neumann series of the gradient does. It is the mean growth of a
    random vector under ``J^T`` over the second half of the steps, so a complex pair of eigenvalues does no harm.

    Args:
        f, z, args, batch_dims: As in ``fixpoint.solve``; z is the point, usually a solution.
        steps: Vector-Jacobian products, at least 2.
        generator: Source of the first vector, on z's device; None takes the global one.

    Returns:
        Tensor: One number per row, in the batch shape; without gradient.

    Raises:
        TypeError, ValueError: If an option or a state cannot work.

    Source: R. von Mises, H. Pollaczek-Geiringer, ZAMM 9 (1929).

    Example:
        >>> import torch, fixpoint
        >>> A = torch.diag(torch.tensor([0.9, 0.1, -0.5]))
        >>> fixpoint.spectral_radius(lambda z: z @ A, torch.zeros(2, 3))
        tensor([0.9000, 0.9000])
    """
    require_count("steps", steps, least=2)
    layout, at, fz = _recorded(f, z, args, batch_dims)
    vector = torch.randn(at.shape, dtype=at.dtype, device=at.device, generator=generator)
    growth = torch.zeros_like(row_norm(at), requires_grad=False)
    for step in range(steps):
        size = row_norm(vector)[:, None]
        product = _pull(fz, at, (vector / torch.where(size > 0, size, 1)).to(at.dtype), create_graph=False)
        if step >= steps // 2:
            growth = growth + row_norm(product).log()
        vector = product
    return (growth / (steps - steps // 2)).exp().reshape(layout.batch_shape).detach()


def correction_loss(solution: Solution, criterion: Callable[[Any], Tensor], *, decay: float = 0.8) -> Tensor:
    """Fixed-point correction: a loss on states on the way, the later the heavier.

    ``sum_i decay^(K - i) criterion(state_i)`` over the K states that ``solve(keep_states=...)`` kept, in their order,
    to be added to the loss of the solution itself. It teaches f to be near its goal after few evaluations. Each state
    has the gradient of JFB, so the cost is one recorded application of f for each.

    Args:
        solution: With at least one state in ``solution.states``.
        criterion: Takes a state, in the structure of z0, to a scalar loss.
        decay: Weight of a state relative to the next, in (0, 1].

    Returns:
        Tensor: The weighted sum.

    Raises:
        TypeError: For anything but a solution.
        ValueError: If there are no states, ``decay`` is out of range, or the criterion's value is no scalar.

    Source: S. Bai, Z. Geng, Y. Savani, J. Z. Kolter, Deep Equilibrium Optical Flow Estimation, CVPR 2022.

    Example:
        >>> import torch, fixpoint
        >>> w = torch.tensor(0.5, requires_grad=True)
        >>> sol = fixpoint.solve(lambda z: w * torch.cos(z), torch.zeros(2, 3), keep_states=(1, 2))
        >>> loss = sol.value.square().mean() + fixpoint.correction_loss(sol, lambda z: z.square().mean())
        >>> loss.backward()
        >>> sorted(sol.states)
        [1, 2]
    """
    if not isinstance(solution, Solution):
        found = type(solution).__name__
        raise TypeError(
            f"solution must be a fixpoint.Solution, as of layer(..., return_solution=True), found a {found}"
        )
    if not 0 < decay <= 1:
        raise ValueError(f"decay must lie in (0, 1], found {decay}")
    if not solution.states:
        raise ValueError("solution.states is empty: pass to solve keep_states=(...), evaluations that it reaches")
    states = [solution.states[nfev] for nfev in sorted(solution.states)]
    losses = [criterion(state) for state in states]
    for loss in losses:
        if not isinstance(loss, Tensor) or loss.ndim:
            found = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"criterion must return a scalar tensor, such as a mean; found {found}")
    return torch.stack([decay ** (len(losses) - i) * loss for i, loss in enumerate(losses, start=1)]).sum()


def _recorded(
    f: Callable[..., Any], z: Any, args: Sequence[Any], batch_dims: int | None
) -> tuple[Layout, Tensor, Tensor]:
    """The layout, the rows of z, and f of these with a graph."""
    check_args(args)
    layout = Layout.of(z, batch_dims)
    # In inference mode nothing would be recorded, and a Jacobian pass for zero; its tensors cannot be saved either.
    with torch.inference_mode(False), torch.enable_grad():
        at = layout.flatten(z).clone()
        if not at.requires_grad:
            at = at.detach().requires_grad_()
        args = map_leaves(lambda x: x.clone() if isinstance(x, Tensor) and x.is_inference() else x, tuple(args))
        return layout, at, RowMap(f, args, layout, gradients=False)(at)


def _pull(fz: Tensor, z: Tensor, u: Tensor, *, create_graph: bool) -> Tensor:
    """``J^T u``; zero where f does not depend on z."""
    if not fz.requires_grad:
        return torch.zeros_like(u)
    (product,) = torch.autograd.grad(
        fz, z, u, retain_graph=True, create_graph=create_graph, allow_unused=True, materialize_grads=True
    )
    return product
