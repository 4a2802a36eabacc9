"""Sampling chains of which the denoiser is asked about some steps: what is interpolated, and what that saves."""

from __future__ import annotations

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler

import fixpoint_diffusion.chains.chain as chain_module
from fixpoint import CausalQuasiNewton, SparseChain
from fixpoint_diffusion import DDIMChain, NoiseSchedule, StochasticDDIMChain, embedded, initial_noise, sample
from fixpoint_diffusion.chains import MultistepChain, SamplingChain, chain_from_scheduler
from fixpoint_diffusion.processes import GaussianPrior, Transitions

LINEAR = NoiseSchedule.linear()
X_T = initial_noise(0, range(2), (3,), dtype=torch.float64)
STEPS = 40
# Two samples, the rows of which stand together; rows 0, 4, 8, ... and the last of each are evaluated.
SAMPLE = torch.arange(2).repeat_interleave(STEPS)
STEP = torch.arange(STEPS).repeat(2)
EVALUATED = torch.tensor([row for row in range(2 * STEPS) if row % STEPS % 4 == 0 or row % STEPS == STEPS - 1])
SKIPPED = torch.tensor([row for row in range(2 * STEPS) if row not in EVALUATED.tolist()])


def curved(x, t):
    """Bends with x and t, and treats entries by themselves."""
    return torch.tanh(x) * (1 + t.reshape(-1, *[1] * (x.ndim - 1)) / 1000).to(x.dtype)


def of_schedule(prediction_type):
    return DDIMChain(curved, X_T, LINEAR, steps=STEPS, prediction_type=prediction_type)


def learned_variance():
    transitions = Transitions.of(
        LINEAR, LINEAR.timesteps(STEPS), eta=1.0, variance_type="learned_range", prediction_type="epsilon"
    )
    noise = initial_noise(1, range(2 * STEPS), (3,), dtype=torch.float64).reshape(2, STEPS, 3)
    return SamplingChain(lambda x, t: torch.cat((curved(x, t), torch.sin(x)), dim=1), X_T, transitions, noise=noise)


def scheduled(kind, **options):
    def make():
        chain = chain_from_scheduler(curved, X_T, kind(**options), steps=STEPS)
        assert chain.steps == STEPS
        return chain

    return make


CHAINS = {
    "epsilon": lambda: of_schedule("epsilon"),
    "v": lambda: of_schedule("v_prediction"),
    "sample": lambda: of_schedule("sample"),
    "clipped": lambda: DDIMChain(curved, X_T, LINEAR, steps=STEPS, clip_sample=1.0),
    "stochastic": lambda: StochasticDDIMChain(curved, X_T, LINEAR, steps=STEPS, eta=1.0, seed=3),
    "learned variance": learned_variance,
    "multistep": scheduled(DPMSolverMultistepScheduler),
    "euler": scheduled(EulerDiscreteScheduler),
    "flow": scheduled(FlowMatchEulerDiscreteScheduler),
}


@pytest.fixture(params=CHAINS)
def chain(request):
    return CHAINS[request.param]()


def states_before(chain):
    path = chain.sequential() if chain.start.ndim == X_T.ndim else None
    if path is None:  # steps that look back: the states, not the latents
        state, path, samples = chain.start, [], torch.arange(2)
        for k in range(chain.steps):
            state = chain.transition(state, samples, torch.full_like(samples, k))
            path.append(state)
        path = torch.stack(path, dim=1)
    return torch.cat((chain.start[:, None], path[:, :-1]), dim=1).flatten(0, 1)


def test_steps_that_are_evaluated_are_exact(chain):
    x = states_before(chain)
    expected = chain.transition(x, SAMPLE, STEP)
    before = chain.evals
    found, _ = chain.sparse_transition(x, SAMPLE, STEP, EVALUATED)
    assert chain.evals - before == len(EVALUATED)
    torch.testing.assert_close(found[EVALUATED], expected[EVALUATED], rtol=0, atol=0)
    assert (found[SKIPPED] != expected[SKIPPED]).flatten(1).any(dim=1).all()
    assert isinstance(chain, SparseChain)


