"""``invert`` of the parallel pipelines, on small models with random weights."""

from __future__ import annotations

import copy
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler, DDPMScheduler
from torch import Tensor

import fixpoint
from fixpoint_diffusion import ExplicitInverse, StepwiseInverse, pipelines
from tests.fixpoint_diffusion.tiny import NearlyGaussian, tiny_stable_diffusion, tiny_unet, tiny_vae

PLAIN = {"clip_sample": False}
CALL: dict[str, Any] = {"num_inference_steps": 7, "output_type": "pt"}
TIGHT: dict[str, Any] = {"solver": fixpoint.Picard(), "rtol": 1e-6}


def silent(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def ddim() -> Any:
    torch.manual_seed(0)
    scheduler = DDIMScheduler(**PLAIN)
    return silent(pipelines.ParallelDDIMPipeline(NearlyGaussian(tiny_unet(), scheduler), scheduler))


@pytest.fixture(scope="module")
def dit() -> Any:
    torch.manual_seed(2)
    model = diffusers.DiTTransformer2DModel(2, 8, num_layers=1, out_channels=4, norm_num_groups=4, sample_size=4)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    scheduler = DDIMScheduler(**PLAIN)
    return silent(pipelines.ParallelDiTPipeline(NearlyGaussian(model.eval(), scheduler), tiny_vae(), scheduler))


@pytest.fixture(scope="module")
def stable_diffusion() -> Any:
    torch.manual_seed(3)
    parts = tiny_stable_diffusion()
    parts["unet"] = NearlyGaussian(parts["unet"], parts["scheduler"])
    return silent(pipelines.ParallelStableDiffusionPipeline(**parts))


def pictures(count: int, channels: int = 3) -> Tensor:
    return torch.rand(count, channels, 8, 8, generator=torch.Generator().manual_seed(0))


def test_an_image_goes_through_a_latent_pipeline_and_comes_back(stable_diffusion: Any) -> None:
    images, call = pictures(2), {**CALL, "prompt": "a cat", "negative_prompt": "bad"}
    result = stable_diffusion.invert(images, rtol=0, atol=3e-5, **call)
    assert result.inverse.converged.all()
    vae = stable_diffusion.vae
    with torch.no_grad():
        latents = vae.encode(2 * images - 1).latent_dist.mode() * vae.config.scaling_factor
        decoded = vae.decode(latents / vae.config.scaling_factor).sample
    back = stable_diffusion(
        latents=result.latents,
        guidance_scale=1.0,
        num_images_per_prompt=2,
        **{**call, "output_type": "latent"},
        **TIGHT,
    )
    torch.testing.assert_close(back.images, latents, rtol=0, atol=1e-4)
    torch.testing.assert_close(result.images, (decoded / 2 + 0.5).clamp(0, 1), rtol=0, atol=1e-3)
    loss = (decoded - (2 * images - 1)).square().mean(dim=(1, 2, 3)).sqrt()
    torch.testing.assert_close(result.vae_error, loss.double(), rtol=1e-4, atol=0)
    assert (result.vae_error > 0.1).all()  # of random weights; it is no part of the error of the inversion
    assert (result.inverse.error < 1e-4).all()


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_each_image_has_its_own_prompt_and_guidance_is_that_of_the_call(stable_diffusion: Any, guidance: float) -> None:
    call = {**CALL, "prompt": ["a cat", "a dog"], "guidance_scale": guidance, "output_type": "latent"}
    x_0 = 0.3 * torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    result = stable_diffusion.invert(x_0, rtol=0, atol=3e-5, **call)
    assert result.vae_error is None
    torch.testing.assert_close(stable_diffusion(latents=result.latents, **call, **TIGHT).images, x_0, rtol=0, atol=1e-4)
    other = {**call, "guidance_scale": guidance + 4}
    edited = stable_diffusion(latents=result.latents, **other, **TIGHT).images
    assert float((edited - x_0).abs().max()) > 1e-3


def test_plain_inversion_is_that_of_diffusers_scheduler(stable_diffusion: Any) -> None:
    pipe, x_0 = stable_diffusion, 0.3 * torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    inverse = DDIMInverseScheduler.from_config(pipe.scheduler.config)
    inverse.set_timesteps(7)
    with torch.no_grad():
        prompts, _ = pipe.encode_prompt("a cat", "cpu", 1, False)
        x = x_0
        for t in inverse.timesteps:
            x = inverse.step(pipe.unet(x, t, encoder_hidden_states=prompts).sample, t, x).prev_sample
    result = pipe.invert(x_0, method=ExplicitInverse(), on_failure="ignore", prompt="a cat", **CALL)
    torch.testing.assert_close(result.latents, x, rtol=0, atol=1e-5)
    exact = pipe.invert(x_0, rtol=1e-4, prompt="a cat", **CALL)
    assert (exact.inverse.error < result.inverse.error / 5).all()


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_classes_of_a_transformer(dit: Any, guidance: float) -> None:
    call = {**CALL, "class_labels": [3, 7], "guidance_scale": guidance}
    made = dit(generator=torch.Generator().manual_seed(0), **call, **TIGHT)
    x_0 = made.solution.value[:, -1]
    result = dit.invert(x_0, rtol=0, atol=3e-5, **call)
    back = dit(latents=result.latents, **call, **TIGHT)
    torch.testing.assert_close(back.solution.value[:, -1], x_0, rtol=0, atol=1e-4)
    torch.testing.assert_close(back.images, made.images, rtol=0, atol=1e-3)


@pytest.mark.parametrize("form", ["pil", "one pil", "np", "pt", "list of pt"])
def test_images_may_have_any_form_that_the_pipeline_returns(ddim: Any, form: str) -> None:
    image = (pictures(2, 1) * 255).round() / 255
    pil = ddim.numpy_to_pil(image.permute(0, 2, 3, 1).numpy())
    given = {
        "pil": pil,
        "one pil": pil[0],
        "np": image.permute(0, 2, 3, 1).numpy(),
        "pt": image,
        "list of pt": list(image),
    }[form]
    result = ddim.invert(given, rtol=1e-4, **CALL)
    expected = image[:1] if form == "one pil" else image
    torch.testing.assert_close(result.images, expected, rtol=0, atol=1e-3)
    torch.testing.assert_close(ddim(latents=result.latents, **CALL, **TIGHT).images, expected, rtol=0, atol=1e-3)
    shown = ddim.invert(given, rtol=1e-4, num_inference_steps=7).images[0]
    assert np.abs(np.asarray(shown, dtype=float) - np.asarray(pil[0], dtype=float)).max() <= 1


def test_noise_is_that_of_the_generator(ddim: Any) -> None:
    image, call = pictures(2, 1), {**CALL, "eta": 0.5}
    result = ddim.invert(image, rtol=0, atol=3e-5, generator=torch.Generator().manual_seed(4), **call)
    back = ddim(latents=result.latents, generator=torch.Generator().manual_seed(4), **call, **TIGHT)
    torch.testing.assert_close(back.images, image, rtol=0, atol=1e-3)
    with pytest.raises(ValueError, match="pass generator="):
        ddim.invert(image, **call)


def test_noise_that_no_generator_decides_is_refused(dit: Any) -> None:
    """The message asked for the generator that had been given: diffusers' loop does not pass it on."""
    pipe = silent(pipelines.ParallelDiTPipeline(dit.transformer, dit.vae, DDPMScheduler(clip_sample=False)))
    call = {"class_labels": [3], "num_inference_steps": 2, "generator": torch.Generator().manual_seed(4)}
    with pytest.raises(ValueError, match=r"global random state.* pipe\.scheduler = DDIM"):
        pipe.invert(pictures(1), **call)


def test_nothing_is_kept_and_nothing_is_drawn(stable_diffusion: Any, ddim: Any) -> None:
    for pipe, call in ((stable_diffusion, {"prompt": "a cat"}), (ddim, {})):
        image = pictures(1, 3 if call else 1)
        pipe(**CALL, **call)
        before, timesteps, state = dict(vars(pipe)), pipe.scheduler.timesteps, torch.get_rng_state()
        pipe.invert(image, rtol=1e-2, **{**CALL, "num_inference_steps": 3}, **call)
        assert vars(pipe) == before
        assert pipe.scheduler.timesteps is timesteps
        assert torch.equal(state, torch.get_rng_state())


def test_threads_do_not_disturb_each_other(ddim: Any) -> None:
    images, meeting = pictures(3, 1), threading.Barrier(3)

    def work(number: int) -> Tensor:
        meeting.wait(timeout=60)
        call = {**CALL, "num_inference_steps": 4 + number}
        if number == 2:
            return ddim(batch_size=1, generator=torch.Generator().manual_seed(0), **call, **TIGHT).images
        return ddim.invert(images[number], rtol=1e-4, **call).latents

    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(work, range(3)))
    meeting = threading.Barrier(1)
    for number, found in enumerate(together):
        torch.testing.assert_close(found, work(number))


