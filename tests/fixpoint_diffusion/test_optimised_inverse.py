"""DEQ-DDIM's inversion by descent: its gradients against backpropagation, its bookkeeping, its costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import fixpoint
from fixpoint import IFT, JFB, Anderson, CausalQuasiNewton, Phantom, Status
from fixpoint_diffusion import (
    DDIMChain,
    NoiseSchedule,
    SamplingChain,
    StochasticDDIMChain,
    initial_noise,
    invert,
    sample,
)
from fixpoint_diffusion.inversion import Descent, OptimisedInverse, ddim_encoding
from fixpoint_diffusion.inversion.descent.gradients import LinearTerm, loss_and_gradient, part_of
from fixpoint_diffusion.inversion.descent.settings import deq_ddim_inversion_settings

SCHEDULE = NoiseSchedule.linear()
IMAGES = torch.tensor([[0.9, -0.7, 0.4], [-0.8, 0.9, 0.1]], dtype=torch.float64)
ADAM = partial(torch.optim.Adam, lr=0.1)


def chain_of(denoiser: Any, *, steps: int = 20, eta: float = 0.0, samples: int = 2) -> SamplingChain:
    x_T = initial_noise(0, range(samples), (3,), dtype=torch.float64)
    if eta:
        return StochasticDDIMChain(denoiser, x_T, SCHEDULE, steps=steps, eta=eta, seed=3)
    return DDIMChain(denoiser, x_T, SCHEDULE, steps=steps)


def gradient_by(chain: SamplingChain, rule: Any, rtol: float = 1e-10) -> tuple[Tensor, list[int], SamplingChain]:
    products: list[int] = []
    part = part_of(chain, chain.x_T, torch.arange(len(chain.x_T)), products)

    def solve_chain(part: SamplingChain) -> Tensor:
        return sample(part, solver=CausalQuasiNewton(window=part.steps), rtol=rtol).trajectory

    return loss_and_gradient(part, IMAGES, rule, solve_chain).gradient, products, part


def backpropagated(chain: SamplingChain) -> Tensor:
    """By PyTorch, through a plain loop over the steps."""
    x_T = chain.x_T.detach().clone().requires_grad_()
    x, samples = x_T, torch.arange(len(x_T))
    for k in range(chain.steps):
        x = chain.transition(x, samples, torch.full_like(samples, k))
    (gradient,) = torch.autograd.grad((x - IMAGES).square().sum(), x_T)
    return gradient


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("rule", ["sequential", IFT(rtol=1e-8)])
def test_exact_gradients_are_those_of_backpropagation(mixture: Callable[..., Any], rule: Any, eta: float) -> None:
    chain = chain_of(mixture(SCHEDULE), eta=eta)
    expected = backpropagated(chain)
    found, _, _ = gradient_by(chain, rule)
    assert float((found - expected).norm() / expected.norm()) < 1e-5


def test_reversed_sweep_needs_few_products(gaussian: Callable[..., Any]) -> None:
    """Where the prior's slopes are those of the steps, as far as a denoiser is like that of a Gaussian."""
    chain = chain_of(gaussian(SCHEDULE))
    _, products, part = gradient_by(chain, IFT(rtol=1e-5), rtol=1e-5)
    assert len(products) <= 4
    assert set(products) == {2 * chain.steps}
    assert part.rounds <= 5


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_true_one_step_gradient_differentiates_the_denoisers_first_call(
    mixture: Callable[..., Any], eta: float
) -> None:
    """With all later latents held fixed, x_0 is the linear term plus what the first call adds."""
    chain = chain_of(mixture(SCHEDULE), eta=eta)
    with torch.no_grad():
        latents = chain.sequential()
        before = chain.inputs(latents)

    def reached(x_T: Tensor) -> Tensor:
        x = torch.cat((x_T[:, None], before[:, 1:]), dim=1)
        out = [chain.denoiser(x[:, k], chain.timesteps[k].expand(2)) for k in range(chain.steps)]
        a, after = chain.transitions.alphas, chain.transitions.alphas_prev
        total = x_T
        for k in range(chain.steps):
            factor = (after[k] / a[k]).sqrt()
            weight = chain.transitions.direction[k] - factor * (1 - a[k]).sqrt()
            total = factor * total + weight * out[k]
            total = total if chain.noise is None else total + chain.transitions.sigma[k] * chain.noise[:, k]
        return total

    x_T = chain.x_T.clone().requires_grad_()
    (expected,) = torch.autograd.grad((reached(x_T) - IMAGES).square().sum(), x_T)
    torch.testing.assert_close(gradient_by(chain, JFB())[0], expected, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(gradient_by(chain, Phantom(damping=0.1))[0], 0.1 * expected, rtol=1e-6, atol=1e-9)
    linear = 0.2 * (latents[:, -1] - IMAGES) / SCHEDULE.alphas_cumprod[chain.timesteps[0]].sqrt()
    torch.testing.assert_close(gradient_by(chain, LinearTerm(damping=0.1))[0], linear, rtol=1e-6, atol=1e-9)


def test_enough_phantom_steps_are_exact(mixture: Callable[..., Any]) -> None:
    chain = chain_of(mixture(SCHEDULE), steps=8)
    torch.testing.assert_close(gradient_by(chain, Phantom(steps=8))[0], backpropagated(chain), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("rule", "rounds", "products"),
    [("sequential", 6, 6), (JFB(), 1, 1), (Phantom(steps=4), 4, 4), (LinearTerm(), 0, 0)],
)
def test_costs_are_counted(mixture: Callable[..., Any], rule: Any, rounds: int, products: int) -> None:
    """Beside the solve's rounds: what is recorded for the gradient, and the products it takes."""
    chain = chain_of(mixture(SCHEDULE), steps=6)
    solved = sample(chain, solver=CausalQuasiNewton(window=6), rtol=1e-10).rounds
    _, found, part = gradient_by(chain, rule)
    assert part.rounds == rounds + (0 if rule == "sequential" else solved)
    assert found == [2 if rule == "sequential" else 12] * products


@pytest.mark.parametrize("rule", ["sequential", IFT(), JFB(), LinearTerm()])
@pytest.mark.parametrize("eta", [0.0, 0.5])
def test_images_are_inverted(gaussian: Callable[..., Any], rule: Any, eta: float) -> None:
    chain = chain_of(gaussian(SCHEDULE), steps=4, eta=eta)
    found = OptimisedInverse(gradient=rule, optimiser=ADAM, epochs=300, stop=1e-3).descend(chain, IMAGES)
    assert (found.status == Status.CONVERGED).all()
    chain.x_T = found.best_x_T
    loss = (chain.sequential()[:, -1] - IMAGES).square().sum(dim=1)
    assert float(loss.max()) < 1.1e-3


def test_the_best_x_T_is_the_one_that_was_scored(mixture: Callable[..., Any]) -> None:  # noqa: N802
    chain = chain_of(mixture(SCHEDULE), steps=6)
    wild = partial(torch.optim.SGD, lr=3.0)  # the loss goes up and down
    found = OptimisedInverse(gradient="sequential", optimiser=wild, epochs=7, stop=0.0).descend(chain, IMAGES)
    losses = torch.stack([epoch.loss for epoch in found.history])
    assert (losses.argmin(dim=0) < 6).any()
    torch.testing.assert_close(found.best_loss, losses.min(dim=0).values)
    chain.x_T = found.best_x_T
    torch.testing.assert_close((chain.sequential()[:, -1] - IMAGES).square().sum(dim=1), found.best_loss)


def test_samples_that_are_done_cost_nothing_more_and_stay(gaussian: Callable[..., Any]) -> None:
    chain = chain_of(gaussian(SCHEDULE), steps=6)
    easy = chain.sequential()[:1].detach()[:, -1]
    images = torch.cat((easy, IMAGES[1:]))
    method = OptimisedInverse(gradient="sequential", optimiser=ADAM, epochs=5, stop=1e-6, start=chain.x_T)
    found = method.descend(chain, images)
    assert found.status.tolist() == [Status.CONVERGED, Status.MAX_EVALS]
    assert [epoch.evals for epoch in found.history] == [12, 6, 6, 6, 6]
    assert torch.equal(found.best_x_T[0], chain.x_T[0])
    assert torch.equal(found.x_T[0], chain.x_T[0])


def test_a_sample_is_inverted_as_it_would_be_alone(mixture: Callable[..., Any]) -> None:
    both, alone = chain_of(mixture(SCHEDULE), steps=6), chain_of(mixture(SCHEDULE), steps=6, samples=1)
    start = initial_noise(5, range(2), (3,), dtype=torch.float64)
    method = OptimisedInverse(gradient=JFB(), optimiser=ADAM, epochs=5, start=start)
    together = method.descend(both, IMAGES).best_x_T
    torch.testing.assert_close(together[:1], replace(method, start=start[:1]).descend(alone, IMAGES[:1]).best_x_T)


def test_a_sample_of_which_the_denoiser_makes_nan_fails_alone(mixture: Callable[..., Any]) -> None:
    good = mixture(SCHEDULE)

    def denoiser(x: Tensor, t: Tensor, bad: Tensor) -> Tensor:
        return torch.where(bad, torch.nan, good(x, t))

    bad = {"bad": torch.tensor([[True], [False]])}
    chain = DDIMChain(denoiser, torch.zeros_like(IMAGES), SCHEDULE, steps=6, conditioning=bad)
    start = initial_noise(5, range(2), (3,), dtype=torch.float64)
    for rule in ("sequential", IFT(), LinearTerm()):
        method = OptimisedInverse(gradient=rule, optimiser=ADAM, epochs=4, start=start)  # type: ignore[arg-type]
        found = method.descend(chain, IMAGES)
        assert found.status.tolist() == [Status.NON_FINITE, Status.MAX_EVALS]
        alone = replace(method, start=start[1:]).descend(chain_of(good, steps=6, samples=1), IMAGES[1:])
        torch.testing.assert_close(found.best_x_T[1:], alone.best_x_T, rtol=1e-4, atol=1e-6)


def test_a_run_goes_on_as_if_it_had_not_been_stopped(mixture: Callable[..., Any]) -> None:
    chain = chain_of(mixture(SCHEDULE), steps=6, eta=0.5)
    method = OptimisedInverse(gradient=JFB(), optimiser=ADAM, epochs=6, stop=0.0)
    whole = method.descend(chain, IMAGES)
    first = method.descend(chain, IMAGES, callback=lambda now: len(now.history) == 2)
    assert first.status.tolist() == [Status.STOPPED] * 2
    second = replace(method, epochs=4, resume=first).descend(chain, IMAGES)
    assert torch.equal(second.x_T, whole.x_T)
    assert torch.equal(second.best_loss, whole.best_loss)
    assert [epoch.evals for epoch in second.history] == [epoch.evals for epoch in whole.history]


def test_a_run_can_be_saved(mixture: Callable[..., Any], tmp_path: Any) -> None:
    chain = chain_of(mixture(SCHEDULE), steps=4)
    method = OptimisedInverse(gradient="sequential", optimiser=ADAM, epochs=2)
    now = method.descend(chain, IMAGES)
    torch.save(now.state(), tmp_path / "descent.pt")
    loaded = Descent.of(torch.load(tmp_path / "descent.pt", weights_only=True))
    again = replace(method, resume=loaded).descend(chain, IMAGES)
    assert torch.equal(again.x_T, replace(method, epochs=4).descend(chain, IMAGES).x_T)


def test_solves_start_from_the_last_epochs_latents(mixture: Callable[..., Any]) -> None:
    chain = chain_of(mixture(SCHEDULE))
    gentle = partial(torch.optim.Adam, lr=1e-4)
    method = OptimisedInverse(gradient=LinearTerm(), optimiser=gentle, epochs=3, rtol=1e-3)
    rounds = [epoch.rounds for epoch in method.descend(chain, IMAGES).history]
    assert rounds[2] < rounds[0] / 2


def test_plain_ddim_inversion_is_a_good_start(gaussian: Callable[..., Any]) -> None:
    chain = chain_of(gaussian(SCHEDULE), steps=200)
    x_T, latents = ddim_encoding(chain, IMAGES)
    assert latents.shape == (2, 200, 3)
    assert torch.equal(latents[:, -1], IMAGES)
    chain.x_T = x_T
    errors = (chain.sequential() - latents).abs().amax(dim=(0, 2))
    assert float(errors.max()) < 0.1
    encoded = OptimisedInverse(gradient=JFB(), start="encoded", epochs=1).descend(chain, IMAGES)
    drawn = OptimisedInverse(gradient=JFB(), epochs=1).descend(chain, IMAGES)
    assert float(encoded.best_loss.max()) < 0.05 * float(drawn.best_loss.min())


def test_plain_ddim_inversion_undoes_its_own_steps() -> None:
    """Where the denoiser's output does not depend on x, it is exact, noise or none."""
    constant = torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64)
    for eta in (0.0, 1.0):
        chain = chain_of(lambda x, t: constant.expand_as(x), steps=10, eta=eta)
        x_T, _ = ddim_encoding(chain, chain.sequential()[:, -1])
        torch.testing.assert_close(x_T, chain.x_T)


