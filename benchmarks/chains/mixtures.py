"""How often a sample that is said to have converged is not the sequential one: random mixtures, half of them clipped."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fixpoint_diffusion import NoiseSchedule, StochasticDDIMChain, initial_noise


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


def random_chain(seed: int, samples: int = 5) -> StochasticDDIMChain:
    """A function of the seed: length, size, modes, schedule, prediction, noise and clipping are drawn."""
    generator = torch.Generator().manual_seed(seed)

    def number(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator))

    def one_of(*choices):
        return choices[int(number(0, len(choices)))]

    steps, dim, modes = int(number(5, 120)), int(number(1, 9)), int(number(1, 7))
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


def chains(seeds: Sequence[int]) -> Iterator[StochasticDDIMChain]:
    for seed in seeds:
        yield random_chain(seed)
