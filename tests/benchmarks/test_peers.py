"""The peers against plain loops over their papers' formulas, and the sequential sampler."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.peers import paradigms, parataa, quasi_deer, srds
from benchmarks.peers.windows import slide
from fixpoint import Progress, Status
from fixpoint_diffusion import DDIMChain, NoiseSchedule, StochasticDDIMChain, initial_noise
from fixpoint_diffusion.chains import SamplingChain

SCHEDULE = NoiseSchedule.linear()
T = 12


def make_chain(denoiser: Callable[..., Tensor], *, eta: float = 0.0, samples: int = 1, steps: int = T) -> DDIMChain:
    x_T = initial_noise(5, range(samples), (3,), dtype=torch.float64)
    if eta == 0:
        return DDIMChain(denoiser, x_T, SCHEDULE, steps=steps)
    return StochasticDDIMChain(denoiser, x_T, SCHEDULE, steps=steps, eta=eta, seed=5)


class Formula:
    """``x_{i+1} = a_i x_i + b_i eps(x_i) + c_i z_i`` of a chain of one sample, from the textbook's scalars."""

    def __init__(self, chain: SamplingChain, eta: float) -> None:
        levels = SCHEDULE.alphas_cumprod[chain.timesteps].tolist()
        self.pairs = list(zip(levels, [*levels[1:], 1.0], strict=True))
        self.chain, self.start = chain, chain.x_T[0].numpy()
        self.ancestral = [math.sqrt((1 - q) / (1 - p) * (1 - p / q)) for p, q in self.pairs]
        self.c = [eta * sigma for sigma in self.ancestral]
        self.a = [math.sqrt(q / p) for p, q in self.pairs]
        self.b = [
            math.sqrt(max(1 - q - c * c, 0)) - math.sqrt(q * (1 - p) / p)
            for (p, q), c in zip(self.pairs, self.c, strict=True)
        ]

    def eps(self, i: int, x: np.ndarray) -> np.ndarray:
        return self.chain.denoiser(torch.from_numpy(x)[None], self.chain.timesteps[i : i + 1])[0].numpy()

    def added(self, i: int) -> np.ndarray | float:
        return 0.0 if self.chain.noise is None else self.c[i] * self.chain.noise[0, i].numpy()

    def step(self, i: int, x: np.ndarray) -> np.ndarray:
        return self.a[i] * x + self.b[i] * self.eps(i, x) + self.added(i)


def paradigms_rule(formula: Formula, tolerance: float, p: int) -> Iterator[np.ndarray]:
    """Shih et al., Algorithm 1."""
    x = [formula.start.copy() for _ in range(T + 1)]
    t = 0
    while t < T:
        p = min(p, T - t)
        y = [formula.step(t + j, x[t + j]) - x[t + j] for j in range(p)]
        new = [x[t] + sum(y[: j + 1]) for j in range(p)]
        errors = {j: ((new[j - 1] - x[t + j]) ** 2).mean() for j in range(1, p)}
        stride = min([j for j in errors if errors[j] > (tolerance * formula.ancestral[t + j]) ** 2] + [p])
        x[t + 1 : t + p + 1] = new
        for j in range(t + p + 1, T + 1):
            x[j] = new[-1].copy()
        t += stride
        yield np.stack(x[1:])


