"""Norms of rows, whose squares may leave the range of their dtype, and numbers on their way to the host."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array = npt.NDArray[Any]
Meanwhile = Callable[[], object] | None  # what to ask of a device before the host waits for numbers


def row_norm(x: Tensor) -> Tensor:
    """Euclidean norm of each row of ``(rows, dim)``, summed in at least float32."""
    return torch.linalg.vector_norm(x, dim=1, dtype=None if x.dtype in _WIDE else torch.float32)


_WIDE = (torch.float32, torch.float64)


def _difference_norm(z: Tensor, fz: Tensor) -> Tensor:
    """``row_norm(fz - z)``; of a big state on the CPU block by block, in a scratch that stays in its cache.

    A fresh tensor as large as the state can cost the operating system several times what the arithmetic costs.
    """
    if z.numel() <= _BLOCK or z.device.type != "cpu":
        return row_norm(fz - z)
    width = min(z.shape[1], _BLOCK)
    height = _BLOCK // width
    scratch = z.new_empty(height, width)

    def norms(ours: Tensor, theirs: Tensor) -> Tensor:
        return row_norm(torch.sub(ours, theirs, out=scratch[: ours.shape[0], : ours.shape[1]]))

    strips = zip(fz.split(width, dim=1), z.split(width, dim=1), strict=True)
    parts = [torch.cat([*map(norms, ours.split(height), theirs.split(height))]) for ours, theirs in strips]
    return parts[0] if len(parts) == 1 else row_norm(torch.stack(parts, dim=1))


def safe_norm(x: Tensor) -> Tensor:
    """Euclidean norms along the last dimension, in the dtype of ``x``; no square leaves the range of the dtype."""
    if not x.shape[-1]:
        return torch.linalg.vector_norm(x, dim=-1)
    if x.is_cpu and not x.requires_grad:  # the host may look which ones are in doubt
        norm = torch.linalg.vector_norm(x, dim=-1)
        low, high = plain_norms(x.dtype)
        doubtful = ~((norm > low) & (norm < high))
        if bool(doubtful.any()):
            norm[doubtful] = _norm_of_scaled(x[doubtful])
        return norm
    # Float64 holds all squares of narrower numbers.
    wider = x.dtype != torch.float64 and x.device.type != "mps"
    return torch.linalg.vector_norm(x, dim=-1, dtype=torch.float64).to(x.dtype) if wider else _norm_of_scaled(x)


def _norm_of_scaled(x: Tensor) -> Tensor:
    """The same, of vectors divided by their largest entry."""
    largest = x.abs().amax(dim=-1, keepdim=True)
    unit = torch.where((largest > 0) & (largest < torch.inf), largest, 1)
    return (unit * torch.linalg.vector_norm(x / unit, dim=-1, keepdim=True)).squeeze(-1)


_BLOCK = 1 << 18  # entries
_FEW = 1 << 12  # entries of a state; of fewer, calling torch costs more than computing in float64
# A norm no larger than this may have lost squares below the range of its dtype; above the inverse, beyond it.
_LOW = {dtype: torch.finfo(dtype).tiny ** 0.4 for dtype in _WIDE}


def plain_norms(dtype: torch.dtype) -> tuple[float, float]:
    """Between these, ``row_norm`` of rows in ``dtype`` has lost no squares."""
    low = _LOW[dtype if dtype in _WIDE else torch.float32]
    return low, 1 / low


def to_host(x: Tensor, meanwhile: Meanwhile = None) -> Array:
    """``x`` as float64 on the host, which waits for the device.

    ``meanwhile`` is called after the copy has been queued and before the host waits for it. What it queues keeps the
    device busy while the host reads the numbers.
    """
    x = x.detach() if x.requires_grad else x
    if meanwhile is None:
        return x.cpu().double().numpy()
    if not x.is_cuda:  # there is no event: the host also waits for what ``meanwhile`` has queued
        meanwhile()
        return x.cpu().double().numpy()
    numbers = x.to("cpu", non_blocking=True)  # into pinned memory
    arrived = torch.cuda.current_stream(x.device).record_event()  # before what ``meanwhile`` queues
    meanwhile()
    arrived.synchronize()
    return numbers.to(torch.float64, copy=True).numpy()  # who keeps it does not keep pinned memory


def residual_norms(pairs: Sequence[tuple[Tensor, Tensor]], among: Array | bool, meanwhile: Meanwhile) -> list[Array]:
    """Euclidean norms of ``fz - z`` and of ``fz``, ``(2, rows)`` of each pair ``(z, fz)``, in one transfer."""
    if pairs[0][0].is_cpu:
        return [residual_norms_on_host(z, fz, among) for z, fz in pairs]
    norms = torch.stack([x for z, fz in pairs for x in (_difference_norm(z, fz), row_norm(fz))])
    figures = np.split(to_host(norms, meanwhile), len(pairs))
    return [_repaired(each, *pair, _LOW[norms.dtype], among) for each, pair in zip(figures, pairs, strict=True)]


def residual_norms_on_host(z: Tensor, fz: Tensor, among: Array | bool) -> Array:
    if z.numel() <= _FEW and z.dtype == fz.dtype and z.dtype in _WIDE:
        figures = _small_norms(z.numpy(force=True), fz.numpy(force=True))
        return figures if z.dtype == torch.float32 else _repaired(figures, z, fz, _LOW[z.dtype], among)
    z, fz = z.detach(), fz.detach()
    norms = torch.stack((_difference_norm(z, fz), row_norm(fz)))
    return _repaired(norms.cpu().numpy().astype(np.float64), z, fz, _LOW[norms.dtype], among)


def _einsum_vecdot(x: Array, y: Array) -> Array:
    return np.einsum("...i,...i->...", x, y)


# Products along the last axis; np.vecdot is there since NumPy 2.0.
vecdot: Callable[[Array, Array], Array] = getattr(np, "vecdot", _einsum_vecdot)


def _small_norms(z: Array, fz: Array) -> Array:
    """As ``residual_norms``, summed in float64: of float32, no square leaves its range."""
    both = np.empty((2, *z.shape))
    with np.errstate(all="ignore"):
        np.subtract(fz, z, out=both[0])
        both[1] = fz
        return np.sqrt(vecdot(both, both))


def _repaired(figures: Array, z: Tensor, fz: Tensor, low: float, among: Array | bool) -> Array:
    """``figures`` with those outside ``(low, 1 / low)`` computed anew: squares may have under- or overflowed there."""
    doubtful = (figures <= low) | (figures >= 1 / low)
    if not np.count_nonzero(doubtful) or z.numel() == 0:
        return figures
    rows = np.flatnonzero(doubtful.any(axis=0) & among)
    if rows.size:
        index = torch.from_numpy(rows).to(z.device)
        ours, theirs = (x.detach().index_select(0, index).cpu().double() for x in (fz, z))
        figures[:, rows] = torch.stack((_norm_of_scaled(ours - theirs), _norm_of_scaled(ours))).numpy()
    return figures
