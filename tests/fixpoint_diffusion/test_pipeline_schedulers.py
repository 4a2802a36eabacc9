"""Transitions and noise of diffusers' schedulers, against the schedulers' own loops, step by step."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fixpoint_diffusion import SamplingChain
from fixpoint_diffusion.pipelines import ParallelDDPMPipeline
from fixpoint_diffusion.pipelines.schedulers import check_scheduler, scheduler_noise, scheduler_transitions
from tests.fixpoint_diffusion.tiny import tiny_unet

X_T = torch.randn(2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
PREDICTIONS = st.sampled_from(["epsilon", "v_prediction", "sample"])
SPACINGS = st.sampled_from(["leading", "trailing", "linspace"])
STEPS = st.sampled_from([1, 2, 7, 30])  # 7 and 30 do not divide 1000


def denoiser(x: Tensor, t: Tensor) -> Tensor:
    """Anything smooth that leaves the range of the images, so that clipping has something to do."""
    return 1.5 * torch.tanh(x.roll(1, dims=1)) + (t / 2000).reshape(-1, 1)


def in_float64(scheduler: Any) -> Any:
    """The scheduler with the same levels, but arithmetic that rounds where it can be seen."""
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    if hasattr(scheduler, "final_alpha_cumprod"):
        scheduler.final_alpha_cumprod = scheduler.final_alpha_cumprod.double()
    else:
        scheduler.one = scheduler.one.double()
    return scheduler


def loop(scheduler: Any, generator: Any = None, **options: Any) -> Tensor:
    """All latents of diffusers' own loop."""
    x, latents = X_T, []
    for t in scheduler.timesteps:
        x = scheduler.step(denoiser(x, t.expand(2)), t, x, generator=generator, **options).prev_sample
        latents.append(x)
    return torch.stack(latents, dim=1)


def chain_of(scheduler: Any, generator: Any = None, eta: float = 0.0, **options: Any) -> SamplingChain:
    noise = scheduler_noise(
        scheduler, (2, 3), eta=eta, generator=generator, dtype=torch.float64, device=torch.device("cpu")
    )
    return SamplingChain(denoiser, X_T, scheduler_transitions(scheduler, eta=eta, **options), noise=noise)


def assert_equal_to_the_loop(scheduler: Any, **options: Any) -> None:
    expected = loop(scheduler, torch.Generator().manual_seed(1), **options)
    chain = chain_of(scheduler, torch.Generator().manual_seed(1), **options)
    torch.testing.assert_close(chain.sequential(), expected, rtol=1e-9, atol=1e-9)
    # The cumulative form too, where steps do not arrive at the level that the next one starts from.
    torch.testing.assert_close(chain(expected), expected, rtol=1e-8, atol=1e-8)


@settings(max_examples=150)
@given(
    spacing=SPACINGS,
    prediction_type=PREDICTIONS,
    steps=STEPS,
    clip=st.sampled_from([None, 0.8]),
    use_clipped_model_output=st.booleans(),
    set_alpha_to_one=st.booleans(),
    steps_offset=st.sampled_from([0, 1]),
    eta=st.sampled_from([0.0, 0.4, 1.0]),
)
def test_ddim_steps_are_those_of_diffusers(
    spacing: str,
    prediction_type: str,
    steps: int,
    clip: float | None,
    use_clipped_model_output: bool,
    set_alpha_to_one: bool,
    steps_offset: int,
    eta: float,
) -> None:
    scheduler = DDIMScheduler(
        timestep_spacing=spacing,
        prediction_type=prediction_type,
        clip_sample=clip is not None,
        clip_sample_range=clip or 1.0,
        set_alpha_to_one=set_alpha_to_one,
        steps_offset=steps_offset,
    )
    scheduler.set_timesteps(steps)
    assert_equal_to_the_loop(in_float64(scheduler), eta=eta, use_clipped_model_output=use_clipped_model_output)


