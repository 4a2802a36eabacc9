"""invert: against closed forms, SciPy, finite differences and the ordinary sampler."""

from __future__ import annotations

import warnings
from functools import partial

import pytest
import scipy.optimize
import torch
from torch import Tensor

import fixpoint
from fixpoint import IFT, ConvergenceError, ConvergenceWarning, Status
from fixpoint_diffusion import (
    DDIMChain,
    DrawnInverse,
    ExplicitInverse,
    NoiseSchedule,
    OptimisedInverse,
    ParallelInverse,
    SamplingChain,
    StepwiseInverse,
    StochasticDDIMChain,
    Transitions,
    embedded,
    invert,
    step_noise,
)
from fixpoint_diffusion.chains import chain_from_scheduler
from fixpoint_diffusion.denoisers.guided import Guided
from fixpoint_diffusion.inversion import InverseMethod, InverseRound, search
from fixpoint_diffusion.inversion.forecast import Forecast
from fixpoint_diffusion.inversion.problem import BestSoFar, InverseProblem, rms
from fixpoint_diffusion.processes import Clip
from fixpoint_diffusion.training.data import load_digits, split_held_out

SCHEDULE = NoiseSchedule.linear()
METHODS = (ParallelInverse(), StepwiseInverse())


def curved(x: Tensor, t: Tensor) -> Tensor:
    """A denoiser that bends, row by row and entry by entry."""
    a = SCHEDULE.alphas_cumprod.to(x)[t].reshape(-1, *[1] * (x.ndim - 1))
    return (1 - a).sqrt() * x + 0.2 * torch.sin(2 * x)


def gentle(x: Tensor, t: Tensor) -> Tensor:
    """A denoiser that bends a little, and mixes entries."""
    return 0.6 * x + 0.05 * torch.sin(x.roll(1, 1))


def images(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0), dtype=dtype) * 1.6 - 0.8


