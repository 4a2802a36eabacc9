"""Parallel pipelines against diffusers' own, on small models with random weights."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch import Tensor, nn

import fixpoint
from fixpoint_diffusion import pipelines
from tests.fixpoint_diffusion.tiny import tiny_stable_diffusion, tiny_unet, tiny_vae

TIGHT: dict[str, Any] = {"solver": fixpoint.Picard(), "rtol": 1e-6}


@pytest.fixture(scope="module")
def unet() -> nn.Module:
    torch.manual_seed(0)
    return tiny_unet()


@pytest.fixture(scope="module")
def vae() -> nn.Module:
    torch.manual_seed(1)
    return tiny_vae()


@pytest.fixture(scope="module")
def transformer() -> nn.Module:
    """With a learned variance, which the pipelines cut off; weights that start at zero are shaken awake."""
    torch.manual_seed(2)
    model = diffusers.DiTTransformer2DModel(2, 8, num_layers=1, out_channels=8, norm_num_groups=4, sample_size=4)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model.eval()


@pytest.fixture(scope="module")
def stable_diffusion() -> dict[str, Any]:
    torch.manual_seed(3)
    return tiny_stable_diffusion()


def silent(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def assert_same_images(original: Any, parallel: Any, *args: Any, **kwargs: Any) -> Any:
    """Both called alike, with generators of one seed, global and their own."""
    kwargs = {"num_inference_steps": 7, "output_type": "pt", **kwargs}
    outputs = []
    for pipe, options in ((original, {}), (parallel, TIGHT)):
        torch.manual_seed(11)
        outputs.append(silent(pipe)(*args, generator=torch.Generator().manual_seed(5), **kwargs, **options))
    assert bool(outputs[1].solution.converged.all())
    torch.testing.assert_close(outputs[1].images, outputs[0].images, rtol=1e-5, atol=5e-5)
    return outputs[1]


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"clip_sample": False},
        {"timestep_spacing": "trailing", "prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
        {"timestep_spacing": "linspace", "prediction_type": "sample", "variance_type": "fixed_large"},
        {"steps_offset": 1, "beta_schedule": "squaredcos_cap_v2"},
    ],
)
def test_ddpm_equals_its_original(unet: nn.Module, config: dict[str, Any]) -> None:
    scheduler = DDPMScheduler(**config)
    original, parallel = diffusers.DDPMPipeline(unet, scheduler), pipelines.ParallelDDPMPipeline(unet, scheduler)
    output = assert_same_images(original, parallel, batch_size=2)
    assert isinstance(output, diffusers.ImagePipelineOutput)


@pytest.mark.parametrize(
    ("config", "call"),
    [
        ({}, {}),
        ({}, {"eta": 0.5, "use_clipped_model_output": True}),
        ({"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}, {"eta": 1.0}),
        ({"clip_sample_range": 0.5}, {"eta": 1.001, "num_inference_steps": 20}),
        ({"timestep_spacing": "trailing", "prediction_type": "v_prediction", "rescale_betas_zero_snr": True}, {}),
        ({"timestep_spacing": "linspace", "prediction_type": "sample"}, {"eta": 0.3}),
        ({}, {"num_inference_steps": 1}),
    ],
)
def test_ddim_equals_its_original(unet: nn.Module, config: dict[str, Any], call: dict[str, Any]) -> None:
    scheduler = DDIMScheduler(**config)
    original, parallel = diffusers.DDIMPipeline(unet, scheduler), pipelines.ParallelDDIMPipeline(unet, scheduler)
    assert_same_images(original, parallel, batch_size=2, **call)


@pytest.mark.parametrize("solver", [None, fixpoint.Anderson(), fixpoint.CausalQuasiNewton()])
def test_any_solver_will_do(unet: nn.Module, solver: fixpoint.Solver | None) -> None:
    scheduler = DDIMScheduler(clip_sample=False)
    original, parallel = diffusers.DDIMPipeline(unet, scheduler), pipelines.ParallelDDIMPipeline(unet, scheduler)
    call = {"num_inference_steps": 30, "output_type": "pt"}
    expected = silent(original)(generator=torch.Generator().manual_seed(0), **call).images
    output = silent(parallel)(generator=torch.Generator().manual_seed(0), solver=solver, rtol=1e-5, **call)
    torch.testing.assert_close(output.images, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", [DDIMScheduler, DDPMScheduler])
@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_dit_equals_its_original(transformer: nn.Module, vae: nn.Module, kind: type, guidance_scale: float) -> None:
    """DDPM's noise comes from the global generator here, and for both halves of a guided batch."""
    parts = (transformer, vae, kind(clip_sample=False))
    original, parallel = diffusers.DiTPipeline(*parts), pipelines.ParallelDiTPipeline(*parts)
    assert_same_images(original, parallel, [3, 7], guidance_scale=guidance_scale)