def test_rows_worked_on_a_few_at_a_time_are_the_same(chain, monkeypatch):
    x, z = states_before(chain), chain.guess
    expected = chain.transition(x, SAMPLE, STEP), *chain.sparse_transition(x, SAMPLE, STEP, EVALUATED), chain(z)
    sizes, arrive = [], chain.arrive
    monkeypatch.setattr(chain_module, "_PART", 7 * x[:1].numel())
    monkeypatch.setattr(chain, "arrive", lambda x, *more: sizes.append(len(x)) or arrive(x, *more))
    found = chain.transition(x, SAMPLE, STEP), *chain.sparse_transition(x, SAMPLE, STEP, EVALUATED), chain(z)
    assert set(sizes) == {7, len(x) % 7, len(EVALUATED) % 7}
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_interpolation_and_what_it_would_have_missed_are_by_the_formulas_of_ddim():
    chain = of_schedule("epsilon")
    x = states_before(chain)
    found, missed = chain.sparse_transition(x, SAMPLE, STEP, EVALUATED)
    a, after = LINEAR.alphas_cumprod[chain.timesteps], chain.transitions.alphas_prev
    eps = curved(x, chain.timesteps[STEP])
    image = (x - (1 - a[STEP, None]).sqrt() * eps) / a[STEP, None].sqrt()
    # What normal data of mean 0 and variance 0.3 would be seen as, which is the prior of a denoiser that names none.
    expected = a[STEP, None].sqrt() * 0.3 / (0.3 * a[STEP, None] + 1 - a[STEP, None]) * x

    def arrived(row, low, high):
        share, k = (row - low) / (high - low), row % STEPS
        beyond = image - expected
        guess = expected[row] + (1 - share) * beyond[low] + share * beyond[high]
        noise = (x[row] - a[k].sqrt() * guess) / (1 - a[k]).sqrt()
        return after[k].sqrt() * guess + (1 - after[k]).sqrt() * noise

    known = EVALUATED.tolist()
    for row in SKIPPED.tolist():
        low, high = max(each for each in known if each < row), min(each for each in known if each > row)
        torch.testing.assert_close(found[row], arrived(row, low, high), rtol=1e-6, atol=1e-9)
        assert missed[row] == 0
    for place, row in enumerate(known):
        k = row % STEPS
        if k in (0, STEPS - 1):  # no neighbours on both sides
            assert missed[row] == 0
            continue
        truth = after[k].sqrt() * image[row] + (1 - after[k]).sqrt() * eps[row]
        off = (arrived(row, known[place - 1], known[place + 1]) - truth).norm()
        torch.testing.assert_close(missed[row], off, rtol=1e-5, atol=1e-9)


class Normal:
    """The exact denoiser of normal data, in any prediction type, which names its prior."""

    prior = GaussianPrior(torch.tensor([0.3, -0.5, 1.0]), torch.tensor([0.2, 0.5, 1.5]))

    def __init__(self, transitions):
        self.transitions, self.prediction_type = transitions, transitions.prediction_type

    def __call__(self, x, t):
        step = torch.stack([(self.transitions.timesteps - each).abs().argmin() for each in t])
        a = self.transitions.alphas[step][:, None]
        gain = a.sqrt() * self.prior.variances / (a * self.prior.variances + 1 - a)
        image = self.prior.mean + gain * (x - a.sqrt() * self.prior.mean)
        eps = (x - a.sqrt() * image) / (1 - a).sqrt()
        said = {
            "epsilon": eps,
            "v_prediction": a.sqrt() * eps - (1 - a).sqrt() * image,
            "sample": image,
        }
        return said[self.prediction_type]


def of_normal_data(make):
    """The chain of that denoiser with the transitions of another."""
    transitions = make().transitions
    kind = SamplingChain if transitions.history is None else MultistepChain
    noise = initial_noise(1, range(2 * STEPS), (3,), dtype=torch.float64).reshape(2, STEPS, 3)
    noisy = bool((transitions.sigma > 0).any())
    return kind(Normal(transitions), X_T, transitions, noise=noise if noisy else None)


@pytest.mark.parametrize("name", ["epsilon", "v", "sample", "stochastic", "multistep"])
def test_where_the_prior_is_right_interpolation_is_exact(name):
    """Whatever the latents and the noise."""
    chain = of_normal_data(CHAINS[name])
    shape = (2 * STEPS, *chain.start.shape[1:])
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found, missed = chain.sparse_transition(x, SAMPLE, STEP, EVALUATED)
    torch.testing.assert_close(found, chain.transition(x, SAMPLE, STEP), rtol=1e-7, atol=1e-7)
    assert float(missed.max()) < 1e-7


