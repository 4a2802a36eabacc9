"""Restoration in parallel against the sequential method, and that against a plain loop over DDNM's formulas."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import fixpoint
import fixpoint_diffusion.chains.chain as chain_module
from fixpoint_diffusion import DDIMChain, NoiseSchedule, embedded, initial_noise
from fixpoint_diffusion.processes import Clip, GaussianPrior
from fixpoint_diffusion.restoration import BlockMean, Blur, LinearMap, Mask, RestorationChain, project, restore
from fixpoint_diffusion.restoration.chain import _LEFT, SplitChain
from fixpoint_diffusion.training.data import load_digits, split_held_out

SCHEDULE = NoiseSchedule.linear()
KNOWN = torch.ones(8, 8, dtype=torch.bool)
KNOWN[2:6, 3:7] = False
GAUSS = torch.exp(-torch.arange(-2.0, 3.0).square() / 2.88)
DIGITS = {
    "mask": Mask(KNOWN),
    "super-resolution x2": BlockMean(2),
    "super-resolution x4": BlockMean(4),
    "blur": Blur(torch.outer(GAUSS, GAUSS) / GAUSS.sum() ** 2),
}
MEAN = LinearMap(torch.tensor([[0.5, 0.5, 0.0]]), (3,))


@pytest.fixture(scope="module")
def digits() -> tuple[Any, Tensor]:
    return embedded("ddpm-digits"), split_held_out(load_digits())[1].images[:3]


def small(denoiser: Any, *, eta: float = 0.85, schedule: NoiseSchedule = SCHEDULE, **options: Any) -> RestorationChain:
    x_T = options.pop("x_T", initial_noise(0, range(2), (3,), dtype=torch.float64))
    y = options.pop("y", torch.tensor([[0.3], [-0.9]], dtype=torch.float64))
    return RestorationChain(denoiser, x_T, schedule, MEAN, y, steps=12, eta=eta, **options)


def test_rows_worked_on_a_few_at_a_time_invert_no_more_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []

    class Counted(LinearMap):
        def pinv(self, y: Tensor) -> Tensor:
            rows.append(len(y))
            return super().pinv(y)

    y = torch.linspace(-1, 1, 8, dtype=torch.float64)[:, None]
    x_T = initial_noise(0, range(8), (3,), dtype=torch.float64)
    chain = RestorationChain(lambda x, t: x.tanh(), x_T, SCHEDULE, Counted(MEAN.matrix, (3,)), y, steps=5)
    rows.clear()
    expected = chain.sequential()
    counted = sum(rows)
    monkeypatch.setattr(chain_module, "_PART", 3)
    rows.clear()
    torch.testing.assert_close(chain.sequential(), expected, rtol=1e-12, atol=1e-12)
    assert sum(rows) == counted


@pytest.mark.parametrize("eta", [0.0, 0.85])
@pytest.mark.parametrize("clip", [None, 0.4])
def test_sequential_method_is_the_papers_formulas(mixture: Callable[..., Any], eta: float, clip: float | None) -> None:
    schedule = SCHEDULE if clip is None else replace(SCHEDULE, x0_hook=Clip(clip))
    denoiser = mixture(schedule)
    chain = small(denoiser, eta=eta, schedule=schedule)
    x, y = chain.x_T, chain.measurement
    inverse = torch.linalg.pinv(MEAN.matrix)
    levels = [*schedule.alphas_cumprod[chain.timesteps].tolist(), 1.0]
    for k, (a, after) in enumerate(itertools.pairwise(levels)):
        eps = denoiser(x, chain.timesteps[k].expand(2))
        x_0 = (x - (1 - a) ** 0.5 * eps) / a**0.5
        x_0 = x_0 if clip is None else x_0.clamp(-clip, clip)
        x_0 = x_0 + (y - x_0 @ MEAN.matrix.T) @ inverse.T
        fresh = 0 if chain.noise is None else eta * chain.noise[:, k]
        x = after**0.5 * x_0 + (1 - after) ** 0.5 * (fresh + (1 - eta**2) ** 0.5 * eps)
    torch.testing.assert_close(chain.sequential()[:, -1], x)
    torch.testing.assert_close(MEAN.apply(x), y)


@pytest.mark.parametrize("name", DIGITS)
@pytest.mark.parametrize("eta", [0.0, 0.85])
def test_digits_are_restored_as_sequentially_in_a_third_of_the_rounds(
    digits: tuple[Any, Tensor], name: str, eta: float
) -> None:
    denoiser, images = digits
    degradation = DIGITS[name]
    y, x_T = degradation.apply(images), initial_noise(0, range(3), images.shape[1:])
    schedule = NoiseSchedule.from_diffusers(denoiser.schedule_config)
    chain = RestorationChain(denoiser, x_T, schedule, degradation, y, eta=eta)
    with torch.no_grad():
        expected = chain.sequential()
        result = restore(chain)
    assert bool(result.solution.converged.all())
    off = (result.trajectory - expected).flatten(2).norm(dim=2) / expected.flatten(2).norm(dim=2)
    assert float(off.max()) < 1e-3
    assert result.rounds <= 10  # of 25
    assert result.evals < 10 * 25 * 3
    # Deblurring needs the cut frequencies to be what they were.
    torch.testing.assert_close(
        project(degradation, result.images), degradation.pinv(y), atol=2e-3 if name == "blur" else 1e-3, rtol=0
    )


def test_range_and_null_space_have_slopes_of_their_own(mixture: Callable[..., Any]) -> None:
    """With the prior's slopes, as for any chain, the same problem takes more rounds."""
    chain = small(mixture(SCHEDULE), eta=0.85)
    ours = restore(chain, backward=None, rtol=1e-6)
    plain = fixpoint.solve(chain, solver=fixpoint.CausalQuasiNewton(), rtol=1e-6, backward=None)
    torch.testing.assert_close(ours.trajectory, plain.value, rtol=1e-4, atol=1e-5)
    assert ours.rounds < plain.nfev


