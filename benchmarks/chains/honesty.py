"""How often a chain that is said to have converged misses the tolerance: many random chains, measured afresh."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.solvers.standings import Target
from fixpoint import CausalQuasiNewton, Recurrence, solve

HOW_TO_READ = """\
Random chains of five families, with right, wrong and no slopes, at tolerances of 1e-2, 1e-3 and 1e-6; float64.
rows: rows that the solver calls converged. above: how many of them miss the tolerance all the same, worst: by what
factor at most, where the residual ||f(z) - z|| of the row is measured afresh and held against rtol ||f(z)||; the same
for every state by itself; and for the error of every state against the sequential run.
"""
SOLVERS = {
    "CausalQuasiNewton()": CausalQuasiNewton(),
    "CausalQuasiNewton(window=10)": CausalQuasiNewton(window=10),
    "CausalQuasiNewton(certify=True)": CausalQuasiNewton(certify=True),
    "CausalQuasiNewton(certify=True, window=10)": CausalQuasiNewton(certify=True, window=10),
}
RTOLS = (1e-2, 1e-3, 1e-6)
FIGURES = ("residual", "state's residual", "state's error")
_SLACK = 1 + 1e-6  # for the rounding of another batch size


@dataclass(frozen=True)
class Tally:
    """Rows said to have converged; by figure, how many of them are above the tolerance, and the worst factor."""

    rows: int
    ended: int
    above: tuple[int, ...]
    worst: tuple[float, ...]


def chains(seeds: Sequence[int], samples: int = 6) -> Iterator[Recurrence]:
    """The random chains: five families for each seed, of other lengths and sizes, with three kinds of slopes."""
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        steps = int(torch.randint(5, 80, (), generator=generator))
        dim = int(torch.randint(1, 7, (), generator=generator))

        def normal(*shape: int, generator: torch.Generator = generator) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        noise, tilt = normal(samples, steps, dim), normal(samples, 1, dim, dim).expand(-1, steps, -1, -1) / dim**0.5
        centres = normal(samples, 1, 5, dim).expand(-1, steps, -1, -1)
        slopes = [None, torch.ones(steps), 3 * torch.rand(steps, generator=generator) - 1]
        for number, (step, inputs) in enumerate(
            (
                (_linear, (0.3 * noise, tilt)),
                (_network, (noise, tilt)),
                (_expanding, (0.2 * noise, tilt)),
                (_mixture, (0.1 * noise, centres)),
                (_shrinking, (1e-4 * noise, tilt)),
            )
        ):
            yield Recurrence(step, normal(samples, dim), inputs=inputs, slopes=slopes[(seed + number) % 3])


def _times(a: Tensor, x: Tensor) -> Tensor:
    return (a @ x[..., None])[..., 0]


def _linear(x: Tensor, u: Tensor, a: Tensor) -> Tensor:
    return x + 0.1 * _times(a, x) + u


def _network(x: Tensor, u: Tensor, a: Tensor) -> Tensor:
    return torch.tanh(1.2 * _times(a, x) + u)


def _expanding(x: Tensor, u: Tensor, a: Tensor) -> Tensor:
    return x + 0.15 * torch.tanh(2 * _times(a, x)) + 0.03 * x + u


def _mixture(x: Tensor, u: Tensor, centres: Tensor) -> Tensor:
    weights = torch.softmax(-2 * (x[:, None] - centres).square().sum(dim=2), dim=1)
    return x + 0.1 * ((weights[..., None] * centres).sum(dim=1) - x) + u


def _shrinking(x: Tensor, u: Tensor, a: Tensor) -> Tensor:
    return 0.9 * x + 0.2 * torch.sin(_times(a, x)) * x + u


def factors(chain: Recurrence, z: Tensor, rtol: float) -> Tensor:
    """``(3, B)``: by what factor each row exceeds the tolerance: its residual, its worst state's, its worst error."""
    fz, expected = chain(z), chain.sequential()

    def ratio(difference: Tensor, size: Tensor) -> Tensor:
        allowed = rtol * size.norm(dim=-1)
        return torch.where(difference.norm(dim=-1) == 0, 0, difference.norm(dim=-1) / allowed)

    return torch.stack(
        (
            ratio((fz - z).flatten(1), fz.flatten(1)),
            ratio(fz - z, fz).amax(dim=1),
            ratio(z - expected, expected).amax(dim=1),
        )
    )


def measure(seeds: Sequence[int], solvers: dict[str, CausalQuasiNewton] = SOLVERS) -> dict[str, Tally]:
    """Solve every chain with every solver, and count."""
    found: dict[str, list[Tensor]] = {name: [] for name in solvers}
    ended = dict.fromkeys(solvers, 0)
    for chain in tqdm(chains(seeds), total=5 * len(seeds), unit="chain", mininterval=1):
        for name, solver in solvers.items():
            for rtol in RTOLS:
                options = {"rtol": rtol, "max_evals": 1000, "backward": None, "on_failure": "ignore"}
                solution = solve(chain, solver=solver, **options)
                ended[name] += solution.converged.numel()
                found[name].append(factors(chain, solution.value, rtol)[:, solution.converged])
    return {name: _tally(torch.cat(each, dim=1), ended[name]) for name, each in found.items()}


def _tally(each: Tensor, ended: int) -> Tally:
    above = tuple((~(each <= _SLACK)).sum(dim=1).tolist())
    return Tally(each.shape[1], ended, above, tuple(each.amax(dim=1).tolist()))


def table(tallies: dict[str, Tally]) -> str:
    """A line a solver."""
    width = max(map(len, tallies))
    heads = "".join(f"{name + ': above, worst':>34}" for name in FIGURES)
    lines = [HOW_TO_READ, f"{'':{width}} {'converged':>14}{heads}"]
    for name, tally in tallies.items():
        shares = [f"{n} of {tally.rows}, {worst:.2g}" for n, worst in zip(tally.above, tally.worst, strict=True)]
        lines.append(f"{name:{width}} {f'{tally.rows} of {tally.ended}':>14}" + "".join(f"{x:>34}" for x in shares))
    return "\n".join(lines)


def targets(tallies: dict[str, Tally]) -> list[Target]:
    """What a certificate promises: no row and no state whose residual misses the tolerance."""
    aims = []
    for name, tally in tallies.items():
        if "certify" in name:
            missed = tally.above[:2]
            measured = f"{missed[0]} rows and {missed[1]} with such a state of {tally.rows}"
            aims.append(Target(f"{name}: no residual above the tolerance", missed == (0, 0), measured))
    return aims


def as_json(tallies: dict[str, Tally]) -> dict[str, object]:
    """The same as plain data."""
    return {
        name: {
            "rows": tally.ended,
            "converged": tally.rows,
            "above": dict(zip(FIGURES, tally.above, strict=True)),
            "worst": dict(zip(FIGURES, tally.worst, strict=True)),
        }
        for name, tally in tallies.items()
    }
