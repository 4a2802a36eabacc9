"""Nested states and the flat rows that solvers see."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fixpoint.engine.transforms import plain


def as_tensor(x: Any) -> Tensor:
    """``x`` itself if it is a tensor; else its numbers on the host, whatever the default device is."""
    return x if isinstance(x, Tensor) else torch.as_tensor(x, device="cpu")


def leaves(state: Any, path: str = "z") -> Iterator[tuple[str, Any]]:
    """Yield ``(path, leaf)`` for every leaf of nested tuples, lists and dicts, dicts in insertion order."""
    for leaf_path, leaf, _ in paired_leaves(state, state, path):
        yield leaf_path, leaf


def paired_leaves(state: Any, like: Any, path: str = "z") -> Iterator[tuple[str, Any, Any]]:
    """Yield ``(path, leaf, leaf of like)`` for two states nested alike, in the order of ``like``.

    The order matters: f may well return a dict whose keys were inserted in another order than those of z0.
    """
    if isinstance(like, dict):
        for key, child in like.items():
            yield from paired_leaves(state[key], child, f"{path}[{key!r}]")
    elif isinstance(like, (tuple, list)):
        for index, child in enumerate(like):
            yield from paired_leaves(state[index], child, f"{path}[{index}]")
    else:
        yield path, state, like


def map_leaves(function: Callable[[Any], Any], state: Any) -> Any:
    """Rebuild ``state`` with ``function`` applied to each leaf; dicts and named tuples keep their class."""
    if isinstance(state, dict):
        # A copy, for a subclass may hold more than its items.
        rebuilt = {} if type(state) is dict else copy.copy(state)
        for key, child in state.items():
            rebuilt[key] = map_leaves(function, child)
        return rebuilt
    if isinstance(state, (tuple, list)):
        children = [map_leaves(function, child) for child in state]
        return type(state)(*children) if hasattr(state, "_fields") else type(state)(children)
    return function(state)


def require_same_layout(
    found: Any, expected: Any, *, f: str = "f", z: str = "z", lower: torch.dtype | None = None
) -> None:
    """Raise unless what f returned has the nesting, shapes, dtype and device of the state ``expected``.

    ``f`` and ``z`` are the caller's names for the map and its state. ``lower`` is a further dtype that may come back.
    """
    _require_same_nesting(found, expected, f"{f} must return the structure of {z}0: at", z)
    for path, leaf, like in paired_leaves(found, expected, z):
        for name in ("shape", "dtype", "device"):
            here, there = getattr(leaf, name), getattr(like, name)
            if here != there and not (name == "dtype" and here == lower):
                here, there = (tuple(here), tuple(there)) if name == "shape" else (here, there)
                raise ValueError(f"{f} must keep the {name} of {z}0: {path} came back as {here}, expected {there}")


def _require_same_nesting(found: Any, expected: Any, message: str, path: str) -> None:
    """Raise ``TypeError`` where ``found`` is not nested like ``expected``."""
    pairs: list[tuple[Any, Any, Any]] = []
    if isinstance(expected, dict):
        if not isinstance(found, dict) or found.keys() != expected.keys():
            keys = list(found) if isinstance(found, dict) else type(found).__name__
            raise TypeError(f"{message} {path} found {keys}, expected {list(expected)}")
        pairs = [(key, found[key], expected[key]) for key in expected]
    elif isinstance(expected, (tuple, list)):
        if not isinstance(found, (tuple, list)) or len(found) != len(expected):
            size = f"{len(found)} entries" if isinstance(found, (tuple, list)) else type(found).__name__
            raise TypeError(f"{message} {path} found {size}, expected {len(expected)}")
        pairs = [(index, *pair) for index, pair in enumerate(zip(found, expected, strict=True))]
    elif not isinstance(found, Tensor):
        pair = isinstance(found, tuple) and len(found) == 2
        hint = "; pass has_aux=True if f returns (state, aux)" if pair else ""
        raise TypeError(f"{message} {path} found {type(found).__name__}, not a Tensor{hint}")
    for key, child, expected_child in pairs:
        _require_same_nesting(child, expected_child, message, f"{path}[{key!r}]")


def _all_finite(leaf: Tensor) -> bool:
    """A finite sum has finite terms, and costs a tenth of looking at each; only an overflow needs the closer look."""
    leaf = plain(leaf)
    return bool(torch.isfinite(leaf.sum())) or bool(torch.isfinite(leaf).all())


@dataclass(frozen=True)
class Layout:
    """How a nested state is laid out as real rows ``(rows, dim)``, one row per independent problem.

    Complex leaves become pairs of real numbers, so solvers never see them. The entries of a leaf stand in a row as they
    stand in memory, so that f is shown the memory format of z0, such as ``torch.channels_last``.

    Example:
        See :class:`fixpoint.ForwardSolve`, whose ``z0`` is laid out so.
    """

    example: Any  # as the state that it was made from, but for the numbers
    batch_shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    rows: int = field(init=False)  # independent problems
    _plain: bool = field(init=False)  # one real tensor: the common case, which is spared the walk through a tree
    _is_rows: bool = field(init=False)  # such a tensor is laid out as it is
    _size: int = field(init=False)  # length of a plain state's row

    def __post_init__(self) -> None:
        # No cached properties: their lock keeps torch.compile out, before Python 3.12.
        batch_dims = len(self.batch_shape)
        is_plain = (
            isinstance(self.example, Tensor)
            and not self.example.is_complex()
            and _memory_order(self.example, batch_dims) is None
        )
        object.__setattr__(self, "rows", math.prod(self.batch_shape))
        object.__setattr__(self, "_plain", is_plain)
        object.__setattr__(self, "_is_rows", is_plain and self.example.ndim == 2 == batch_dims + 1)
        object.__setattr__(self, "_size", math.prod(self.example.shape[len(self.batch_shape) :]) if is_plain else 0)

    @classmethod
    def of(cls, state: Any, batch_dims: int | None) -> Layout:
        """Check ``state`` and describe it.

        ``batch_dims=None`` means 1, but 0 where no leaf has more than one dimension, or one has none.
        """
        tensors = list(leaves(state))
        if not tensors:
            raise ValueError("z0 holds no tensor")
        for path, leaf in tensors:
            if not isinstance(leaf, Tensor):
                raise TypeError(f"z0 must hold tensors: {path} is a {type(leaf).__name__}")
            if not (leaf.is_floating_point() or leaf.is_complex()):
                raise TypeError(f"z0 must be floating point or complex: {path} is {leaf.dtype}")
            if leaf.layout != torch.strided:
                raise TypeError(f"z0 must be dense: {path} is {leaf.layout}, of which to_dense() makes one")
        first_path, first = tensors[0]
        if batch_dims is None:
            dims = [leaf.ndim for _, leaf in tensors]
            batch_dims = 1 if max(dims) > 1 and min(dims) > 0 else 0
        if batch_dims < 0:
            raise ValueError(f"batch_dims must be at least 0, found {batch_dims}")
        batch_shape = first.shape[:batch_dims]
        for path, leaf in tensors:
            if leaf.ndim < batch_dims:
                raise ValueError(f"batch_dims={batch_dims}, but {path} has shape {tuple(leaf.shape)}")
            if leaf.shape[:batch_dims] != batch_shape:
                raise ValueError(
                    f"leaves must agree in their {batch_dims} batch dimension(s): "
                    f"{first_path} has {tuple(batch_shape)}, {path} has {tuple(leaf.shape[:batch_dims])}; pass "
                    "batch_dims=0 if the whole state is one problem"
                )
            if (leaf.dtype, leaf.device) != (first.dtype, first.device):
                raise TypeError(
                    f"leaves must agree in dtype and device: {first_path} is {first.dtype} on {first.device}, "
                    f"{path} is {leaf.dtype} on {leaf.device}"
                )
            if not (torch.compiler.is_compiling() or leaf.is_meta or _all_finite(leaf)):
                raise ValueError(f"z0 must be finite: {path} holds NaN or infinity")
        example = map_leaves(lambda leaf: _shape_of(leaf, batch_shape), state)
        return cls(example=example, batch_shape=batch_shape, dtype=first.dtype, device=first.device)

    def flatten(self, state: Any) -> Tensor:
        """``(rows, dim)`` real tensor that holds ``state``; differentiable."""
        if self._is_rows and state.shape == self.example.shape:
            return state
        if self._plain:
            return state.reshape(self.rows, self._size)
        rows = []
        for _, leaf, like in paired_leaves(state, self.example):
            order = _memory_order(like, len(self.batch_shape))
            leaf = leaf if order is None else leaf.permute(order)
            real = torch.view_as_real(leaf.resolve_conj()) if leaf.is_complex() else leaf
            rows.append(real.reshape(self.rows, math.prod(real.shape[len(self.batch_shape) :])))
        return rows[0] if len(rows) == 1 else torch.cat(rows, dim=1)

    @property
    def leaf_sizes(self) -> tuple[int, ...]:
        """Length of each leaf's part of a row."""
        dims = len(self.batch_shape)
        return tuple(math.prod(leaf.shape[dims:]) * (2 if leaf.is_complex() else 1) for _, leaf in leaves(self.example))

    @property
    def row_order(self) -> tuple[int, ...] | None:
        """Of a state that is one tensor, the dimensions of a row as its entries stand in it; None: in their order."""
        dims = len(self.batch_shape)
        order = _memory_order(self.example, dims)
        return None if order is None else tuple(i - dims for i in order[dims:])

    def unflatten(self, flat: Tensor) -> Any:
        """The state, structured like the example, that ``flat`` holds; views where possible."""
        if self._is_rows:
            return flat.view_as(flat)  # a tensor of its own, which f may ask gradients for
        if self._plain:
            return flat.reshape(self.example.shape)
        start = 0

        def take(leaf: Tensor) -> Tensor:
            nonlocal start
            order = _memory_order(leaf, len(self.batch_shape))
            stored = leaf.shape if order is None else tuple(leaf.shape[i] for i in order)
            shape = (*stored, 2) if leaf.is_complex() else stored
            size = math.prod(shape[len(self.batch_shape) :])
            # Contiguous, as a leaf is that nobody has laid out in rows: f may take views of it.
            part = flat[:, start : start + size].contiguous().reshape(shape)
            start += size
            part = torch.view_as_complex(part) if leaf.is_complex() else part
            return part if order is None else part.permute(_inverse(order))

        return map_leaves(take, self.example)

    def with_rows(self, rows: int) -> Layout:
        """The same layout for another number of rows, of at least one; for one batch dimension."""

        batch_shape = torch.Size([rows])
        example = map_leaves(lambda leaf: _shape_of(leaf, batch_shape), self.example)
        return replace(self, example=example, batch_shape=batch_shape)


