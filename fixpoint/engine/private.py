"""What PyTorch has no public way to ask. All such names stand here, and what follows where a version has them not."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.modules import batchnorm, dropout
from torch.nn.utils import parametrizations
from torch.utils import checkpoint

Function = TypeVar("Function", bound=Callable[..., Any])
Hooks = tuple[Callable[..., Any], Callable[..., Any]]


def _classes(module: object, *names: str) -> tuple[type, ...]:
    return tuple(getattr(module, name) for name in names if hasattr(module, name))


# For isinstance. Public are only their subclasses, which are many, and others write more. Without them, what such
# modules update and draw is not held fixed during a solve.
BATCH_NORMS = _classes(batchnorm, "_BatchNorm")
NORMS = _classes(batchnorm, "_NormBase") + _classes(parametrizations, "_SpectralNorm")
STATISTICS = _classes(batchnorm, "_NormBase")
DROPOUTS = _classes(dropout, "_DropoutNd")
# The object that a non-reentrant checkpoint makes for itself. Without it no checkpoint is recognised.
CHECKPOINTS = _classes(checkpoint, "_CheckpointFrame")


def unwrapped(x: Tensor) -> Tensor:
    """``x`` without any wrapper of torch.func: ``torch.func.debug_unwrap``, public in later versions."""
    public = getattr(torch.func, "debug_unwrap", None)
    if public is not None:
        return cast(Tensor, public(x))
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(x):
        x = functorch.get_unwrapped(x)
    return x


def transforming() -> bool:
    """Whether code runs inside torch.func or forward-mode differentiation, where a tensor is more than its numbers.

    Without these names the answer is yes, and solvers do without NumPy and write nothing in place.
    """
    level = getattr(getattr(torch._C, "_functorch", None), "maybe_current_level", None)
    return level is None or level() is not None or in_forward_mode()


def in_forward_mode() -> bool:
    """Whether forward-mode differentiation is on. Without the name the answer is yes: tensors tell themselves."""
    level = getattr(forward_ad, "_current_level", None)
    return level is None or level >= 0


def unwrap_if_dead(x: Tensor) -> Tensor:
    """``x`` without its outermost wrapper of torch.func, if that transformation is over.

    PyTorch takes off one wrapper at an operation and fails on the next, where solves stand inside solves. Without it,
    these fail.
    """
    unwrap = getattr(getattr(torch._C, "_functorch", None), "unwrap_if_dead", None)
    return x if unwrap is None else unwrap(x)


def unbatched(x: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]] | None:
    """``x`` with its batch in front, and the way back, inside ``torch.autograd.grad(..., is_grads_batched=True)``.

    That hides the batch in a way of its own, older than that of ``torch.func``. None outside of it. Without these
    functions, PyTorch raises at the first evaluation of an adjoint there.
    """
    names = ("_vmapmode_increment_nesting", "_vmapmode_decrement_nesting")
    increment, decrement = (getattr(torch._C, name, None) for name in names)
    remove, add = (getattr(torch, name, None) for name in ("_remove_batch_dim", "_add_batch_dim"))
    if increment is None or decrement is None or remove is None or add is None:
        return None
    level = increment() - 1
    decrement()
    legacy = getattr(getattr(torch._C, "_functorch", None), "is_legacy_batchedtensor", None)
    if level < 1 or (legacy is not None and not legacy(x)):
        return None
    return remove(x, level, 1, 0), lambda y: add(y, 0, level)


def is_only_holder(x: Tensor) -> bool:
    """Whether no other tensor and no other library holds the memory of ``x``.

    Without it the answer is no, and what f returns is copied.
    """
    count = getattr(torch._C, "_storage_Use_Count", None)
    memory = x.untyped_storage()
    # Memory that torch cannot resize is somebody else's, NumPy's for one. The second holder is ``memory``.
    return count is not None and memory.resizable() and count(memory._cdata) == 2


def in_backward() -> bool:
    """Whether autograd runs a backward pass in this thread. Without it the answer is yes: it cannot be excluded."""
    task = getattr(torch._C, "_current_graph_task_id", None)
    return task is None or task() != -1


def saved_tensors_hooks() -> list[Hooks]:
    """What ``torch.autograd.graph.saved_tensors_hooks`` has set, as pairs of functions, the innermost first.

    Since PyTorch 2.8; before, and where a function is missing, an empty list.
    """
    autograd = getattr(torch._C, "_autograd", None)
    names = ("_top_saved_tensors_default_hooks", "_saved_tensors_hooks_is_enabled")
    top, enabled = (getattr(autograd, name, None) for name in names)
    pop, push = (getattr(autograd, f"_{verb}_saved_tensors_default_hooks", None) for verb in ("pop", "push"))
    if top is None or enabled is None or pop is None or push is None or not enabled():
        return []
    taken: list[Hooks] = []
    try:
        while (hooks := top(True)) is not None:
            taken.append(hooks)
            pop()
    finally:
        for hooks in reversed(taken):
            push(*hooks)
    return taken


def outside_dynamo(function: Function) -> Function:
    """``function``, which ``torch.compile`` leaves as it is.

    As ``torch.compiler.disable``, but that imports the compiler at once, which takes seconds. Without it, that is done
    at the first call.
    """
    disable = getattr(torch, "_disable_dynamo", None)
    if disable is not None:
        return cast(Function, disable(function))

    @functools.wraps(function)
    def disabled(*args: Any, **options: Any) -> Any:
        return torch.compiler.disable(function)(*args, **options)

    return cast(Function, disabled)


def in_dispatch_mode() -> bool:
    """Whether something sees each operation that is dispatched, such as a counter of FLOPs.

    What is compiled then is left as it is, and stays so. Without the name the answer is no.
    """
    modes = getattr(torch._C, "_len_torch_dispatch_stack", None)
    return modes is not None and modes() > 0


def is_compiled_itself(x: object) -> bool:
    """Whether x itself came from ``torch.compile``. Without these attributes the answer is no."""
    if isinstance(x, torch.nn.Module):
        return "_orig_mod" in x._modules
    return hasattr(x, "_torchdynamo_orig_callable")
