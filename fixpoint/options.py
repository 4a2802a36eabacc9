"""Options of ``solve``: what they may be, and what the engine makes of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from numbers import Real
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from fixpoint.backward.base import Backward
from fixpoint.engine.layout import Layout, as_tensor
from fixpoint.engine.norms import Array
from fixpoint.engine.tolerance import OnFailure, Tolerance
from fixpoint.engine.transforms import plain
from fixpoint.solvers.base import Solver, require_count

Norm = Callable[[Any], Tensor] | Literal["leafwise"]


@dataclass(frozen=True, kw_only=True)
class Counts:
    """The counts among the options of ``solve``, as Python's integers."""

    max_evals: int = 1
    check_every: int = 1
    depth: int | None = None
    keep_states: frozenset[int] = field(default_factory=frozenset)


def check_options(
    *,
    args: Any = (),
    solver: object = None,
    backward: object = None,
    rtol: Any = 0.0,
    atol: Any = 0.0,
    norm: object = None,
    max_evals: Any = 1,
    on_failure: str = "warn",
    check_every: Any = 1,
    depth: Any = None,
    keep_states: Iterable[Any] = (),
    batch_dims: Any = None,
    callback: object = None,
) -> Counts:
    """Raise for an option of ``solve`` that cannot work, whatever the problem; others are checked where they act."""
    check_args(args)
    if not isinstance(solver, Solver):
        raise TypeError(f"solver must be a fixpoint.Solver such as Anderson(), found {solver!r}")
    if backward is not None and not isinstance(backward, Backward):
        raise TypeError(f"backward must be a fixpoint.Backward such as IFT(), or None, found {backward!r}")
    for name, limit in (("rtol", rtol), ("atol", atol)):
        _check_limit(name, limit)
    if norm is not None and norm != "leafwise" and not callable(norm):
        raise ValueError(f'norm must be a function of a state, "leafwise" or None, found {norm!r}')
    if batch_dims is not None:
        require_count("batch_dims", batch_dims, 0)
    if callback is not None and not callable(callback):
        raise TypeError(f"callback must be a function of a fixpoint.Progress, or None, found {callback!r}")
    if not isinstance(keep_states, Iterable):
        raise TypeError(f"keep_states must be a tuple of numbers of evaluations, found {keep_states!r}: write (4, 8)")
    options = Counts(
        max_evals=require_count("max_evals", max_evals),
        check_every=require_count("check_every", check_every),
        depth=None if depth is None else require_count("depth", depth, 0),
        keep_states=frozenset(require_count("keep_states' entry", nfev) for nfev in keep_states),
    )
    if options.keep_states and (options.check_every > 1 or depth is not None):
        found = f"check_every={check_every}, depth={depth}"
        raise ValueError(f"keep_states needs check_every=1 and depth=None, found {found}")
    if on_failure not in get_args(OnFailure):
        raise ValueError(f"on_failure must be one of {get_args(OnFailure)}, found {on_failure!r}")
    return options


def check_args(args: Any) -> None:
    """Raise for args that are no collection of arguments, as where one stands without its parentheses."""
    if not isinstance(args, tuple | list):
        raise TypeError(
            f"args must be a tuple or list of f's further arguments, found a {type(args).__name__}: write args=(x,)"
        )


def _check_limit(name: str, limit: Any) -> None:
    """Raise for a tolerance that is none for any batch; those of single rows are looked at when the batch is known."""
    if isinstance(limit, Tensor | np.ndarray):
        return
    if not isinstance(limit, Real) or isinstance(limit, bool):
        raise TypeError(f"{name} must be a number or a tensor with the batch shape, found {limit!r}")
    if not float(limit) >= 0:
        raise ValueError(f"{name} must be at least 0, found {limit}")


def norm_of(problem: object) -> Callable[[Any], Tensor] | None:
    """The problem's own norm if it brings one. A module's attribute of that name is a layer, not a norm."""
    norm = getattr(problem, "norm", None)
    return norm if callable(norm) and not isinstance(norm, nn.Module) else None


def tolerance_of(rtol: Any, atol: Any, norm: Norm | None, layout: Layout, rounding: float) -> Tolerance:
    """When a row of such a state is done; ``rounding`` is the relative rounding of f."""
    return Tolerance(
        rtol=_per_row("rtol", rtol, layout),
        atol=_per_row("atol", atol, layout),
        norm=partial(_norm_of_rows, norm, layout) if callable(norm) else None,
        leaves=layout.leaf_sizes if norm == "leafwise" else None,
        rounding=rounding,
    )


def _norm_of_rows(norm: Callable[[Any], Tensor], layout: Layout, flat: Tensor) -> Tensor:
    """``norm`` on rows ``(rows, dim)``; under ``torch.vmap`` the rows of a solve come several times over."""
    sizes = [norm(layout.unflatten(part)) for part in flat.split(layout.rows)] if len(flat) else []
    for size in sizes:
        if not isinstance(size, Tensor) or tuple(size.shape) != tuple(layout.batch_shape):
            found = tuple(size.shape) if isinstance(size, Tensor) else f"a {type(size).__name__}"
            raise ValueError(f"norm must return a tensor of the batch shape {tuple(layout.batch_shape)}, found {found}")
    return torch.cat([size.reshape(-1) for size in sizes]) if sizes else flat.new_zeros(0)


def _per_row(name: str, value: Any, layout: Layout) -> float | Array:
    """A tolerance as a number, or as one for each row."""
    if isinstance(value, Tensor | np.ndarray) and value.ndim > 0:
        if tuple(value.shape) != tuple(layout.batch_shape):
            raise ValueError(
                f"{name} must be a number or have the batch shape {tuple(layout.batch_shape)}, found shape "
                f"{tuple(value.shape)}"
            )
        found = plain(as_tensor(value).detach().double().cpu())
        if tuple(found.shape) != tuple(value.shape):
            raise ValueError(f"{name} must be the same for all members of a torch.vmap, found a mapped tensor")
        return np.array(found.tolist(), dtype=np.float64).reshape(-1)  # numpy() fails under torch.func
    return float(value)
