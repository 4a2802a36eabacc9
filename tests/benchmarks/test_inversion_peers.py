"""The peers' inverses against loops over their papers' formulas; the coupled samplers against themselves and DDIM."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.peers import AIDI, BDIA, EDICT, GNRI, CoupledSampler, ForwardStep, ReNoise, Rex
from fixpoint import Status
from fixpoint_diffusion import DDIMChain, NoiseSchedule, StochasticDDIMChain, initial_noise, invert
from fixpoint_diffusion.inversion import Found, InverseMethod, ddim_encoding

SCHEDULE = NoiseSchedule.linear()
T = 6
IMAGES = initial_noise(3, range(2), (3,), dtype=torch.float64) / 2


def make_chain(denoiser: Callable[..., Tensor], *, eta: float = 0.0, steps: int = T) -> DDIMChain:
    x_T = initial_noise(5, range(2), (3,), dtype=torch.float64)
    if eta == 0:
        return DDIMChain(denoiser, x_T, SCHEDULE, steps=steps)
    return StochasticDDIMChain(denoiser, x_T, SCHEDULE, steps=steps, eta=eta, seed=5)


def run(method: InverseMethod, chain: DDIMChain, tolerance: float = 1e-3) -> Found:
    limits = torch.full((2,), tolerance, dtype=torch.float64)
    return method.run(chain, IMAGES, tolerance=limits, progress=False, callback=None)


def undone(chain: DDIMChain, eta: float, undo: Callable[..., np.ndarray]) -> np.ndarray:
    """x_T by ``undo(f, after)`` of one step after another, ``f`` from the textbook's scalars, one sample at a time."""
    levels = [*SCHEDULE.alphas_cumprod[chain.timesteps].tolist(), 1.0]
    found = []
    for sample in range(2):
        x = IMAGES[sample].numpy()
        for k in reversed(range(chain.steps)):
            p, q = levels[k], levels[k + 1]
            c = eta * ((1 - q) / (1 - p) * (1 - p / q)) ** 0.5
            a = (q / p) ** 0.5
            b = max(1 - q - c * c, 0) ** 0.5 - a * (1 - p) ** 0.5
            added = 0.0 if chain.noise is None else c * chain.noise[sample, k].numpy()

            def f(z: np.ndarray, k: int = k, x=x, a=a, b=b, added=added) -> np.ndarray:
                eps = chain.denoiser(torch.from_numpy(z)[None], chain.timesteps[k : k + 1])[0].numpy()
                return (x - b * eps - added) / a

            x = undo(f, x, lambda z, f=f, x=x, a=a: a * (z - f(z)))
        found.append(x)
    return np.stack(found)


def plain(f, z, _):
    return f(f(f(z)))


def mean_of_two(f, z, _):
    first = f(z)
    second = f(first)
    z = (first + second) / 2
    return (second + f(z)) / 2


def renoise(f, z, _):
    iterates = [z]
    for _ in range(4):
        iterates.append(f(iterates[-1]))
    return sum(iterates[2:]) / 3


def forward_steps(f, z, missed):
    for _ in range(4):
        z = z - 0.3 * missed(z)
    return z


def newton(f, z, _, *, exact: bool) -> np.ndarray:
    seen = []
    for _ in range(3):
        r = z - f(z)
        seen.append((np.abs(r).sum(), z))
        slope = np.sign(r)
        if exact:
            steps = 1e-6 * np.eye(3)
            slope = np.array([(np.abs(z + e - f(z + e)).sum() - np.abs(z - e - f(z - e)).sum()) / 2e-6 for e in steps])
        z = z - np.abs(r).mean() / (slope + 1e-6)
    return min(seen, key=lambda pair: pair[0])[1]


RULES: dict[str, tuple[InverseMethod, Callable[..., np.ndarray]]] = {
    "plain": (AIDI(iterations=3), plain),
    "mean": (AIDI(iterations=3, acceleration="mean"), mean_of_two),
    "renoise": (ReNoise(iterations=4), renoise),
    "forward steps": (ForwardStep(iterations=4, rate=0.3), forward_steps),
    "newton": (GNRI(iterations=3), lambda *each: newton(*each, exact=True)),
    "sign step": (GNRI(iterations=3, exact=False), lambda *each: newton(*each, exact=False)),
}


@pytest.mark.parametrize("eta", [0.0, 0.7])
@pytest.mark.parametrize("name", RULES)
def test_inverses_follow_their_papers(mixture, name: str, eta: float) -> None:
    method, rule = RULES[name]
    chain = make_chain(mixture(SCHEDULE), eta=eta)
    np.testing.assert_allclose(run(method, chain).x_T.numpy(), undone(chain, eta, rule), rtol=1e-4, atol=1e-6)


