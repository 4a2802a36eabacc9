"""Parallel pipelines of today's models against diffusers' own, on small models with random weights."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

import fixpoint
from fixpoint_diffusion import pipelines
from fixpoint_diffusion.pipelines import Guidance
from fixpoint_diffusion.pipelines.stand_ins import Listener, OneStep
from tests.fixpoint_diffusion.tiny import awake, tiny_pipeline

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

TIGHT: dict[str, Any] = {"solver": fixpoint.Picard(), "rtol": 1e-6}


def embeddings(*names: str, count: int = 1) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(3)
    shapes = {name: (count, 8) if "pooled" in name else (count, 5, 8) for name in names}
    return {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}


PROMPT = ("prompt_embeds", "pooled_prompt_embeds")
BOTH = (*PROMPT, "negative_prompt_embeds", "negative_pooled_prompt_embeds")
SD3, FLUX, XL = "StableDiffusion3Pipeline", "FluxPipeline", "StableDiffusionXLPipeline"
IMG2IMG = "StableDiffusionImg2ImgPipeline"
IMAGE = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
LATENT = {"beta_schedule": "scaled_linear"}
FLOW = ("FlowMatchEulerDiscreteScheduler", {})
MU = ("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True})
FLOW_SDE = ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True})
FLOW_2M = (
    "DPMSolverMultistepScheduler",
    {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0},
)
EULER = ("EulerDiscreteScheduler", {"use_karras_sigmas": True})
LEADING = ("EulerDiscreteScheduler", LATENT | {"timestep_spacing": "leading"})
ANCESTRAL = ("EulerAncestralDiscreteScheduler", {})
HEUN = ("HeunDiscreteScheduler", {})
DDPM = ("DDPMScheduler", {"clip_sample": False})
TWO_M = ("DPMSolverMultistepScheduler", LATENT | {"use_karras_sigmas": True})
THREE_M = ("DPMSolverMultistepScheduler", LATENT | {"solver_order": 3})
SDE = ("DPMSolverMultistepScheduler", LATENT | {"algorithm_type": "sde-dpmsolver++"})
UNIPC = ("UniPCMultistepScheduler", LATENT | {"solver_order": 3})
DDIM = ("DDIMScheduler", LATENT | {"clip_sample": False, "steps_offset": 1})
CASES: dict[str, tuple[str, tuple[str, dict[str, Any]], dict[str, Any]]] = {
    "SD3": (SD3, FLOW, {**embeddings(*BOTH)}),
    "SD3, two prompts": (SD3, FLOW, {**embeddings(*BOTH, count=2), "guidance_scale": 3.0}),
    "SD3, no guidance": (SD3, FLOW, {**embeddings(*PROMPT), "guidance_scale": 1.0, "output_type": "latent"}),
    "SD3, mu": (SD3, MU, embeddings(*BOTH)),
    "SD3, noise": (SD3, FLOW_SDE, embeddings(*BOTH)),
    "SD3, DPM-Solver++": (SD3, FLOW_2M, embeddings(*BOTH)),
    "FLUX": (FLUX, MU, {**embeddings(*PROMPT), "guidance_scale": 2.0}),
    "FLUX, true guidance": (FLUX, MU, {**embeddings(*BOTH, count=2), "true_cfg_scale": 3.0}),
    "FLUX, own sigmas": (FLUX, MU, {**embeddings(*PROMPT), "sigmas": [1.0, 0.7, 0.4, 0.1], "output_type": "latent"}),
    "XL": (XL, LEADING, {**embeddings(*BOTH)}),
    "XL, rescaled": (XL, TWO_M, {**embeddings(*BOTH, count=2), "guidance_scale": 3.0, "guidance_rescale": 0.7}),
    "XL, to half way": (XL, UNIPC, {**embeddings(*BOTH), "denoising_end": 0.5, "output_type": "latent"}),
    "XL, ancestral": (XL, ANCESTRAL, {**embeddings(*BOTH), "denoising_end": 0.7}),
    "XL, Heun": (XL, HEUN, {**embeddings(*PROMPT), "guidance_scale": 1.0}),
    "XL, DDPM": (XL, DDPM, {**embeddings(*BOTH), "denoising_end": 0.4}),
    "image": (IMG2IMG, DDIM, {"prompt": ["a", "b"], "image": IMAGE, "num_images_per_prompt": 2}),
    "image, DDPM": (IMG2IMG, DDPM, {"prompt": "a", "image": IMAGE}),
    "image, Euler": (IMG2IMG, EULER, {"prompt": "a", "image": IMAGE, "strength": 0.6}),
    "image, DPM-Solver++ 3M": (IMG2IMG, THREE_M, {"prompt": "a", "image": IMAGE, "strength": 0.6}),
    "image, with noise": (IMG2IMG, SDE, {"prompt": "a", "image": IMAGE, "strength": 0.7}),
    "image, UniPC": (IMG2IMG, UNIPC, {"prompt": "a", "image": IMAGE, "strength": 0.7, "guidance_scale": 1.0}),
    "image, Heun": (IMG2IMG, HEUN, {"prompt": "a", "image": IMAGE, "strength": 0.5}),
    "image, all of it": (IMG2IMG, EULER, {"prompt": "a", "image": IMAGE, "strength": 1.0}),
}


def pair(kind: str, scheduler: tuple[str, dict[str, Any]] | None = None) -> tuple[Any, Any]:
    """A pipeline of diffusers, and the parallel one of the same components."""
    original = tiny_pipeline(kind)
    if scheduler is not None:
        original.scheduler = getattr(diffusers, scheduler[0])(**scheduler[1])
    parallel = getattr(pipelines, f"Parallel{kind}").from_pipe(original)
    for pipe in (original, parallel):
        pipe.set_progress_bar_config(disable=True)
    return original, parallel


def call_of(case: str, **more: Any) -> dict[str, Any]:
    """The arguments of a call, new ones each time, for a generator goes on."""
    kind, _, call = CASES[case]
    size = {} if kind == IMG2IMG else {"height": 8, "width": 8}
    generator = torch.Generator().manual_seed(5)
    return {"num_inference_steps": 9, "output_type": "pt", "generator": generator, **size, **call, **more}


@pytest.mark.parametrize("case", CASES)
def test_pipelines_equal_their_originals(case: str) -> None:
    original, parallel = pair(*CASES[case][:2])
    torch.manual_seed(11)  # not every loop passes the generator on
    expected = original(**call_of(case))
    torch.manual_seed(11)
    output = parallel(**call_of(case), **TIGHT)
    assert type(output) is type(expected)
    assert bool(output.solution.converged.all())
    assert 0 < output.rounds <= output.solution.nfev
    torch.testing.assert_close(output.images, expected.images, rtol=1e-4, atol=1e-4)
    assert parallel.num_timesteps == original.num_timesteps


@pytest.mark.parametrize("case", ["SD3", "FLUX, true guidance", "XL", "image, UniPC"])
def test_callbacks_are_given_the_tensors_of_the_loop_after_every_round(case: str) -> None:
    original, parallel = pair(*CASES[case][:2])
    names = original._callback_tensor_inputs
    held: list[dict[str, Tensor]] = []

    def callback(pipe: Any, index: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        assert index == len(held) or pipe.scheduler is original.scheduler
        held.append(dict(tensors))
        return tensors

    more = {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": names, "output_type": "latent"}
    original(**call_of(case, **more))
    expected = held.pop()
    held.clear()
    output = parallel(**call_of(case, **more), **TIGHT)
    assert len(held) == output.solution.nfev
    assert held[-1].keys() == set(names)
    for name, value in expected.items():
        torch.testing.assert_close(held[-1][name], value, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(held[-1]["latents"], output.images)


def test_a_callback_stops_a_run_and_cannot_change_it() -> None:
    _, parallel = pair(SD3)

    def stop(pipe: Any, index: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        pipe._interrupt = index == 1
        return tensors

    def change(pipe: Any, index: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors["pooled_prompt_embeds"].zero_()
        return tensors

    with pytest.warns(fixpoint.ConvergenceWarning, match="did not converge in 2 evaluations"):
        assert parallel(**call_of("SD3", callback_on_step_end=stop), **TIGHT).rounds == 2
    names = {"callback_on_step_end_tensor_inputs": ["pooled_prompt_embeds"]}
    with pytest.raises(ValueError, match="changed in place pooled_prompt_embeds"):
        parallel(**call_of("SD3", callback_on_step_end=change, **names))
    with pytest.raises(ValueError, match="has to be in"):
        parallel(**call_of("SD3", callback_on_step_end=stop, callback_on_step_end_tensor_inputs=["other"]))


@pytest.mark.parametrize("case", ["XL, ancestral", "FLUX", "SD3, DPM-Solver++"])
def test_latents_to_start_from_are_those_of_the_original(case: str) -> None:
    original, parallel = pair(*CASES[case][:2])
    shape = (1, 4, 16) if case == "FLUX" else (1, 4, 4, 4)
    given = {"latents": torch.randn(shape, generator=torch.Generator().manual_seed(9)), "output_type": "latent"}
    expected = original(**call_of(case, **given)).images
    torch.testing.assert_close(parallel(**call_of(case, **given), **TIGHT).images, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", ["SD3", "FLUX, true guidance", "XL, rescaled"])
def test_half_precision_networks_are_told_what_their_loops_tell_them(case: str) -> None:
    """With latents between steps in single precision, which the originals round."""
    original, parallel = pair(*CASES[case][:2])
    original.to(torch.bfloat16)
    call = {name: value.bfloat16() if isinstance(value, Tensor) else value for name, value in call_of(case).items()}
    expected = original(**call).images
    call["generator"] = torch.Generator().manual_seed(5)
    output = parallel(**call, solver=fixpoint.Picard())
    assert output.images.dtype == torch.bfloat16
    assert output.solution.value.dtype == torch.float32
    torch.testing.assert_close(output.images, expected, rtol=0, atol=0.1)


def test_rounded_timesteps_are_those_of_the_loop() -> None:
    original, parallel = pair(FLUX)
    original.to(torch.bfloat16)
    call = {name: each.bfloat16() if isinstance(each, Tensor) else each for name, each in call_of("FLUX").items()}
    told: list[set[float]] = [set(), set()]
    for pipe, seen in zip((original, parallel), told, strict=True):
        hook = original.transformer.register_forward_pre_hook(
            lambda module, args, given, seen=seen: seen.update(given["timestep"].tolist()), with_kwargs=True
        )
        pipe(**call)
        hook.remove()
    assert told[0] == told[1]


@pytest.mark.parametrize("solver", [None, fixpoint.Picard(), fixpoint.CausalQuasiNewton(window=3)])
@pytest.mark.parametrize("max_rows", [None, 3])
def test_no_call_has_more_rows_than_asked(solver: Any, max_rows: int | None) -> None:
    original, parallel = pair(XL)
    sizes: list[int] = []
    original.unet.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    call = call_of("XL", num_inference_steps=12, height=64, width=64, output_type="latent")
    output = parallel(**call, solver=solver, max_rows=max_rows)
    # Images (3, 64, 64) by the rule, with two rows each: 2^15 entries of latents (4, 32, 32), 4 pixels for each.
    assert max(sizes) <= 2 * (max_rows or 2**15 // (4 * 32 * 32) // 4 // 2)
    assert sum(sizes) - 2 * output.evals in range(7)  # the check of the network is not counted


def test_rows_may_go_by_the_clock() -> None:
    original, parallel = pair(SD3)
    expected = original(**call_of("SD3")).images
    output = parallel(**call_of("SD3"), rtol=1e-5, max_rows="auto")
    torch.testing.assert_close(output.images, expected, rtol=1e-2, atol=1e-2)


class ParallelWanPipeline(pipelines.ParallelPipeline, diffusers.WanPipeline):
    """Of videos; its loop asks the network twice, the negative rows last."""

    _network = "transformer"


def test_another_pipeline_takes_two_lines() -> None:
    torch.manual_seed(0)
    sizes = {"patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 1}
    transformer = diffusers.WanTransformer3DModel(**sizes, text_dim=8, freq_dim=16, ffn_dim=16)
    vae = diffusers.AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
    original = diffusers.WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=vae,
        scheduler=diffusers.UniPCMultistepScheduler(**flow),
        transformer=awake(transformer),
    )
    parallel = ParallelWanPipeline.from_pipe(original)
    for pipe in (original, parallel):
        pipe.set_progress_bar_config(disable=True)
    call = {**embeddings("prompt_embeds", "negative_prompt_embeds"), "num_inference_steps": 6, "output_type": "latent"}
    call |= {"height": 16, "width": 16, "num_frames": 5}
    expected = original(**call, generator=torch.Generator().manual_seed(5)).frames
    output = parallel(**call, generator=torch.Generator().manual_seed(5), **TIGHT)
    torch.testing.assert_close(output.frames, expected, rtol=1e-4, atol=1e-4)
    parallel.register_modules(transformer_2=transformer)
    with pytest.raises(ValueError, match="later steps ask another network"):
        parallel(**call)


class OtherGuidance(pipelines.ParallelStableDiffusion3Pipeline):
    def _guidance(self, arguments: Any, *, doubled: bool) -> Guidance:
        return Guidance(scale=arguments["guidance_scale"], negative_first=False)


class OtherTimesteps(pipelines.ParallelStableDiffusion3Pipeline):
    def _told(self, timestep: Tensor) -> Tensor:
        return timestep / 1000


class OtherRows(pipelines.ParallelFluxPipeline):
    _shared = ()


class Unscaled(pipelines.ParallelStableDiffusionXLPipeline):
    """A loop that shows the network something else."""

    def prepare_latents(self, *args: Any, **kwargs: Any) -> Tensor:
        self.scheduler.scale_model_input = lambda latents, t: latents
        return super().prepare_latents(*args, **kwargs)


@pytest.mark.parametrize(
    ("case", "kind", "message"),
    [
        ("SD3", OtherGuidance, "makes another prediction of the network's answers than is served"),
        ("SD3", OtherTimesteps, "tells the network other timesteps"),
        ("FLUX", OtherRows, "there are 1 latents, but txt_ids for 5"),
        ("XL", Unscaled, "shows the network other latents"),
    ],
)
def test_a_loop_that_does_something_else_is_refused_before_the_network_is_asked(
    case: str, kind: Any, message: str
) -> None:
    original = tiny_pipeline(CASES[case][0])
    pipe = kind.from_pipe(original)
    network = getattr(original, pipe._network)
    network.register_forward_pre_hook(lambda *_: pytest.fail("the network was asked"))
    with pytest.raises(ValueError, match=message):
        pipe(**call_of(case))


@pytest.mark.parametrize(
    ("case", "call", "message"),
    [
        ("SD3", {"skip_guidance_layers": [0]}, "skip_guidance_layers cannot be solved in parallel: its guidance"),
        ("XL", {"ip_adapter_image": IMAGE}, "ip_adapter_image cannot be solved in parallel: IP adapters"),
        ("FLUX", {"negative_ip_adapter_image_embeds": [IMAGE]}, "negative_ip_adapter_image_embeds cannot be solved"),
        ("image", {"latents": IMAGE}, "starts from an image: it takes no latents"),
    ],
)
def test_arguments_that_cannot_be_served_are_named(case: str, call: dict[str, Any], message: str) -> None:
    _, parallel = pair(CASES[case][0])
    with pytest.raises(ValueError, match=message):
        parallel(**call_of(case, **call))


@pytest.mark.parametrize("kind", ["LCMScheduler", "FlowMatchHeunDiscreteScheduler", "PNDMScheduler", "TCDScheduler"])
def test_schedulers_that_cannot_be_served_are_named(kind: str) -> None:
    _, parallel = pair(XL)
    parallel.scheduler = getattr(diffusers, kind)()
    with pytest.raises(ValueError, match=kind):
        parallel(**call_of("XL"))


def test_pipelines_with_other_loops_are_named() -> None:
    parts = tiny_pipeline("StableDiffusionPipeline").components
    source = diffusers.StableDiffusionPAGPipeline(
        **{name: part for name, part in parts.items() if name != "image_encoder"}, requires_safety_checker=False
    )
    with pytest.raises(ValueError, match="StableDiffusionPAGPipeline cannot be solved in parallel: its guidance"):
        pipelines.ParallelStableDiffusionPipeline.from_pipe(source)


def test_networks_with_a_cache_are_named() -> None:
    original, parallel = pair(FLUX)
    original.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(ValueError, match=r"keeps a cache .* disable_cache\(\)"):
        parallel(**call_of("FLUX"))


def test_only_ddim_and_ddpm_are_inverted() -> None:
    _, parallel = pair("StableDiffusionPipeline", EULER)
    with pytest.raises(ValueError, match="invert is for DDIM and DDPM schedulers, found EulerDiscreteScheduler"):
        parallel.invert(IMAGE, prompt="a")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("txt_ids", lambda ids: ids + 1),
        ("encoder_hidden_states", lambda prompts: prompts[:, :-1]),
        ("joint_attention_kwargs", lambda kwargs: {"scale": 2.0}),
    ],
)
def test_loops_that_ask_twice_about_different_things_are_refused(
    name: str, change: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for a negative prompt of another length, or attention that is told something else in the second call."""
    _, parallel = pair(FLUX)
    forward = Listener.forward

    def changed(self: Listener, **given: Any) -> Any:
        if self.calls:
            given[name] = change(given[name])
        return forward(self, **given)

    monkeypatch.setattr(Listener, "forward", changed)
    with pytest.raises(ValueError, match=f"more than once in a step, with {name}"):
        parallel(**call_of("FLUX, true guidance"))


def test_loops_that_step_in_their_own_way_are_refused() -> None:
    stand_in = OneStep(diffusers.DDPMScheduler(), lambda step: step["sample"])
    stand_in.step(IMAGE, 1, IMAGE)
    with pytest.raises(ValueError, match="takes more steps than it has timesteps"):
        stand_in.step(IMAGE, 1, IMAGE)


def test_timesteps_end_once_the_step_is_taken() -> None:
    """Counted before, cut and moved as pipelines do; what is made of them otherwise is plain."""
    scheduler = diffusers.DDPMScheduler()
    scheduler.set_timesteps(10)
    stand_in = OneStep(scheduler, lambda step: step["sample"])
    timesteps = stand_in.timesteps
    assert len(timesteps) == len(list(timesteps)) == 10
    part = timesteps[3:].to("cpu")[1:-1]
    walked = []
    for t in part:
        walked.append(t)
        stand_in.step(IMAGE, t, IMAGE)
    assert walked == [scheduler.timesteps[4]]
    assert stand_in.walked == slice(4, 9)
    assert all(type(each) is Tensor for each in (timesteps[2], timesteps * 2, timesteps[:1].repeat(2), walked[0]))
