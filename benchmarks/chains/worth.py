"""Quality for the time: today's samplers, step by step and in parallel, on thousands of digits."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.chains.modern import RTOL, chain_of
from fixpoint_diffusion import SamplingChain, sample
from fixpoint_diffusion.evaluation import DigitFeatures, evaluate
from fixpoint_diffusion.training.data import load_digits, split_held_out

_BATCH = 250
CASES = (("flow, Euler, shift 3", 28), ("flow, Euler, shift 3", 50), ("DPM-Solver++ 2M", 25))
QUICK = (("flow, Euler, shift 3", 4),)
WAYS: dict[str, Callable[[SamplingChain], Tensor]] = {
    "in sequence": lambda chain: chain.sequential(trajectory=False),
    "in parallel": lambda chain: sample(chain, rtol=RTOL).images,
}


@dataclass(frozen=True, kw_only=True)
class Worth:
    """One way to run one sampler.

    Attributes:
        sampler, calls: the sampler, and its calls of the network in sequence.
        way: a key of ``WAYS``.
        distance, interval: Frechet distance to the held-out digits, and its 95% interval.
        alone, batched: seconds of one core for one image by itself (the least of three), and for one in a large batch.
    """

    sampler: str
    calls: int
    way: str
    distance: float
    interval: tuple[float, float]
    alone: float
    batched: float


@torch.no_grad()
def measure(cases: Sequence[tuple[str, int]], *, images: int) -> list[Worth]:
    """Every case, both ways, from the same noise."""
    _, held_out = split_held_out(load_digits())
    batches = [range(first, min(first + _BATCH, images)) for first in range(0, images, _BATCH)]
    found = []
    for (name, calls), way in tqdm([(case, way) for case in cases for way in WAYS], unit="run"):
        alone = min(_timed(name, calls, way, [range(k, k + 1)])[1] for k in range(3))
        pictures, seconds = _timed(name, calls, way, batches)
        report = evaluate(pictures.clamp(-1, 1), held_out.images, DigitFeatures(), metrics=["frechet"])
        figure = report.figures["frechet"]
        found.append(
            Worth(
                sampler=name,
                calls=calls,
                way=way,
                distance=figure.value,
                interval=figure.interval or (figure.value, figure.value),
                alone=alone,
                batched=seconds / images,
            )
        )
    return found


def table(found: Sequence[Worth], images: int) -> str:
    """A line for each way to run each sampler."""
    train, held_out = split_held_out(load_digits())
    floor = evaluate(train.images, held_out.images, DigitFeatures(), metrics=["frechet"]).figures["frechet"].value
    width = max(len(each.sampler) for each in found)
    lines = [
        f"{images} digits. distance: Frechet's in the classifier's features, to {len(held_out)} held-out digits,",
        f"with its 95% interval; the {len(train)} training digits are at {floor:.2f}. ms: of one core for one image by",
        f"itself (least of three), and for one of batches of {_BATCH}. "
        f"In parallel: to rtol {RTOL:g}, by the usual rule.",
        "",
        f"{'':{width}} calls {'':11}  distance (interval)  ms alone  ms in batch",
    ]
    lines += [
        f"{each.sampler:{width}} {each.calls:>5} {each.way:11}   "
        f"{f'{each.distance:.3f} ({each.interval[0]:.3f}-{each.interval[1]:.3f})':>18} "
        f"{1e3 * each.alone:>9.0f} {1e3 * each.batched:>12.1f}"
        for each in found
    ]
    return "\n".join(lines)


def as_json(found: Sequence[Worth], images: int) -> dict[str, object]:
    """Every figure."""
    return {"images": images, "runs": [asdict(each) for each in found]}


def _timed(name: str, calls: int, way: str, batches: Sequence[range]) -> tuple[Tensor, float]:
    """The images, and the seconds of one core that they took, which do not depend on what else the machine does."""
    start = time.process_time()
    pictures = torch.cat([WAYS[way](chain_of(name, calls, samples)) for samples in batches])
    return pictures, time.process_time() - start
