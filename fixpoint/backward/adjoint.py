"""How a rule that answers v with an adjoint u is attached: by one recorded application of f."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fixpoint.backward.base import ForwardSolve
from fixpoint.backward.explicit import Solve, solve_explicitly
from fixpoint.engine.loop import LoopResult
from fixpoint.engine.transforms import transformed

Exact = Callable[[Tensor], "tuple[Tensor | None, ...] | None"]


def attach_adjoint(
    run: ForwardSolve, result: LoopResult, adjoint: Solve, exact: Exact | None = None
) -> tuple[Tensor, LoopResult]:
    """``f(z*)``, recorded once, with a backward that answers the incoming gradient v with an adjoint u.

    ``adjoint(image, v)`` finds it, where ``image(u) = v + J^T u``. It then flows through the recorded application to
    parameters, inputs and whatever f closes over, with no list of them anywhere. That has no second derivative. A rule
    that has one gives it as ``exact(v)``: gradients for ``run.inputs`` that are differentiable themselves, or None
    where it cannot.
    """
    if run.transformed:
        raise ValueError(
            "this backward rule does not work under torch.func or forward-mode differentiation; IFT() and Phantom() do"
        )
    z = result.z.detach().requires_grad_()
    fz = run.f(z)

    def image(u: Tensor, v: Tensor) -> Tensor:
        (product,) = torch.autograd.grad(fz, z, u, retain_graph=True, allow_unused=True)
        return v if product is None else v + product

    def answer(v: Tensor) -> Tensor:
        if transformed(v):  # several gradients at once, by is_grads_batched=True
            return solve_explicitly(image, adjoint, adjoint, v, (v,)).z
        return adjoint(lambda u: image(u, v), v).z

    versions = [x._version for x in run.inputs]

    def answer_differentiably(v: Tensor) -> tuple[Tensor | None, ...]:
        if [x._version for x in run.inputs] != versions:
            raise RuntimeError("an argument or a parameter of f was changed in place between forward and backward")
        gradients = exact(v) if exact else None
        if gradients is not None:
            return None, *gradients
        with torch.no_grad():
            u = answer(v)
        return refuse_second_order(u, v, fz), *(None for _ in run.inputs)

    return _Attached.apply(fz, answer, answer_differentiably, *run.inputs), run.measured(result, fz)


class _Attached(torch.autograd.Function):
    """Identity on f(z*). The inputs are there for derivatives of second order; the first takes its way through fz."""

    @staticmethod
    def forward(
        fz: Tensor,
        answer: Callable[[Tensor], Tensor],
        answer_differentiably: Callable[[Tensor], tuple[Tensor | None, ...]],
        *inputs: Tensor,
    ) -> Tensor:
        return fz.clone()  # a view would forbid in-place use of the solution, by nn.ReLU(inplace=True) say

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.answer, ctx.answer_differentiably, *_ = inputs

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True
            through_fz, *gradients = ctx.answer_differentiably(v)
        else:
            through_fz, gradients = ctx.answer(v), [None] * (len(ctx.needs_input_grad) - 3)
        return through_fz, None, None, *gradients


def refuse_second_order(gradient: Tensor, *depends_on: Tensor) -> Tensor:
    """``gradient``, with an error for whoever differentiates it.

    ``once_differentiable`` would not do: ``torch.autograd.grad`` prunes its error, as it leads to no input. This one
    leads to all that the gradient depends on.
    """
    return _FirstOrder.apply(gradient, *depends_on)


class _FirstOrder(torch.autograd.Function):
    @staticmethod
    def forward(gradient: Tensor, *depends_on: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[None, ...]:
        raise RuntimeError(
            "this backward rule gives first derivatives only, found a second one asked for. IFT() has second "
            "derivatives when all that requires grad in f is in args or a parameter of a module f; Phantom() and "
            "Unroll() have them always."
        )
