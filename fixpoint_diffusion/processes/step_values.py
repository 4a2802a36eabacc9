"""Numbers that belong to the steps of a chain, brought to where the latents are."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """x in float64 (float32 on devices without it): sums over a chain cancel, 1 / sqrt(alpha_T) is about 157.

    Example:
        >>> import torch
        >>> from fixpoint_diffusion.processes import wide
        >>> wide(torch.zeros(2)).dtype
        torch.float64
    """
    return x.to(torch.float32 if x.device.type == "mps" else torch.float64)


class StepValues:
    """Coefficients of T steps by name, each in the dtype and on the device of the latents that it multiplies.

    All are copied to a device once, when the first of them is asked for there.

    Args:
        values: a tensor ``(T, ...)`` for each name.

    Example:
        >>> values = StepValues({"sigma": torch.tensor([0.5, 0.25], dtype=torch.float64)})
        >>> values.at("sigma", torch.zeros(3, 1, 8, 8), torch.tensor([1, 0, 1])).shape
        torch.Size([3, 1, 1, 1])
    """

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        self._values = values
        self._copies: dict[tuple[torch.device, torch.dtype], dict[str, Tensor]] = {}

    def whole(self, name: str, x: Tensor) -> Tensor:
        """One coefficient of all steps, ``(T, ...)``."""
        here = x.device, x.dtype
        if here not in self._copies:
            copies = {each: value.to(x.device, x.dtype) for each, value in self._values.items()}
            self._copies[here] = {each: _for_gradients(value) for each, value in copies.items()}
        return self._copies[here][name]

    def at(self, name: str, x: Tensor, k: int | slice | Tensor) -> Tensor:
        """One coefficient of the steps k, shaped to multiply x.

        Args:
            name: which one.
            x: ``(B, *shape)`` for one step k, ``(B, n, *shape)`` for a slice of n steps, ``(N, *shape)`` for a tensor
                of N steps, one for each row.
            k: which step or steps.
        """
        chosen = self.whole(name, x)[k]
        if isinstance(k, int):
            return chosen
        leading = 1 if isinstance(k, Tensor) else 2
        return chosen.reshape(-1, *[1] * (x.ndim - leading))


def _for_gradients(value: Tensor) -> Tensor:
    """The value; what was made in inference mode is copied outside of it, for later passes may want gradients."""
    if not value.is_inference():
        return value
    with torch.inference_mode(False):
        return value.clone()
