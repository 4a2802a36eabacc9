from __future__ import annotations

import dataclasses
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import fixpoint
from fixpoint_diffusion.models import FPDM, FPDMConfig, allocate, fpdm_layer_problem
from fixpoint_diffusion.processes import NoiseSchedule, Transitions, step_noise
from fixpoint_diffusion.sampling import fpdm_steps, sample_fpdm
from fixpoint_diffusion.sampling.fpdm import follow_transitions

CONFIG = FPDMConfig(sample_size=4, patch_size=2, width=16, heads=2)
SCHEDULE = NoiseSchedule.linear().zero_terminal_snr()


@pytest.fixture
def model() -> FPDM:
    return lively(CONFIG)


@pytest.fixture(name="x_T")
def initial_latents() -> Tensor:
    return torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def lively(config: FPDMConfig) -> FPDM:
    """A model in float64 whose zero-initialised parts are random, so that every path of it matters."""
    generator = torch.Generator().manual_seed(0)
    model = FPDM(config).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.15 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model.eval()


@torch.no_grad()
def sampled_by_hand(
    model: FPDM,
    x: Tensor,
    timesteps: list[int],
    iterations: list[int],
    *,
    reuse: bool | str,
    eta: float = 0.0,
    y: Tensor | None = None,
    guidance: float = 1.0,
) -> Tensor:
    """DDIM (Song et al. 2021, Eq. 12 and 16) with explicit applications of the implicit block.

    With ``learn_sigma`` and ``eta=1``, DDPM with the learned variance (Nichol and Dhariwal 2021, Eq. 15). The halves
    with and without classes are two models that share nothing but the latents.
    """
    solutions: dict[bool, list[Tensor]] = {True: [], False: []}

    def network(x: Tensor, k: int, *, classes: bool) -> Tensor:
        labels = y if classes or y is None else torch.full_like(y, model.config.num_classes)
        history = solutions[classes]
        start = None
        if reuse and history:
            start = history[-1]
        if reuse == "extrapolate" and len(history) > 1:
            start = history[-1] + (1 - 0.5 ** iterations[k - 1]) * (history[-1] - history[-2])
        problem = fpdm_layer_problem(model, x, torch.tensor(timesteps[k]), start, y=labels)
        tokens = problem.z0
        for _ in range(iterations[k]):
            tokens = problem(tokens)
        history.append(tokens)
        condition = None if labels is None else model.class_embedding(labels)
        for block in model.post:
            tokens = block(tokens, condition)
        return model.head(tokens, condition)

    for k, t in enumerate(timesteps):
        a = float(SCHEDULE.alphas_cumprod[t])
        a_next = float(SCHEDULE.alphas_cumprod[timesteps[k + 1]]) if k + 1 < len(timesteps) else 1.0
        out = network(x, k, classes=True)
        predicted, variance = out[:, :1], out[:, 1:]
        if guidance != 1:
            without = network(x, k, classes=False)[:, :1]
            predicted = without + guidance * (predicted - without)
        if model.config.prediction_type == "v_prediction":
            image = math.sqrt(a) * x - math.sqrt(1 - a) * predicted
            noise = math.sqrt(1 - a) * x + math.sqrt(a) * predicted
        elif model.config.prediction_type == "sample":
            image, noise = predicted, (x - math.sqrt(a) * predicted) / math.sqrt(1 - a)
        else:
            image, noise = (x - math.sqrt(1 - a) * predicted) / math.sqrt(a), predicted
        large, small = 1 - a / a_next, (1 - a_next) / (1 - a) * (1 - a / a_next)
        sigma = eta * math.sqrt(small)
        x = math.sqrt(a_next) * image + math.sqrt(1 - a_next - sigma**2) * noise
        if model.config.learn_sigma and t > 0:
            share = (variance + 1) / 2
            sigma = torch.exp((share * math.log(large) + (1 - share) * math.log(max(small, 1e-20))) / 2)
        elif model.config.learn_sigma:
            sigma = 0.0
        if eta:
            x = x + sigma * step_noise(7, range(len(x)), [k], x.shape[1:], dtype=torch.float64)[:, 0]
    return x


TIMESTEPS = {"trailing": [999, 799, 599, 399, 199], "linspace": [999, 749, 500, 250, 0]}


