"""What a parallel pipeline shows while it runs, and how it is stopped."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.callbacks import SDCFGCutoffCallback
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn

import fixpoint
from fixpoint_diffusion.pipelines import ParallelStableDiffusionPipeline
from tests.fixpoint_diffusion.tiny import tiny_conditional_unet

PROMPTS = {
    "prompt_embeds": torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0)),
    "negative_prompt_embeds": torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1)),
}


@pytest.fixture(scope="module")
def unet() -> nn.Module:
    torch.manual_seed(0)
    return tiny_conditional_unet()


@pytest.fixture
def pipe(unet: nn.Module) -> ParallelStableDiffusionPipeline:
    """Latents from embeddings: no text model, and nothing to decode with."""
    parts = dict.fromkeys(["vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor"])
    scheduler = DDIMScheduler(clip_sample=False, steps_offset=1)
    pipe = ParallelStableDiffusionPipeline(**parts, unet=unet, scheduler=scheduler, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe: Any, on_step_end: Callable[..., Any] | None = None, **call: Any) -> Any:
    call = {**PROMPTS, "num_inference_steps": 20, "output_type": "latent", **call}
    options = {"solver": fixpoint.Picard(), "rtol": 1e-6}
    return pipe(generator=torch.Generator().manual_seed(0), callback_on_step_end=on_step_end, **options, **call)


def test_callback_comes_after_every_round_with_the_images_so_far(pipe: Any) -> None:
    rounds: list[int] = []
    latents: list[Tensor] = []

    def callback(given: Any, index: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        assert type(given) is type(pipe)
        assert given.num_timesteps == 20
        assert isinstance(given.unet, diffusers.UNet2DConditionModel)
        assert int(timestep) == 1
        assert given.guidance_scale == 7.5
        torch.testing.assert_close(tensors["negative_prompt_embeds"], PROMPTS["negative_prompt_embeds"])
        torch.testing.assert_close(tensors["prompt_embeds"], torch.cat(list(PROMPTS.values())[::-1]))
        rounds.append(index)
        latents.append(tensors["latents"].clone())
        return tensors

    names = ["latents", "prompt_embeds", "negative_prompt_embeds"]
    output = run(pipe, callback, callback_on_step_end_tensor_inputs=names)
    assert rounds == list(range(output.solution.nfev))
    torch.testing.assert_close(latents[-1], output.images)
    assert not torch.allclose(latents[0], output.images)


def test_callback_can_stop_the_run_with_the_best_latents_so_far(pipe: Any) -> None:
    def callback(given: Any, index: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        given._interrupt = index == 2
        return tensors

    with pytest.warns(fixpoint.ConvergenceWarning, match="2 of 2 rows did not converge in 3 evaluations"):
        output = run(pipe, callback)
    assert output.rounds == 3
    torch.testing.assert_close(output.images, output.solution.value[:, -1])
    assert run(pipe).solution.nfev > 3  # and the next run begins afresh


Callback = Callable[[Any, Any, int, dict[str, Tensor]], dict[str, Tensor]]


def changes_guidance(pipe: Any, given: Any, index: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    given._guidance_scale = 1.5
    return tensors


def changes_guidance_of_the_pipeline_itself(
    pipe: Any, given: Any, index: int, tensors: dict[str, Tensor]
) -> dict[str, Tensor]:
    pipe._guidance_scale = 1.5
    return tensors


def changes_rescaling(pipe: Any, given: Any, index: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    given._guidance_rescale = 0.7
    return tensors


def swaps_the_scheduler(pipe: Any, given: Any, index: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    scheduler = DDIMScheduler(clip_sample=True, clip_sample_range=0.1)
    scheduler.set_timesteps(given.num_timesteps)
    given.scheduler = scheduler
    return tensors


def changes_latents_in_place(pipe: Any, given: Any, index: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    tensors["latents"].mul_(1.1)
    return tensors


def changes_prompts_in_place(pipe: Any, given: Any, index: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    tensors["prompt_embeds"][0] = 0
    return {}


def returns_other_latents(pipe: Any, given: Any, index: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"latents": tensors["latents"] * 1.1}


def returns_prompts_it_was_not_given(
    pipe: Any, given: Any, index: int, tensors: dict[str, Tensor]
) -> dict[str, Tensor]:
    return {"prompt_embeds": torch.cat(list(PROMPTS.values()))}


@pytest.mark.parametrize(
    ("change", "said", "names"),
    [
        (changes_guidance, "set _guidance_scale", ["latents"]),
        (changes_guidance_of_the_pipeline_itself, "set _guidance_scale", ["latents"]),
        (changes_rescaling, "set _guidance_rescale", ["latents"]),
        (swaps_the_scheduler, "set scheduler", ["latents"]),
        (changes_latents_in_place, "changed in place latents", ["latents"]),
        (changes_prompts_in_place, "changed in place prompt_embeds", ["latents", "prompt_embeds"]),
        (returns_other_latents, "returned another latents", ["latents"]),
        (returns_prompts_it_was_not_given, "returned another prompt_embeds", ["latents"]),
    ],
)
def test_what_changes_the_loop_of_diffusers_is_refused_by_name(
    pipe: Any, change: Callback, said: str, names: list[str]
) -> None:
    """The callback does change what diffusers returns. Here its first round is the last one, and no harm is done."""
    original = diffusers.StableDiffusionPipeline.from_pipe(pipe)
    original.set_progress_bar_config(disable=True)
    call = {**PROMPTS, "num_inference_steps": 5, "output_type": "latent", "callback_on_step_end_tensor_inputs": names}
    plain, changed = (
        original(generator=torch.Generator().manual_seed(0), callback_on_step_end=callback, **call).images
        for callback in (None, lambda given, index, _, tensors: change(original, given, index, tensors))
    )
    assert float((plain - changed).norm() / plain.norm()) > 1e-4

    rounds: list[int] = []

    def callback(given: Any, index: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        rounds.append(index)
        return change(pipe, given, index, tensors)

    with pytest.raises(ValueError, match=f"the callback {said}"):
        run(pipe, callback, callback_on_step_end_tensor_inputs=names)
    assert rounds == [0]
    again = run(pipe, num_inference_steps=5)
    torch.testing.assert_close(again.images, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda given: given.scheduler.timesteps[2:].fill_(5), r"scheduler\.timesteps"),
        (lambda given: given.scheduler.alphas_cumprod.mul_(0.9), r"scheduler\.alphas_cumprod"),
        (lambda given: given.unet.conv_out.weight.mul_(0.9), "the network's weights"),
    ],
)
def test_changes_in_place_of_the_scheduler_and_the_weights_are_refused(
    pipe: Any, unet: nn.Module, change: Callable[[Any], object], said: str
) -> None:
    pipe.unet = copy.deepcopy(unet)
    original = diffusers.StableDiffusionPipeline.from_pipe(pipe)
    original.set_progress_bar_config(disable=True)
    call = {**PROMPTS, "num_inference_steps": 5, "output_type": "latent"}

    def callback(given: Any, index: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        change(given)
        return tensors

    plain, changed = (
        original(generator=torch.Generator().manual_seed(0), callback_on_step_end=each, **call).images
        for each in (None, callback)
    )
    assert float((plain - changed).norm() / plain.norm()) > 1e-4
    with pytest.raises(ValueError, match=f"the callback changed in place {said}"):
        run(pipe, callback, num_inference_steps=5)


def test_what_changes_nothing_for_diffusers_is_let_pass(pipe: Any) -> None:
    """Attributes of the caller's own, equal tensors, names that no pipeline has, and a run within the callback."""
    pipe.count = 0
    inner: list[Tensor] = []

    def callback(given: Any, index: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        pipe.count += 1
        given.seen = index
        given._guidance_scale = given.guidance_scale
        given.unet = given.unet
        if index == 0:
            inner.append(run(pipe, guidance_scale=2.0, num_inference_steps=3).images)
        return {"latents": tensors["latents"].clone(), "other": tensors["latents"] * 2}

    output = run(pipe, callback)
    assert pipe.count == output.solution.nfev == pipe.seen + 1
    assert pipe.guidance_scale == 7.5
    torch.testing.assert_close(output.images, run(pipe).images)
    torch.testing.assert_close(inner[0], run(pipe, guidance_scale=2.0, num_inference_steps=3).images)
    run(pipe, lambda *given: None, num_inference_steps=3)  # nothing returned is nothing changed


class Scaled(AttnProcessor):
    """Attention that is told how strong it shall be, as a LoRA is."""

    def __call__(self, *args: Any, strength: float, **kwargs: Any) -> Tensor:
        return strength * super().__call__(*args, **kwargs)


def test_settings_of_the_network_are_not_changed_on_the_way(pipe: Any) -> None:
    torch.manual_seed(0)
    pipe.unet = tiny_conditional_unet()
    pipe.unet.set_attn_processor(Scaled())
    original = diffusers.StableDiffusionPipeline.from_pipe(pipe)
    original.set_progress_bar_config(disable=True)

    def loop(change: bool) -> Tensor:
        def callback(given: Any, index: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            if change:
                given.cross_attention_kwargs["strength"] = 3.0
            return tensors

        call = {**PROMPTS, "num_inference_steps": 5, "output_type": "latent", "callback_on_step_end": callback}
        noise = torch.Generator().manual_seed(0)
        return original(generator=noise, cross_attention_kwargs={"strength": 1.0}, **call).images

    def callback(given: Any, index: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        given.cross_attention_kwargs["strength"] = 3.0
        return tensors

    plain, changed = loop(change=False), loop(change=True)
    assert float((plain - changed).norm() / plain.norm()) > 1e-3
    with pytest.raises(ValueError, match="the callback changed in place cross_attention_kwargs"):
        run(pipe, callback, cross_attention_kwargs={"strength": 1.0})
    output = run(pipe, cross_attention_kwargs={"strength": 1.0}, num_inference_steps=5)
    torch.testing.assert_close(output.images, plain, rtol=1e-4, atol=1e-4)


def test_what_is_no_dict_of_tensors_is_refused(pipe: Any) -> None:
    with pytest.raises(ValueError, match="must return a dict of tensors or None, got Tensor"):
        run(pipe, lambda given, index, timestep, tensors: tensors["latents"])


@pytest.mark.filterwarnings("ignore:`callback:FutureWarning", "ignore:Passing `callback:FutureWarning")
def test_deprecated_callback_may_look_at_the_end_but_not_change(pipe: Any) -> None:
    seen: list[Tensor] = []
    call = {"callback_steps": 1, "num_inference_steps": 3}
    output = run(pipe, **call, callback=lambda index, timestep, latents: seen.append(2 * latents / 2))
    torch.testing.assert_close(seen, [output.images])
    with pytest.raises(ValueError, match="the callback changed in place latents"):
        run(pipe, **call, callback=lambda index, timestep, latents: latents.zero_())


def test_a_run_can_be_stopped_from_elsewhere(pipe: Any, unet: nn.Module) -> None:
    """As a button would: without a callback, by the attribute of the pipeline while the network runs."""
    hook = unet.register_forward_hook(lambda *_: setattr(pipe, "_interrupt", True))
    with pytest.warns(fixpoint.ConvergenceWarning, match="did not converge in 1 evaluation,"):
        run(pipe)
    hook.remove()
    assert run(pipe).solution.nfev > 1


def test_callbacks_that_change_later_steps_are_refused_before_anything_is_done(pipe: Any) -> None:
    with pytest.raises(ValueError, match="SDCFGCutoffCallback changes later steps"):
        run(pipe, SDCFGCutoffCallback(cutoff_step_ratio=0.4))


def test_tensors_that_are_not_rows_of_the_batch_are_refused(pipe: Any) -> None:
    with pytest.raises(ValueError, match="ip_adapter_image_embeds cannot be solved in parallel"):
        run(pipe, ip_adapter_image_embeds=[torch.zeros(4, 1, 1, 8)])
    with pytest.raises(ValueError, match=r"cross_attention_kwargs\.masks holds tensors"):
        run(pipe, cross_attention_kwargs={"masks": [torch.ones(1)]})


def test_bar_counts_rounds_and_follows_the_pipelines_settings(
    unet: nn.Module, pipe: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    run(pipe)
    assert capsys.readouterr().err == ""
    pipe.set_progress_bar_config(disable=False, desc="images")
    output = run(pipe)
    shown = capsys.readouterr().err
    assert "images" in shown
    assert f"{output.solution.nfev}/21" in shown
    assert "active=0" in shown
    assert "/20" not in shown  # the bar of the loop


def test_original_frees_the_hooks_of_the_real_network(
    pipe: Any, unet: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Offloading hooks sit on the components: the stand-ins must be gone when they are looked for."""
    found: list[Any] = []
    monkeypatch.setattr(ParallelStableDiffusionPipeline, "maybe_free_model_hooks", lambda self: found.append(self.unet))
    run(pipe, num_inference_steps=2)
    assert found == [unet]