def test_one_plain_iteration_is_ddim_inversion(mixture) -> None:
    chain = make_chain(mixture(SCHEDULE))
    torch.testing.assert_close(run(AIDI(iterations=1), chain).x_T, ddim_encoding(chain, IMAGES)[0])


def test_anderson_solves_an_affine_step_in_one_iteration_more_than_it_has_dimensions() -> None:
    mix = torch.tensor([[0.5, 0.3, 0.0], [0.0, 0.4, -0.3], [0.2, 0.0, 0.6]], dtype=torch.float64)
    chain = make_chain(lambda x, t: x @ mix)
    found = invert(chain, IMAGES, method=AIDI(iterations=5, acceleration="anderson", memory=3), rtol=1e-6)
    assert found.converged.all()
    assert not invert(chain, IMAGES, method=AIDI(iterations=5), rtol=1e-6, on_failure="ignore").converged.any()


@pytest.mark.parametrize("method", [rule[0] for rule in RULES.values()], ids=list(RULES))
def test_rounds_rows_and_claims(method, mixture) -> None:
    chain = make_chain(mixture(SCHEDULE))
    found = run(method, chain)
    assert (found.rounds, found.evals) == (T * method.iterations, 2 * T * method.iterations)
    assert found.status.tolist() == [Status.MAX_EVALS] * 2
    assert run(method, chain, tolerance=100.0).status.tolist() == [Status.CONVERGED] * 2


def test_one_step_that_is_not_undone_is_enough_not_to_claim_it(mixture) -> None:
    denoiser = mixture(SCHEDULE)

    def easy_at_first(x: Tensor, t: Tensor) -> Tensor:
        """The step that is undone last does not depend on its latent."""
        return torch.where((t == t_first)[:, None], 0.0, denoiser(x, t))

    chain = make_chain(easy_at_first)
    t_first = chain.timesteps[0]
    assert run(AIDI(iterations=3), chain).status.tolist() == [Status.MAX_EVALS] * 2


def test_a_sample_that_breaks_leaves_the_others_alone(mixture) -> None:
    denoiser = mixture(SCHEDULE)

    def breaks(x: Tensor, t: Tensor) -> Tensor:
        return torch.where(torch.arange(len(x))[:, None] % 2 == 1, torch.nan, denoiser(x, t))

    for method, _ in [*RULES.values(), (AIDI(iterations=3, acceleration="anderson"), None)]:
        chain = make_chain(breaks)
        chain.check_evals = 1  # rows do see each other here: which is broken is told by its place
        found, whole = run(method, chain), run(method, make_chain(denoiser))
        torch.testing.assert_close(found.x_T[0], whole.x_T[0])
        assert found.status[1] == Status.MAX_EVALS


def test_no_iteration_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1, got 0"):
        AIDI(iterations=0)


SAMPLERS = {"EDICT": EDICT(), "BDIA": BDIA(), "BDIA half": BDIA(share=0.5), "Rex": Rex(coupling=0.99)}


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=list(SAMPLERS))
def test_coupled_samplers_come_back_from_any_image(mixture, sampler: CoupledSampler) -> None:
    chain = make_chain(mixture(SCHEDULE))
    there = sampler.backward(chain, sampler.end(chain, IMAGES))
    back = sampler.forward(chain, (there[1], there[0]) if isinstance(sampler, BDIA) else there)
    torch.testing.assert_close(back[0], IMAGES, rtol=0, atol=1e-7)


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=list(SAMPLERS))
def test_coupled_samplers_are_ddim_where_the_noise_is_always_the_same(sampler: CoupledSampler) -> None:
    noise = torch.tensor([0.3, -1.0, 0.5], dtype=torch.float64)
    chain = make_chain(lambda x, t: noise.expand_as(x))
    image = sampler.forward(chain, sampler.start(chain, chain.x_T))[0]
    torch.testing.assert_close(image, chain.sequential()[:, -1], rtol=0, atol=1e-9)


@pytest.mark.parametrize("sampler", [EDICT(mixing=1.0), BDIA(share=0.5), Rex()], ids=["EDICT", "BDIA", "Rex"])
def test_coupled_samplers_approach_ddim_as_steps_get_smaller(sampler: CoupledSampler) -> None:
    """Exact for standard normal data, whose image is known for any number of steps."""

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        return (1 - SCHEDULE.alphas_cumprod[t, None]).sqrt() * x

    errors = []
    for steps in (20, 100):
        chain = make_chain(denoiser, steps=steps)
        image = sampler.forward(chain, sampler.start(chain, chain.x_T))[0]
        errors.append(float((image - chain.x_T).abs().max()))
    assert errors[1] < errors[0] / 2