@pytest.mark.parametrize("reuse", [True, False, "extrapolate"])
@pytest.mark.parametrize(
    ("iterations", "spacing"), [(1, "trailing"), (3, "linspace"), ([4, 1, 2, 3, 1], "linspace"), (2, "trailing")]
)
def test_samples_equal_ddim_written_by_hand(
    model: FPDM, x_T: Tensor, iterations: int | list[int], spacing: str, reuse: bool | str
) -> None:
    samples = sample_fpdm(model, x_T, SCHEDULE, steps=5, iterations=iterations, reuse=reuse, spacing=spacing)
    counts = [iterations] * 5 if isinstance(iterations, int) else iterations
    assert samples.timesteps.tolist() == TIMESTEPS[spacing]
    expected = sampled_by_hand(model, x_T, TIMESTEPS[spacing], counts, reuse=reuse)
    torch.testing.assert_close(samples.images, expected, rtol=1e-10, atol=1e-10)
    assert samples.iterations.tolist() == [[k] * 3 for k in counts]
    assert samples.block_passes == sum(1 + k + 1 for k in counts)


def test_steps_are_of_one_length_unless_asked_for(model: FPDM, x_T: Tensor) -> None:
    """With zero terminal SNR a sampler has to start at the last timestep, which not every schedule's rule does."""
    assert sample_fpdm(model, x_T, SCHEDULE, steps=5).timesteps.tolist() == TIMESTEPS["trailing"]


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_guided_samples_of_any_prediction_equal_the_hand_loop(
    x_T: Tensor, prediction_type: str, eta: float, guidance: float
) -> None:
    """Each half starts at its own solution: the hand loop runs them apart."""
    model = lively(dataclasses.replace(CONFIG, num_classes=3, prediction_type=prediction_type))
    y, timesteps = torch.tensor([0, 2, 1]), [800, 500, 350, 0]
    # A prediction of the noise says nothing at a timestep without signal.
    run = follow_transitions(
        model,
        x_T,
        Transitions.of(SCHEDULE, torch.tensor(timesteps), eta=eta, prediction_type=prediction_type),
        iterations=2,
        y=y,
        guidance=guidance,
        seed=7,
    )
    *_, last = run
    expected = sampled_by_hand(model, x_T, timesteps, [2] * 4, reuse=True, eta=eta, y=y, guidance=guidance)
    torch.testing.assert_close(last.after, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("guidance", [1.0, 2.5])
@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
def test_learned_variance_with_reuse_equals_the_hand_loop(x_T: Tensor, guidance: float, spacing: str) -> None:
    model = lively(dataclasses.replace(CONFIG, num_classes=3, learn_sigma=True))
    y, options = torch.tensor([0, 2, 1]), {"eta": 1.0, "variance_type": "learned_range", "seed": 7}
    samples = sample_fpdm(
        model, x_T, SCHEDULE, steps=5, iterations=2, spacing=spacing, y=y, guidance=guidance, **options
    )
    expected = sampled_by_hand(model, x_T, TIMESTEPS[spacing], [2] * 5, reuse=True, eta=1.0, y=y, guidance=guidance)
    torch.testing.assert_close(samples.images, expected, rtol=1e-7, atol=1e-7)


def test_cost_counts_every_block(x_T: Tensor) -> None:
    model = lively(dataclasses.replace(CONFIG, n_pre=2, n_post=3, implicit_blocks=2))
    passes = 0

    def count(*_: object) -> None:
        nonlocal passes
        passes += 1

    for block in (*model.pre, *model.post, *model.implicit_block.blocks):  # of which only parts may be called
        block.attention.register_forward_hook(count)
    samples = sample_fpdm(model, x_T, SCHEDULE, steps=4, iterations=[1, 2, 3, 4])
    assert passes == samples.block_passes == 4 * 5 + 2 * 10


def test_reuse_starts_each_step_where_the_last_one_ended(model: FPDM, x_T: Tensor) -> None:
    steps = list(fpdm_steps(model, x_T, SCHEDULE, steps=4, iterations=2))
    assert steps[0].z0 is None
    for before, step in pairwise(steps):
        assert step.z0 is before.solution.value
        assert step.latent is before.after
        with torch.no_grad():
            _, again = model(step.latent, torch.tensor(step.timestep), z0=step.z0, depth=2, return_solution=True)
        assert torch.equal(again.value, step.solution.value)
    assert all(step.z0 is None for step in fpdm_steps(model, x_T, SCHEDULE, steps=4, reuse=False))


def test_recorded_deltas_are_the_differences_of_the_last_two_iterates(model: FPDM, x_T: Tensor) -> None:
    samples = sample_fpdm(model, x_T, SCHEDULE, steps=3, iterations=[2, 3, 1], record=True)
    for k, step in enumerate(fpdm_steps(model, x_T, SCHEDULE, steps=3, iterations=[2, 3, 1])):
        z = [fpdm_layer_problem(model, step.latent, torch.tensor(step.timestep), step.z0).z0]
        problem = fpdm_layer_problem(model, step.latent, torch.tensor(step.timestep))
        for _ in range(int(samples.iterations[k, 0])):
            z.append(problem(z[-1]))
        differences = [(b - a).flatten(1).norm(dim=1) for a, b in pairwise(z)]
        torch.testing.assert_close(samples.residuals[k], torch.stack(differences))
        torch.testing.assert_close(samples.deltas[k], differences[-1])
    plain = sample_fpdm(model, x_T, SCHEDULE, steps=3)
    assert plain.residuals is None
    assert plain.deltas is None


def test_many_iterations_give_what_the_solved_layer_gives(model: FPDM, x_T: Tensor) -> None:
    """At the fixed point neither the solver nor the start matters."""
    results = [
        sample_fpdm(model, x_T, SCHEDULE, steps=4, iterations=60, reuse=reuse, solver=solver).images
        for solver in (fixpoint.Picard(), fixpoint.Anderson())
        for reuse in (True, False)
    ]
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_an_image_does_not_depend_on_its_batch(model: FPDM, x_T: Tensor, eta: float) -> None:
    together = sample_fpdm(model, x_T, SCHEDULE, steps=4, eta=eta, seed=5).images
    fewer = sample_fpdm(model, x_T[:2], SCHEDULE, steps=4, eta=eta, seed=5).images
    torch.testing.assert_close(together[:2], fewer, rtol=1e-10, atol=1e-10)


def test_stochastic_step_adds_the_seeded_noise_with_ddim_variance(model: FPDM, x_T: Tensor) -> None:
    """Song et al. 2021, Eq. 16, for the second of four steps."""
    eta, seed = 0.7, 11
    step = list(fpdm_steps(model, x_T, SCHEDULE, steps=4, eta=eta, seed=seed))[1]
    a, a_next = (float(SCHEDULE.alphas_cumprod[t]) for t in (749, 499))
    with torch.no_grad():
        v = model(step.latent, torch.tensor(749), z0=step.z0, depth=4)
    image = math.sqrt(a) * step.latent - math.sqrt(1 - a) * v
    noise = math.sqrt(1 - a) * step.latent + math.sqrt(a) * v
    sigma = eta * math.sqrt((1 - a_next) / (1 - a)) * math.sqrt(1 - a / a_next)
    fresh = step_noise(seed, range(3), [1], (1, 4, 4), dtype=torch.float64)[:, 0]
    expected = math.sqrt(a_next) * image + math.sqrt(1 - a_next - sigma**2) * noise + sigma * fresh
    torch.testing.assert_close(step.after, expected, rtol=1e-10, atol=1e-10)


def test_sampling_builds_no_graph_and_keeps_precision(x_T: Tensor) -> None:
    model = lively(CONFIG).float().train()
    samples = sample_fpdm(model, x_T.requires_grad_(), SCHEDULE, steps=2)
    assert not samples.images.requires_grad
    assert samples.images.dtype == torch.float64  # x_T's; the network runs in its own


def test_conditional_models_take_classes(x_T: Tensor) -> None:
    model = lively(dataclasses.replace(CONFIG, num_classes=3, learn_sigma=True))
    y = torch.tensor([0, 1, 1])
    samples = sample_fpdm(model, x_T, SCHEDULE, steps=2, y=y).images
    assert samples.shape == x_T.shape
    assert not torch.allclose(samples, sample_fpdm(model, x_T, SCHEDULE, steps=2, y=y.flip(0)).images)


@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_learned_variance_gives_what_diffusers_gives(x_T: Tensor, guidance: float, monkeypatch) -> None:
    diffusers = pytest.importorskip("diffusers")
    model = lively(dataclasses.replace(CONFIG, num_classes=3, learn_sigma=True))
    scheduler = diffusers.DDPMScheduler(
        rescale_betas_zero_snr=True, prediction_type="v_prediction", variance_type="learned_range", clip_sample=False
    )
    scheduler.set_timesteps(5)
    x, y, none = x_T, torch.tensor([0, 1, 1]), torch.full((3,), 3)
    for k, t in enumerate(scheduler.timesteps):
        with torch.no_grad():
            out, without = (model(x, t, labels, depth=2) for labels in (y, none))
        guided = without[:, :1] + guidance * (out[:, :1] - without[:, :1])
        noise = step_noise(7, range(3), [k], (1, 4, 4), dtype=torch.float64)[:, 0]
        monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, noise=noise, **__: noise)
        x = scheduler.step(torch.cat([guided, out[:, 1:]], dim=1), t, x).prev_sample
    options = {"spacing": "leading", "eta": 1.0, "variance_type": "learned_range", "seed": 7}
    samples = sample_fpdm(
        model,
        x_T,
        NoiseSchedule.from_diffusers(scheduler),
        steps=5,
        iterations=2,
        reuse=False,
        y=y,
        guidance=guidance,
        **options,
    )
    assert samples.timesteps.tolist() == scheduler.timesteps.tolist()
    torch.testing.assert_close(samples.images, x, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="'learned_range' needs a model that learned a variance"):
        sample_fpdm(lively(CONFIG), x_T, SCHEDULE, **options)


