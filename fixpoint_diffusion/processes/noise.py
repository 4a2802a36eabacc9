"""Noise that is a function of (seed, sample, step): the same for any batch, window, order or number of devices.

Each (seed, sample) keys a counter-based generator, Philox 4x64 (Salmon et al., SC 2011), and the step is the highest
word of its counter. Raw bits become normals by the Box-Muller transform here, because NumPy promises to keep the bits
of a generator between its versions, but not its normals.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

_WORD = 2**64
_INITIAL_STEP = _WORD - 1  # step "-1"


def step_noise(
    seed: int,
    samples: Sequence[int],
    steps: Sequence[int],
    shape: Sequence[int],
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Standard normal noise for the given steps of the given samples.

    Args:
        seed: from 0 to ``2**64 - 1``.
        samples: indices of the images, B of them; a ``range`` is fine.
        steps: indices of the chain's steps, T of them, counted from the noise end.
        shape: shape of one image.
        dtype, device: of the result; the numbers are drawn in float64 on the CPU and rounded.

    Returns:
        Noise of shape ``(B, T, *shape)``. Entry (b, k) depends on ``seed``, ``samples[b]`` and ``steps[k]`` alone.

    Raises:
        ValueError: a seed or index outside ``0 .. 2**64 - 1``.

    Example:
        >>> together = step_noise(7, samples=range(3), steps=range(10), shape=(2, 2))
        >>> alone = step_noise(7, samples=[2], steps=[9], shape=(2, 2))
        >>> torch.equal(together[2, 9], alone[0, 0])
        True
    """
    for step in steps:
        _check_word("step", step, _INITIAL_STEP)
    return _normals(seed, samples, steps, shape).to(device=device, dtype=dtype)


def initial_noise(
    seed: int,
    samples: Sequence[int],
    shape: Sequence[int],
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """The x_T of the given samples: standard normal, and independent of every step's noise of the same seed.

    Args:
        seed: from 0 to ``2**64 - 1``.
        samples: indices of the images, B of them; a ``range`` is fine.
        shape: shape of one image.
        dtype, device: of the result; the numbers are drawn in float64 on the CPU and rounded.

    Returns:
        Noise of shape ``(B, *shape)``; entry b depends on ``seed`` and ``samples[b]`` alone.

    Raises:
        ValueError: a seed or index outside ``0 .. 2**64 - 1``.

    Example:
        >>> initial_noise(0, samples=range(4), shape=(1, 8, 8)).shape
        torch.Size([4, 1, 8, 8])
    """
    return _normals(seed, samples, [_INITIAL_STEP], shape)[:, 0].to(device=device, dtype=dtype)


def _normals(seed: int, samples: Iterable[int], steps: Sequence[int], shape: Sequence[int]) -> Tensor:
    _check_word("seed", seed)
    pairs = (math.prod(shape) + 1) // 2
    bits = [_bits(seed, sample, step, 2 * pairs) for sample in samples for step in steps]
    # The top 53 bits as numbers in (0, 1]: the logarithm must not meet zero.
    uniform = ((np.array(bits, dtype=np.uint64).reshape(-1, 2, pairs) >> np.uint64(11)) + np.uint64(1)) * 2.0**-53
    radius, angle = np.sqrt(-2 * np.log(uniform[:, 0])), 2 * math.pi * uniform[:, 1]
    normals = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], axis=1)[:, : math.prod(shape)]
    return torch.from_numpy(np.ascontiguousarray(normals)).reshape(-1, len(steps), *shape)


def _bits(seed: int, sample: int, step: int, count: int) -> np.ndarray:
    _check_word("sample", sample)
    key = np.array([seed, sample], dtype=np.uint64)
    counter = np.array([0, 0, 0, step], dtype=np.uint64)
    return np.random.Philox(key=key, counter=counter).random_raw(count)


def _check_word(name: str, value: int, end: int = _WORD) -> None:
    if not 0 <= value < end:
        raise ValueError(f"{name} must be from 0 to {end - 1}, got {value}")