def parataa_rule(formula: Formula, k: int, m: int, tolerance: float, ridge: float, w: int) -> Iterator[np.ndarray]:
    """Tang et al., Eq. 8 (equations of order k) and Theorem 3.2 (coefficients of a state from those up to it)."""
    x = [formula.start.copy() for _ in range(T + 1)]
    t, xs, rs = 0, [], []
    while t < T:
        end = min(t + w, T)
        eps = {i: formula.eps(i, x[i]) for i in range(t, end)}
        residual = {i: np.zeros(3) for i in range(1, T + 1)}
        good = {}
        for i in range(t, end):
            one = formula.a[i] * x[i] + formula.b[i] * eps[i] + formula.added(i)
            share = 1 - formula.pairs[i][0] / formula.pairs[i][1]
            good[i] = ((one - x[i + 1]) ** 2).mean() <= tolerance**2 * share
            # Latents that are final satisfy their equations: reaching back over them changes nothing but rounding.
            origin = max(i - k + 1, t)
            value = math.prod(formula.a[origin : i + 1]) * x[origin]
            for j in range(origin, i + 1):
                value = value + math.prod(formula.a[j + 1 : i + 1]) * (formula.b[j] * eps[j] + formula.added(j))
            residual[i + 1] = value - x[i + 1]
        xs.append([each.copy() for each in x])
        rs.append(residual)
        xs, rs = xs[-m - 1 :], rs[-m - 1 :]
        first = next((i for i in range(t, end) if not good[i]), end)
        for i in range(first, end):
            change = residual[i + 1].copy()
            if len(xs) > 1 and i > first:
                rows = range(t + 1, i + 2)
                dx = [b[i + 1] - a[i + 1] for a, b in pairwise(xs)]
                dr = [b[i + 1] - a[i + 1] for a, b in pairwise(rs)]
                F = np.stack([np.concatenate([b[j] - a[j] for j in rows]) for a, b in pairwise(rs)], 1)
                R = np.concatenate([residual[j] for j in rows])
                gamma = np.linalg.solve(F.T @ F + ridge * np.eye(F.shape[1]), F.T @ R)
                change -= sum(g * (u + v) for g, u, v in zip(gamma, dx, dr, strict=True))
            x[i + 1] = x[i + 1] + change
        for j in range(end + 1, T + 1):
            x[j] = x[end].copy()
        t = min(first + 1, end)
        yield np.stack(x[1:])


def quasi_deer_rule(formula: Formula, tolerance: float) -> Iterator[np.ndarray]:
    """Gonzalez et al., Eq. 3 with the diagonal of the Jacobian."""
    x = [formula.start.copy() for _ in range(T + 1)]
    largest = math.inf
    while largest > tolerance:
        new = [formula.start]
        for i in range(T):
            jacobian = torch.autograd.functional.jacobian(
                lambda v, i=i: formula.chain.transition(v[None], torch.tensor([0]), torch.tensor([i]))[0],
                torch.from_numpy(x[i]),
            )
            new.append(formula.step(i, x[i]) + jacobian.diagonal().numpy() * (new[i] - x[i]))
        largest = max(np.abs(b - a).max() for a, b in zip(x, new, strict=True))
        x = new
        yield np.stack(x[1:])


def srds_rule(formula: Formula, iterations: int, length: int) -> Iterator[np.ndarray]:
    """Selvam et al., Algorithm 1; the coarse sampler is a DDIM step over a block."""
    starts = list(range(0, T, length))
    ends = [min(s + length, T) for s in starts]

    def coarse(n: int, x: np.ndarray) -> np.ndarray:
        p, q = formula.pairs[starts[n]][0], formula.pairs[ends[n] - 1][1]
        eps = formula.eps(starts[n], x)
        return math.sqrt(q) * (x - math.sqrt(1 - p) * eps) / math.sqrt(p) + math.sqrt(1 - q) * eps

    def fine(n: int, x: np.ndarray) -> np.ndarray:
        for i in range(starts[n], ends[n]):
            x = formula.step(i, x)
        return x

    x = [formula.start]
    for n in range(len(starts)):
        x.append(coarse(n, x[n]))
    for _ in range(iterations):
        new = [formula.start]
        for n in range(len(starts)):
            new.append(coarse(n, new[n]) + fine(n, x[n]) - coarse(n, x[n]))
        x = new
        yield np.stack([x[n + 1] for n in range(len(starts)) for _ in range(starts[n], ends[n])])


def rounds_of(run: Callable[..., object]) -> list[np.ndarray]:
    """The first sample's trajectory after each round of a run."""
    seen: list[np.ndarray] = []

    def look(progress: Progress) -> None:
        seen.append(progress.value[0].numpy())

    run(callback=look)
    return seen


