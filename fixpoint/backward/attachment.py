"""Gradients by one recorded application of f, and the hand-over of a state with its gradient."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fixpoint.backward.functional import LinearSolves, for_each_gradient, solve_functionally
from fixpoint.engine.ambient import version
from fixpoint.engine.outcome import LoopResult
from fixpoint.engine.private import unbatched
from fixpoint.engine.tolerance import Status
from fixpoint.engine.transforms import Functional, transformed
from fixpoint.engine.warning import warn

if TYPE_CHECKING:
    from fixpoint.backward.base import ForwardSolve

DoubleBackward = Callable[[Functional, Tensor], "tuple[Tensor | None, ...] | None"]


def hand_over(result: LoopResult, attached: Tensor) -> Tensor:
    """The state of ``result``, with the gradient that flows through ``attached``: none for rows that have failed."""
    if attached is result.z:
        return attached
    if torch.compiler.is_compiling():
        # Zero, with the gradient of ``attached``. Infinity minus infinity would be NaN, and spoil the value.
        zero = torch.where(torch.isfinite(attached.detach()), attached - attached.detach(), 0)
        return result.z.detach() + zero
    if transformed(attached):
        # Forward mode nested in itself takes the tangent that a Function returns for a constant.
        difference = attached - attached.detach()
        failed = (result.status == int(Status.NON_FINITE))[:, None] | ~torch.isfinite(attached.detach())
        return result.z.detach() + torch.where(failed, 0, difference)
    return _HandedOver.apply(result.z.detach(), attached, result.status == int(Status.NON_FINITE))


class _HandedOver(torch.autograd.Function):
    """The first argument, with the derivatives of the second where the third does not say that the row has failed."""

    generate_vmap_rule = True

    @staticmethod
    def forward(z: Tensor, attached: Tensor, failed: Tensor) -> Tensor:
        return z.clone()  # a view would forbid in-place use of the solution, by nn.ReLU(inplace=True) say

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[2])

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
        (failed,) = ctx.saved_tensors
        return None, torch.where(failed[:, None], 0, v), None


class _WithoutGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        return None


def without_gradient(x: Tensor) -> Tensor:
    """``x``, still a part of the graph, through which nothing flows: not even zero times NaN."""
    return _WithoutGradient.apply(x)


def attach_adjoint(
    run: ForwardSolve, result: LoopResult, linear: LinearSolves, double_backward: DoubleBackward | None = None
) -> tuple[Tensor, LoopResult]:
    """``f(z*)``, recorded once, with a backward that answers the incoming gradient v with an adjoint u.

    ``linear.adjoint(image, v)`` finds it, where ``image(u) = v + J^T u``. It then flows through the recorded
    application to parameters, inputs and whatever f closes over, with no list of them anywhere. That has no second
    derivative. A rule that has one gives it as ``double_backward(f, v)``: gradients for ``run.inputs`` that are
    differentiable themselves, or None where it cannot; f is the map with the rows that have failed held fixed.
    """
    if run.transformed:
        raise ValueError(
            "this backward rule does not work under torch.func or forward-mode differentiation; IFT() and Phantom() do"
        )
    z = result.z.detach().requires_grad_()
    fz = run.recorded(lambda f, z: f(z), z)
    _warn_if_detached(run, z, fz)

    def image(u: Tensor, v: Tensor) -> Tensor:
        # A transformation that follows u differentiates this product, which is linear in u.
        (product,) = torch.autograd.grad(fz, z, u, retain_graph=True, allow_unused=True, create_graph=transformed(u))
        return v if product is None else v + product

    def answer(v: Tensor) -> Tensor:
        batch = unbatched(v)
        if batch is not None:  # several gradients at once: further rows
            v, batched = batch
            u = linear.adjoint(
                lambda u: torch.cat([image(*each) for each in zip(u.reshape(v.shape), v, strict=True)]), v.flatten(0, 1)
            ).z
            return batched(u.reshape(v.shape))
        if transformed(v):
            return solve_functionally(image, linear.adjoint, linear.transposed(), v, (v,)).z
        return linear.adjoint(lambda u: image(u, v), v).z

    versions = [version(x) for x in run.inputs]

    def answer_differentiably(v: Tensor) -> tuple[Tensor | None, ...]:
        if [version(x) for x in run.inputs] != versions:
            raise RuntimeError("an argument or a parameter of f was changed in place between forward and backward")
        # A second derivative evaluates f again; the first one has the graph that was recorded.
        gradients = None
        if double_backward is not None and _is_same_map(run, z, fz):
            gradients = for_each_gradient(partial(double_backward, run.sound(z, fz)), v)
        if gradients is not None:
            return None, *gradients
        with torch.no_grad():
            u = answer(v)
        return refuse_second_order(u, v, fz), *(None for _ in run.inputs)

    attached = _Attached.apply(fz, answer, answer_differentiably, *run.inputs)
    return attached, run.measured(result, fz)


def _is_same_map(run: ForwardSolve, z: Tensor, fz: Tensor) -> bool:
    """Whether f is still the map that was solved, as far as its image of the solution tells.

    What it reads beside its arguments, such as a buffer or an attribute, may have been set for another solve.
    """
    with torch.no_grad():
        now, then = run.f(z.detach()), fz.detach()
    limit = max(torch.finfo(then.dtype).eps, run.tolerance.rounding) ** 0.5
    return not bool(((now - then).abs() > limit * then.abs().sum(dim=1, keepdim=True)).any())


def _warn_if_detached(run: ForwardSolve, z: Tensor, fz: Tensor) -> None:
    """Warn of an f whose value depends on z and whose graph does not: its Jacobian passes for zero."""
    if torch.compiler.is_compiling() or z.numel() == 0 or _reaches(fz, z):
        return
    with torch.no_grad():
        nudge = torch.finfo(z.dtype).eps ** 0.5 * (1 + z.detach().abs())
        depends = not torch.equal(run.f(z.detach() + nudge), run.f(z.detach()))
    if depends:
        message = (
            "f's output depends on z, but not as far as autograd can see, so the gradient is that of a constant f: "
            "look for z.detach(), no_grad() or NumPy inside f, or pass backward=None if no gradient is wanted."
        )
        warn(message, UserWarning, message)


def _reaches(output: Tensor, leaf: Tensor) -> bool:
    """Whether the graph of ``output`` leads to ``leaf``."""
    seen, found = set(), [output.grad_fn]
    while found:
        node = found.pop()
        if node is None or node in seen:
            continue
        if getattr(node, "variable", None) is leaf:
            return True
        seen.add(node)
        found += [following for following, _ in node.next_functions]
    return False


class _Attached(torch.autograd.Function):
    """Identity on f(z*). The inputs are there for derivatives of second order; the first takes its way through fz."""

    @staticmethod
    def forward(
        fz: Tensor,
        answer: Callable[[Tensor], Tensor],
        answer_differentiably: Callable[[Tensor], tuple[Tensor | None, ...]],
        *inputs: Tensor,
    ) -> Tensor:
        return fz.view_as(fz)

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
    generate_vmap_rule = True

    @staticmethod
    def forward(gradient: Tensor, *depends_on: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def jvp(ctx: Any, gradient: Tensor, *_: Tensor | None) -> Tensor:
        return gradient.view_as(gradient)  # forward mode has followed how the gradient was found

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[None, ...]:
        raise RuntimeError(
            "this backward rule gives first derivatives only, found a second one asked for. IFT() has second "
            "derivatives when all that requires grad in f is in args or a parameter of a module f, which is no "
            "TorchScript and still the map that was solved; Phantom() and Unroll() have them always."
        )