@settings(max_examples=100)
@given(
    spacing=SPACINGS,
    prediction_type=PREDICTIONS,
    steps=STEPS,
    clip=st.sampled_from([None, 0.8]),
    variance_type=st.sampled_from(["fixed_small", "fixed_small_log", "fixed_large"]),
    steps_offset=st.sampled_from([0, 1]),
)
def test_ddpm_steps_are_those_of_diffusers(
    spacing: str, prediction_type: str, steps: int, clip: float | None, variance_type: str, steps_offset: int
) -> None:
    scheduler = DDPMScheduler(
        timestep_spacing=spacing,
        prediction_type=prediction_type,
        clip_sample=clip is not None,
        clip_sample_range=clip or 1.0,
        variance_type=variance_type,
        steps_offset=steps_offset,
    )
    scheduler.set_timesteps(steps)
    assert_equal_to_the_loop(in_float64(scheduler))


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
def test_ddpm_takes_timesteps_of_ones_own(variance_type: str) -> None:
    scheduler = DDPMScheduler(variance_type=variance_type)
    scheduler.set_timesteps(timesteps=[900, 333, 20, 19])
    assert_equal_to_the_loop(in_float64(scheduler))


@pytest.mark.parametrize("kind", [DDIMScheduler, DDPMScheduler])
@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_steps_from_pure_noise_are_those_of_diffusers(kind: type, prediction_type: str) -> None:
    scheduler = kind(rescale_betas_zero_snr=True, timestep_spacing="trailing", prediction_type=prediction_type)
    scheduler.set_timesteps(10)
    assert float(scheduler.alphas_cumprod[scheduler.timesteps[0]]) == 0
    assert_equal_to_the_loop(in_float64(scheduler))


def test_pure_noise_says_nothing_to_a_prediction_of_noise() -> None:
    """Where diffusers' loop divides by zero."""
    scheduler = DDIMScheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing", clip_sample=False)
    scheduler.set_timesteps(10)
    assert not bool(loop(scheduler).isfinite().all())
    with pytest.raises(ValueError, match="timestep 999 holds no signal"):
        scheduler_transitions(scheduler)


def test_eta_above_one_is_served_as_far_as_there_is_a_variance() -> None:
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(20)
    assert_equal_to_the_loop(in_float64(scheduler), eta=1.001)
    assert not bool(loop(scheduler, eta=9.0).isfinite().all())
    with pytest.raises(ValueError, match="largest legal eta"):
        scheduler_transitions(scheduler, eta=9.0)


def test_an_eta_that_the_scheduler_ignores_is_ignored() -> None:
    scheduler = diffusers.CogVideoXDDIMScheduler()
    scheduler.set_timesteps(5)
    assert_equal_to_the_loop(in_float64(scheduler), eta=0.7)
    assert chain_of(scheduler, torch.Generator().manual_seed(0), eta=0.7).noise is None


def test_one_generator_for_each_image_draws_what_the_loop_draws() -> None:
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(5)
    first, second = ([torch.Generator().manual_seed(i) for i in (3, 4)] for _ in range(2))
    expected = loop(in_float64(scheduler), first, eta=1.0)
    torch.testing.assert_close(chain_of(scheduler, second, eta=1.0).sequential(), expected, rtol=1e-9, atol=1e-9)


def test_nothing_is_drawn_for_a_deterministic_loop() -> None:
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(5)
    generator = torch.Generator().manual_seed(0)
    assert chain_of(scheduler, generator).noise is None
    assert torch.equal(generator.get_state(), torch.Generator().manual_seed(0).get_state())


def test_noise_has_the_channels_of_the_images_where_the_network_predicts_variances_too() -> None:
    noises = []
    for variance_type, channels in (("fixed_small", 3), ("learned_range", 6)):
        scheduler = DDPMScheduler(variance_type=variance_type)
        scheduler.set_timesteps(5)
        noises.append(
            scheduler_noise(
                scheduler,
                (2, channels, 4),
                generator=torch.Generator().manual_seed(0),
                dtype=torch.float64,
                device=torch.device("cpu"),
            )
        )
    assert torch.equal(*noises)


def test_timesteps_beyond_the_schedule_are_refused() -> None:
    """An offset moves the first of a thousand steps to 1000, where diffusers' loop runs out of its table."""
    scheduler = DDIMScheduler(steps_offset=1)
    scheduler.set_timesteps(1000)
    with pytest.raises(ValueError, match=r"descend strictly within 0 \.\. 999"):
        scheduler_transitions(scheduler)


