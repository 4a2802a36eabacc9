"""What torch.compile may see of a solve: all of a run of fixed depth, and of others nothing."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

Solve = TypeVar("Solve", bound=Callable[..., Any])


def outside_graphs(solve: Solve) -> Solve:
    """Let ``solve`` run as it is within code that is compiled, unless its backward rule says that it can be compiled.

    A loop to a tolerance decides by numbers that a compiler has not got. An f that is compiled itself stays so.
    """
    as_it_is = torch._disable_dynamo(solve)

    @functools.wraps(solve)
    def solve_either(*args: Any, **options: Any) -> Any:
        if torch.compiler.is_compiling():
            backward, depth = options.get("backward"), options.get("depth")
            if backward is None or options.get("record") or not backward.can_be_compiled(depth):
                return as_it_is(*args, **options)
        return solve(*args, **options)

    return cast(Solve, solve_either)