def _shape_of(leaf: Tensor, batch_shape: torch.Size) -> Tensor:
    """Zeros in the shape and memory format of ``leaf``, with rows of this ``batch_shape``: they take a row's memory.

    Of a leaf that lies in its own order, they take none. The leaf itself would live as long as the solution.
    """
    leaf, batch_dims = leaf.detach(), len(batch_shape)
    order = _memory_order(leaf, batch_dims)
    if order is None:
        return leaf.new_zeros(()).expand(batch_shape + leaf.shape[batch_dims:])
    stored = leaf.new_zeros([leaf.shape[i] for i in order[batch_dims:]])
    return stored.expand(batch_shape + stored.shape).permute(_inverse(order))


def _memory_order(leaf: Tensor, batch_dims: int) -> tuple[int, ...] | None:
    """The dimensions of a leaf as they lie in memory, batch first; None where that is their own order."""
    if leaf.ndim - batch_dims < 2 or leaf.is_contiguous():
        return None
    strides = leaf.stride()
    order = (*range(batch_dims), *sorted(range(batch_dims, leaf.ndim), key=lambda i: -strides[i]))
    if order == tuple(range(leaf.ndim)):
        return None
    # A row that has gaps or repeats itself is laid out in its own order. How the rows lie plays no part.
    return order if leaf.permute(order)[(0,) * batch_dims].is_contiguous() else None


def _inverse(order: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(order.index(i) for i in range(len(order)))