@given(data=st.data(), steps=st.integers(1, 60), heuristic=st.sampled_from(["constant", "increasing", "decreasing"]))
def test_allocation_spends_exactly_the_budget_in_the_named_order(data, steps: int, heuristic: str) -> None:
    total = data.draw(st.integers(steps, 20 * steps))
    counts = allocate(total, steps, heuristic, slope=data.draw(st.floats(0, 2)))
    assert len(counts) == steps
    assert sum(counts) == total
    assert min(counts) >= 1
    if heuristic == "constant":
        assert max(counts) - min(counts) <= 1
    elif heuristic == "increasing":
        assert list(counts) == sorted(counts)
    else:
        assert list(counts) == sorted(counts, reverse=True)


@pytest.mark.parametrize(
    ("total", "slope", "ends"),
    [
        (26 * 10, 1.0, (13, 39)),  # the paper's largest mean: half to one and a half times it, and not 1 to 51
        (8 * 50, 2.0, (1, 15)),  # from nothing would be less than one iteration
        (8 * 50, 0.5, (6, 10)),
        (26 * 10, 0.0, (26, 26)),
    ],
)
def test_allocation_is_linear_between_the_ends_that_the_slope_says(total: int, slope: float, ends) -> None:
    steps = total // 26 if total % 26 == 0 else 50
    counts = allocate(total, steps, "increasing", slope=slope)
    assert np.abs(np.array(counts) - np.linspace(*ends, steps)).max() <= 1
    assert allocate(total, steps, "decreasing", slope=slope) == counts[::-1]
    assert sum(counts) == total


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: allocate(3, 4), "got 3 iterations for 4 steps"),
        (lambda: allocate(3, 0), "got 3 iterations for 0 steps"),
        (lambda: allocate(9, 3, "linear"), "heuristic must be one of"),
        (lambda: allocate(9, 3, "increasing", slope=2.1), "slope must be from 0 to 2, got 2.1"),
        (lambda: allocate(9, 3, slope=-1), "slope must be from 0 to 2, got -1"),
    ],
)
def test_impossible_allocations_are_refused(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"iterations": [1, 2]}, "one for each of 4 steps, got 2"),
        ({"iterations": 0}, "positive whole numbers, got 0"),
        ({"iterations": [1, 2, 2.5, 1]}, "positive whole numbers, got 2.5"),
        ({"iterations": torch.tensor([1, 2, 0, 1])}, "positive whole numbers, got 0"),
        ({"reuse": "twice"}, "reuse must be True, False or 'extrapolate', got 'twice'"),
        ({"eta": -0.1}, "eta must be"),
        ({"spacing": "even"}, "spacing must be one of"),
    ],
)
def test_impossible_options_are_refused(model: FPDM, x_T: Tensor, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample_fpdm(model, x_T, SCHEDULE, **{"steps": 4, **options})


def test_iterations_may_be_a_tensor_or_numpy_integers(model: FPDM, x_T: Tensor) -> None:
    expected = sample_fpdm(model, x_T, SCHEDULE, steps=2, iterations=(1, 3)).images
    for iterations in (torch.tensor([1, 3]), list(np.array([1, 3]))):
        assert torch.equal(sample_fpdm(model, x_T, SCHEDULE, steps=2, iterations=iterations).images, expected)
