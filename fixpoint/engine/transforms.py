"""What torch.func and forward-mode differentiation have put around a tensor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fixpoint.engine.private import in_forward_mode, transforming, unwrap_if_dead, unwrapped

Functional = Callable[..., Tensor]  # f(z, *inputs), a map on rows that depends on nothing else


class ClosureError(ValueError):
    """f closes over what torch.func or forward-mode differentiation works on, where only arguments can be followed."""

    def __init__(self) -> None:
        super().__init__(
            "under torch.func and forward-mode differentiation, tensors of f that are transformed or require grad must "
            "be in args or parameters of a module f: found that f closes over one"
        )


def transformed(*tensors: Tensor) -> bool:
    """Whether torch.func or forward-mode differentiation is at work on any of the tensors.

    Inside its derivatives torch.func wraps whatever is computed, so there the answer is yes for any result.
    """
    if torch.compiler.is_compiling():
        return False
    forward = in_forward_mode()
    return any(unwrapped(x) is not x or (forward and forward_ad.unpack_dual(x).tangent is not None) for x in tensors)


def recording(*tensors: Tensor) -> bool:
    """Whether autograd records or torch.func follows what is done with these, so that nothing is written in place."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return True
    return not torch.compiler.is_compiling() and transforming()


def is_capturing(x: Tensor) -> bool:
    """Whether a CUDA graph records what is done on the tensor's device, so that nothing can be read from it."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def alive(x: Tensor) -> Tensor:
    """``x`` without the wrappers of transformations that are over."""
    while (inner := unwrap_if_dead(x)) is not x:
        x = inner
    return x


def plain(x: Tensor) -> Tensor:
    """The numbers behind a tensor that torch.func has wrapped, to look at and not to compute with."""
    return x if torch.compiler.is_compiling() else unwrapped(x)


def depends_on_nothing_else(f: Functional, z: Tensor, inputs: Sequence[Tensor]) -> bool:
    """Whether f(z, *inputs) carries no derivative and no batch but those of z and the inputs. Evaluates f once."""
    fixed = [x.detach() for x in (z, *inputs)]
    with torch.enable_grad():
        seen = _witness(f(*fixed))
    known = _witness(sum((x.sum() * 0 for x in fixed), start=z.new_zeros(())))
    return seen == known


def _witness(x: Tensor) -> list[str]:
    """What is done to ``x``, one entry for each level of transformation at which something is."""
    seen: list[str] = []
    _Witness.apply(seen.append, x)
    return seen


class _Witness(torch.autograd.Function):
    """Identity, which PyTorch takes through every level of nested transformations; no attribute shows them."""

    @staticmethod
    def forward(see: Callable[[str], None], x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.see, x = inputs
        if x.requires_grad:
            ctx.see("gradient")

    @staticmethod
    def jvp(ctx: Any, _: None, tangent: Tensor) -> Tensor:
        ctx.see("tangent")
        return tangent

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], see: Callable[[str], None], x: Tensor) -> tuple[Tensor, int]:
        see("batch")
        return _Witness.apply(see, x), in_dims[1]