def test_half_precision_networks_keep_latents_in_single_precision(ddim: Any) -> None:
    pipe = silent(pipelines.ParallelDDIMPipeline(copy.deepcopy(ddim.unet).half(), DDIMScheduler(**PLAIN)))
    image = pictures(2, 1)
    result = pipe.invert(image, rtol=1e-2, **CALL)
    assert result.latents.dtype == torch.float32
    assert result.images.dtype == torch.float16
    assert result.inverse.converged.all()

    def off(latents: Tensor) -> float:
        back = pipe(latents=latents, **CALL, **TIGHT).solution.value[:, -1]
        return float((back - result.inverse.reconstruction).norm())

    # Rounded to half precision, x_T does not lead back as closely. (The network rounds a few outputs otherwise, too.)
    assert off(result.latents) < off(result.latents.half().float()) / 3


def test_one_image_that_cannot_be_inverted_spoils_no_other(ddim: Any) -> None:
    pipe, image = copy.copy(ddim), pictures(2, 1)
    pipe.unet = Broken(ddim.unet.network, ddim.scheduler)
    image[1] = 1.0
    with pytest.warns(fixpoint.ConvergenceWarning, match="1 of 2 samples were not inverted"):
        both = pipe.invert(image, rtol=1e-4, **CALL)
    assert both.inverse.converged.tolist() == [True, False]
    alone = pipe.invert(image[:1], rtol=1e-4, **CALL)
    torch.testing.assert_close(both.latents[:1], alone.latents, rtol=1e-4, atol=1e-4)


