"""The flow between images and noise that models are trained on, ``(1 - sigma) x_0 + sigma noise``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

FLOW_SCHEDULE: dict[str, Any] = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "shift": 1.0,
}

_MOST_TIMESTEPS = 1_000_000


def is_flow(schedule_config: Mapping[str, Any] | None) -> bool:
    """Whether a model that was trained on this, a scheduler's configuration, predicts ``noise - x_0`` along a flow.

    Example:
        >>> is_flow(FLOW_SCHEDULE), is_flow({"_class_name": "DDIMScheduler"})
        (True, False)
    """
    return str((schedule_config or {}).get("_class_name")).startswith("FlowMatch")


def flow_levels(schedule_config: Mapping[str, Any]) -> Tensor:
    """The signal levels of a flow at unit size, ``(N,)`` float64: entry i is that of ``sigma = (i + 1) / N``.

    Raises:
        ValueError: a number of timesteps that is none.

    Example:
        >>> flow_levels({"num_train_timesteps": 4})
        tensor([0.9000, 0.5000, 0.1000, 0.0000], dtype=torch.float64)
    """
    steps = schedule_config.get("num_train_timesteps", 1000)
    if not isinstance(steps, int) or isinstance(steps, bool) or not 1 <= steps <= _MOST_TIMESTEPS:
        raise ValueError(
            f"num_train_timesteps of a flow must be a whole number from 1 to {_MOST_TIMESTEPS}, got {steps!r}"
        )
    sigma = torch.arange(1, steps + 1, dtype=torch.float64, device="cpu") / steps
    return (1 - sigma).square() / ((1 - sigma).square() + sigma.square())
