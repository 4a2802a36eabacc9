"""DDPM's chain with a tolerance that is a share of each step's noise: rounds, rows, and what becomes of the images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.chains.cases import batch
from benchmarks.chains.curves import spread
from benchmarks.solvers.standings import Target
from fixpoint import CausalQuasiNewton
from fixpoint_diffusion import StochasticDDIMChain, sample
from fixpoint_diffusion.evaluation import digit_frechet_distance
from fixpoint_diffusion.training.data import load_digits, split_held_out

RTOL = 1e-3
# noise_rtol and window. With the largest share a window is done as soon as it is seen, so a longer one takes fewer
# rounds. States far ahead of what is known are guessed worse and are seen twice, so it takes more rows. This one keeps
# to both bounds below.
CASES = ((0.0, 50), (0.5, 50), (2.0, 50), (8.0, 39))
_BATCH = 128
# ParaSolver's for DDPM with 1000 steps are 42 rounds and 1.08 T rows.
_ROUNDS, _ROWS = 32, 1.08
HOW_TO_READ = """\
ddpm-digits, eta=1, CausalQuasiNewton by its own rule. rounds, rows: of samples by themselves, median/worst; rows as a
multiple of T. error: ||x_0 - sequential|| / ||sequential|| with the same noise, median/worst. distance: Frechet
distance of {images} images to the training digits, in the classifier's features.
"""


@dataclass(frozen=True, kw_only=True)
class Found:
    """What one tolerance takes; ``noise_rtol`` None: the sequential sampler."""

    steps: int
    images: int
    noise_rtol: float | None
    window: int
    rounds: list[float]
    rows: list[float]
    errors: list[float]
    distance: float


def measure(*, steps: int, samples: int, images: int) -> list[Found]:
    """The sequential sampler first, then every case."""
    solvers: dict[float | None, CausalQuasiNewton] = {
        share: CausalQuasiNewton(noise_rtol=share, window=window) for share, window in CASES
    }
    reference = split_held_out(load_digits())[0].images
    expected = [_chain(steps, range(i, i + 1)).sequential(trajectory=False) for i in range(samples)]
    found = []
    for share, solver in tqdm({None: None, **solvers}.items(), unit="tolerance", mininterval=1):
        alone: list[tuple[float, float, float]] = []
        for i, image in enumerate(expected):
            if solver is None:
                alone.append((steps, 1.0, 0.0))
                continue
            x_0, rounds, rows = _drawn(_chain(steps, range(i, i + 1)), solver)
            alone.append((rounds, rows / steps, float((x_0 - image).norm() / image.norm())))
        rounds, rows, errors = (list(column) for column in zip(*alone, strict=True))
        pictures = torch.cat([_drawn(_chain(steps, part), solver)[0] for part in _batches(images)])
        found.append(
            Found(
                steps=steps,
                images=images,
                noise_rtol=share,
                window=1 if solver is None else solver.window or steps,
                rounds=rounds,
                rows=rows,
                errors=errors,
                distance=digit_frechet_distance(pictures, reference),
            )
        )
    return found


def _chain(steps: int, samples: range) -> StochasticDDIMChain:
    chain = batch("unet", steps, 1.0, samples)
    assert isinstance(chain, StochasticDDIMChain)
    return chain


def _batches(images: int) -> Iterator[range]:
    return (range(first, min(first + _BATCH, images)) for first in range(0, images, _BATCH))


def _drawn(chain: StochasticDDIMChain, solver: CausalQuasiNewton | None) -> tuple[Tensor, int, int]:
    """x_0, rounds and rows."""
    if solver is None:
        return chain.sequential(trajectory=False), chain.steps, chain.steps
    result = sample(chain, solver=solver, rtol=RTOL)
    return result.images, result.rounds, result.evals


def table(found: Sequence[Found]) -> str:
    """A line for each tolerance."""
    lines = [HOW_TO_READ.format(images=found[0].images), f"T={found[0].steps}"]
    lines.append(f"{'noise_rtol':>12} {'window':>7} {'rounds':>10} {'rows / T':>11} {'error':>18} {'distance':>9}")
    for each in found:
        name = "sequential" if each.noise_rtol is None else f"{each.noise_rtol:g}"
        rounds, rows, errors = (spread(x) for x in (each.rounds, each.rows, each.errors))
        lines.append(
            f"{name:>12} {each.window:>7} {f'{rounds[0]:g}/{rounds[1]:g}':>10} {f'{rows[0]:.2f}/{rows[1]:.2f}':>11} "
            f"{f'{errors[0]:.1e}/{errors[1]:.1e}':>18} {each.distance:>9.3f}"
        )
    return "\n".join(lines)


def as_json(found: Sequence[Found]) -> dict[str, object]:
    """Every figure."""
    return {"tolerances": [asdict(each) for each in found]}


def targets(found: Sequence[Found]) -> list[Target]:
    """The loosest tolerance takes fewer rounds and no more rows than ParaSolver, at the distance of the sequential."""
    loosest, sequential = found[-1], found[0]
    rounds, rows = spread(loosest.rounds)[0], spread(loosest.rows)[0]
    return [
        Target(
            f"at most {_ROUNDS} rounds and {_ROWS} T rows",
            rounds <= _ROUNDS and rows <= _ROWS,
            f"{rounds:g}, {rows:.3f}",
        ),
        Target(
            "the same Frechet distance within 5 %",
            abs(loosest.distance - sequential.distance) <= 0.05 * sequential.distance,
            f"{loosest.distance:.3f} against {sequential.distance:.3f}",
        ),
    ]