class OtherSteps(DDIMScheduler):
    """A subclass may step in any way."""


SOLVERS = [
    diffusers.PNDMScheduler,
    diffusers.KDPM2DiscreteScheduler,
    diffusers.DEISMultistepScheduler,
    diffusers.LMSDiscreteScheduler,
]
LATENT = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "timestep_spacing": "leading"}


@pytest.mark.parametrize("kind", SOLVERS)
def test_the_advice_for_other_solvers_works_on_latents(kind: type) -> None:
    """Followed to the letter, on data far beyond [-1, 1]: diffusers' loop, and the exact flow of that data."""
    pipe = SimpleNamespace(scheduler=kind(**LATENT, steps_offset=1))
    with pytest.raises(ValueError, match=f"the steps of {kind.__name__} cannot be solved in parallel") as caught:
        check_scheduler(pipe.scheduler)
    _, advice = str(caught.value).split("pipe.scheduler = ")
    pipe.scheduler = eval(advice, {"DDIMScheduler": DDIMScheduler, "pipe": pipe})
    check_scheduler(pipe.scheduler)

    mean, levels = 9.0, pipe.scheduler.alphas_cumprod.double()

    def latents(x: Tensor, t: Tensor) -> Tensor:
        """The noise in latents that all have one value."""
        a = levels[t].reshape(-1, 1)
        return (x - a.sqrt() * mean) / (1 - a).sqrt()

    pipe.scheduler.set_timesteps(20)
    x = X_T
    for t in in_float64(pipe.scheduler).timesteps:
        x = pipe.scheduler.step(latents(x, t.expand(2)), t, x).prev_sample
    chain = SamplingChain(latents, X_T, scheduler_transitions(pipe.scheduler))
    torch.testing.assert_close(chain.sequential()[:, -1], x, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(x, torch.full_like(x, mean), rtol=0.05, atol=0)


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (OtherSteps(), "the scheduler OtherSteps is not known"),
        (diffusers.FlowMatchHeunDiscreteScheduler(), "FlowMatchHeunDiscreteScheduler describes a flow"),
        (diffusers.LMSDiscreteScheduler(use_karras_sigmas=True), "with use_karras_sigmas=True cannot be honoured"),
        (diffusers.UniPCMultistepScheduler(predict_x0=False), "predict_x0=False cannot be honoured"),
        (DDPMScheduler(variance_type="fixed_large_log"), "with variance_type='fixed_large_log' cannot be honoured"),
    ],
)
def test_schedulers_that_cannot_be_read_are_named(scheduler: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_scheduler(scheduler)


@pytest.mark.parametrize(
    "scheduler",
    [
        DDIMScheduler(thresholding=True),
        DDPMScheduler(variance_type="fixed_large"),
        DDPMScheduler(variance_type="learned_range", thresholding=True),
        diffusers.DDIMParallelScheduler(),
        diffusers.CogVideoXDDIMScheduler(),
        diffusers.FlowMatchEulerDiscreteScheduler(),
        diffusers.EulerDiscreteScheduler(use_karras_sigmas=True),
    ],
)
def test_schedulers_that_can_be_served_pass(scheduler: Any) -> None:
    check_scheduler(scheduler)


@pytest.mark.parametrize("variance_type", ["learned_range", "fixed_large"])
def test_the_pipeline_of_a_network_that_predicts_variances_is_that_of_diffusers(variance_type: str) -> None:
    torch.manual_seed(0)
    unet = tiny_unet(out_channels=2 if variance_type == "learned_range" else 1)
    scheduler = DDPMScheduler(variance_type=variance_type, thresholding=True, sample_max_value=1.5)
    images = []
    for kind in (diffusers.DDPMPipeline, ParallelDDPMPipeline):
        pipe = kind(unet, scheduler)
        pipe.set_progress_bar_config(disable=True)
        options = {"batch_size": 2, "num_inference_steps": 8, "output_type": "np"}
        images.append(torch.from_numpy(pipe(generator=torch.manual_seed(1), **options).images))
    torch.testing.assert_close(images[1], images[0], rtol=0, atol=2e-3)
