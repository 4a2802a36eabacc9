"""Noise that is a function of (seed, sample, step): the same for any batch, window, order or number of devices.

Each (seed, sample) keys a counter-based generator, Philox 4x64 (Salmon et al., SC 2011), and the step is the highest
word of its counter. The bits are those of NumPy's generator of that name. They are made on the device where the noise
is wanted, by NumPy on the CPU and in torch elsewhere, and become normals by the Box-Muller transform. Up to the last
bit of the logarithm and the cosine, which devices round differently, a seed gives the same noise everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

_WORD = 2**64
_INITIAL_STEP = _WORD - 1  # step "-1"
_HALF = 2**32 - 1
# Philox 4x64-10 (Salmon et al., 2011): rounds, multipliers, and what is added to the key before each further round.
_ROUNDS = 10
_FACTORS = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
_BUMPS = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)
_PART = 2**18  # numbers that are drawn at a time


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
        dtype, device: of the result; the numbers are drawn there in float64 and rounded (on the CPU for devices without
            float64).

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
    return _normals(seed, samples, steps, shape, dtype, device)


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
        dtype, device: of the result; the numbers are drawn there in float64 and rounded (on the CPU for devices without
            float64).

    Returns:
        Noise of shape ``(B, *shape)``; entry b depends on ``seed`` and ``samples[b]`` alone.

    Raises:
        ValueError: a seed or index outside ``0 .. 2**64 - 1``.

    Example:
        >>> initial_noise(0, samples=range(4), shape=(1, 8, 8)).shape
        torch.Size([4, 1, 8, 8])
    """
    return _normals(seed, samples, [_INITIAL_STEP], shape, dtype, device)[:, 0]


def _normals(
    seed: int, samples: Sequence[int], steps: Sequence[int], shape: Sequence[int], dtype: torch.dtype, device: Any
) -> Tensor:
    _check_word("seed", seed)
    for sample in samples:
        _check_word("sample", sample)
    device = torch.device(device)
    wide = torch.device("cpu") if device.type == "mps" else device  # which has no float64
    draw = _from_numpy if wide.type == "cpu" else _from_torch
    size = math.prod(shape)
    out = torch.empty(len(samples) * len(steps), size, dtype=dtype, device=wide)
    # A few streams at a time, which bounds the memory.
    part = max(1, _PART // max(size, 1))
    for start in range(0, len(out) if size else 0, part):
        rows = range(start, min(start + part, len(out)))
        streams = [(samples[row // len(steps)], steps[row % len(steps)]) for row in rows]
        words = draw(seed, streams, 2 * ((size + 1) // 2), wide)
        out[rows.start : rows.stop] = _box_muller(words, size).to(dtype)
    return out.reshape(len(samples), len(steps), *shape).to(device)


def _from_numpy(seed: int, streams: list[tuple[int, int]], count: int, device: torch.device) -> Tensor:
    """``count`` words of each stream (sample, step), ``(R, count)`` int64 with the bits of unsigned words."""
    words = np.empty((len(streams), count), dtype=np.uint64)
    for row, (sample, step) in enumerate(streams):
        key, counter = np.array([seed, sample], dtype=np.uint64), np.array([0, 0, 0, step], dtype=np.uint64)
        words[row] = np.random.Philox(key=key, counter=counter).random_raw(count)
    return torch.from_numpy(words.view(np.int64))


def _from_torch(seed: int, streams: list[tuple[int, int]], count: int, device: torch.device) -> Tensor:
    """The same words, made on the device.

    The counter of the n-th block of four words is (n, 0, 0, step), from n = 1 on. torch multiplies and adds int64
    modulo 2^64, as unsigned words want it.
    """
    # The only thing that is copied to the device.
    sample, step = torch.tensor([[_signed(word) for word in stream] for stream in streams], device=device).unbind(1)
    shape = (len(streams), -(-count // 4))
    first = torch.arange(1, shape[1] + 1, device=device).expand(shape)
    zero = torch.zeros_like(first)
    counter = [first, zero, zero, step[:, None].expand(shape)]
    keys = [torch.full_like(sample, _signed(seed))[:, None], sample[:, None]]
    for number in range(_ROUNDS):
        if number:
            keys = [key + _signed(bump) for key, bump in zip(keys, _BUMPS, strict=True)]
        high0, low0 = _product(_FACTORS[0], counter[0])
        high1, low1 = _product(_FACTORS[1], counter[2])
        counter = [high1 ^ counter[1] ^ keys[0], low1, high0 ^ counter[3] ^ keys[1], low0]
    return torch.stack(counter, dim=2).flatten(1)[:, :count]


def _box_muller(words: Tensor, size: int) -> Tensor:
    """Normals ``(R, size)`` from streams of 64-bit words ``(R, n)``: the first half gives radii, the second angles."""
    pairs = (size + 1) // 2
    # The top 53 bits as numbers in (0, 1]: the logarithm must not meet zero.
    uniform = (((words[:, : 2 * pairs] >> 11) & (2**53 - 1)) + 1).double() * 2.0**-53
    radius, angle = (-2 * uniform[:, :pairs].log()).sqrt(), 2 * math.pi * uniform[:, pairs:]
    return torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)[:, :size]


def _product(factor: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """High and low word of the 128-bit product of an unsigned 64-bit constant and unsigned words."""
    factor_high, factor_low = factor >> 32, factor & _HALF
    x_high, x_low = (x >> 32) & _HALF, x & _HALF
    low = factor_low * x_low
    middle = factor_high * x_low + ((low >> 32) & _HALF)
    other = factor_low * x_high + (middle & _HALF)
    high = factor_high * x_high + ((middle >> 32) & _HALF) + ((other >> 32) & _HALF)
    return high, _signed(factor) * x


def _signed(word: int) -> int:
    """The int64 with the bits of an unsigned word."""
    return word - _WORD if word >= _WORD // 2 else word


def _check_word(name: str, value: int, end: int = _WORD) -> None:
    if not 0 <= value < end:
        raise ValueError(f"{name} must be from 0 to {end - 1}, got {value}")
