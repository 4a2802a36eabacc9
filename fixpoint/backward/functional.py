"""A solve as a function of every input, which all transformations of torch.func can go through, to any order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from fixpoint.engine.loop import Map
from fixpoint.engine.outcome import LoopResult
from fixpoint.engine.private import unbatched
from fixpoint.engine.transforms import Functional, alive

Solve = Callable[[Map, Tensor], LoopResult]
Report = Callable[[LoopResult], None]
Gradients = TypeVar("Gradients", bound="tuple[Tensor | None, ...] | None")


class LinearSolves(NamedTuple):
    """How the linear equations of derivatives are solved: two ways, for a chain's adjoint runs backwards.

    Attributes:
        adjoint: Solves ``u = v + J^T u``.
        tangent: Solves ``t = J t + b``.
    """

    adjoint: Solve
    tangent: Solve

    @classmethod
    def alike(cls, solve: Solve) -> LinearSolves:
        """Both equations solved in one way."""
        return cls(solve, solve)

    def transposed(self) -> LinearSolves:
        """The same for derivatives of the adjoint equation, whose own adjoint has J again."""
        return LinearSolves(adjoint=self.tangent, tangent=self.adjoint)


def solve_functionally(
    f: Functional, solve: Solve, linear: LinearSolves, z0: Tensor, inputs: Sequence[Tensor]
) -> LoopResult:
    """``solve(lambda z: f(z, *inputs), z0)``, which every transformation of torch.func can go through, to any order.

    Args:
        f: ``f(z, *inputs)`` on rows ``(rows, dim)``.
        solve: Solves a map from a start, without gradients, on any number of rows.
        linear: The same for the linear equations of the derivatives.

    Source: the derivatives are those of the implicit function theorem; see the page on gradients.
    """
    outcome: list[LoopResult] = []
    z, *figures = _Solve.apply(f, solve, linear, outcome.append, z0, *inputs)
    result = outcome[-1]
    found: dict[str, Any] = {
        name: None if getattr(result, name) is None else _without_columns(name, x)
        for name, x in zip(_FIGURES, figures, strict=True)
    }
    return replace(result, z=z, **found)


# What is known of each row beside its state. Between the levels of torch.func, each has rows first: (rows, columns),
# without columns where nothing is known.
_FIGURES = ("residual", "scale", "status", "evals", "trace", "predicted_error", "amplification", "lyapunov")


def _in_columns(name: str, result: LoopResult) -> Tensor:
    x = getattr(result, name)
    if x is None:
        return result.residual.new_empty(len(result.residual), 0)
    return x.T if name == "trace" else x[:, None]


def _without_columns(name: str, x: Tensor) -> Tensor:
    return x.T if name == "trace" else x[:, 0]


def vector_jacobian_product(
    f: Functional, linear: LinearSolves, z: Tensor, inputs: Sequence[Tensor], v: Tensor
) -> tuple[Tensor | None, ...]:
    """``v^T dz/dinputs`` at the solution ``z`` of ``z = f(z, *inputs)``, itself differentiable; None for integers."""

    def adjoint(u: Tensor, z: Tensor, v: Tensor, *inputs: Tensor) -> Tensor:
        pullback = torch.func.vjp(lambda z: f(z, *inputs), z)[1]
        return v + pullback(u)[0]

    u = solve_functionally(adjoint, linear.adjoint, linear.transposed(), v, (z, v, *inputs)).z
    smooth = [i for i, x in enumerate(inputs) if x.is_floating_point() or x.is_complex()]
    along, values = _in_places(f, inputs, smooth)
    pullback = torch.func.vjp(partial(along, z), *values)[1]
    products = dict(zip(smooth, pullback(u), strict=True))
    return tuple(products.get(i) for i in range(len(inputs)))


def _in_places(f: Functional, inputs: Sequence[Tensor], places: Sequence[int]) -> tuple[Functional, list[Tensor]]:
    """f as a function of z and of the inputs at some places alone, and these inputs."""

    def along(z: Tensor, *values: Tensor) -> Tensor:
        placed = dict(zip(places, values, strict=True))
        return f(z, *(placed.get(i, x) for i, x in enumerate(inputs)))

    return along, [inputs[i] for i in places]


class _Solve(torch.autograd.Function):
    """The state of a solve and its figures, in columns; every tensor that f depends on is an argument."""

    @staticmethod
    def forward(
        f: Functional, solve: Solve, linear: LinearSolves, report: Report, z0: Tensor, *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        found = solve(lambda z: f(z, *inputs), z0)
        report(replace(found, state=None))
        return found.z.clone(), *(_in_columns(name, found) for name in _FIGURES)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.f, _, ctx.linear, _, _, *tensors = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(output[0], *tensors)
        ctx.save_for_forward(output[0], *tensors)

    @staticmethod
    def backward(ctx: Any, v: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        z, *inputs = map(alive, ctx.saved_tensors)
        products = for_each_gradient(lambda v: vector_jacobian_product(ctx.f, ctx.linear, z, inputs, v), alive(v))
        return None, None, None, None, None, *products

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor | None, ...]:
        """``t = J t + df/dinputs dinputs``, solved from its constant term, as the adjoint is from v."""
        z, *inputs = map(alive, ctx.saved_tensors)
        moving = [i for i, tangent in enumerate(tangents[5:]) if tangent is not None]
        n = len(inputs)

        def image(t: Tensor, z: Tensor, *rest: Tensor) -> Tensor:
            inputs, directions = rest[:n], rest[n:]
            along, values = _in_places(ctx.f, inputs, moving)
            # A transposed product, because forward-mode differentiation does not nest in itself outside torch.func.
            pullback = torch.func.vjp(along, z, *values)[1]
            pushforward = torch.func.vjp(pullback, torch.zeros_like(z))[1]
            return pushforward((t, *directions))[0]

        rest = (z, *inputs, *(tangents[5 + i] for i in moving))
        start = image(torch.zeros_like(z), *rest)
        return solve_functionally(image, ctx.linear.tangent, ctx.linear, start, rest).z, *(None for _ in _FIGURES)

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[Any, ...],
        f: Functional,
        solve: Solve,
        linear: LinearSolves,
        report: Report,
        z0: Tensor,
        *inputs: Tensor,
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        """The batch becomes further rows, so each of its members has a status and stops when it is done."""
        size, z0_dim, dims = info.batch_size, in_dims[4], in_dims[5:]
        z0 = z0.expand(size, *z0.shape) if z0_dim is None else z0.movedim(z0_dim, 0)

        def on_rows(z: Tensor, *inputs: Tensor) -> Tensor:
            mapped = torch.vmap(f, in_dims=(0, *dims), randomness=info.randomness)
            return mapped(z.reshape(z0.shape), *inputs).reshape(z.shape)

        flat = _Solve.apply(on_rows, solve, linear, report, z0.reshape(-1, z0.shape[2]), *inputs)
        return tuple(x.reshape(*z0.shape[:2], *x.shape[1:]) for x in flat), (0,) * len(flat)


def for_each_gradient(pull: Callable[[Tensor], Gradients], v: Tensor) -> Gradients:
    """``pull(v)``, one after the other where several gradients come at once."""
    batch = unbatched(v)
    if batch is None:
        return pull(v)
    members, batched = batch
    results = [pull(member) for member in members]
    found = [result for result in results if result is not None]
    if len(found) < len(results):
        return cast(Gradients, None)
    columns = zip(*found, strict=True)
    return cast(Gradients, tuple(None if column[0] is None else batched(torch.stack(column)) for column in columns))