@pytest.mark.parametrize("eta", [0.0, 0.85])
def test_slopes_are_those_of_the_steps_for_a_gaussian_as_wide_as_is_left_open(eta: float) -> None:
    variance = _LEFT * float(GaussianPrior.isotropic().variances)

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        a = SCHEDULE.alphas_cumprod[t][:, None]
        return (1 - a).sqrt() * x / (a * variance + 1 - a)

    chain = small(denoiser, eta=eta)
    problem, sample, step = SplitChain(chain), torch.zeros(12, dtype=torch.int64), torch.arange(12)
    seen, unseen = torch.tensor([0.6, 0.6, 0.0], dtype=torch.float64), torch.tensor([0.5, -0.5, 2.0]).double()
    at = problem.start[:1].expand(12, -1, -1)
    for part, change in ((0, seen), (1, unseen)):
        moved = torch.zeros(2, 3, dtype=torch.float64).index_fill(0, torch.tensor(part), 1.0) * change
        found = problem.transition(at + moved, sample, step) - problem.transition(at, sample, step)
        torch.testing.assert_close(found, problem.slopes.unflatten(1, (2, 3)) * moved)


def test_the_denoiser_sees_latents_in_the_dtype_of_the_first() -> None:
    seen = set()

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        seen.add(x.dtype)
        return 0.5 * x

    x_T = initial_noise(0, range(2), (3,), dtype=torch.float32)
    images = restore(small(denoiser, x_T=x_T, y=torch.tensor([[0.3], [-0.9]]))).images
    assert seen == {torch.float32} == {images.dtype}


def test_a_share_of_the_noise_may_be_the_tolerance(mixture: Callable[..., Any]) -> None:
    chain = small(mixture(SCHEDULE), eta=0.85)
    strict, loose = (
        restore(chain, solver=fixpoint.CausalQuasiNewton(noise_rtol=c), backward=None, rtol=1e-5) for c in (0.0, 2.0)
    )
    assert loose.evals < strict.evals
    with pytest.raises(ValueError, match="this one adds none"):
        restore(small(mixture(SCHEDULE), eta=0.0), solver=fixpoint.CausalQuasiNewton(noise_rtol=0.5))


def test_other_solvers_serve(mixture: Callable[..., Any]) -> None:
    chain = small(mixture(SCHEDULE))
    result = restore(chain, solver=fixpoint.Picard(), backward=None, rtol=1e-10)
    torch.testing.assert_close(result.trajectory, chain.sequential())


@pytest.mark.parametrize("eta", [0.0, 0.85])
def test_gradients_are_those_of_the_sequential_method(mixture: Callable[..., Any], eta: float) -> None:
    x_T = initial_noise(0, range(2), (3,), dtype=torch.float64).requires_grad_()
    y = torch.tensor([[0.3], [-0.9]], dtype=torch.float64, requires_grad=True)
    weights = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    chain = small(mixture(SCHEDULE), eta=eta, x_T=x_T, y=y)
    expected = torch.autograd.grad((chain.sequential()[:, -1] * weights).square().sum(), (x_T, y))
    result = restore(chain, rtol=1e-10, backward=fixpoint.IFT(rtol=1e-10))
    found = torch.autograd.grad((result.images * weights).square().sum(), (x_T, y))
    assert all(float(gradient.abs().max()) > 1e-4 for gradient in expected)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)


def test_a_sample_is_restored_as_it_would_be_alone(mixture: Callable[..., Any]) -> None:
    denoiser = mixture(SCHEDULE)
    both = small(denoiser)
    second = small(denoiser, x_T=both.x_T[1:], y=both.measurement[1:], first_sample=1)
    torch.testing.assert_close(restore(both).images[1:], restore(second).images, rtol=1e-9, atol=1e-9)


def test_bad_input_is_refused(mixture: Callable[..., Any]) -> None:
    denoiser = mixture(SCHEDULE)
    with pytest.raises(ValueError, match=r"eta is a share.*got 1\.2"):
        small(denoiser, eta=1.2)
    with pytest.raises(ValueError, match=r"measurement must have the shape.*\(2, 1\), got \(2, 3\)"):
        small(denoiser, y=torch.zeros(2, 3, dtype=torch.float64))
    with pytest.raises(ValueError, match="measurement must have the dtype"):
        small(denoiser, y=torch.zeros(2, 1))
    with pytest.raises(ValueError, match="measurement must be finite"):
        small(denoiser, y=torch.full((2, 1), torch.nan, dtype=torch.float64))
    with pytest.raises(TypeError, match="restore takes a RestorationChain, got DDIMChain"):
        restore(DDIMChain(denoiser, torch.zeros(2, 3), SCHEDULE, steps=3))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="noise must have shape"):
        small(denoiser, noise=torch.zeros(2, 3, 3, dtype=torch.float64))
    with pytest.raises(ValueError, match="either timesteps, or steps"):
        small(denoiser, timesteps=torch.tensor([5, 1]))
