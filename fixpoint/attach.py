"""attach(): gradients for a fixed point that was found elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fixpoint.backward.base import Backward
from fixpoint.backward.ift import IFT
from fixpoint.engine.layout import as_tensor, map_leaves
from fixpoint.solve import solve
from fixpoint.solvers.picard import Picard


def attach(
    f: Callable[..., Any],
    z_star: Any,
    args: Sequence[Any] = (),
    backward: Backward = IFT(),  # noqa: B008 - immutable
    *,
    batch_dims: int | None = None,
) -> Any:
    """The state ``z_star`` with the gradient that ``backward`` gives a fixed point of f.

    For a solution that another program has found, or that was stored. Nothing is solved and nothing verified: the
    gradient is right as far as ``z_star = f(z_star, *args)`` holds. Costs what the rule costs after a solve: one
    recorded evaluation of f with ``IFT``.

    Args:
        f: Maps a state to a state, as in ``fixpoint.solve``.
        z_star: The fixed point: a tensor, or nested tuples, lists and dicts of tensors. Its own graph plays no part.
            NumPy arrays become tensors.
        args: A tuple or list of further arguments of f.
        backward: A rule that attaches to a solved state, such as ``IFT()``, ``Phantom()``, ``JFB()`` or ``Neumann()``.
        batch_dims: As in ``fixpoint.solve``.

    Returns:
        A state equal to ``z_star``. Without a graph where grad mode is off or f depends on nothing that requires grad.

    Raises:
        TypeError, ValueError: As ``fixpoint.solve``, and for a rule that runs the forward solve in a way of its own
            (``Unroll``, ``StochasticJFB``, ``Reversible``, ``SHINE``).

    Example:
        >>> import torch, fixpoint
        >>> a = torch.tensor(0.5, requires_grad=True)
        >>> z = fixpoint.attach(lambda z, a: a * z + 1, torch.tensor([2.0]), (a,))  # z = 1 / (1 - a), found by hand
        >>> z.sum().backward()
        >>> round(float(a.grad), 4)  # 1 / (1 - a)^2
        4.0
    """
    if not isinstance(backward, Backward):
        raise TypeError(f"backward must be a fixpoint.Backward such as IFT(), found {backward!r}")
    if backward.runs_forward:
        raise TypeError(f"{backward!r} needs a forward solve of its own: pass a rule such as IFT(), Phantom() or JFB()")
    # Other programs give arrays; f is a function of tensors all the same.
    state = map_leaves(as_tensor, z_star)
    return solve(f, state, args, solver=Picard(), backward=backward, batch_dims=batch_dims, depth=0).value