class Broken(NearlyGaussian):
    """Gives no numbers for bright images."""

    def forward(self, x: Tensor, timestep: Tensor, *, return_dict: bool = True, **inputs: Any) -> Any:
        out = super().forward(x, timestep)
        out.sample = torch.where(x.mean(dim=(1, 2, 3), keepdim=True) > 0.9, torch.nan, out.sample)
        return out if return_dict else (out.sample,)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (2 * pictures(1, 1) - 1, "values from 0 to 1, got -"),
        (pictures(2, 1) + torch.tensor([0.0, torch.nan]).reshape(2, 1, 1, 1), "not in image 1"),
        (torch.zeros(1, 1, 8, 8, dtype=torch.int64), "torch.int64"),
        (np.zeros((1, 8, 8, 1), dtype=np.uint8), "torch.uint8"),
        (pictures(1, 3), "samples of the shape"),
        (pictures(1, 1)[..., :4], "samples of the shape"),
        ("image.png", "got str"),
        ([], "got list"),
    ],
)
def test_what_is_no_image_is_refused(ddim: Any, image: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ddim.invert(image, **CALL)


def test_numbers_that_do_not_fit_are_refused(ddim: Any, dit: Any, stable_diffusion: Any) -> None:
    with pytest.raises(ValueError, match="samples of the shape"):
        dit.invert(pictures(3), class_labels=[1, 2], **CALL)
    with pytest.raises(ValueError, match="3 latents, but encoder_hidden_states for 2"):
        stable_diffusion.invert(pictures(3), prompt=["a", "b"], guidance_scale=3.0, **CALL)
    with pytest.raises(ValueError, match="sides that are multiples of 2"):
        stable_diffusion.invert(pictures(1)[..., :7], prompt="a", **CALL)
    with pytest.raises(ValueError, match="invert takes no latents"):
        ddim.invert(pictures(1, 1), latents=pictures(1, 1), **CALL)
    with pytest.raises(ValueError, match="samples of the shape"):
        ddim(batch_size=2, latents=torch.zeros(1, 1, 8, 8), **CALL)


def test_clipping_is_refused_and_the_advice_works(ddim: Any) -> None:
    pipe = silent(pipelines.ParallelDDIMPipeline(ddim.unet, DDIMScheduler()))
    with pytest.raises(ValueError, match="cannot be inverted") as refusal:
        pipe.invert(pictures(1, 1), **CALL)
    code = str(refusal.value).rpartition(": ")[2]
    plain = pipe.invert(pictures(1, 1), method=ExplicitInverse(), on_failure="ignore", **CALL)
    assert plain.inverse.rounds == CALL["num_inference_steps"]  # which clips on its way, and undoes nothing
    exec(code, {"pipe": pipe, "DDIMScheduler": DDIMScheduler})
    assert pipe.invert(pictures(1, 1), **CALL).inverse.converged.all()


def test_a_method_and_a_callback_of_ones_own(ddim: Any) -> None:
    image, seen = pictures(1, 1), list[Any]()
    assert ddim.invert(image, method=StepwiseInverse(), **CALL).inverse.converged.all()

    def stop(entry: Any) -> bool:
        seen.append(entry)
        return len(seen) == 2

    result = ddim.invert(image, rtol=1e-12, callback=stop, on_failure="ignore", **CALL)
    assert result.inverse.rounds == 2
    assert result.inverse.status.tolist() == [fixpoint.Status.STOPPED]
    assert result.latents.isfinite().all()


def test_rows_are_bounded_and_counted(ddim: Any) -> None:
    sizes: list[int] = []
    hook = ddim.unet.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    closely = {"rtol": 1e-5, **CALL}  # what is found is determined as far as it was asked for
    bounded = ddim.invert(pictures(2, 1), max_rows=5, **closely)
    hook.remove()
    assert max(sizes) == 5
    assert sizes[1] == 3  # the check of the network
    # Beside the search, the ordinary sampler runs from what it found.
    assert sum(sizes) - 3 - bounded.inverse.evals >= 2 * 7
    found = ddim.invert(pictures(2, 1), **closely)
    torch.testing.assert_close(found.latents, bounded.latents, rtol=1e-4, atol=1e-4)


def test_latents_to_start_from(ddim: Any, dit: Any) -> None:
    """diffusers' own pipelines of these two models take none."""
    for pipe, call, x_T in (
        (ddim, {}, torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(5))),
        (dit, {"class_labels": [1, 2]}, torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(5))),
    ):
        made = pipe(
            generator=torch.Generator().manual_seed(5),
            **({"batch_size": 2} | CALL if not call else call | CALL),
            **TIGHT,
        )
        given = pipe(latents=x_T, **call, **CALL, **TIGHT)
        torch.testing.assert_close(given.images, made.images)