@pytest.mark.parametrize("reading", ["paper", "released-code"])
def test_settings_run(mixture: Callable[..., Any], reading: Any) -> None:
    chain = chain_of(mixture(SCHEDULE), steps=10)
    method = replace(deq_ddim_inversion_settings(chain, reading), epochs=30, stop=0.0)
    found = method.descend(chain, IMAGES)
    assert bool((found.best_loss < found.history[0].loss).all())
    assert max(epoch.rounds for epoch in found.history) <= 16


def test_settings_are_the_papers_and_the_codes() -> None:
    chain = chain_of(lambda x, t: 0.5 * x, steps=10)
    paper, code = (deq_ddim_inversion_settings(chain, reading) for reading in ("paper", "released-code"))  # type: ignore[arg-type]
    assert (paper.solver, paper.rtol, paper.max_evals) == (Anderson(memory=5), 1e-3, 15)
    assert (paper.epochs, paper.stop, paper.start) == (400, 0.5, "noise")
    inner = code.solver.solver
    assert (inner.memory, inner.damping, code.rtol, code.start) == (3, 0.9, 1e-2, "encoded")
    assert code.gradient == LinearTerm(damping=0.1)
    baseline = deq_ddim_inversion_settings(chain, baseline=True)
    assert (baseline.gradient, baseline.epochs) == ("sequential", 3000)
    bedroom = deq_ddim_inversion_settings(chain, dataset="lsun-bedroom")
    assert (bedroom.epochs, bedroom.stop) == (500, 2.0)
    noisy = deq_ddim_inversion_settings(chain_of(lambda x, t: 0.5 * x, steps=10, eta=1.0), dataset="celeba")
    assert (noisy.epochs, noisy.max_evals) == (1500, 50)
    with pytest.raises(ValueError, match="reading must be"):
        deq_ddim_inversion_settings(chain, "thesis")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="dataset must be one of cifar10"):
        deq_ddim_inversion_settings(chain, dataset="mnist")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"gradient": "exact"}, TypeError, "gradient must be"),
        ({"gradient": fixpoint.Unroll()}, TypeError, "runs the solve in a way of its own"),
        ({"epochs": 0}, ValueError, "epochs"),
        ({"stop": -1.0}, ValueError, "stop"),
        ({"start": "zeros"}, ValueError, "start must be"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        OptimisedInverse(**options)


def test_what_does_not_fit_the_chain_is_refused(mixture: Callable[..., Any]) -> None:
    chain = chain_of(mixture(SCHEDULE), steps=4)
    with pytest.raises(ValueError, match=r"shape of x_T, \(2, 3\), got torch.float64 \(1, 3\)"):
        OptimisedInverse().descend(chain, IMAGES[:1])
    with pytest.raises(ValueError, match="x_0 must be finite; it is not in sample 0 and others"):
        OptimisedInverse().descend(chain, IMAGES * torch.nan)
    with pytest.raises(ValueError, match="start must have the shape"):
        OptimisedInverse(start=IMAGES[:1]).descend(chain, IMAGES)
    other = OptimisedInverse(gradient="sequential", epochs=1).descend(
        chain_of(mixture(SCHEDULE), samples=1), IMAGES[:1]
    )
    with pytest.raises(ValueError, match="resume must be"):
        OptimisedInverse(resume=other).descend(chain, IMAGES)
    with pytest.raises(ValueError, match="damping"):
        LinearTerm(damping=0.0)
    zero = NoiseSchedule.linear().zero_terminal_snr()
    chain = DDIMChain(lambda x, t: 0.5 * x, IMAGES, zero, steps=4, prediction_type="v_prediction", spacing="trailing")
    with pytest.raises(ValueError, match="zero terminal SNR"):
        OptimisedInverse(gradient=LinearTerm()).descend(chain, IMAGES)


@pytest.mark.parametrize("rule", ["sequential", IFT(), Phantom(steps=2), LinearTerm()])
def test_samples_may_be_numbers_and_batches_empty(rule: Any) -> None:
    for shape in ((3,), (0, 3), (0,)):
        chain = DDIMChain(lambda x, t: 0.5 * x, torch.zeros(shape), SCHEDULE, steps=5)
        method = OptimisedInverse(gradient=rule, optimiser=ADAM, epochs=3)
        found = invert(chain, torch.full(shape, 0.2), method=method, on_failure="ignore")
        assert found.x_T.shape == shape
        assert len(found.history) == (3 if shape == (3,) else 0)


@pytest.mark.parametrize("rule", ["sequential", IFT(), Phantom(steps=2), LinearTerm()])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_inference_mode_changes_nothing(mixture: Callable[..., Any], rule: Any, eta: float) -> None:
    method = OptimisedInverse(gradient=rule, optimiser=ADAM, epochs=3)
    expected = invert(chain_of(mixture(SCHEDULE), eta=eta), IMAGES, method=method, on_failure="ignore")
    with torch.inference_mode():
        chain = chain_of(mixture(SCHEDULE), eta=eta)
        found = invert(chain, IMAGES.clone(), method=method, on_failure="ignore")
    assert torch.equal(found.x_T, expected.x_T)
