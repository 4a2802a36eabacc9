"""How many fixed point iterations each timestep gets."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Literal, get_args

import numpy as np
from torch import Tensor

Heuristic = Literal["constant", "increasing", "decreasing"]


def allocate(total: int, steps: int, heuristic: Heuristic = "constant", *, slope: float = 1.0) -> tuple[int, ...]:
    """Divide a budget of iterations among the steps of a sampler, in the order in which it takes them.

    The names say where the work goes: ``"increasing"`` gives more to later, less noisy steps, ``"decreasing"`` more to
    the first, noisiest ones. Both are linear in the step, from ``1 - slope / 2`` times the mean at the poorer end to
    ``1 + slope / 2`` times the mean at the richer one. Where the poorer end would get less than one iteration it gets
    one, and the line is as much flatter.

    Args:
        total: Iterations in all, at least one for each step.
        steps: Sampling steps.
        heuristic: ``"constant"``, ``"increasing"`` or ``"decreasing"``.
        slope: Difference of the two ends in units of the mean, from 0 (constant) to 2 (from nothing to twice the mean).
            The default leads from half to one and a half times the mean. Unused with ``"constant"``.

    Returns:
        ``steps`` whole numbers of at least 1 whose sum is ``total``; the first belongs to the noisiest step.

    Raises:
        ValueError: If the budget is less than one iteration a step, the heuristic is unknown, or the
            slope is out of range.

    Source: Bai and Melas-Kyriazi, CVPR 2024, Sec. 3.3, Fig. 3 and Table 5.

    >>> allocate(12, 4, "increasing", slope=2), allocate(12, 4, "decreasing"), allocate(10, 4)
    ((1, 2, 4, 5), (4, 4, 2, 2), (2, 2, 3, 3))
    """
    if heuristic not in get_args(Heuristic):
        raise ValueError(f"heuristic must be one of {get_args(Heuristic)}, got {heuristic!r}")
    if steps < 1 or total < steps:
        raise ValueError(f"every step takes at least one iteration: got {total} iterations for {steps} steps")
    if not 0 <= slope <= 2:
        raise ValueError(f"slope must be from 0 to 2, got {slope}")
    mean = total / steps
    low = mean if heuristic == "constant" or steps == 1 else max(1.0, (1 - slope / 2) * mean)
    # Rounding the running sum, not each part, keeps the total; sorting then keeps the order.
    running = np.floor(np.cumsum(np.linspace(low, 2 * mean - low, steps)) + 0.5)
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