def assert_same(ours: list[np.ndarray], rule: Iterator[np.ndarray], *, atol: float = 1e-9) -> None:
    theirs = list(rule)
    assert len(ours) == len(theirs) > 2
    for mine, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine, other, atol=atol)


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize(("window", "tolerance"), [(T, 0.3), (5, 0.05)])
def test_paradigms_follows_its_paper(mixture, eta: float, window: int, tolerance: float) -> None:
    chain = make_chain(mixture(SCHEDULE), eta=eta)
    ours = rounds_of(lambda **look: paradigms(chain, tolerance=tolerance, window=window, **look))
    assert_same(ours, paradigms_rule(Formula(chain, eta), tolerance, window))


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize(("order", "memory", "window"), [(T, 3, T), (4, 2, T), (3, 2, 7), (1, 1, T)])
def test_parataa_follows_its_paper(mixture, eta: float, order: int, memory: int, window: int) -> None:
    chain = make_chain(mixture(SCHEDULE), eta=eta)
    ours = rounds_of(lambda **look: parataa(chain, order=order, memory=memory, tolerance=1e-2, window=window, **look))
    assert_same(ours, parataa_rule(Formula(chain, eta), order, memory, 1e-2, 1e-3, window), atol=1e-6)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_quasi_deer_follows_its_paper(mixture, eta: float) -> None:
    chain = make_chain(mixture(SCHEDULE), eta=eta)
    ours = rounds_of(lambda **look: quasi_deer(chain, probes=None, tolerance=1e-4, spacing=1e-5, **look))
    theirs = list(quasi_deer_rule(Formula(chain, eta), 1e-4))
    # Ours ends a round earlier where only the last state had still moved: its input was final.
    assert 0 <= len(theirs) - len(ours) <= 1
    for mine, other in zip(ours, theirs, strict=False):
        np.testing.assert_allclose(mine, other, atol=2e-3)


def test_random_signs_estimate_the_same_diagonal(mixture) -> None:
    chain = make_chain(mixture(SCHEDULE))
    exact, estimated = (
        rounds_of(lambda probes=probes, **look: quasi_deer(chain, probes=probes, max_rounds=1, **look))[0]
        for probes in (None, 4000)
    )
    plain = rounds_of(lambda **look: paradigms(chain, max_rounds=1, **look))[0]
    assert np.abs(estimated - exact).max() < 0.1 * np.abs(plain - exact).max()


@pytest.mark.parametrize("steps", [12, 9, 1])
def test_srds_follows_its_paper(mixture, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "T", steps)
    chain, length = make_chain(mixture(SCHEDULE), steps=steps), math.ceil(math.sqrt(steps))
    blocks = math.ceil(steps / length)
    ours = rounds_of(lambda **look: srds(chain, tolerance=0.0, **look))
    theirs = list(srds_rule(Formula(chain, 0.0), blocks, length))
    assert len(ours) == len(theirs) == blocks
    for mine, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine, other, atol=1e-9)
    assert chain.rounds == blocks + blocks * (length + blocks)
    assert chain.evals == blocks + blocks * (steps + blocks)


PEERS = {
    "paradigms": lambda chain, **options: paradigms(chain, tolerance=0.0, **options),
    "parataa": lambda chain, **options: parataa(chain, tolerance=0.0, order=5, **options),
    "quasi_deer": lambda chain, **options: quasi_deer(chain, tolerance=0.0, **options),
    "srds": lambda chain, **options: srds(chain, tolerance=0.0, **options),
}


@pytest.mark.parametrize("peer", PEERS)
def test_without_tolerance_every_peer_ends_at_the_sequential_samples(mixture, peer: str) -> None:
    chain = make_chain(mixture(SCHEDULE), samples=3)
    result = PEERS[peer](chain)
    torch.testing.assert_close(result.images, chain.sequential()[:, -1], rtol=0, atol=1e-8)
    assert result.solution.converged.all()
    assert result.solution.nfev <= T


