"""A fixed point as a layer of a network."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fixpoint.backward.base import Backward
from fixpoint.backward.ift import IFT
from fixpoint.options import check_options
from fixpoint.solve import solve
from fixpoint.solvers.anderson import Anderson
from fixpoint.solvers.base import Solver

_OPTIONS = [name for name, p in inspect.signature(solve).parameters.items() if p.kind is p.KEYWORD_ONLY]


class FixedPointLayer(nn.Module):
    """``layer(*inputs)`` returns ``z*`` with ``z* = f(z*, *inputs)``, differentiable in the inputs and f's parameters.

    Args:
        f: Called as ``f(z, *inputs)``; a module's parameters become the layer's.
        solver: The update rule.
        backward: How gradients are attached.
        **solve_options: Further options of ``fixpoint.solve``, kept for every call; unknown ones raise at once.

    Raises:
        TypeError, ValueError: For an option that ``fixpoint.solve`` does not have, or a value that cannot work.

    Example:
        >>> import torch, fixpoint
        >>> class Cell(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.linear = torch.nn.Linear(8, 8)
        ...     def forward(self, z, x):
        ...         return torch.tanh(0.5 * self.linear(z) + x)
        >>> layer = fixpoint.FixedPointLayer(Cell(), backward=fixpoint.JFB())
        >>> x = torch.randn(4, 8)
        >>> layer(x).shape
        torch.Size([4, 8])
        >>> layer(x, return_solution=True).converged.all()
        tensor(True)
    """

    def __init__(
        self,
        f: Callable[..., Any],
        *,
        solver: Solver = Anderson(),  # noqa: B008 - immutable
        backward: Backward | None = IFT(),  # noqa: B008 - immutable
        **solve_options: Any,
    ) -> None:
        super().__init__()
        _check_names(solve_options)
        if not callable(f):
            raise TypeError(f"f must be a module or function of z and the inputs, found {type(f).__name__}")
        self.f = f
        self.options = {"solver": solver, "backward": backward, **solve_options}
        checked = inspect.signature(check_options).parameters
        check_options(**{name: value for name, value in self.options.items() if name in checked})

    def forward(self, *inputs: Any, z0: Any = None, return_solution: bool = False, **solve_options: Any) -> Any:
        """Solve for ``z*``.

        Args:
            *inputs: What f takes after z.
            z0: Where to start; None starts from zeros like the first input.
            return_solution: Return the ``Solution`` in place of its value.
            **solve_options: Options of ``fixpoint.solve`` for this call alone, such as ``depth=4`` or ``rtol=1e-6``.
        """
        _check_names(solve_options)
        if z0 is None:
            if not inputs or not isinstance(inputs[0], Tensor):
                raise TypeError("z0 is missing, and there is no first input tensor to take its shape from: pass z0=")
            z0 = torch.zeros_like(inputs[0])
        solution = solve(self.f, z0, inputs, **{**self.options, **solve_options})
        return solution if return_solution else solution.value

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.options.items())


def _check_names(options: dict[str, Any]) -> None:
    for name in options:
        if name not in _OPTIONS:
            raise TypeError(f"FixedPointLayer: unknown option {name!r}, expected one of {_OPTIONS}")