@pytest.mark.parametrize(
    "call",
    [
        {},
        {"guidance_scale": 1.0, "eta": 1.0},
        {"guidance_scale": 3.0, "guidance_rescale": 0.7, "eta": 0.5, "negative_prompt": "bad"},
        {"prompt": ["a cat", "a dog"], "negative_prompt": ["b", "c"], "num_images_per_prompt": 2},
        {"latents": torch.ones(1, 4, 4, 4), "cross_attention_kwargs": {}, "height": 8, "width": 8},
        {
            "scheduler": DDPMScheduler(clip_sample=False, steps_offset=1),
            "num_inference_steps": None,
            "timesteps": [900, 500, 90, 3],
        },
    ],
)
def test_stable_diffusion_equals_its_original(stable_diffusion: dict[str, Any], call: dict[str, Any]) -> None:
    call = dict(call)
    parts = {**stable_diffusion, "scheduler": call.pop("scheduler", stable_diffusion["scheduler"])}
    original = diffusers.StableDiffusionPipeline(**parts)
    parallel = pipelines.ParallelStableDiffusionPipeline(**parts)
    output = assert_same_images(original, parallel, **{"prompt": "a cat", **call})
    assert output.nsfw_content_detected is None
    assert parallel.guidance_scale == original.guidance_scale
    assert parallel.num_timesteps == original.num_timesteps


def test_images_come_in_every_form_that_the_original_knows(unet: nn.Module) -> None:
    original = silent(diffusers.DDIMPipeline(unet, DDIMScheduler()))
    parallel = silent(pipelines.ParallelDDIMPipeline(unet, DDIMScheduler()))
    for output_type in ("pil", "np"):
        call = {"num_inference_steps": 3, "output_type": output_type, "return_dict": False}
        expected = original(generator=torch.Generator().manual_seed(0), **call)
        found = parallel(generator=torch.Generator().manual_seed(0), **call, **TIGHT)
        assert isinstance(found, tuple)
        assert len(found) == len(expected) == 1
        np.testing.assert_allclose(np.asarray(found[0][0]), np.asarray(expected[0][0]), atol=1.01)


def test_pipelines_come_from_folders_and_from_pipelines_and_go_back(unet: nn.Module, tmp_path: Path) -> None:
    original = silent(diffusers.DDIMPipeline(unet, DDIMScheduler()))
    original.save_pretrained(tmp_path / "original")
    loaded = pipelines.ParallelDDIMPipeline.from_pretrained(tmp_path / "original")
    assert_same_images(original, loaded)
    taken = pipelines.ParallelDDIMPipeline.from_pipe(original)
    assert taken.unet is original.unet
    assert_same_images(original, taken)
    taken.save_pretrained(tmp_path / "parallel")
    assert type(diffusers.DiffusionPipeline.from_pretrained(tmp_path / "parallel")) is diffusers.DDIMPipeline


def test_stable_diffusion_comes_from_a_folder(stable_diffusion: dict[str, Any], tmp_path: Path) -> None:
    original = diffusers.StableDiffusionPipeline(**stable_diffusion)
    original.save_pretrained(tmp_path)
    loaded = pipelines.ParallelStableDiffusionPipeline.from_pretrained(tmp_path)
    assert_same_images(original, loaded, "a cat", guidance_scale=2.0)


def test_output_says_what_it_cost(unet: nn.Module) -> None:
    """Every row that the network saw is counted, no call has more than allowed, and rounds are fewer than steps."""
    sizes: list[int] = []
    pipe = silent(pipelines.ParallelDDIMPipeline(unet, DDIMScheduler(clip_sample=False)))
    hook = unet.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    output = pipe(batch_size=2, generator=torch.Generator().manual_seed(0), rtol=1e-3, max_rows=16)
    hook.remove()
    assert output.rounds < 50
    assert sizes.pop(1) == 3  # the check of the network
    assert output.evals == sum(sizes)
    assert max(sizes) <= 16
    assert output.solution.value.shape == (2, 50, 1, 8, 8)


def test_scheduler_is_refused_before_anything_is_done(unet: nn.Module) -> None:
    pipe = pipelines.ParallelDDPMPipeline(unet, diffusers.PNDMScheduler())
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match="PNDMScheduler cannot be solved in parallel"):
        pipe()
    assert torch.equal(state, torch.get_rng_state())


def test_unknown_arguments_are_refused(unet: nn.Module) -> None:
    with pytest.raises(TypeError, match="num_steps"):
        pipelines.ParallelDDIMPipeline(unet, DDIMScheduler())(num_steps=3)
    with pytest.raises(ValueError, match=r"latents must be a tensor \(B, \*shape\), got list"):
        pipelines.ParallelDDIMPipeline(unet, DDIMScheduler())(latents=[1.0])


