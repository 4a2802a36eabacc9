"""What torch.compile may see of a solve: all of a run of fixed depth, and of others nothing."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import nn

from fixpoint.engine.private import DROPOUTS, STATISTICS, outside_dynamo

Solve = TypeVar("Solve", bound=Callable[..., Any])


def outside_graphs(solve: Solve) -> Solve:
    """Let ``solve`` run as it is within code that is compiled, unless its backward rule says that it can be compiled.

    A loop to a tolerance decides by numbers that a compiler has not got. An f that is compiled itself stays so.
    """
    as_it_is = outside_dynamo(solve)

    @functools.wraps(solve)
    def solve_either(f: Any, *args: Any, **options: Any) -> Any:
        if torch.compiler.is_compiling() and (_changes(f) or not _can_be_compiled(**options)):
            return as_it_is(f, *args, **options)
        return solve(f, *args, **options)

    return cast(Solve, solve_either)


def _can_be_compiled(*, backward: Any = None, depth: int | None = None, record: bool = False, **_: Any) -> bool:
    return backward is not None and not record and backward.can_be_compiled(depth)


def _changes(f: object) -> bool:
    """Whether f is a module with dropout or statistics, which a graph would draw and update at every evaluation."""
    modules = f.modules() if isinstance(f, nn.Module) else ()
    return any(module.training and isinstance(module, DROPOUTS + STATISTICS) for module in modules)