def test_learned_variances_are_interpolated_too():
    chain = learned_variance()
    x = states_before(chain)
    found, _ = chain.sparse_transition(x, SAMPLE, STEP, EVALUATED)
    known, said = EVALUATED.tolist(), torch.sin(x)
    large = 1 - chain.transitions.alphas / chain.transitions.alphas_prev
    small = (large * (1 - chain.transitions.alphas_prev) / (1 - chain.transitions.alphas)).clamp(min=1e-20)
    quiet = SamplingChain(chain.denoiser, X_T, chain.transitions, noise=torch.zeros_like(chain.noise))
    without, _ = quiet.sparse_transition(x, SAMPLE, STEP, EVALUATED)
    for row in SKIPPED.tolist():
        low, high = max(each for each in known if each < row), min(each for each in known if each > row)
        share = (torch.lerp(said[low], said[high], (row - low) / (high - low)) + 1) / 2
        scale = ((share * large[STEP[row]].log() + (1 - share) * small[STEP[row]].log()) / 2).exp()
        noise = (chain.timesteps[STEP[row]] > 0) * scale * chain.noise[SAMPLE[row], STEP[row]]
        torch.testing.assert_close(found[row] - without[row], noise, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("solver", [CausalQuasiNewton(window=70), CausalQuasiNewton(window=100, certify=True)])
def test_samples_are_solved_as_by_themselves(solver):
    """In sliding windows, some of which are evaluated whole beside others that are not."""

    def denoiser(x, t):
        return torch.sin(3 * x) * t[:, None] / 1000

    x_T = initial_noise(0, range(5), (3,), dtype=torch.float64)
    together = sample(DDIMChain(denoiser, x_T, LINEAR, steps=200, clip_sample=1.0), solver=solver)
    for number in range(5):
        alone = sample(DDIMChain(denoiser, x_T[number : number + 1], LINEAR, steps=200, clip_sample=1.0), solver=solver)
        torch.testing.assert_close(alone.trajectory[0], together.trajectory[number], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("steps", [63, 64, 65, 512])
def test_lengths_at_which_the_distance_changes(steps):
    chain = StochasticDDIMChain(curved, X_T, LINEAR, steps=steps, eta=0.5)
    result = sample(chain, solver=CausalQuasiNewton(window=steps))
    expected = chain.sequential()
    assert float(((result.trajectory - expected).norm(dim=2) / expected.norm(dim=2)).max()) < 2e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_latents_of_half_precision_are_sampled(dtype):
    chain = DDIMChain(curved, X_T.to(dtype), LINEAR, steps=100)
    result = sample(chain, solver=CausalQuasiNewton(window=100), rtol=3e-2)
    expected = chain.sequential(trajectory=False).double()
    assert float((result.images.double() - expected).norm() / expected.norm()) < 6e-2


def test_conditions_and_hooks_are_those_of_each_row():
    labels = torch.tensor([0.2, 0.9], dtype=torch.float64)
    seen = []

    def denoiser(x, t, label):
        return torch.tanh(x) * label[:, None]

    def hook(x_0, step, sample):
        seen.append((step.tolist(), sample.tolist()))
        return x_0 * (1 - 0.001 * step[:, None] / (1 + sample[:, None]))

    chain = DDIMChain(denoiser, X_T, LINEAR, steps=150, x0_hook=hook, conditioning={"label": labels})
    result = sample(chain, solver=CausalQuasiNewton(window=150))
    expected = chain.sequential()
    assert float(((result.trajectory - expected).norm(dim=2) / expected.norm(dim=2)).max()) < 2e-3
    assert result.evals < 2 * 150 * result.rounds / 2
    assert {len(steps) for steps, _ in seen} > {300}  # of evaluated steps, of all, and of their neighbours' guesses


@pytest.mark.parametrize("seed", range(3))
def test_a_denoiser_that_swings_from_step_to_step_is_sampled_right(seed):
    """Its period is near the distance of the steps that are evaluated, so interpolation is far off."""

    def swinging(x, t):
        return torch.tanh(x) * (1 + 0.5 * torch.sin(t[:, None].to(x) / 3))

    x_T = initial_noise(100 + seed, range(1), (3,), dtype=torch.float64)
    chain = DDIMChain(swinging, x_T, LINEAR, steps=200, clip_sample=1.0)
    result = sample(chain, solver=CausalQuasiNewton(window=200))
    expected = chain.sequential()
    assert result.solution.converged.all()
    assert result.rounds < 100
    assert float(((result.trajectory - expected).norm(dim=2) / expected.norm(dim=2)).max()) < 2e-3


@pytest.mark.parametrize("samples", [0, 2])
@pytest.mark.parametrize("size", [0, 3])
def test_no_sample_and_no_entry(samples, size):
    chain = StochasticDDIMChain(lambda x, t: 0.5 * x, torch.zeros(samples, size), LINEAR, steps=100, eta=1.0)
    assert chain.guess.shape == (samples, 100, size)


@pytest.mark.parametrize("shape", [(), (5,), (1, 8, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_shapes_and_dtypes(shape, dtype):
    x_T = initial_noise(0, range(2), shape, dtype=torch.float32).to(dtype)
    chain = DDIMChain(lambda x, t: torch.tanh(x), x_T, LINEAR, steps=STEPS)
    x = x_T.repeat_interleave(STEPS, dim=0)
    found, missed = chain.sparse_transition(x, SAMPLE, STEP, EVALUATED)
    assert found.shape == x.shape
    assert found.dtype == dtype
    assert missed.shape == (2 * STEPS,)
    torch.testing.assert_close(found[EVALUATED], chain.transition(x, SAMPLE, STEP)[EVALUATED], rtol=0, atol=0)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_long_chain_takes_fewer_rows(eta, monkeypatch):
    unet = embedded("ddpm-digits")
    x_T = initial_noise(0, range(1), (1, 8, 8))

    def run():
        chain = StochasticDDIMChain(unet, x_T, LINEAR, steps=200, eta=eta)
        return chain, sample(chain, solver=CausalQuasiNewton(window=200))

    chain, some = run()
    monkeypatch.delattr(SamplingChain, "sparse_transition")
    assert not isinstance(chain, SparseChain)
    _, whole = run()
    assert some.evals < 0.85 * whole.evals
    assert some.rounds <= whole.rounds + 2
    expected = chain.sequential(trajectory=False)
    for found in (some, whole):
        assert float((found.images - expected).norm() / expected.norm()) < 1e-3