class Broken(nn.Module):
    """A network that fails, beside what pipelines read from one."""

    def __init__(self, like: nn.Module, error: str) -> None:
        super().__init__()
        self.config, self.dtype, self.device, self.error = like.config, like.dtype, like.device, error

    def forward(self, x: Tensor, t: Tensor, **_: Any) -> Any:
        if self.error == "raises":
            raise RuntimeError("out of luck")
        if self.error == "shape":
            return x[..., :-1]
        return torch.where(x.flatten(1).mean(1).reshape(-1, 1, 1, 1) > 10, torch.nan, torch.tanh(x))


def test_pipeline_is_itself_again_when_the_network_or_the_original_fails(unet: nn.Module) -> None:
    broken = Broken(unet, "raises")
    pipe = silent(pipelines.ParallelDDIMPipeline(broken, DDIMScheduler()))
    scheduler = pipe.scheduler
    with pytest.raises(RuntimeError, match="out of luck"):
        pipe()
    with pytest.raises(ValueError, match="list of generators"):
        pipe(generator=[torch.Generator()] * 3)
    assert pipe.unet is broken
    assert pipe.scheduler is scheduler


def test_networks_that_return_another_shape_are_told_so(unet: nn.Module) -> None:
    pipe = silent(pipelines.ParallelDDIMPipeline(Broken(unet, "shape"), DDIMScheduler()))
    with pytest.raises(ValueError, match="must return the shape of its input"):
        pipe(num_inference_steps=3)


def test_one_image_that_breaks_spoils_no_other(stable_diffusion: dict[str, Any]) -> None:
    parts = {**stable_diffusion, "unet": Broken(stable_diffusion["unet"], "nan")}
    parts["unet"].encoder_hid_proj = None
    call = {"prompt": "a cat", "guidance_scale": 1.0, "output_type": "latent", "num_inference_steps": 5, **TIGHT}
    pipe = silent(pipelines.ParallelStableDiffusionPipeline(**parts))
    good, bad = torch.ones(1, 4, 4, 4), torch.full((1, 4, 4, 4), 30.0)
    alone = pipe(latents=good, **call)
    with pytest.warns(fixpoint.ConvergenceWarning, match="1 NON_FINITE"):
        both = pipe(num_images_per_prompt=2, latents=torch.cat([bad, good]), **call)
    assert both.solution.status.tolist() == [fixpoint.Status.NON_FINITE, fixpoint.Status.CONVERGED]
    torch.testing.assert_close(both.images[1:], alone.images, rtol=1e-5, atol=1e-5)


def test_settings_that_no_chain_has_are_refused(unet: nn.Module) -> None:
    pipe = silent(pipelines.ParallelDDIMPipeline(unet, DDIMScheduler()))
    with pytest.raises(ValueError, match="largest legal eta"):
        pipe(eta=9.0)
    pipe.scheduler = DDIMScheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing")
    with pytest.raises(ValueError, match="timestep 999 holds no signal"):
        pipe()
    pipe.scheduler = DDPMScheduler()
    with pytest.raises(ValueError, match="cannot be larger"):
        pipe(num_inference_steps=1001)


def test_repeated_timesteps_are_refused(stable_diffusion: dict[str, Any]) -> None:
    parts = {**stable_diffusion, "scheduler": DDPMScheduler(clip_sample=False, steps_offset=1)}
    with pytest.raises(ValueError, match="descending order"):
        pipelines.ParallelStableDiffusionPipeline(**parts)("a", num_inference_steps=None, timesteps=[900, 900, 3])


def test_half_precision_networks_keep_latents_in_single_precision(unet: nn.Module) -> None:
    half = copy.deepcopy(unet).half()
    call = {"num_inference_steps": 7, "output_type": "pt", "eta": 0.5}
    noise = torch.Generator().manual_seed(5)
    original = silent(diffusers.DDIMPipeline(half, DDIMScheduler()))(generator=noise, **call).images
    noise.manual_seed(5)
    output = silent(pipelines.ParallelDDIMPipeline(half, DDIMScheduler()))(generator=noise, **call, **TIGHT)
    assert output.images.dtype == torch.float16
    assert output.solution.value.dtype == torch.float32
    torch.testing.assert_close(output.images, original, rtol=0, atol=0.02)


def test_constructors_are_those_of_the_originals() -> None:
    for name in pipelines.__all__:
        kind = getattr(pipelines, name)
        if name.endswith("Pipeline") and name != "ParallelPipeline":
            original = getattr(diffusers, name.removeprefix("Parallel"))
            assert issubclass(kind, original)
            assert inspect.signature(kind.__init__) == inspect.signature(original.__init__)
