"""Part 4: milliseconds of a call against its rows, for both networks: the curve from which row budgets follow."""

from __future__ import annotations

import torch

from benchmarks.device.common import DTYPES, Part, normal
from benchmarks.device.networks import as_denoiser, transformer, unet

ROWS = tuple(2**n for n in range(12))
_SHARE = 0.2  # of what is left that one size may take
_REPEATS = 4
_LONG = 0.1  # seconds of a call that is made once


def main(part: Part) -> None:
    """bfloat16 before float32; each curve ends where calls become too long."""
    makers = {"transformer": transformer}
    if part.has("diffusers"):
        makers["unet"] = unet
    for dtype in ("bfloat16", "float32"):
        for name, make in makers.items():
            with part.attempt(f"{name} in {dtype}"), torch.no_grad():
                curve(part, name, make, dtype)


def curve(part: Part, name: str, make: object, dtype: str) -> None:
    """One network in one precision, on growing batches."""
    assert callable(make)
    denoiser = as_denoiser(part, make(part.rehearse), DTYPES[dtype])
    assert denoiser.sample_shape is not None
    seconds = 0.0
    for rows in ROWS[:3] if part.rehearse else ROWS:
        repeats = _REPEATS if seconds < _LONG else 1
        # Twice the rows take twice the time at most. One call warms up, one is for the memory.
        if 2 * seconds * (repeats + 2) > _SHARE * part.left and not part.rehearse:
            part.leave_out(f"{name} in {dtype} from {rows} rows on", "a call would take too long")
            break
        x = normal(rows, *denoiser.sample_shape).to(part.device, torch.float32)
        t = torch.arange(rows, device=part.device) * 999 // max(rows - 1, 1)
        seconds = part.time(lambda x=x, t=t: denoiser(x, t), repeats=repeats)
        peak = part.peak(lambda x=x, t=t: denoiser(x, t))
        part.add("curve", network=name, dtype=dtype, rows=rows, milliseconds=1e3 * seconds, peak_bytes=peak)
