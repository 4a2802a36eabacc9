"""How many fixed point iterations each timestep gets."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Literal, get_args

import numpy as np
from torch import Tensor

Heuristic = Literal["constant", "increasing", "decreasing"]


def allocate(total: int, steps: int, heuristic: Heuristic = "constant") -> tuple[int, ...]:
    """Divide a budget of iterations among the steps of a sampler, in the order in which it takes them.

    The names say where the work goes: ``"increasing"`` gives more to later, less noisy steps, ``"decreasing"`` more to
    the first, noisiest ones. Both are linear in the step, from one iteration at the poorer end.

    Args:
        total: Iterations in all, at least one for each step.
        steps: Sampling steps.
        heuristic: ``"constant"``, ``"increasing"`` or ``"decreasing"``.

    Returns:
        ``steps`` whole numbers of at least 1 whose sum is ``total``; the first belongs to the noisiest step.

    Raises:
        ValueError: If the budget is less than one iteration a step, or the heuristic is unknown.

    Source: Bai and Melas-Kyriazi, CVPR 2024, Sec. 3.3, Fig. 3 and Table 5.

    >>> allocate(12, 4, "increasing"), allocate(12, 4, "decreasing"), allocate(10, 4)
    ((1, 2, 4, 5), (5, 4, 2, 1), (2, 2, 3, 3))
    """
    if heuristic not in get_args(Heuristic):
        raise ValueError(f"heuristic must be one of {get_args(Heuristic)}, got {heuristic!r}")
    if steps < 1 or total < steps:
        raise ValueError(f"every step takes at least one iteration: got {total} iterations for {steps} steps")
    mean = total / steps
    ends = (mean, mean) if heuristic == "constant" or steps == 1 else (1.0, 2 * mean - 1)
    # Rounding the running sum, not each part, keeps the total; sorting then keeps the order.
    running = np.floor(np.cumsum(np.linspace(*ends, steps)) + 0.5)
    parts = sorted(int(part) for part in np.diff(running, prepend=0))
    return tuple(parts[::-1] if heuristic == "decreasing" else parts)


def iterations_per_step(iterations: int | Sequence[int] | Tensor, steps: int) -> tuple[int, ...]:
    """One whole number of iterations, at least 1, for each of ``steps`` steps, from one number or one for each.

    Raises:
        ValueError: If there are not ``steps`` of them, or one is not a positive whole number.
    """
    given = iterations.tolist() if isinstance(iterations, Tensor) else iterations
    counts = tuple(given) if isinstance(given, Sequence) else (given,) * steps
    if len(counts) != steps:
        raise ValueError(f"iterations must be one number or one for each of {steps} steps, got {len(counts)}")
    for count in counts:
        if isinstance(count, bool) or not isinstance(count, Integral) or count < 1:
            raise ValueError(f"iterations must be positive whole numbers, got {count!r}")
    return tuple(int(count) for count in counts)
