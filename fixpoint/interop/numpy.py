"""NumPy arrays in, NumPy arrays out: what lets ``solve`` and ``root`` take them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from fixpoint.engine.layout import leaves, map_leaves
from fixpoint.solution import Solution

Solve = TypeVar("Solve", bound=Callable[..., Any])

# The dtypes that a tensor can share with an array.
_SHARED = frozenset(map(np.dtype, ("?", "u1", "i1", "i2", "i4", "i8", "f2", "f4", "f8", "c8", "c16")))


def accepts_arrays(solve: Solve) -> Solve:
    """Let ``solve(f, z0, args, **options)``, written for tensors, take NumPy arrays too and then return arrays.

    With a z0 of arrays, f is a NumPy function: it is shown arrays and returns arrays, numbers or lists of numbers.
    Nothing is copied but what f returns, because a NumPy function may write its next result into the same memory
    (``out=``). What f is shown of the state is read-only. Gradients are off.

    Example:
        >>> import numpy as np, fixpoint
        >>> sol = fixpoint.solve(lambda z, b: 0.5 * z + b, np.zeros((2, 3)), (np.ones((2, 3)),), rtol=1e-9)
        >>> sol.value.round(6)
        array([[2., 2., 2.],
               [2., 2., 2.]])
        >>> type(sol.residual)
        <class 'numpy.ndarray'>
    """

    @functools.wraps(solve)
    def solve_either(f: Any, z0: Any = None, args: Sequence[Any] = (), **options: Any) -> Any:
        start = getattr(f, "z0", None) if z0 is None else z0
        if not any(_is_array(leaf) for _, leaf in leaves(start)):
            del start  # a problem may make its z0 at each access: this one is not to live through the solve
            return solve(f, z0, args, **options)
        callback = options.get("callback")
        if callback is not None:
            options["callback"] = lambda progress: callback(_with_arrays(progress))
        try:
            on_tensors = _ArrayMap(f, start, has_aux=options.get("has_aux", False))
            shared = tuple(map_leaves(_shared, args))
            solution = solve(on_tensors, on_tensors.z0, shared, **{**options, "backward": None})
        except BaseException as error:
            # What was found by then, whoever raised: a failure to converge, f, or Ctrl-C.
            if isinstance(getattr(error, "solution", None), Solution):
                error.solution = _with_arrays(error.solution)  # type: ignore[attr-defined]
            raise
        return _with_arrays(solution)

    return cast(Solve, solve_either)


class _ArrayMap:
    """A NumPy function as a problem on tensors that share memory with its arrays."""

    def __init__(self, f: Any, z0: Any, *, has_aux: bool) -> None:
        self._f = f
        self._has_aux = has_aux
        self._example = z0
        self.z0 = map_leaves(_start, z0)
        # Only an object with a z0 of its own is a problem, and only a problem brings these.
        problem = f if hasattr(f, "z0") else None
        self.batch_dims = getattr(problem, "batch_dims", None)
        norm = getattr(problem, "norm", None)
        self.norm = (lambda z: torch.from_numpy(np.array(norm(map_leaves(_shown, z))))) if callable(norm) else None

    def __call__(self, z: Any, *args: Any) -> Any:
        try:
            output = self._f(map_leaves(_shown, z), *map_leaves(_as_array, args))
        except ValueError as error:
            if "read-only" in str(error):
                raise ValueError("f changed its input in place (z += 1, out=z): return a new array instead") from error
            raise
        if self._has_aux and isinstance(output, tuple) and len(output) == 2:
            state, aux = output
            return _copied(state, self._example), aux
        return _copied(output, self._example)


def _is_array(leaf: object) -> bool:
    return isinstance(leaf, (np.ndarray, np.generic))


def _shared(leaf: Any) -> Any:
    """A tensor on the array's memory where there can be one; anything else as it is."""
    sharable = isinstance(leaf, np.ndarray) and leaf.dtype in _SHARED and leaf.flags.writeable
    sharable = sharable and all(stride >= 0 and stride % leaf.itemsize == 0 for stride in leaf.strides)
    return torch.from_numpy(leaf) if sharable else leaf


def _start(leaf: Any) -> Any:
    """A leaf of z0 as a tensor; solve copies it before it starts."""
    if isinstance(leaf, Tensor):
        raise TypeError("z0 must hold tensors alone or NumPy arrays alone, found both")
    if not _is_array(leaf):
        return leaf
    tensor = _shared(leaf)
    return tensor if isinstance(tensor, Tensor) else _copy(leaf)


def _copy(array: Any) -> Tensor:
    native = np.array(array, dtype=array.dtype.newbyteorder("="), order="C")
    if native.dtype not in _SHARED:
        raise TypeError(f"expected arrays of numbers that PyTorch knows, found dtype {native.dtype}")
    return torch.from_numpy(native)


def _copied(output: Any, like: Any) -> Any:
    """f's output as tensors of its own; Python's numbers and lists take the dtype of z0, as they do in NumPy."""
    if isinstance(like, dict) and isinstance(output, dict):
        return {key: _copied(child, like[key]) if key in like else child for key, child in output.items()}
    if isinstance(like, tuple | list):
        alike = isinstance(output, tuple | list) and len(output) == len(like)
        return tuple(map(_copied, output, like)) if alike else output
    if _is_array(output):
        return _copy(output)
    if isinstance(output, float | int | complex | list | tuple) and _is_array(like):
        return _copy(np.asarray(output).astype(like.dtype, casting="same_kind"))
    return output


def _as_array(leaf: Any) -> Any:
    return leaf.numpy() if isinstance(leaf, Tensor) else leaf


def _shown(leaf: Any) -> Any:
    array = _as_array(leaf)
    array.flags.writeable = False
    return array


def _with_arrays(result: Any) -> Any:
    """A dataclass of figures with every tensor in it as an array on the same memory."""
    figures = {field.name: getattr(result, field.name) for field in dataclasses.fields(result)}
    return dataclasses.replace(result, **{name: map_leaves(_as_array, figure) for name, figure in figures.items()})
