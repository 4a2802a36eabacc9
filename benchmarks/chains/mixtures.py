"""How often a sample that is said to have converged is not the sequential one: random mixtures, half clipped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.solvers.standings import Target
from fixpoint import CausalQuasiNewton
from fixpoint_diffusion import NoiseSchedule, StochasticDDIMChain, initial_noise, sample


@dataclass(frozen=True, kw_only=True)
class MixtureDenoiser:
    """The best denoiser for data from a mixture of Gaussians, ``(modes, D)`` means and one variance."""

    alphas: Tensor
    means: Tensor
    variance: float
    prediction_type: str

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        a = self.alphas[t][:, None]
        rows = x.double()
        spread = a * self.variance + 1 - a
        offsets = rows[:, None] - a.sqrt()[..., None] * self.means
        weights = torch.softmax(-offsets.square().sum(2) / (2 * spread), dim=1)
        posterior = self.means + (a.sqrt() * self.variance / spread)[..., None] * offsets
        x_0 = (weights[..., None] * posterior).sum(1)
        eps = (rows - a.sqrt() * x_0) / (1 - a).sqrt()
        outputs = {"sample": x_0, "epsilon": eps, "v_prediction": a.sqrt() * eps - (1 - a).sqrt() * x_0}
        return outputs[self.prediction_type].to(x.dtype)


# Steps of a chain, from so many to fewer than so many.
SHORT, LONG = (5, 120), (64, 500)


def random_chain(seed: int, samples: int = 5, lengths: tuple[int, int] = SHORT) -> StochasticDDIMChain:
    """A function of the seed: length, within ``lengths``, size, modes, schedule, prediction, noise, clipping."""
    generator = torch.Generator().manual_seed(seed)

    def number(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator))

    def one_of(*choices: Any) -> Any:
        return choices[int(number(0, len(choices)))]

    steps, dim, modes = int(number(*lengths)), int(number(1, 9)), int(number(1, 7))
    schedule = one_of(NoiseSchedule.linear, NoiseSchedule.cosine)()
    denoiser = MixtureDenoiser(
        alphas=schedule.alphas_cumprod,
        means=torch.randn(modes, dim, generator=generator, dtype=torch.float64),
        variance=10 ** number(-4, -0.5),
        prediction_type=one_of("epsilon", "v_prediction", "sample"),
    )
    return StochasticDDIMChain(
        denoiser,
        initial_noise(seed, range(samples), (dim,), dtype=torch.float64),
        schedule,
        steps=steps,
        eta=one_of(0.0, 0.0, 0.5, 1.0),
        seed=seed,
        clip_sample=one_of(None, number(0.3, 2.0)),
    )


# Each tolerance with as many of the chains.
RTOLS = (1e-2, 1e-3, 1e-4)
SOLVERS = {
    "CausalQuasiNewton()": CausalQuasiNewton(),
    "CausalQuasiNewton(window=10)": CausalQuasiNewton(window=10),
    "CausalQuasiNewton(probes=1)": CausalQuasiNewton(probes=1),
    "CausalQuasiNewton(certify=True)": CausalQuasiNewton(certify=True),
    "CausalQuasiNewton(certify=True, window=10)": CausalQuasiNewton(certify=True, window=10),
}
# Windows of whole chains, without a budget of rows: early rounds evaluate a part of the steps.
LONG_SOLVERS = {
    "CausalQuasiNewton(window=500)": CausalQuasiNewton(window=500),
    "CausalQuasiNewton(certify=True, window=500)": CausalQuasiNewton(certify=True, window=500),
}
HOW_TO_READ = """\
Samplers of random mixtures of Gaussians, half of them clipped, five samples each; float64; tolerances of 1e-2, 1e-3
and 1e-4. beyond: samples called converged that have a latent farther from the sequential one than twice the tolerance.
worst: the largest such error, in tolerances. amplified: samples seen to amplify errors more than thirtyfold.
rounds/T and rows/T: rounds, and rows for each sample, held against the number of steps; means. Chains have 5 to 119
steps; with window=500, 64 to 499.
"""


@dataclass(frozen=True)
class Tally:
    """What a solver made of all samples."""

    samples: int
    converged: int
    beyond: int
    worst: float
    amplified: int
    rounds: float
    rows: float


def errors(chain: StochasticDDIMChain, trajectory: Tensor, rtol: float) -> Tensor:
    """``(B,)``: the largest error of each sample's latents against the sequential run, in tolerances."""
    exact = chain.sequential()
    return ((trajectory - exact).norm(dim=2) / (rtol * exact.norm(dim=2))).amax(dim=1)


def measure(
    seeds: Sequence[int], solvers: dict[str, CausalQuasiNewton] = SOLVERS, lengths: tuple[int, int] = SHORT
) -> dict[str, Tally]:
    """Sample every chain with every solver, and count."""
    found: dict[str, list[Tensor]] = {name: [] for name in solvers}
    for seed in tqdm(seeds, unit="chain", mininterval=1):
        rtol = RTOLS[seed % len(RTOLS)]
        for name, solver in solvers.items():
            chain = random_chain(seed, lengths=lengths)
            result = sample(chain, solver=solver, rtol=rtol, on_failure="ignore")
            solution, like = result.solution, torch.ones(len(chain.x_T))
            costs = (result.rounds / chain.steps * like, result.evals / chain.steps / len(like) * like)
            error = errors(chain, result.trajectory, rtol)
            found[name].append(torch.stack([solution.converged, error, solution.amplification, *costs]))
    return {name: _tally(torch.cat(each, dim=1)) for name, each in found.items()}


def _tally(each: Tensor) -> Tally:
    converged, error, amplification, rounds, rows = each
    good = error[converged > 0]
    return Tally(
        samples=each.shape[1],
        converged=len(good),
        beyond=int((good > 2).sum()),
        worst=float(good.max()) if len(good) else 0.0,
        amplified=int((amplification > 30).sum()),
        rounds=float(rounds.mean()),
        rows=float(rows.mean()),
    )


def table(tallies: dict[str, Tally]) -> str:
    """A line a solver."""
    width = max(map(len, tallies))
    heads = ("converged", "beyond", "worst", "amplified", "rounds/T", "rows/T")
    lines = [HOW_TO_READ, f"{'':{width}}" + "".join(f"{head:>14}" for head in heads)]
    for name, tally in tallies.items():
        cells = (
            f"{tally.converged} of {tally.samples}",
            f"{tally.beyond}",
            f"{tally.worst:.2g}",
            f"{tally.amplified}",
            f"{tally.rounds:.2f}",
            f"{tally.rows:.2f}",
        )
        lines.append(f"{name:{width}}" + "".join(f"{cell:>14}" for cell in cells))
    return "\n".join(lines)


def targets(tallies: dict[str, Tally]) -> list[Target]:
    """With a certificate, no sample beyond twice the tolerance."""
    return [
        Target(f"{name}: none beyond twice the tolerance", tally.beyond == 0, f"{tally.beyond} of {tally.converged}")
        for name, tally in tallies.items()
        if "certify" in name
    ]


def as_json(tallies: dict[str, Tally]) -> dict[str, object]:
    """The same as plain data."""
    return {name: asdict(tally) for name, tally in tallies.items()}