def chain_of(x_0: Tensor, steps: int = 20, **options: object) -> DDIMChain:
    return DDIMChain(curved, torch.zeros_like(x_0), SCHEDULE, steps=steps, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("steps", [1, 7, 20])
def test_a_linear_denoiser_is_inverted_to_the_closed_form(method: object, steps: int) -> None:
    x_0 = images(3, 4)
    chain = DDIMChain(lambda x, t: 0.5 * x, torch.zeros_like(x_0), SCHEDULE, steps=steps)
    a, after, direction = (
        chain.transitions.alphas,
        chain.transitions.alphas_prev,
        chain.transitions.direction,
    )
    factor = ((after / a).sqrt() * (1 - 0.5 * (1 - a).sqrt()) + 0.5 * direction).prod()
    inverse = invert(chain, x_0, method=method, rtol=1e-9)  # type: ignore[arg-type]
    assert inverse.converged.all()
    torch.testing.assert_close(inverse.x_T, x_0 / factor, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_each_step_is_the_root_that_scipy_finds(method: object) -> None:
    x_0 = images(2, 1)
    chain = chain_of(x_0, steps=8)
    inverse = invert(chain, x_0, method=method, rtol=1e-9)  # type: ignore[arg-type]
    for sample in range(2):
        x = float(x_0[sample, 0])
        for k in reversed(range(8)):

            def miss(z: float, k: int = k, after: float = x) -> float:
                row = torch.tensor([[z]], dtype=torch.float64)
                return float(chain.transition(row, torch.tensor([0]), torch.tensor([k]))) - after

            x = scipy.optimize.brentq(miss, -20, 20, xtol=1e-13)
        assert float(inverse.x_T[sample, 0]) == pytest.approx(x, rel=1e-6)


def test_the_result_is_what_the_ordinary_sampler_makes_of_x_t() -> None:
    x_0 = images(2, 3)
    inverse = invert(chain_of(x_0), x_0, rtol=1e-4)
    again = DDIMChain(curved, inverse.x_T, SCHEDULE, steps=20).sequential()
    torch.testing.assert_close(inverse.trajectory, again, rtol=0, atol=0)
    torch.testing.assert_close(inverse.reconstruction, again[:, -1], rtol=0, atol=0)
    torch.testing.assert_close(inverse.error, (again[:, -1] - x_0).square().mean(dim=1).sqrt())
    assert (inverse.error <= 1e-4 * x_0.square().mean(dim=1).sqrt()).all()
    assert inverse.rounds == len(inverse.history) < 20
    assert inverse.evals == sum(entry.rows for entry in inverse.history)


# A prediction of the noise says nothing where there is no signal.
@pytest.mark.parametrize(
    ("prediction", "terminal"),
    [("epsilon", False), ("v_prediction", False), ("v_prediction", True), ("sample", False), ("sample", True)],
)
def test_every_prediction_type_and_a_start_without_signal(prediction: str, terminal: bool) -> None:
    schedule = SCHEDULE.zero_terminal_snr() if terminal else SCHEDULE
    a = schedule.alphas_cumprod

    def denoiser(x: Tensor, t: Tensor) -> Tensor:  # of a Gaussian with variance 0.5, bent a little
        level = a.to(x)[t].reshape(-1, 1)
        image = 0.5 * level.sqrt() * x / (0.5 * level + 1 - level) + 0.05 * torch.sin(x)
        noise = (x - level.sqrt() * image) / (1 - level).sqrt()
        return {"epsilon": noise, "sample": image}.get(prediction, level.sqrt() * noise - (1 - level).sqrt() * image)

    x_0 = images(2, 3)
    timesteps = torch.linspace(999, 20, 15).long()
    chain = DDIMChain(denoiser, torch.zeros_like(x_0), schedule, timesteps=timesteps, prediction_type=prediction)
    assert invert(chain, x_0, rtol=1e-6).converged.all()


def test_a_stochastic_chain_is_inverted_with_its_own_noise() -> None:
    x_0 = images(3, 4)
    chain = StochasticDDIMChain(curved, torch.zeros_like(x_0), SCHEDULE, steps=12, eta=0.5, seed=3)
    inverse = invert(chain, x_0, rtol=1e-6)
    again = StochasticDDIMChain(curved, inverse.x_T, SCHEDULE, steps=12, eta=0.5, seed=3)
    torch.testing.assert_close(again.sequential()[:, -1], x_0, rtol=0, atol=1e-5)


def test_drawn_noise_leads_from_a_drawn_trajectory_to_the_image() -> None:
    x_0 = images(3, 4)
    chain = StochasticDDIMChain(curved, torch.zeros_like(x_0), SCHEDULE, steps=12, eta=1.0)
    inverse = invert(chain, x_0, method=DrawnInverse(seed=5), rtol=1e-6)
    assert inverse.converged.all()
    assert inverse.noise is not None
    again = StochasticDDIMChain(curved, inverse.x_T, SCHEDULE, steps=12, eta=1.0, noise=inverse.noise)
    torch.testing.assert_close(again.sequential()[:, -1], x_0, rtol=0, atol=1e-5)
    # The latents are the forward process of the image.
    a = chain.transitions.alphas
    own = step_noise(5, range(3), range(12), (4,), dtype=torch.float64)[:, 4]
    torch.testing.assert_close(inverse.trajectory[:, 3], a[4].sqrt() * x_0 + (1 - a[4]).sqrt() * own)
    alone = invert(
        StochasticDDIMChain(curved, torch.zeros(1, 4).double(), SCHEDULE, steps=12),
        x_0[:1],
        method=DrawnInverse(seed=5),
    )
    torch.testing.assert_close(alone.x_T, inverse.x_T[:1])


def test_drawn_noise_needs_steps_that_add_noise() -> None:
    x_0 = images(1, 2)
    with pytest.raises(ValueError, match="no step of this chain"):
        invert(chain_of(x_0), x_0, method=DrawnInverse())


def test_guidance_and_conditioning_of_each_sample() -> None:
    def denoiser(x: Tensor, t: Tensor, shift: Tensor) -> Tensor:
        return curved(x + 0.3 * shift, t)

    x_0, shift = images(3, 2), torch.tensor([[0.0], [1.0], [2.0]]).double()
    scales = torch.tensor([1.0, 1.5, 2.0]).double()
    conditioning = {"shift": shift, "negative_shift": torch.zeros_like(shift)}
    chain = DDIMChain(
        Guided(denoiser, scales), torch.zeros_like(x_0), SCHEDULE, steps=10, conditioning=conditioning, max_rows=7
    )
    inverse = invert(chain, x_0, rtol=1e-6)
    assert inverse.converged.all()
    for row in range(3):
        alone = {name: rows[row : row + 1] for name, rows in conditioning.items()}
        single = DDIMChain(
            Guided(denoiser, float(scales[row])), x_0[row : row + 1], SCHEDULE, steps=10, conditioning=alone
        )
        torch.testing.assert_close(invert(single, x_0[row : row + 1], rtol=1e-6).x_T, inverse.x_T[row : row + 1])


def folding(x: Tensor, t: Tensor) -> Tensor:
    """Takes every latent of a large sample to one image."""
    a = SCHEDULE.alphas_cumprod.to(x)[t].reshape(-1, 1)
    flat = (x - a.sqrt() * 0.1) / (1 - a).sqrt()
    return torch.where(x.abs().amax(dim=1, keepdim=True) > 1.5, flat, curved(x, t))


def test_a_sample_without_root_ends_alone_and_its_status_says_so() -> None:
    x_0 = torch.tensor([[0.3, -0.2], [5.0, 5.0]], dtype=torch.float64)
    chain = DDIMChain(folding, torch.zeros_like(x_0), SCHEDULE, steps=10)
    with pytest.warns(ConvergenceWarning, match="1 of 2 samples were not inverted"):
        inverse = invert(chain, x_0)
    assert inverse.converged.tolist() == [True, False]
    assert Status(int(inverse.status[1])) in (Status.STAGNATED, Status.MAX_EVALS)
    assert torch.isfinite(inverse.x_T).all()
    assert torch.isfinite(inverse.error).all()
    with pytest.raises(ConvergenceError) as failure:
        invert(chain, x_0, on_failure="raise")
    assert failure.value.solution.converged.tolist() == [True, False]  # type: ignore[attr-defined]
    good = invert(DDIMChain(folding, torch.zeros(1, 2).double(), SCHEDULE, steps=10), x_0[:1])
    torch.testing.assert_close(inverse.x_T[:1], good.x_T)


@pytest.mark.parametrize("method", METHODS)
def test_an_image_outside_of_what_the_model_can_make_ends_beside_others(method: InverseMethod) -> None:
    def bounded(x: Tensor, t: Tensor) -> Tensor:  # predicts images from -1 to 1, whatever it sees
        return torch.tanh(x)

    x_0 = torch.tensor([[0.3, -0.2], [3.0, 0.0]], dtype=torch.float64)
    chain = DDIMChain(bounded, torch.zeros_like(x_0), SCHEDULE, steps=10, prediction_type="sample")
    with pytest.warns(ConvergenceWarning, match="1 of 2 samples were not inverted"):
        inverse = invert(chain, x_0, method=method)
    assert inverse.converged.tolist() == [True, False]
    assert torch.isfinite(inverse.x_T).all()
    assert float(inverse.error[1]) >= 2 / 2**0.5
    single = DDIMChain(bounded, torch.zeros_like(x_0[:1]), SCHEDULE, steps=10, prediction_type="sample")
    alone = invert(single, x_0[:1], method=method)
    torch.testing.assert_close(inverse.x_T[:1], alone.x_T, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_a_denoiser_that_is_not_finite_for_one_sample(method: InverseMethod) -> None:
    def denoiser(x: Tensor, t: Tensor, bad: Tensor) -> Tensor:
        return torch.where(bad, torch.nan, curved(x, t))

    x_0 = images(2, 2)
    conditioning = {"bad": torch.tensor([[False], [True]])}
    chain = DDIMChain(denoiser, torch.zeros_like(x_0), SCHEDULE, steps=10, conditioning=conditioning)
    inverse = invert(chain, x_0, method=method, on_failure="ignore")
    assert inverse.converged.tolist() == [True, False]
    assert Status(int(inverse.status[1])) is Status.NON_FINITE
    assert torch.isnan(inverse.error[1])


def test_a_run_step_by_step_that_is_stopped_has_the_rest_from_the_prior() -> None:
    def stop(evals: int) -> bool:
        seen.append(evals)
        return len(seen) == 4

    def as_the_prior_says(x: Tensor, t: Tensor) -> Tensor:
        a = SCHEDULE.alphas_cumprod.to(x)[t].reshape(-1, 1)
        return (1 - a).sqrt() * x / (0.3 * a + 1 - a)

    x_0 = images(2, 3)
    for denoiser, status in ((as_the_prior_says, Status.CONVERGED), (curved, Status.STOPPED)):
        seen: list[int] = []
        chain = DDIMChain(denoiser, torch.zeros_like(x_0), SCHEDULE, steps=20)
        inverse = invert(chain, x_0, method=StepwiseInverse(), rtol=1e-8, callback=stop, on_failure="ignore")
        assert inverse.rounds == sum(seen)
        assert (inverse.status == status).all()


@pytest.mark.parametrize("method", [*METHODS, ExplicitInverse()])
def test_each_method_shows_a_bar_if_asked(method: InverseMethod, capsys: pytest.CaptureFixture[str]) -> None:
    x_0 = images(2, 3)
    invert(chain_of(x_0, steps=3), x_0, method=method, on_failure="ignore")
    assert capsys.readouterr().err == ""
    invert(chain_of(x_0, steps=3), x_0, method=method, on_failure="ignore", progress=True)
    assert "inverting" in capsys.readouterr().err


def test_the_second_try_is_kept_where_it_is_better() -> None:
    x_0 = images(2, 3)
    once = invert(
        chain_of(x_0), x_0, method=ParallelInverse(max_rounds=1, second_try=None), rtol=1e-6, on_failure="ignore"
    )
    assert not once.converged.any()
    assert invert(chain_of(x_0), x_0, method=ParallelInverse(max_rounds=1), rtol=1e-6).converged.all()


def test_a_callback_stops_with_the_best_so_far() -> None:
    x_0, chain = images(2, 3), DDIMChain(gentle, torch.zeros(2, 3).double(), SCHEDULE, steps=20)
    seen: list[Tensor] = []

    def stop(entry: InverseRound) -> bool:
        seen.append(entry.predicted_error)
        return len(seen) == 4

    inverse = invert(chain, x_0, rtol=1e-12, callback=stop, on_failure="ignore")
    assert inverse.rounds == 4
    assert (inverse.status == Status.STOPPED).all()
    torch.testing.assert_close(inverse.error, seen[-1], rtol=0.2, atol=0)


def test_a_callback_stops_a_run_whose_last_sample_has_just_ended() -> None:
    """No second try follows."""
    x_0 = images(1, 2)

    def broken(x: Tensor, t: Tensor) -> Tensor:
        return torch.full_like(x, torch.nan)

    chain, seen = DDIMChain(broken, torch.zeros_like(x_0), SCHEDULE, steps=20), list[InverseRound]()

    def stop(entry: InverseRound) -> bool:
        seen.append(entry)
        return len(seen) == last

    last = 10**6
    whole = invert(chain, x_0, callback=stop, on_failure="ignore")
    last, seen = len(seen), []
    inverse = invert(chain, x_0, callback=stop, on_failure="ignore")
    assert inverse.rounds == last < whole.rounds
    assert inverse.status.tolist() == [int(Status.NON_FINITE)]


def test_the_predicted_error_is_that_of_the_sampler() -> None:
    x_0 = images(4, 3)
    chain = DDIMChain(gentle, torch.zeros_like(x_0), SCHEDULE, steps=20)
    inverse = invert(chain, x_0, rtol=1e-8)
    for entry in inverse.history[1:4]:
        again = DDIMChain(gentle, entry.x_T, SCHEDULE, steps=20).sequential()[:, -1]
        measured = (again - x_0).square().mean(dim=1).sqrt()
        ratio = entry.predicted_error / measured
        assert ((ratio > 0.5) & (ratio < 2)).all()


def test_a_prediction_that_promises_too_much_is_corrected(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = Forecast.error
    monkeypatch.setattr(Forecast, "error", lambda *given: honest(*given) / 1e4)
    x_0 = images(2, 3)
    chain = DDIMChain(gentle, torch.zeros_like(x_0), SCHEDULE, steps=20)
    inverse = invert(chain, x_0, method=ParallelInverse(second_try=None), rtol=1e-6)
    assert inverse.converged.all()
    assert chain.rounds - inverse.rounds <= 5 * 20  # not confirmed again in every round


def test_a_sample_that_waited_for_others_has_time_left_when_it_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was foretold of it was too good; by then, its last progress lies many rounds back."""
    honest, good = Forecast.error, torch.tensor([1e-3, 1.0], dtype=torch.float64)
    monkeypatch.setattr(Forecast, "observe", lambda *given: None)  # the same trajectory, the same prediction
    monkeypatch.setattr(Forecast, "error", lambda *given: honest(*given) * good)
    monkeypatch.setattr(search, "_PATIENCE", 5)
    x_0 = images(2, 3)
    chain = DDIMChain(gentle, torch.zeros_like(x_0), SCHEDULE, steps=20)
    inverse = invert(chain, x_0, method=ParallelInverse(probes=0, second_try=None), rtol=1e-10)
    assert inverse.converged.all()
    assert sum(bool(each.predicted_error[0].isnan()) for each in inverse.history) >= 3


def test_a_round_that_was_not_finite_teaches_the_forecast_nothing_of_that_sample() -> None:
    slopes = torch.tensor([[0.9], [0.8], [0.7]], dtype=torch.float64)
    latents, seen, misses = (images(2, 3, 4) * scale for scale in (1.0, 0.5, 0.1))
    broken = seen.clone()
    broken[1, 1] = torch.inf
    learned, plain = Forecast(slopes), Forecast(slopes)
    learned.observe(latents, broken, torch.arange(2))
    learned.observe(latents + images(2, 3, 4) ** 2, seen + 1, torch.arange(2))
    found, expected = learned.error(misses[None])[0], plain.error(misses[None])[0]
    assert float(found[0]) != pytest.approx(float(expected[0]))  # of the other one it has learned
    only_broken = torch.zeros_like(misses)
    only_broken[1, 0] = 1  # is passed on by the broken step, then by one whose rounds were finite
    assert torch.isfinite(learned.error(only_broken[None])).all()


def test_the_forecast_of_a_sample_at_rest_is_what_it_was() -> None:
    """What it takes for its Jacobians is what the rounds have shown in which the sample was at work."""
    latents, seen, misses = (images(2, 3, 4) * scale for scale in (1.0, 0.5, 0.1))
    forecast = Forecast(torch.tensor([[0.9], [0.8], [0.7]], dtype=torch.float64))
    plain = forecast.error(misses[None])[0]
    for _ in range(2):
        latents, seen = latents + images(2, 3, 4) ** 2, seen + 1
        forecast.observe(latents, seen, torch.arange(2))
    before = forecast.error(misses[None])[0]
    for _ in range(3):
        latents[1], seen[1] = latents[1] + misses[1], seen[1] ** 2
        forecast.observe(latents, seen, torch.tensor([1]))
    after = forecast.error(misses[None])[0]
    assert float(after[0]) == float(before[0]) != float(plain[0])
    assert float(after[1]) != float(before[1])


@pytest.mark.parametrize("what", ["image", "parameter"])
def test_gradient_of_x_t_against_finite_differences(what: str) -> None:
    x_0, gain = images(2, 2), torch.tensor(0.2, dtype=torch.float64)

    def x_t(image: Tensor, gain: Tensor, backward: IFT | None = None) -> Tensor:
        def denoiser(x: Tensor, t: Tensor) -> Tensor:
            a = SCHEDULE.alphas_cumprod.to(x)[t].reshape(-1, 1)
            return (1 - a).sqrt() * x + gain * torch.sin(2 * x) * x.roll(1, 1)

        chain = DDIMChain(denoiser, torch.zeros(2, 2).double(), SCHEDULE, steps=6)
        return invert(chain, image, rtol=1e-12, backward=backward).x_T

    given = (x_0 if what == "image" else gain).clone().requires_grad_()
    total = x_t(given, gain, IFT(rtol=1e-10)) if what == "image" else x_t(x_0, given, IFT(rtol=1e-10))
    (total.sin().sum()).backward()
    assert given.grad is not None
    for index in range(given.numel()):
        shift = torch.zeros(given.numel(), dtype=torch.float64)
        shift[index] = 1e-5
        shift = shift.reshape(given.shape)
        ends = [x_t(x_0 + s, gain) if what == "image" else x_t(x_0, gain + s) for s in (shift, -shift)]
        slope = float((ends[0].sin() - ends[1].sin()).sum()) / 2e-5
        assert float(given.grad.flatten()[index]) == pytest.approx(slope, rel=1e-4, abs=1e-6)


def test_low_precision_of_the_denoiser_alone() -> None:
    x_0 = images(2, 3, dtype=torch.float16)
    chain = DDIMChain(lambda x, t: (0.5 * x).to(x.dtype), torch.zeros_like(x_0), SCHEDULE, steps=10)
    inverse = invert(chain, x_0, rtol=1e-2)
    assert inverse.converged.all()
    assert inverse.x_T.dtype == torch.float16


def test_steps_that_do_not_meet_and_a_single_image() -> None:
    a = SCHEDULE.alphas_cumprod
    t = torch.tensor([900, 500, 100])
    transitions = Transitions.between(t, a[t], a[torch.tensor([520, 90, 3])])
    chain = SamplingChain(lambda x, t: 0.5 * x + 0.05 * torch.sin(x), torch.zeros(1, 5).double(), transitions)
    assert invert(chain, images(1, 5), rtol=1e-6).converged.all()


@pytest.mark.parametrize(
    ("x_0", "message"),
    [
        (torch.zeros(2, 4), "shape of x_T"),
        (torch.zeros(2, 3, dtype=torch.int64), "float tensor"),
        (torch.tensor([[0.0] * 3, [float("nan")] * 3]), "not in sample 1"),
        ([0.0], "got list"),
    ],
)
def test_bad_images_are_refused(x_0: Tensor, message: str) -> None:
    chain = DDIMChain(curved, torch.zeros(2, 3), SCHEDULE, steps=5)
    with pytest.raises(ValueError, match=message):
        invert(chain, x_0)
    assert chain.rounds == 0


@pytest.mark.parametrize("method", [ExplicitInverse(), OptimisedInverse(epochs=2)])
def test_gradients_of_a_chain_that_clips_are_refused_before_the_search(method: InverseMethod) -> None:
    chain = DDIMChain(gentle, torch.zeros(2, 3), SCHEDULE, steps=5, clip_sample=1.0)
    with pytest.raises(ValueError, match=r"cannot be inverted.*Or leave backward out"):
        invert(chain, torch.full((2, 3), 0.2), method=method, backward=IFT())
    assert chain.rounds == 0


def test_a_chain_that_clips_is_refused_and_each_advice_works() -> None:
    x_0 = torch.full((2, 3), 0.2)
    chain = DDIMChain(gentle, torch.zeros(2, 3), SCHEDULE, steps=5, clip_sample=1.0)
    for method in METHODS:
        with pytest.raises(ValueError, match="cannot be inverted") as refusal:
            invert(chain, x_0, method=method)  # type: ignore[arg-type]
    assert chain.rounds == 0
    advice = str(refusal.value)
    assert 'DDIMChain(..., clip_sample=float("inf"))' in advice
    assert invert(
        DDIMChain(gentle, torch.zeros(2, 3), SCHEDULE, steps=5, clip_sample=float("inf")), x_0
    ).converged.all()
    assert 'chain_from_scheduler(..., x0_hook=Clip(float("inf")))' in advice
    config = {"_class_name": "DDIMScheduler"}  # which clips unless told otherwise
    unclipped = chain_from_scheduler(gentle, torch.zeros(2, 3), config, steps=5, x0_hook=Clip(float("inf")))
    assert invert(unclipped, x_0).converged.all()
    assert "OptimisedInverse()" in advice
    optimiser = partial(torch.optim.Adam, lr=0.1)
    descent = OptimisedInverse(gradient="sequential", optimiser=optimiser, epochs=100)
    assert invert(chain, x_0, method=descent, rtol=5e-2).converged.all()


@pytest.mark.parametrize("bad", [lambda: ParallelInverse(max_rounds=0), lambda: StepwiseInverse(max_evals=0)])
def test_bad_options_are_refused(bad: object) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        bad()  # type: ignore[operator]
    with pytest.raises(ValueError, match="on_failure"):
        invert(chain_of(images(1, 2)), images(1, 2), on_failure="shout")  # type: ignore[arg-type]


def test_real_digits_come_back() -> None:
    denoiser = embedded("ddpm-digits")
    x_0 = split_held_out(load_digits())[1].images[:2]
    schedule = NoiseSchedule.from_diffusers(denoiser.schedule_config)
    chain = DDIMChain(denoiser, torch.zeros_like(x_0), schedule, steps=50)
    with warnings.catch_warnings():
        warnings.simplefilter("error", fixpoint.ConvergenceWarning)
        inverse = invert(chain, x_0, rtol=1e-2)
    assert inverse.rounds < 20
    assert (inverse.error <= 1e-2).all()


def test_a_generated_image_gives_its_own_noise_back() -> None:
    x_T = torch.randn(2, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    chain = DDIMChain(curved, x_T, SCHEDULE, steps=30)
    inverse = invert(chain, chain.sequential()[:, -1], rtol=1e-8)
    torch.testing.assert_close(inverse.x_T, x_T, rtol=0, atol=1e-5)


def test_steps_are_undone_once_more_where_their_errors_add_up() -> None:
    def growing(x: Tensor, t: Tensor) -> Tensor:
        a = SCHEDULE.alphas_cumprod.to(x)[t].reshape(-1, 1)
        return (1 - a).sqrt() * x - 0.3 * torch.sin(2 * x)

    x_0, method = images(3, 5), StepwiseInverse(solver=fixpoint.Picard())
    chain = DDIMChain(growing, torch.zeros_like(x_0), SCHEDULE, steps=100)
    once, _, met, _ = method._undo_all(InverseProblem(chain, x_0), torch.arange(3), torch.full((3,), 1e-3))
    arrived = chain.sequential(x_T=InverseProblem(chain, x_0).latent(once))[:, -1]
    assert met.all()
    assert (rms(arrived - x_0) > 1e-3).any()  # each step is as near as it should be, and x_0 is not
    inverse = invert(chain, x_0, method=method, rtol=0, atol=1e-3)
    assert inverse.converged.all()
    assert len(inverse.history) > chain.steps
    seen: list[int] = []
    stopped = invert(
        chain,
        x_0,
        method=method,
        rtol=0,
        atol=1e-3,
        on_failure="ignore",
        callback=lambda evals: seen.append(evals) or len(seen) == chain.steps,
    )
    assert len(seen) == chain.steps  # a callback is heard at the last step too
    assert Status.STOPPED in stopped.status.tolist()
    # As a second try too.
    alone, with_it = (ParallelInverse(max_rounds=1, second_try=each) for each in (None, method))
    assert not invert(chain, x_0, method=alone, rtol=0, atol=1e-3, on_failure="ignore").converged.any()
    assert invert(chain, x_0, method=with_it, rtol=0, atol=1e-3).converged.all()


def test_x_t_error_and_trajectory_of_the_best_belong_together() -> None:
    """Also where what was tried last is worse, or no number."""
    x_0 = images(3, 4)
    chain = chain_of(x_0)
    right = invert(chain, x_0, rtol=1e-6).x_T
    problem, everyone, before = InverseProblem(chain, x_0), torch.arange(3), chain.rounds
    best = BestSoFar(problem)
    assert best.consider(everyone, problem.to_coordinates(right)).max() < 1e-5
    worse = problem.to_coordinates(right) + torch.tensor([[1.0], [torch.nan], [0.0]])
    best.consider(everyone, worse)
    found = best.found(torch.zeros(3), [])
    torch.testing.assert_close(found.x_T, right, rtol=0, atol=1e-12)
    assert found.trajectory is not None
    torch.testing.assert_close(found.trajectory, chain.sequential(x_T=right), rtol=0, atol=1e-12)
    assert chain.rounds > before
    assert found.rounds == 0  # running the sampler is no search