@pytest.mark.parametrize("peer", PEERS)
def test_samples_do_not_depend_on_their_company(mixture, peer: str) -> None:
    def breaks(x: Tensor, t: Tensor) -> Tensor:
        return torch.where(x[:, :1] == 7, torch.nan, mixture(SCHEDULE)(x, t))

    whole, alone = make_chain(breaks, samples=3), make_chain(breaks, samples=1)
    whole.x_T[1] = 7
    result, expected = PEERS[peer](whole), PEERS[peer](alone)
    # Signs are drawn for the whole batch: the way differs there, not the end.
    torch.testing.assert_close(result.images[:1], expected.images, rtol=0, atol=1e-8)
    assert result.solution.status.tolist() == [Status.CONVERGED, Status.NON_FINITE, Status.CONVERGED]
    if peer != "srds":
        assert result.solution.evals[1] == 1


def test_a_state_that_breaks_starts_over(mixture) -> None:
    def update(states: Tensor, images: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
        broken = (torch.arange(T) >= 3)[:, None]
        return torch.where(broken, torch.inf, images), torch.zeros(1, T, dtype=torch.bool)

    chain = make_chain(mixture(SCHEDULE))
    states = slide(chain, update, window=None, max_rounds=1, callback=None).trajectory
    assert torch.equal(states[0, 3:], chain.z0[0, 3:])
    assert not torch.equal(states[0, :3], chain.z0[0, :3])


@pytest.mark.parametrize("peer", ["paradigms", "parataa"])
def test_windows_bound_the_rows_and_finished_states_cost_none(mixture, peer: str) -> None:
    chain = make_chain(mixture(SCHEDULE), samples=2)
    rows: list[int] = []
    PEERS[peer](chain, window=4, callback=lambda progress: rows.append(chain.evals))
    counts = np.diff([0, *rows])
    assert counts.max() == 8
    assert counts[-1] < 8
    assert chain.rounds == len(rows)


def test_probes_are_counted_as_rows(mixture) -> None:
    chain = make_chain(mixture(SCHEDULE))
    quasi_deer(chain, probes=2, max_rounds=1)
    assert (chain.rounds, chain.evals) == (1, 3 * T)


def test_a_callback_ends_the_run(mixture) -> None:
    chain = make_chain(mixture(SCHEDULE))
    result = paradigms(chain, tolerance=0.0, callback=lambda progress: progress.nfev == 2)
    assert result.rounds == 2
    assert result.solution.status.tolist() == [Status.MAX_EVALS]


def test_without_the_chains_noise_paradigms_returns_what_diffusers_would(mixture) -> None:
    noisy, quiet = make_chain(mixture(SCHEDULE), eta=1.0), make_chain(mixture(SCHEDULE))
    torch.testing.assert_close(paradigms(noisy, tolerance=1e-6).images, noisy.sequential()[:, -1], rtol=0, atol=1e-5)
    assert (paradigms(quiet, tolerance=1e-6).images - noisy.sequential()[:, -1]).norm() > 0.1


@pytest.mark.parametrize(
    "bad",
    [
        lambda chain: paradigms(chain, tolerance=-1.0),
        lambda chain: paradigms(chain, window=0),
        lambda chain: parataa(chain, order=0),
        lambda chain: parataa(chain, memory=-1),
        lambda chain: parataa(chain, ridge=0.0),
        lambda chain: quasi_deer(chain, probes=0),
        lambda chain: quasi_deer(chain, spacing=0.0),
        lambda chain: quasi_deer(chain, max_rounds=0),
        lambda chain: srds(chain, max_iterations=0),
        lambda chain: srds(StochasticDDIMChain(chain.denoiser, chain.x_T, SCHEDULE, steps=4)),
    ],
)
def test_options_that_make_no_sense_are_refused(mixture, bad: Callable[[SamplingChain], object]) -> None:
    with pytest.raises(ValueError, match=r"at least|negative|positive|noise"):
        bad(make_chain(mixture(SCHEDULE)))
