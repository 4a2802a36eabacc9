"""What a parallel pipeline shows while it runs, and how it is stopped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.callbacks import SDCFGCutoffCallback
from torch import Tensor, nn

import fixpoint
from fixpoint_diffusion.pipelines import ParallelDDIMPipeline, ParallelStableDiffusionPipeline
from tests.fixpoint_diffusion.tiny import tiny_conditional_unet, tiny_unet

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


def run(pipe: Any, callback: Callable[..., Any] | None = None, **call: Any) -> Any:
    call = {**PROMPTS, "num_inference_steps": 20, "output_type": "latent", **call}
    options = {"solver": fixpoint.Picard(), "rtol": 1e-6}
    return pipe(generator=torch.Generator().manual_seed(0), callback_on_step_end=callback, **options, **call)


def test_callback_comes_after_every_round_with_the_images_so_far(pipe: Any) -> None:
    rounds: list[int] = []
    latents: list[Tensor] = []

    def callback(given: Any, index: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        assert given is pipe
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


def test_callback_that_changes_what_it_was_given_is_told_that_it_cannot(pipe: Any) -> None:
    with pytest.raises(ValueError, match=r"other tensors for \['latents'\]"):
        run(pipe, lambda given, index, timestep, tensors: {"latents": tensors["latents"] * 2})
    assert isinstance(pipe.unet, diffusers.UNet2DConditionModel)
    run(pipe, lambda *given: None, num_inference_steps=3)  # nothing returned is nothing changed


def test_callbacks_that_change_later_steps_are_refused_before_anything_is_done(pipe: Any) -> None:
    with pytest.raises(ValueError, match="SDCFGCutoffCallback changes later steps"):
        run(pipe, SDCFGCutoffCallback(cutoff_step_ratio=0.4))


def test_tensors_that_are_not_rows_of_the_batch_are_refused(pipe: Any) -> None:
    with pytest.raises(ValueError, match="added_cond_kwargs holds tensors"):
        run(pipe, ip_adapter_image_embeds=[torch.zeros(4, 1, 1, 8)])
    with pytest.raises(ValueError, match="cross_attention_kwargs holds tensors"):
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


def test_stand_ins_are_seen_by_nobody_while_the_chain_is_solved(unet: nn.Module) -> None:
    torch.manual_seed(0)
    network = tiny_unet(
        sample_size=4, block_out_channels=(8,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",)
    )
    pipe = ParallelDDIMPipeline(network, DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    scheduler, seen = pipe.scheduler, []
    network.register_forward_hook(lambda *_: seen.append((pipe.unet, pipe.scheduler)))
    pipe(num_inference_steps=2, solver=fixpoint.Picard())
    assert seen
    assert all(one is network and other is scheduler for one, other in seen)
